// Bit planes -> container codes (FORMAT.md, Weight tensors). Throughout, a prefix is the first bits of u = w + 2^(N-1).

import { BundleError } from "./canonical.mjs";
import { packedWeights, partBytes } from "./rules.mjs";

const CONTEXTS = 8;

function want(condition, text) {
  if (!condition) {
    throw new BundleError(text);
  }
}

/**
 * The symbols of a part, one a weight.
 * @param {Uint8Array} data exactly the part's bytes
 * @param {number} count weights
 * @param {number} bits of a symbol
 * @param {boolean} spaced each byte starts anew
 * @returns {Uint8Array}
 */
export function unpack(data, count, bits, spaced) {
  const perByte = Math.floor(8 / bits);
  want(data.length === Math.ceil(spaced ? count / perByte : (count * bits) / 8), "a part has a wrong length");
  const found = new Uint8Array(count);
  let [held, have, at, spare] = [0, 0, 0, 0]; // held: `have` bits that are not used yet
  for (let i = 0; i < count; i += 1) {
    if (spaced && i % perByte === 0) {
      [spare, have] = [spare | held, 0];
    }
    if (have < bits) {
      held = (held << 8) | data[at];
      have += 8;
      at += 1;
    }
    have -= bits;
    found[i] = held >> have;
    held &= (1 << have) - 1;
  }
  want(at === data.length && (spare | held) === 0, "an unused bit of a plane is set");
  return found;
}

/**
 * The bits of a sorted plane in C order.
 * @param {Uint8Array} stored its bits as stored: inverted for prefixes below the middle, grouped by context
 * @param {Uint8Array} prefix of each weight
 * @param {number} held bits of the prefixes, 1 or more
 */
export function unsort(stored, prefix, held) {
  const half = 1 << (held - 1);
  const contexts = new Uint8Array(2 * half); // by prefix
  for (let p = 0; p < 2 * half; p += 1) {
    contexts[p] = Math.min(p >= half ? p - half : half - 1 - p, CONTEXTS - 1);
  }
  const next = new Array(CONTEXTS + 1).fill(0); // where the next bit of a context is
  for (const p of prefix) {
    next[contexts[p] + 1] += 1;
  }
  for (let i = 1; i <= CONTEXTS; i += 1) {
    next[i] += next[i - 1];
  }
  const found = new Uint8Array(prefix.length);
  for (let i = 0; i < prefix.length; i += 1) {
    const p = prefix[i];
    const bit = stored[next[contexts[p]]++];
    found[i] = p >= half ? bit : bit ^ 1;
  }
  return found;
}

/** The symbols of one part for the weights whose prefixes are given. */
function symbols(part, data, prefix, held) {
  const found = unpack(data, prefix.length, part.bits, part.layout === "spaced");
  return part.layout === "sorted" ? unsort(found, prefix, held) : found;
}

/** The prefixes of the channels that have more than `held` planes, one after another. */
function gather(prefix, caps, each, held) {
  const chosen = caps.flatMap((cap, i) => (cap > held ? [i] : []));
  const found = new Uint8Array(chosen.length * each);
  chosen.forEach((channel, k) => found.set(prefix.subarray(channel * each, (channel + 1) * each), k * each));
  return [chosen, found];
}

function append(prefix, more, bits) {
  for (let i = 0; i < prefix.length; i += 1) {
    prefix[i] = (prefix[i] << bits) | more[i];
  }
}

/** The first `bits` bits of every weight; of a channel with a lower cap as many as it has. */
export async function prefixes(tensor, area, bits, read) {
  const each = area.count / area.shape[0];
  const prefix = new Uint8Array(area.count);
  let held = 0;
  for (const part of tensor.parts) {
    if (held === bits) {
      break;
    }
    const length = partBytes(part, packedWeights(tensor, area, held));
    const data = (await read(part.piece)).subarray(part.start, part.start + length);
    if (tensor.caps === null) {
      append(prefix, symbols(part, data, prefix, held), part.bits);
    } else {
      const [chosen, own] = gather(prefix, tensor.caps, each, held);
      append(own, symbols(part, data, own, held), part.bits);
      chosen.forEach((channel, k) => prefix.set(own.subarray(k * each, (k + 1) * each), channel * each));
    }
    held += part.bits;
  }
  want(held === bits, "a level's bits are no sum of parts");
  return prefix;
}

/** Container code of every prefix of so many bits: c = (prefix - 2^(bits-1)) * 2^shift + offset, as a byte. */
function codeTable(bits, shift, offset) {
  const middle = bits ? 2 ** (bits - 1) : 0;
  return Uint8Array.from({ length: 2 ** bits }, (_, prefix) => ((prefix - middle) * 2 ** shift + offset) & 255);
}

/**
 * Container codes of a weight tensor at a level, as bytes of its dtype in C order.
 * @param {object} tensor a row of manifest.tensors
 * @param {object} area its row of manifest.initializers
 * @param {{bits: number, shift: number, offset: number | number[]}} entry the level's row for it
 * @param {(piece: number) => Promise<Uint8Array>} read decoded bytes of a piece
 */
export async function containerCodes(tensor, area, entry, read) {
  const codes = await prefixes(tensor, area, entry.bits, read);
  const each = area.count / area.shape[0];
  const fill = (table, from, to) => {
    for (let i = from; i < to; i += 1) {
      codes[i] = table[codes[i]];
    }
  };
  if (tensor.caps === null) {
    fill(codeTable(entry.bits, entry.shift, entry.offset), 0, codes.length);
    return codes;
  }
  tensor.caps.forEach((cap, channel) => {
    const bits = Math.min(cap, entry.bits);
    fill(codeTable(bits, entry.shift + entry.bits - bits, entry.offset[cap]), channel * each, (channel + 1) * each);
  });
  return codes;
}
