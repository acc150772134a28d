// What FORMAT.md demands of a manifest whose values have the right types. Generators: each yields one line a breach.

import { Real } from "./canonical.mjs";

const LEAF_BYTES = 65536;
const MAX_BYTES = 2 ** 31 - 1;
const FILE_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/;
const LAYOUTS = { tight: [1, 2, 3, 4, 5, 6, 7, 8], spaced: [3, 5, 6, 7], sorted: [1] };

const inside = (value, low, high) => value >= low && value <= high;

// control characters, half surrogate pairs, characters that reorder or break lines
const UNPRINTABLE = /[\u{0}-\u{1f}\u{7f}-\u{9f}\u{200e}\u{200f}\u{2028}-\u{202e}\u{2066}-\u{2069}\u{d800}-\u{dfff}]/u;

/** 1 to 512 characters, none of them UNPRINTABLE. */
export function isLabel(value) {
  return typeof value === "string" && inside(Array.from(value).length, 1, 512) && !UNPRINTABLE.test(value);
}

function* repeated(names, what) {
  const seen = new Set();
  for (const name of names) {
    if (seen.has(name)) {
      yield `${what} ${name} appears twice`;
    }
    seen.add(name);
  }
}

function* headProblems(manifest) {
  if (!FILE_NAME.test(manifest.model)) {
    yield "the model's name is not 1 to 100 letters, digits, '.', '_' or '-'";
  }
  if (manifest.release < 1) {
    yield "the release number is below 1";
  }
  if (!inside(manifest.size, 1, MAX_BYTES)) {
    yield `size ${manifest.size} is outside the limits`;
  }
  if (!manifest.levels.length) {
    yield "there are no levels";
  }
}

function* objectProblems({ objects, pieces }) {
  for (const [i, entry] of objects.entries()) {
    const leaves = entry.size > LEAF_BYTES ? Math.ceil(entry.size / LEAF_BYTES) : 0;
    if (!inside(entry.size, 1, MAX_BYTES)) {
      yield `object ${i}: size ${entry.size} is outside the limits`;
    } else if (entry.leaves.length !== leaves) {
      yield `object ${i}: ${entry.leaves.length} leaves for ${entry.size} bytes, not ${leaves}`;
    }
  }
  let [at, end] = [0, 0]; // object and byte where the next piece must begin
  for (const [i, piece] of pieces.entries()) {
    if (piece.object !== at || piece.offset !== end || at >= objects.length) {
      yield `piece ${i}: it does not begin where the piece before it ends`;
      return;
    }
    if (!inside(piece.size, 1, MAX_BYTES) || !inside(piece.raw, 0, MAX_BYTES)) {
      yield `piece ${i}: ${piece.size} coded and ${piece.raw} raw bytes are outside the limits`;
    }
    if (!["raw", "deflate"].includes(piece.codec) || (piece.codec === "raw" && piece.size !== piece.raw)) {
      yield `piece ${i}: its codec is unknown, or it is raw and its two sizes differ`;
    }
    end += piece.size;
    if (end > objects[at].size) {
      yield `piece ${i}: it ends after its object`;
      return;
    }
    if (end === objects[at].size) {
      [at, end] = [at + 1, 0];
    }
  }
  if (at !== objects.length) {
    yield "the pieces do not fill the objects";
  }
}

function* initializerProblems({ initializers, tensors, size }) {
  yield* repeated(initializers.map((entry) => entry.name), "initializer");
  let end = 0;
  for (const [i, entry] of initializers.entries()) {
    if (!isLabel(entry.name)) {
      yield `initializer ${i}: its name is not 1 to 512 characters without control characters`;
    }
    if (entry.length > MAX_BYTES || entry.offset < end || entry.offset + entry.length > size) {
      yield `initializer ${i}: it overlaps the one before it or leaves the file`;
    }
    if (entry.kind !== "fixed" && !entry.length) {
      yield `initializer ${i}: an empty initializer must be fixed`;
    }
    if (entry.kind === "planes" && (!["int8", "uint8"].includes(entry.dtype) || !entry.shape.length)) {
      yield `initializer ${i}: a weight tensor is int8 or uint8 with at least one axis`;
    }
    end = entry.offset + entry.length;
  }
  const names = initializers.filter((entry) => entry.kind === "planes").map((entry) => entry.name);
  if (names.length !== tensors.length || names.some((name, i) => name !== tensors[i].name)) {
    yield "the tensors are not the initializers of kind planes in their order";
  }
}

