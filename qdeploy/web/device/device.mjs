// The device: takes a signed release, brings the leaves that a level lacks, checks and assembles it.

import { BundleError } from "./canonical.mjs";
import { joined, sha256 } from "./digest.mjs";
import { fetchFile, fetchRange } from "./download.mjs";
import { MAX_RELEASE, parseManifest, parseRelease } from "./manifest.mjs";
import { assemble, leavesOf, leavesOfLevel, pieceReader } from "./pieces.mjs";
import { isBelow } from "./rules.mjs";
import { checkCounter, counterName, readRoot, signers } from "./trust.mjs";

const sizeOf = (leaves) => leaves.reduce((sum, leaf) => sum + leaf.stop - leaf.start, 0);

/** Leaves of one object that follow one another, as runs of one request each. */
function runs(leaves) {
  const found = [];
  for (const leaf of leaves) {
    const last = found.at(-1);
    if (last && last.at(-1).object === leaf.object && last.at(-1).stop === leaf.start) {
      last.push(leaf);
    } else {
      found.push([leaf]);
    }
  }
  return found;
}

export class Device {
  #line;
  #store;
  #onBytes;
  #held = new Set(); // digests of leaves that the store has
  arriving = 0; // bytes of a leaf that is not whole yet

  /**
   * @param {import("./download.mjs").Line} line
   * @param {MemoryStore | BrowserStore} store
   * @param {() => void} onBytes called when bytes of objects came: `rungs` and `arriving` have changed
   */
  constructor(line, store, onBytes = () => {}) {
    this.#line = line;
    this.#store = store;
    this.#onBytes = onBytes;
  }

  /**
   * Take the server's release if the publisher signed it and it is not older than one that was taken before.
   * @param {Uint8Array} rootData TUF root metadata that says whose signatures count; never from the tree itself
   */
  async connect(rootData) {
    const root = await readRoot(rootData);
    const release = parseRelease(await fetchFile(this.#line, "release.json", MAX_RELEASE));
    const data = await this.#manifestBytes(release);
    this.signers = await signers(root, release, data);
    this.threshold = root.threshold;
    const manifest = parseManifest(data);
    if (manifest.release !== release.release) {
      throw new BundleError(`release.json says release ${release.release}, the manifest ${manifest.release}`);
    }
    const counter = await counterName(root, manifest.model);
    const number = { release: release.release, sha256: release.sha256 };
    checkCounter(await this.#store.get(counter), number);
    await this.#store.set(counter, number);
    await this.#store.set("manifest", { sha256: release.sha256, data });
    this.digest = release.sha256;
    this.manifest = manifest;
    this.#held = await this.#store.leafKeys();
  }

  /** The manifest that release.json names, from the store if it is there: what both give is checked alike. */
  async #manifestBytes(release) {
    const kept = await this.#store.get("manifest");
    const data =
      kept?.sha256 === release.sha256
        ? kept.data
        : await fetchFile(this.#line, `manifests/${release.sha256}.json`, release.size);
    if (data.length !== release.size || (await sha256(data)) !== release.sha256) {
      await this.#store.set("manifest", null);
      throw new BundleError("the manifest is not the one that release.json names");
    }
    return data;
  }

  level(name) {
    const found = this.manifest.levels.find((level) => level.name === name);
    if (!found) {
      const names = this.manifest.levels.map((level) => level.name);
      throw new BundleError(`there is no level ${name}: levels are ${names.join(", ")}`);
    }
    return found;
  }

  /** The level that was in force when the page was last open, the first one otherwise. */
  async remembered() {
    const kept = await this.#store.get("level");
    const known = this.manifest.levels.some((level) => level.name === kept);
    return known ? kept : this.manifest.levels[0].name;
  }

  /** Keep that a level is in force, and drop leaves of other releases. */
  async inForce(name) {
    await this.#store.set("level", name);
    const named = new Set(this.manifest.objects.flatMap((entry) => leavesOf(entry).map((leaf) => leaf.sha256)));
    for (const sha of [...this.#held].filter((one) => !named.has(one))) {
      await this.#store.deleteLeaf(sha);
      this.#held.delete(sha);
    }
  }

  /** Levels in fetch order: bytes that each needs in all and lacks now, mean bits of a weight, levels below it. */
  rungs() {
    const areas = this.manifest.initializers.filter((area) => area.kind === "planes");
    const weights = areas.reduce((sum, area) => sum + area.count, 0);
    return this.manifest.levels.map((level) => {
      const leaves = leavesOfLevel(this.manifest, level);
      const bits = areas.reduce((sum, area, i) => sum + area.count * level.tensors[i].bits, 0);
      return {
        name: level.name,
        total: sizeOf(leaves),
        missing: sizeOf(leaves.filter((leaf) => !this.#held.has(leaf.sha256))),
        bits: weights ? bits / weights : 0,
        below: this.manifest.levels.filter((other) => isBelow(other, level)).map((other) => other.name),
      };
    });
  }

  /**
   * The ONNX file of a level. Held leaves are verified again; those that are missing or damaged are fetched.
   * @param {string} name
   * @returns {Promise<Uint8Array>}
   */
  async bring(name) {
    const level = this.level(name);
    const wanted = leavesOfLevel(this.manifest, level);
    const bytes = new Map();
    for (const { sha256: sha } of wanted) {
      const data = this.#held.has(sha) ? await this.#store.getLeaf(sha) : undefined;
      if (data && (await sha256(data)) === sha) {
        bytes.set(sha, data);
      } else if (this.#held.delete(sha)) {
        await this.#store.deleteLeaf(sha);
      }
    }
    const asked = new Set(bytes.keys()); // equal leaves are fetched once
    const lacking = wanted.filter((leaf) => !asked.has(leaf.sha256) && asked.add(leaf.sha256));
    try {
      for (const run of runs(lacking)) {
        await this.#fetchRun(run, bytes);
      }
    } finally {
      this.arriving = 0;
    }
    return assemble(this.manifest, level, pieceReader(this.manifest, (sha) => bytes.get(sha)));
  }

  /** One request for neighbouring leaves: each is checked and kept as soon as it is whole. */
  async #fetchRun(run, bytes) {
    const entry = this.manifest.objects[run[0].object];
    const path = `objects/${entry.sha256}`;
    let [parts, size, next] = [[], 0, 0];
    for await (let part of fetchRange(this.#line, path, run[0].start, run.at(-1).stop, entry.size)) {
      while (part.length) {
        const { sha256: wanted, start, stop } = run[next];
        const own = part.subarray(0, stop - start - size);
        parts.push(own);
        size += own.length;
        part = part.subarray(own.length);
        if (size === stop - start) {
          const data = joined(parts, size);
          if ((await sha256(data)) !== wanted) {
            throw new BundleError(`bytes ${start} to ${stop} of object ${entry.sha256} are not those that were signed`);
          }
          await this.#store.putLeaf(wanted, data);
          this.#held.add(wanted);
          bytes.set(wanted, data);
          [parts, size, next] = [[], 0, next + 1];
        }
      }
      this.arriving = size;
      this.#onBytes();
    }
  }
}
