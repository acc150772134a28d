"""The one validator of manifests: every breach of FORMAT.md, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from qdeploy.bundle.tables import (
    CODECS,
    DIGEST,
    FILE_NAME,
    ITEM_BYTES,
    KINDS,
    LAYOUTS,
    LEAF_BYTES,
    MAX_AXES,
    MAX_BYTES,
    MAX_COUNTS,
    MAX_FILES,
    MAX_INFO,
    Manifest,
    Part,
    Tensor,
    TensorLevel,
    is_below,
)
from qdeploy.errors import BundleError


def check(manifest: Manifest) -> Manifest:
    """Return the manifest, or raise BundleError with every problem (the first 20)."""
    if found := problems(manifest):
        more = f" (and {len(found) - 20} more)" if len(found) > 20 else ""
        raise BundleError("the manifest is illegal: " + "; ".join(found[:20]) + more)
    return manifest


def problems(manifest: Manifest) -> list[str]:
    """Every breach of FORMAT.md; an empty list for a legal manifest."""
    found = _head_problems(manifest) + _object_problems(manifest) + _initializer_problems(manifest)
    if found:  # the rest relies on sane tables
        return found
    return [
        *_tensor_problems(manifest),
        *_level_problems(manifest),
        *_artifact_problems(manifest),
        *_use_problems(manifest),
    ]


# listed, as Unicode's other classes change with its version
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_label(text: Any) -> bool:
    """1 to 512 characters: no control character, no half of a surrogate pair, none that reorders or breaks lines."""
    return isinstance(text, str) and 0 < len(text) <= 512 and not UNPRINTABLE.search(text)


def _bad_digests(digests: Iterable[str], what: str) -> list[str]:
    return [
        f"{what}: digest {text[:80]!r} is not 64 hex digits" for text in map(str, digests) if not DIGEST.fullmatch(text)
    ]


def _repeated(names: Iterable[str], what: str) -> list[str]:
    seen: set[str] = set()
    twice = {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
    return [f"{what} {name!r} appears twice" for name in sorted(twice)]


def _head_problems(manifest: Manifest) -> list[str]:
    found = _bad_digests([manifest.graph], "graph")
    if not FILE_NAME.fullmatch(manifest.model):
        found.append(f"model name {manifest.model[:80]!r} is not 1..100 letters, digits, '.', '_' or '-'")
    if manifest.release < 1:
        found.append(f"release number {manifest.release} is below 1")
    if not 0 < manifest.size <= MAX_BYTES:
        found.append(f"size {manifest.size} is not 1..{MAX_BYTES}")
    if not manifest.levels:
        found.append("there are no levels")
    for key, limit in MAX_COUNTS.items():
        if len(getattr(manifest, key)) > limit:
            found.append(f"{len(getattr(manifest, key))} {key}, the limit is {limit}")
    return found


def _object_problems(manifest: Manifest) -> list[str]:
    found = []
    for i, entry in enumerate(manifest.objects):
        found += _bad_digests([entry.sha256, *entry.leaves], f"object {i}")
        leaves = -(-entry.size // LEAF_BYTES) if entry.size > LEAF_BYTES else 0
        if not 0 < entry.size <= MAX_BYTES:
            found.append(f"object {i}: size {entry.size} is not 1..{MAX_BYTES}")
        elif len(entry.leaves) != leaves:
            found.append(f"object {i}: {len(entry.leaves)} leaves for {entry.size} bytes, not {leaves}")
    at = (0, 0)  # where the next piece must begin
    for i, piece in enumerate(manifest.pieces):
        found += _bad_digests([piece.sha256], f"piece {i}")
        if piece.codec not in CODECS:
            found.append(f"piece {i}: codec {piece.codec[:80]!r} is none of {', '.join(CODECS)}")
        if not (0 < piece.size <= MAX_BYTES and 0 <= piece.raw <= MAX_BYTES):
            found.append(f"piece {i}: {piece.size} coded and {piece.raw} raw bytes are outside the limits")
        if piece.codec == "raw" and piece.size != piece.raw:
            found.append(f"piece {i}: raw but {piece.size} is not {piece.raw}")
        if (piece.object, piece.offset) != at:
            found.append(f"piece {i}: begins at {(piece.object, piece.offset)}, not at {at}")
            return found
        if piece.object >= len(manifest.objects):
            return [*found, f"piece {i}: there is no object {piece.object}"]
        end, size = piece.offset + piece.size, manifest.objects[piece.object].size
        if end > size:
            return [*found, f"piece {i}: ends at {end}, after the {size} bytes of object {piece.object}"]
        at = (piece.object + 1, 0) if end == size else (piece.object, end)
    if at != (len(manifest.objects), 0):
        found.append(f"the pieces end at {at} and do not fill the {len(manifest.objects)} objects")
    return found


def _initializer_problems(manifest: Manifest) -> list[str]:
    found = _repeated((entry.name for entry in manifest.initializers), "initializer")
    end = 0
    for i, entry in enumerate(manifest.initializers):
        what = f"initializer {i}"
        if not is_label(entry.name):
            found.append(f"{what}: its name is not 1..512 printable characters")
        if entry.dtype not in ITEM_BYTES or entry.kind not in KINDS:
            found.append(f"{what}: dtype {entry.dtype[:80]!r} or kind {entry.kind[:80]!r} is unknown")
            continue
        if len(entry.shape) > MAX_AXES or not all(0 <= axis <= MAX_BYTES for axis in entry.shape):
            found.append(f"{what}: shape {entry.shape} has too many or impossible axes")
            continue
        if entry.offset < end or entry.length > MAX_BYTES or entry.offset + entry.length > manifest.size:
            found.append(f"{what}: bytes {entry.offset} + {entry.length} overlap the one before or leave the file")
        if entry.kind != "fixed" and not entry.length:
            found.append(f"{what}: an empty initializer must be fixed")
        if entry.kind == "planes" and (entry.dtype not in ("int8", "uint8") or not entry.shape):
            found.append(f"{what}: a weight tensor is int8 or uint8 with at least one axis")
        end = entry.offset + entry.length
    names = [entry.name for entry in manifest.of_kind("planes")]
    if names != [tensor.name for tensor in manifest.tensors]:
        found.append("the tensors are not the initializers of kind 'planes' in their order")
    return found


def packed_weights(tensor: Tensor, shape: Sequence[int], first_plane: int) -> int:
    """How many weights a part that begins at `first_plane` packs: those of channels whose cap is above it."""
    if tensor.caps is None:
        return math.prod(shape)
    return sum(cap > first_plane for cap in tensor.caps) * math.prod(shape[1:])


def part_bytes(part: Part, weights: int) -> int:
    """Raw length of a part that packs so many weights."""
    if part.layout == "spaced":
        return -(-weights // (8 // part.bits))
    return -(-weights * part.bits // 8)


def _raw_problem(manifest: Manifest, piece: int, raw: int, what: str) -> list[str]:
    if not 0 <= piece < len(manifest.pieces):
        return [f"{what}: there is no piece {piece}"]
    if manifest.pieces[piece].raw != raw:
        return [f"{what}: piece {piece} has {manifest.pieces[piece].raw} raw bytes, not {raw}"]
    return []


def _tensor_problems(manifest: Manifest) -> list[str]:
    found = []
    spans: dict[int, list[tuple[int, int]]] = {}  # piece -> (start, length) of its parts
    for tensor, entry in zip(manifest.tensors, manifest.of_kind("planes"), strict=True):
        what = f"tensor {tensor.name}"
        if not 1 <= tensor.bits <= 8 or sum(part.bits for part in tensor.parts) != tensor.bits:
            found.append(f"{what}: its parts do not add up to {tensor.bits} bits, 1..8")
            continue
        if tensor.caps is not None:
            if len(tensor.caps) != entry.shape[0] or not all(0 <= cap <= tensor.bits for cap in tensor.caps):
                found.append(f"{what}: caps are not {entry.shape[0]} numbers 0..{tensor.bits}")
                continue
            if not any(cap == tensor.bits for cap in tensor.caps):
                found.append(f"{what}: no channel has all {tensor.bits} planes")
        first = 0
        for part in tensor.parts:
            if part.bits not in LAYOUTS.get(part.layout, ()) or (part.layout == "sorted" and first == 0):
                found.append(f"{what}: layout {part.layout[:80]!r} does not suit {part.bits} bits from plane {first}")
                break
            if any(first < cap < first + part.bits for cap in tensor.caps or ()):
                found.append(f"{what}: a cap lies inside the part of planes {first}..{first + part.bits - 1}")
            raw = part_bytes(part, packed_weights(tensor, entry.shape, first))
            spans.setdefault(part.piece, []).append((part.start, raw))
            first += part.bits
    for piece, areas in spans.items():
        end = 0
        for start, raw in sorted(areas):
            if start != end:
                found.append(f"piece {piece}: a part begins at {start}, not at {end}")
            end = start + raw
        found += _raw_problem(manifest, piece, end, f"the parts of piece {piece}")
    return found


def code_range(tensor: Tensor, entry: TensorLevel, cap: int) -> tuple[int, int]:
    """Smallest and largest container code of a channel with `cap` planes at a level."""
    held = min(entry.bits, cap)
    offset = entry.offset if isinstance(entry.offset, int) else entry.offset[cap]
    if held == 0:
        return offset, offset
    unit = 1 << (entry.shift + entry.bits - held)
    half = 1 << (held - 1)
    return -half * unit + offset, (half - 1) * unit + offset


def _tensor_level_problems(tensor: Tensor, dtype: str, entry: TensorLevel, what: str) -> list[str]:
    if not 1 <= tensor.bits <= 8:
        return []  # said already, and nothing below can be computed
    bits = 0
    steps = {0} | {bits := bits + part.bits for part in tensor.parts}
    offsets = (entry.offset,) if isinstance(entry.offset, int) else entry.offset
    if entry.bits not in steps or not 0 <= entry.shift <= 8 or any(abs(x) > 255 for x in offsets):
        return [f"{what}: bits {entry.bits}, shift {entry.shift} or offset {entry.offset} is out of range"]
    if (tensor.caps is None) != isinstance(entry.offset, int) or (tensor.caps and len(offsets) != tensor.bits + 1):
        return [f"{what}: the offset is one number without caps, {tensor.bits + 1} numbers with caps"]
    low, high = (-128, 127) if dtype == "int8" else (0, 255)
    ranges = [code_range(tensor, entry, cap) for cap in sorted(set(tensor.caps or (tensor.bits,)))]
    if any(least < low or most > high for least, most in ranges):
        return [f"{what}: codes {ranges} leave the range of {dtype}"]
    return []


def _level_problems(manifest: Manifest) -> list[str]:
    found = _repeated((level.name for level in manifest.levels), "level")
    found += _repeated((level.sha256 for level in manifest.levels), "level digest")
    side = sum(entry.length for entry in manifest.of_kind("side"))
    weights = manifest.of_kind("planes")
    for i, level in enumerate(manifest.levels):
        what = f"level {level.name[:100]!r}"
        if not FILE_NAME.fullmatch(level.name):
            found.append(f"{what}: its name is not 1..100 letters, digits, '.', '_' or '-'")
        found += _bad_digests([level.sha256, *(level.golden or {}).values()], what)
        texts = [x for pair in level.info.items() for x in pair if not _is_number(x)]
        if len(level.info) > MAX_INFO or not all(is_label(text) for text in texts):
            found.append(f"{what}: info is more than {MAX_INFO} entries or not printable text and numbers")
        if (level.side is None) != (side == 0):
            found.append(f"{what}: a side piece is there exactly when there are side initializers")
        elif level.side is not None:
            found += _raw_problem(manifest, level.side, side, f"{what} side")
        if len(level.tensors) != len(manifest.tensors):
            found.append(f"{what}: {len(level.tensors)} tensors, not {len(manifest.tensors)}")
            continue
        for tensor, area, entry in zip(manifest.tensors, weights, level.tensors, strict=True):
            found += _tensor_level_problems(tensor, area.dtype, entry, f"{what}, tensor {tensor.name}")
        for other in manifest.levels[:i]:
            same = len(other.tensors) == len(level.tensors)
            if same and is_below(level, other) and not is_below(other, level):
                found.append(f"{what}: it is below the earlier level {other.name!r}")
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1 << 53 if isinstance(value, int) else math.isfinite(value)


def _target_ok(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 256 and all(is_label(entry) for entry in value)
    return is_label(value) or (isinstance(value, int) and _is_number(value))


def _artifact_problems(manifest: Manifest) -> list[str]:
    found = []
    for i, artifact in enumerate(manifest.artifacts):
        what = f"artifact {i}"
        target = artifact.target
        if not target or len(target) > MAX_INFO or not all(is_label(k) and _target_ok(v) for k, v in target.items()):
            found.append(f"{what}: its target is not 1..{MAX_INFO} texts, integers or lists of texts")
        if not 0 < len(artifact.files) <= MAX_FILES:
            found.append(f"{what}: {len(artifact.files)} files, not 1..{MAX_FILES}")
        found += _repeated((name for name, _ in artifact.files), f"{what}: file")
        for name, piece in artifact.files:
            if not FILE_NAME.fullmatch(name):
                found.append(f"{what}: file name {name[:80]!r} is not 1..100 letters, digits, '.', '_' or '-'")
            if not 0 <= piece < len(manifest.pieces):
                found.append(f"{what}: there is no piece {piece}")
    return found


def _use_problems(manifest: Manifest) -> list[str]:
    holes = sum(entry.length for entry in manifest.of_kind("planes", "side"))
    found = _raw_problem(manifest, manifest.skeleton, manifest.size - holes, "skeleton")
    used = {manifest.skeleton, *(level.side for level in manifest.levels)}
    used |= {part.piece for tensor in manifest.tensors for part in tensor.parts}
    used |= {piece for artifact in manifest.artifacts for _, piece in artifact.files}
    found += [f"piece {i} is not used" for i in range(len(manifest.pieces)) if i not in used]
    return found
