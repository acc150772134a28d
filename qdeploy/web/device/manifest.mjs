// The manifest and release.json: strict parser and every rule of FORMAT.md that a manifest can break.

import { BundleError, parseCanonical } from "./canonical.mjs";
import { isLabel, problems } from "./rules.mjs";

export const LEAF_BYTES = 65536;
export const MAX_BYTES = 2 ** 31 - 1; // of an object, a piece, the ONNX file; elements of a tensor
export const MAX_MANIFEST = 16 << 20;
export const MAX_RELEASE = 64 << 10;
const MAX_COUNTS = {
  objects: 65536,
  pieces: 262144,
  initializers: 65536,
  tensors: 16384,
  levels: 64,
  artifacts: 64,
};
const MAX_FILES = 64;
const MAX_INFO = 32;
const MAX_AXES = 8;
const MAX_SIGNATURES = 16;
const MAX_OFFSETS = 9; // one for each cap of 0..8
const ITEM_BYTES = {
  bool: 1, int8: 1, uint8: 1, int16: 2, uint16: 2, float16: 2, int32: 4, uint32: 4, float32: 4, int64: 8, uint64: 8,
  float64: 8,
}; // prettier-ignore
const DIGEST = /^[0-9a-f]{64}$/;

// --- values of a type ------------------------------------------------------------------------------------------------

function want(condition, text) {
  if (!condition) {
    throw new BundleError(text);
  }
}

function integer(value, what) {
  want(typeof value === "number", `${what} is not an integer`);
  return value;
}

function text(value, what) {
  want(typeof value === "string", `${what} is not a text`);
  return value;
}

function digest(value, what) {
  want(typeof value === "string" && DIGEST.test(value), `${what}: its digest is not 64 hex digits`);
  return value;
}

function list(value, what, limit, length = null) {
  want(Array.isArray(value), `${what} is not a list`);
  want(value.length <= limit, `${what} has ${value.length} entries, the limit is ${limit}`);
  want(length === null || value.length === length, `${what} does not have ${length} entries`);
  return value;
}

function object(value, what, keys, optional = []) {
  want(value instanceof Map, `${what} is not an object`);
  for (const key of keys) {
    want(value.has(key), `${what} lacks the key ${key}`);
  }
  for (const key of value.keys()) {
    want(keys.includes(key) || optional.includes(key), `${what} has the unknown key ${JSON.stringify(key)}`);
  }
  return value;
}

// --- rows ------------------------------------------------------------------------------------------------------------

function readObject(value, what) {
  const row = object(value, what, ["sha256", "size", "leaves"]);
  const leaves = list(row.get("leaves"), `${what}, leaves`, Math.ceil(MAX_BYTES / LEAF_BYTES));
  return {
    sha256: digest(row.get("sha256"), what),
    size: integer(row.get("size"), what),
    leaves: leaves.map((leaf) => digest(leaf, what)),
  };
}

function readPiece(value, what) {
  const [pack, offset, size, raw, codec, sha256] = list(value, what, 6, 6);
  return {
    object: integer(pack, what),
    offset: integer(offset, what),
    size: integer(size, what),
    raw: integer(raw, what),
    codec: text(codec, what),
    sha256: digest(sha256, what),
  };
}

function readInitializer(value, what) {
  const [name, dtype, shape, offset, kind] = list(value, what, 5, 5);
  const axes = list(shape, `${what}, shape`, MAX_AXES).map((axis) => integer(axis, what));
  want(axes.every((axis) => axis >= 0 && axis <= MAX_BYTES), `${what}: its shape has impossible axes`);
  want(Object.hasOwn(ITEM_BYTES, text(dtype, what)), `${what}: dtype ${dtype} is unknown`);
  want(["planes", "side", "fixed"].includes(kind), `${what}: its kind is unknown`);
  const count = axes.reduce((product, axis) => product * axis, 1);
  return {
    name: text(name, what),
    dtype,
    shape: axes,
    offset: integer(offset, what),
    kind,
    count,
    length: count * ITEM_BYTES[dtype],
  };
}

function readTensor(value, what) {
  const row = object(value, what, ["name", "bits", "parts"], ["caps"]);
  const parts = list(row.get("parts"), `${what}, parts`, 8).map((part) => {
    const [bits, layout, piece, start] = list(part, `${what}, part`, 4, 4);
    return {
      bits: integer(bits, what),
      layout: text(layout, what),
      piece: integer(piece, what),
      start: integer(start, what),
    };
  });
  const caps = row.has("caps")
    ? list(row.get("caps"), `${what}, caps`, MAX_BYTES).map((cap) => integer(cap, what))
    : null;
  return { name: text(row.get("name"), what), bits: integer(row.get("bits"), what), parts, caps };
}