/** Weights that a part packs which begins at plane `first`: those of channels whose cap is above it. */
export function packedWeights(tensor, area, first) {
  if (tensor.caps === null) {
    return area.count;
  }
  return tensor.caps.reduce((sum, cap) => sum + (cap > first), 0) * (area.count / area.shape[0]);
}

/** Raw length in bytes of a part that packs so many weights. */
export function partBytes(part, weights) {
  return Math.ceil(part.layout === "spaced" ? weights / Math.floor(8 / part.bits) : (weights * part.bits) / 8);
}

function* rawProblem(manifest, piece, raw, what) {
  if (!inside(piece, 0, manifest.pieces.length - 1)) {
    yield `${what}: there is no piece ${piece}`;
  } else if (manifest.pieces[piece].raw !== raw) {
    yield `${what}: piece ${piece} has ${manifest.pieces[piece].raw} raw bytes, not ${raw}`;
  }
}

function* shapeProblems(tensor, area, what) {
  const sum = tensor.parts.reduce((total, part) => total + part.bits, 0);
  if (!inside(tensor.bits, 1, 8) || sum !== tensor.bits) {
    yield `${what}: its parts do not add up to its bits, 1 to 8`;
    return;
  }
  if (tensor.caps !== null) {
    if (tensor.caps.length !== area.shape[0] || !tensor.caps.every((cap) => inside(cap, 0, tensor.bits))) {
      yield `${what}: its caps are not one number of 0 to ${tensor.bits} for each channel`;
      return;
    }
    if (!tensor.caps.includes(tensor.bits)) {
      yield `${what}: no channel has all planes`;
    }
  }
  let first = 0;
  for (const part of tensor.parts) {
    const legal = Object.hasOwn(LAYOUTS, part.layout) && LAYOUTS[part.layout].includes(part.bits);
    if (!legal || (part.layout === "sorted" && first === 0)) {
      yield `${what}: layout ${part.layout} does not suit ${part.bits} bits from plane ${first}`;
      return;
    }
    if (tensor.caps?.some((cap) => cap > first && cap < first + part.bits)) {
      yield `${what}: a cap lies inside a part`;
    }
    first += part.bits;
  }
}

function* tensorProblems(manifest, areas) {
  const spans = new Map(); // piece -> [start, length] of its parts
  for (const [i, tensor] of manifest.tensors.entries()) {
    const broken = [...shapeProblems(tensor, areas[i], `tensor ${tensor.name}`)];
    yield* broken;
    if (broken.length) {
      return;
    }
    let first = 0;
    for (const part of tensor.parts) {
      const length = partBytes(part, packedWeights(tensor, areas[i], first));
      spans.set(part.piece, [...(spans.get(part.piece) ?? []), [part.start, length]]);
      first += part.bits;
    }
  }
  for (const [piece, parts] of spans) {
    let end = 0;
    for (const [start, length] of parts.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
      if (start !== end) {
        yield `piece ${piece}: its parts leave a gap or overlap`;
      }
      end = start + length;
    }
    yield* rawProblem(manifest, piece, end, `the parts of piece ${piece}`);
  }
}

/** Smallest and largest container code of a channel with `cap` planes at a level. */
function codeRange(entry, cap) {
  const held = Math.min(entry.bits, cap);
  const offset = Array.isArray(entry.offset) ? entry.offset[cap] : entry.offset;
  if (held === 0) {
    return [offset, offset];
  }
  const [unit, half] = [2 ** (entry.shift + entry.bits - held), 2 ** (held - 1)];
  return [-half * unit + offset, (half - 1) * unit + offset];
}

