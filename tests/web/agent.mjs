// What Python's tests ask of the JavaScript device: one JSON request a line on standard input, one answer a line.

import { createInterface } from "node:readline";

import { Device } from "../../qdeploy/web/device/device.mjs";
import { sha256 } from "../../qdeploy/web/device/digest.mjs";
import { Pace } from "../../qdeploy/web/device/download.mjs";
import { parseManifest, parseRelease } from "../../qdeploy/web/device/manifest.mjs";
import { decode } from "../../qdeploy/web/device/pieces.mjs";
import { MemoryStore } from "../../qdeploy/web/device/store.mjs";
import { readRoot, signers } from "../../qdeploy/web/device/trust.mjs";

const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const stores = new Map(); // name -> store, which outlives a device

async function connect({ url, root, store = null }) {
  const log = [];
  const kept = stores.get(store) ?? new MemoryStore();
  if (store !== null) {
    stores.set(store, kept);
  }
  const line = { base: new URL(url), pace: new Pace(), pauseMs: 10, log: (row) => log.push(row) };
  const device = new Device(line, kept);
  await device.connect(bytes(root));
  return { device, log };
}

const OPERATIONS = {
  async manifest({ data }) {
    parseManifest(bytes(data));
  },

  async release({ data }) {
    parseRelease(bytes(data));
  },

  async piece({ codec, data, raw }) {
    return Buffer.from(await decode(codec, bytes(data), raw, "it")).toString("base64");
  },

  async signers({ root, release, data }) {
    return signers(await readRoot(bytes(root)), parseRelease(bytes(release)), bytes(data));
  },

  /** Climb through `levels`; digest of each file, object bytes that each cost, and the bytes it said it would. */
  async climb(request) {
    const { device, log } = await connect(request);
    const steps = [];
    for (const name of request.levels ?? device.manifest.levels.map((level) => level.name)) {
      const missing = device.rungs().find((rung) => rung.name === name)?.missing;
      const before = log.length;
      const data = await device.bring(name);
      const fetched = log.slice(before).reduce((sum, row) => sum + row.bytes, 0);
      steps.push({ name, sha256: await sha256(data), size: data.length, fetched, missing });
    }
    return { signers: device.signers, steps, log };
  },

  /** Flip a bit of the first leaf that a store keeps; its digest. */
  async damage({ store }) {
    const [[sha, data]] = stores.get(store).leaves;
    stores.get(store).leaves.set(sha, data.with(0, data[0] ^ 1));
    return sha;
  },

  /** Digests of the leaves that a store keeps. */
  async kept({ store }) {
    return [...(await stores.get(store).leafKeys())].sort();
  },

  /** Take the server's release, put a level in force and forget what other releases left. */
  async settle(request) {
    const { device } = await connect(request);
    const start = await device.remembered();
    await device.bring(request.level);
    await device.inForce(request.level);
    return start;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let answer;
  try {
    answer = { result: (await OPERATIONS[request.op](request)) ?? null };
  } catch (error) {
    answer = { error: error.message, name: error.name };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