function readLevel(value, what) {
  const row = object(value, what, ["name", "sha256", "side", "tensors"], ["golden", "info"]);
  const tensors = list(row.get("tensors"), `${what}, tensors`, MAX_COUNTS.tensors).map((entry) => {
    const [bits, shift, offset] = list(entry, `${what}, tensor`, 3, 3);
    const offsets = Array.isArray(offset)
      ? list(offset, `${what}, offsets`, MAX_OFFSETS).map((one) => integer(one, what))
      : integer(offset, what);
    return { bits: integer(bits, what), shift: integer(shift, what), offset: offsets };
  });
  if (row.has("golden")) {
    const golden = object(row.get("golden"), `${what}, golden`, ["input_sha256", "output_sha256"]);
    golden.forEach((one) => digest(one, `${what}, golden`));
  }
  const info = row.get("info") ?? new Map();
  want(info instanceof Map && (!row.has("info") || info.size > 0), `${what}: info is not an object with entries`);
  want(info.size <= MAX_INFO, `${what}: info has more than ${MAX_INFO} entries`);
  return {
    name: text(row.get("name"), what),
    sha256: digest(row.get("sha256"), what),
    side: row.get("side") === null ? null : integer(row.get("side"), what),
    tensors,
    info,
  };
}

function readArtifact(value, what) {
  const row = object(value, what, ["target", "files"]);
  const target = row.get("target");
  want(target instanceof Map && target.size > 0, `${what}: its target is not an object with entries`);
  for (const [key, one] of target) {
    const texts = Array.isArray(one) ? list(one, `${what}, target`, 256) : typeof one === "number" ? [] : [one];
    want(isLabel(key) && texts.every(isLabel), `${what}: its target is not texts, integers or lists of texts`);
  }
  const files = list(row.get("files"), `${what}, files`, MAX_FILES).map((entry) => {
    const [name, piece] = list(entry, `${what}, file`, 2, 2);
    return { name: text(name, what), piece: integer(piece, what) };
  });
  return { files };
}

function rows(top, key, read) {
  return list(top.get(key), key, MAX_COUNTS[key]).map((value, i) => read(value, `${key.slice(0, -1)} ${i}`));
}

/**
 * A manifest without any breach of FORMAT.md; BundleError names the first otherwise.
 * @param {Uint8Array} data
 */
export function parseManifest(data) {
  const value = parseCanonical(data, MAX_MANIFEST, "the manifest");
  try {
    want(value instanceof Map && value.get("format") === "qdeploy-bundle/1", "its format is not qdeploy-bundle/1");
    const tables = Object.keys(MAX_COUNTS);
    const top = object(value, "it", ["format", "model", "release", "graph", "size", "skeleton", ...tables]);
    const manifest = {
      model: text(top.get("model"), "model"),
      release: integer(top.get("release"), "release"),
      graph: digest(top.get("graph"), "graph"),
      size: integer(top.get("size"), "size"),
      skeleton: integer(top.get("skeleton"), "skeleton"),
      objects: rows(top, "objects", readObject),
      pieces: rows(top, "pieces", readPiece),
      initializers: rows(top, "initializers", readInitializer),
      tensors: rows(top, "tensors", readTensor),
      levels: rows(top, "levels", readLevel),
      artifacts: rows(top, "artifacts", readArtifact),
    };
    for (const problem of problems(manifest)) {
      throw new BundleError(problem);
    }
    return manifest;
  } catch (error) {
    if (error instanceof BundleError) {
      throw new BundleError(`the manifest is refused: ${error.message}`);
    }
    throw error;
  }
}

/**
 * release.json: digest and bytes of the manifest, release number, signatures.
 * @param {Uint8Array} data
 */
export function parseRelease(data) {
  const value = parseCanonical(data, MAX_RELEASE, "release.json");
  try {
    const top = object(value, "it", ["format", "manifest", "release", "signatures"]);
    want(top.get("format") === "qdeploy-release/1", "its format is not qdeploy-release/1");
    const pointer = object(top.get("manifest"), "manifest", ["sha256", "size"]);
    const signatures = list(top.get("signatures"), "signatures", MAX_SIGNATURES).map((entry) => {
      const pair = object(entry, "a signature", ["keyid", "signature"]);
      const [keyid, signature] = [text(pair.get("keyid"), "a key id"), text(pair.get("signature"), "a signature")];
      want(keyid.length <= 1024 && signature.length <= 1024, "a signature is too long");
      return { keyid, signature };
    });
    const release = {
      sha256: digest(pointer.get("sha256"), "manifest"),
      size: integer(pointer.get("size"), "size"),
      release: integer(top.get("release"), "release"),
      signatures,
    };
    want(release.size > 0 && release.size <= MAX_MANIFEST, `manifest size ${release.size} is outside the limits`);
    want(release.release >= 1, "the release number is below 1");
    return release;
  } catch (error) {
    if (error instanceof BundleError) {
      throw new BundleError(`release.json is refused: ${error.message}`);
    }
    throw error;
  }
}
