// From verified leaves to pieces, and from pieces to the ONNX file of a level.

import { BundleError } from "./canonical.mjs";
import { joined, sha256 } from "./digest.mjs";
import { LEAF_BYTES } from "./manifest.mjs";
import { containerCodes } from "./planes.mjs";
import { isBelow } from "./rules.mjs";

// --- raw DEFLATE -----------------------------------------------------------------------------------------------------

/** One pass of the decompressor, stopped once it has given more than `most` bytes; null if the stream is broken. */
async function inflated(coded, most) {
  const decoder = new DecompressionStream("deflate-raw");
  const writer = decoder.writable.getWriter();
  const written = Promise.allSettled([writer.write(coded), writer.close()]);
  const reader = decoder.readable.getReader();
  const chunks = [];
  let size = 0;
  try {
    while (size <= most) {
      const { done, value } = await reader.read();
      if (done) {
        await written;
        return joined(chunks, size);
      }
      chunks.push(value);
      size += value.length;
    }
    return joined(chunks, size);
  } catch {
    return null;
  } finally {
    await reader.cancel().catch(() => {});
  }
}

let refusesTrailing = null; // whether this decompressor refuses bytes after the final block, as the standard wants

async function isStrict() {
  // an empty stream (one fixed block with nothing but its end), and one byte too many
  refusesTrailing ??= (await inflated(Uint8Array.of(3, 0, 0), 1)) === null;
  return refusesTrailing;
}

/** Decode a piece that has its digest: exactly `raw` bytes, by all coded bytes; BundleError otherwise. */
export async function decode(codec, coded, raw, what) {
  if (codec === "raw") {
    return coded;
  }
  const data = await inflated(coded, raw);
  if (data === null || data.length !== raw) {
    throw new BundleError(`${what} does not inflate to ${raw} bytes`);
  }
  if (!(await isStrict()) && (await inflated(coded.subarray(0, -1), raw)) !== null) {
    throw new BundleError(`${what} has bytes after its stream's end`);
  }
  return data;
}

// --- which leaves ----------------------------------------------------------------------------------------------------

/** Pieces that a device at a level holds, ascending: skeleton, planes, side pieces of it and of the levels below. */
export function piecesOf(manifest, level) {
  const found = new Set([manifest.skeleton]);
  manifest.tensors.forEach((tensor, i) => {
    let held = 0;
    for (const part of tensor.parts) {
      held += part.bits;
      if (held <= level.tensors[i].bits) {
        found.add(part.piece);
      }
    }
  });
  for (const low of manifest.levels) {
    if (low.side !== null && isBelow(low, level)) {
      found.add(low.side);
    }
  }
  return [...found].sort((a, b) => a - b);
}

/** The leaves of an object: `[{sha256, start, stop}]`. */
export function leavesOf(entry) {
  const digests = entry.leaves.length ? entry.leaves : [entry.sha256];
  return digests.map((sha, i) => ({
    sha256: sha,
    start: i * LEAF_BYTES,
    stop: Math.min((i + 1) * LEAF_BYTES, entry.size),
  }));
}

/** Leaves that hold the pieces of a level, in fetch order: `[{object, sha256, start, stop}]`. */
export function leavesOfLevel(manifest, level) {
  const wanted = new Map(); // object -> numbers of leaves
  for (const index of piecesOf(manifest, level)) {
    const piece = manifest.pieces[index];
    const numbers = wanted.get(piece.object) ?? new Set();
    for (let k = Math.floor(piece.offset / LEAF_BYTES); k * LEAF_BYTES < piece.offset + piece.size; k += 1) {
      numbers.add(k);
    }
    wanted.set(piece.object, numbers);
  }
  return [...wanted].flatMap(([object, numbers]) => {
    const leaves = leavesOf(manifest.objects[object]);
    return [...numbers].sort((a, b) => a - b).map((k) => ({ object, ...leaves[k] }));
  });
}

// --- a level ---------------------------------------------------------------------------------------------------------

/**
 * Reads pieces from leaves: checks the digest of the coded bytes, then decodes; each piece once.
 * @param {object} manifest
 * @param {(sha256: string) => Uint8Array} leaf verified bytes of a leaf
 */
export function pieceReader(manifest, leaf) {
  const decoded = new Map();
  async function readPiece(index) {
    const piece = manifest.pieces[index];
    const entry = manifest.objects[piece.object];
    const coded = new Uint8Array(piece.size);
    for (const { sha256: sha, start, stop } of leavesOf(entry)) {
      const [from, to] = [Math.max(start, piece.offset), Math.min(stop, piece.offset + piece.size)];
      if (from < to) {
        coded.set(leaf(sha).subarray(from - start, to - start), from - piece.offset);
      }
    }
    const what = `piece ${index} of object ${entry.sha256.slice(0, 12)}`;
    if ((await sha256(coded)) !== piece.sha256) {
      throw new BundleError(`${what} is not the one that the manifest names`);
    }
    return decode(piece.codec, coded, piece.raw, what);
  }
  return (index) => {
    if (!decoded.has(index)) {
      decoded.set(index, readPiece(index));
    }
    return decoded.get(index);
  };
}

/**
 * The ONNX file of a level, byte for byte as it was exported: the skeleton, its holes filled with codes and side
 * tensors. BundleError unless its SHA-256 is the manifest's.
 * @param {object} manifest
 * @param {object} level one of manifest.levels
 * @param {(piece: number) => Promise<Uint8Array>} read
 */
export async function assemble(manifest, level, read) {
  const skeleton = await read(manifest.skeleton);
  const side = level.side === null ? new Uint8Array() : await read(level.side);
  const data = new Uint8Array(manifest.size);
  let [end, kept, used, tensor] = [0, 0, 0, 0];
  for (const area of manifest.initializers) {
    if (area.kind === "fixed") {
      continue;
    }
    const gap = area.offset - end;
    data.set(skeleton.subarray(kept, kept + gap), end);
    kept += gap;
    if (area.kind === "planes") {
      data.set(await containerCodes(manifest.tensors[tensor], area, level.tensors[tensor], read), area.offset);
      tensor += 1;
    } else {
      data.set(side.subarray(used, used + area.length), area.offset);
      used += area.length;
    }
    end = area.offset + area.length;
  }
  data.set(skeleton.subarray(kept), end);
  if ((await sha256(data)) !== level.sha256) {
    throw new BundleError(`level ${level.name} does not assemble to the file that the manifest names`);
  }
  return data;
}
