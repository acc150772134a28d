// Who made a manifest: Ed25519 signatures of the publisher's targets keys, and numbers that only grow.
//
// This is not TUF's client workflow: nothing here says that a release is the newest one (docs/browser.md).

import { BundleError } from "./canonical.mjs";
import { fromHex, sha256, subtle } from "./digest.mjs";

export const MAX_ROOT = 512000;

/**
 * The targets keys and their threshold from TUF root metadata that was given by other means than the tree.
 * @param {Uint8Array} data the file N.root.json
 * @returns {Promise<{keys: Map<string, string>, threshold: number}>} key id -> public key in hex
 */
export async function readRoot(data) {
  const refuse = () => new BundleError("root.json is no TUF root metadata with Ed25519 targets keys: give N.root.json");
  let signed;
  try {
    signed = data.length <= MAX_ROOT ? JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data)).signed : null;
  } catch {
    throw refuse();
  }
  const role = signed?.roles?.targets;
  if (signed?._type !== "root" || !Array.isArray(role?.keyids) || !Number.isSafeInteger(role.threshold)) {
    throw refuse();
  }
  const keys = new Map();
  for (const keyid of role.keyids) {
    const key = signed.keys?.[keyid];
    const hex = key?.keyval?.public;
    if (key?.keytype !== "ed25519" || key.scheme !== "ed25519" || !/^[0-9a-f]{64}$/.test(hex)) {
      throw refuse();
    }
    const text = `{"keytype":"ed25519","keyval":{"public":"${hex}"},"scheme":"ed25519"}`;
    if ((await sha256(new TextEncoder().encode(text))) !== keyid) {
      throw refuse(); // so that one key cannot stand for two
    }
    keys.set(keyid, hex);
  }
  if (role.threshold < 1 || role.threshold > keys.size) {
    throw refuse();
  }
  return { keys, threshold: role.threshold };
}

async function verifies(hex, signature, data) {
  const bytes = fromHex(signature);
  if (bytes?.length !== 64) {
    return false;
  }
  let key;
  try {
    key = await subtle().importKey("raw", fromHex(hex), { name: "Ed25519" }, false, ["verify"]);
  } catch (error) {
    if (error?.name === "NotSupportedError") {
      throw new BundleError("this browser cannot check Ed25519 signatures: use one of 2025 or later");
    }
    return false;
  }
  return subtle().verify({ name: "Ed25519" }, key, bytes, data);
}

/**
 * The key ids that signed the manifest's bytes: `root.threshold` or more, BundleError otherwise.
 * @param {{keys: Map<string, string>, threshold: number}} root
 * @param {{signatures: {keyid: string, signature: string}[]}} release release.json
 * @param {Uint8Array} manifest its bytes, exactly as published
 */
export async function signers(root, release, manifest) {
  const found = new Set();
  for (const { keyid, signature } of release.signatures) {
    if (root.keys.has(keyid) && !found.has(keyid) && (await verifies(root.keys.get(keyid), signature, manifest))) {
      found.add(keyid);
    }
  }
  if (found.size < root.threshold) {
    const said = release.signatures.length ? "wrong signature or too few" : "nobody signed this release";
    throw new BundleError(`${said}: ${found.size} of ${root.threshold} signatures by the publisher's keys`);
  }
  return [...found].sort();
}

/** Under which name the highest release is kept: a number binds as long as the keys stay the same. */
export async function counterName(root, model) {
  const keys = [...root.keys.keys()].sort().join(",");
  return `${model} ${await sha256(new TextEncoder().encode(keys))}`;
}

/**
 * Refuse a release below the highest that was taken, and another one of the same number.
 * @param {{release: number, sha256: string} | undefined} highest
 * @param {{release: number, sha256: string}} found
 */
export function checkCounter(highest, found) {
  if (highest && found.release < highest.release) {
    throw new BundleError(`rollback: the server offers release ${found.release}, this device took ${highest.release}`);
  }
  if (highest && found.release === highest.release && found.sha256 !== highest.sha256) {
    throw new BundleError(`the server offers another release ${found.release} than the one that this device took`);
  }
}