function* tensorLevelProblems(tensor, dtype, entry, what) {
  let bits = 0;
  const steps = [0, ...tensor.parts.map((part) => (bits += part.bits))];
  if (!steps.includes(entry.bits) || !inside(entry.shift, 0, 8)) {
    yield `${what}: ${entry.bits} bits are no sum of its first parts, or shift ${entry.shift} is not 0 to 8`;
    return;
  }
  const offsets = [entry.offset].flat();
  if (Array.isArray(entry.offset) !== (tensor.caps !== null) || (tensor.caps && offsets.length !== tensor.bits + 1)) {
    yield `${what}: the offset is one number without caps, ${tensor.bits + 1} with them`;
    return;
  }
  if (!offsets.every((offset) => inside(offset, -255, 255))) {
    yield `${what}: an offset is not within 255`;
  }
  const [low, high] = dtype === "int8" ? [-128, 127] : [0, 255];
  for (const cap of new Set(tensor.caps ?? [tensor.bits])) {
    const [least, most] = codeRange(entry, cap);
    if (least < low || most > high) {
      yield `${what}: codes ${least} to ${most} leave the range of ${dtype}`;
    }
  }
}

/** True when no tensor has more bits in `low` than in `high`; a level is below itself. */
export function isBelow(low, high) {
  return low.tensors.every((entry, i) => entry.bits <= high.tensors[i].bits);
}

function* infoProblems(level, what) {
  for (const [key, value] of level.info) {
    if (!isLabel(key) || !(isLabel(value) || typeof value === "number" || value instanceof Real)) {
      yield `${what}: info is not text and numbers`;
    }
  }
}

function* levelProblems(manifest, areas) {
  yield* repeated(manifest.levels.map((level) => level.name), "level");
  yield* repeated(manifest.levels.map((level) => level.sha256), "the digest of a level,");
  const side = manifest.initializers.reduce((sum, area) => sum + (area.kind === "side" ? area.length : 0), 0);
  for (const [i, level] of manifest.levels.entries()) {
    const what = `level ${i}`;
    if (!FILE_NAME.test(level.name)) {
      yield `${what}: its name is not 1 to 100 letters, digits, '.', '_' or '-'`;
    }
    yield* infoProblems(level, what);
    if ((level.side === null) !== (side === 0)) {
      yield `${what}: a side piece is there exactly when there are side initializers`;
    } else if (level.side !== null) {
      yield* rawProblem(manifest, level.side, side, `${what}, side`);
    }
    if (level.tensors.length !== manifest.tensors.length) {
      yield `${what}: ${level.tensors.length} tensors, not ${manifest.tensors.length}`;
      return;
    }
    for (const [k, tensor] of manifest.tensors.entries()) {
      yield* tensorLevelProblems(tensor, areas[k].dtype, level.tensors[k], `${what}, tensor ${tensor.name}`);
    }
    if (manifest.levels.slice(0, i).some((other) => isBelow(level, other) && !isBelow(other, level))) {
      yield `${what}: it is below an earlier level`;
    }
  }
}

function* artifactProblems({ artifacts, pieces }) {
  for (const [i, { files }] of artifacts.entries()) {
    yield* repeated(files.map((file) => file.name), `artifact ${i}: file`);
    const sound = (file) => FILE_NAME.test(file.name) && inside(file.piece, 0, pieces.length - 1);
    if (!files.length || !files.every(sound)) {
      yield `artifact ${i}: it has no files, or one without a proper name or piece`;
    }
  }
}

function* useProblems(manifest) {
  const holes = manifest.initializers.reduce((sum, area) => sum + (area.kind === "fixed" ? 0 : area.length), 0);
  yield* rawProblem(manifest, manifest.skeleton, manifest.size - holes, "skeleton");
  const used = new Set([
    manifest.skeleton,
    ...manifest.levels.map((level) => level.side),
    ...manifest.tensors.flatMap((tensor) => tensor.parts.map((part) => part.piece)),
    ...manifest.artifacts.flatMap((artifact) => artifact.files.map((file) => file.piece)),
  ]);
  for (let i = 0; i < manifest.pieces.length; i += 1) {
    if (!used.has(i)) {
      yield `piece ${i} is not used`;
    }
  }
}

/** Every breach of FORMAT.md, found as it is asked for; later rules rely on earlier ones, so take the first. */
export function* problems(manifest) {
  yield* headProblems(manifest);
  yield* objectProblems(manifest);
  yield* initializerProblems(manifest);
  const areas = manifest.initializers.filter((area) => area.kind === "planes");
  yield* tensorProblems(manifest, areas);
  yield* levelProblems(manifest, areas);
  yield* artifactProblems(manifest);
  yield* useProblems(manifest);
}
