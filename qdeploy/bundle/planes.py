"""Weight codes <-> coded bit planes, side by side (FORMAT.md, Weight tensors); and the entropy that bounds the planes.

Throughout, `u` are codes in offset binary: uint8, u = w + 2^(N-1), first axis = channel. A *prefix* of k bits is
u >> (N - k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from qdeploy.bundle.codec import cost_of_bits, encode_bits
from qdeploy.bundle.tables import LAYOUTS, TensorLevel
from qdeploy.errors import BundleError

CONTEXTS = 8  # cells away from zero that have statistics of their own
PIECE_BYTES = 1 << 18  # small parts share a piece of up to so many raw bytes
PART_BYTES = 20  # what a manifest spends on a part, about
SORTED_SAVES = 128  # sorting must save 1/128 of the bytes, or decoding is not worth its time


@dataclass(frozen=True)
class PackedPart:
    """`bits` consecutive planes as bytes: their layout and segments, each of one statistic, to be concatenated."""

    bits: int
    layout: str
    segments: tuple[bytes, ...]

    @property
    def raw(self) -> int:
        """Bytes before coding."""
        return sum(len(segment) for segment in self.segments)


@dataclass(frozen=True)
class CodedPiece:
    """Parts coded as one piece: codec, coded bytes, raw length, and where each part begins in the raw bytes."""

    codec: str
    data: bytes
    raw: int
    starts: tuple[int, ...]


# --- symbols <-> bytes -----------------------------------------------------------------------------------------------


def pack(symbols: np.ndarray, bits: int, layout: str) -> bytes:
    """uint8 symbols [n] below 2^bits -> bytes, layout `tight` or `spaced`."""
    if layout == "spaced" or 8 % bits == 0:
        per = 8 // bits
        padded = np.zeros(-(-len(symbols) // per) * per, np.uint8)
        padded[: len(symbols)] = symbols
        out = np.zeros(len(padded) // per, np.uint8)
        for i in range(per):
            out |= padded[i::per] << np.uint8(8 - bits * (i + 1))
        return out.tobytes()
    return np.packbits(np.unpackbits(symbols[:, None], axis=1)[:, 8 - bits :]).tobytes()


def unpack(raw: bytes, count: int, bits: int, layout: str) -> np.ndarray:
    """Inverse of `pack`: uint8 [count]. BundleError when the length is wrong or an unused bit is set."""
    data = np.frombuffer(raw, np.uint8)
    dense = layout == "spaced" or 8 % bits == 0
    per = 8 // bits
    if len(data) != (-(-count // per) if dense else -(-count * bits // 8)):
        raise BundleError(f"{len(data)} bytes do not hold {count} symbols of {bits} bits: fetch the bundle again")
    if not dense:
        stream = np.unpackbits(data)
        spare = bool(stream[count * bits :].any())
        rows = np.zeros((count, 8), np.uint8)
        rows[:, 8 - bits :] = stream[: count * bits].reshape(count, bits)
        symbols = np.packbits(rows, axis=1)[:, 0]
    else:
        symbols = np.unpackbits(data) if bits == 1 else np.take(_spread(bits), data, axis=0).reshape(-1)
        spare = bool(symbols[count:].any()) or bool((data & np.uint8((1 << (8 - per * bits)) - 1)).any())
        symbols = symbols[:count]
    if spare:
        raise BundleError("an unused bit of a plane is set: fetch the bundle again")
    return symbols


def _spread(bits: int) -> np.ndarray:
    """Table byte -> its floor(8 / bits) symbols, uint8 [256, per]."""
    shifts = [8 - bits * (i + 1) for i in range(8 // bits)]
    return ((np.arange(256)[:, None] >> np.array(shifts)) & ((1 << bits) - 1)).astype(np.uint8)


# --- one plane, folded and grouped by what is held already -----------------------------------------------------------


def _fold(prefix: np.ndarray, held: int) -> tuple[np.ndarray, np.ndarray]:
    """Prefixes of `held` >= 1 bits -> context, and 1 where the next bit is stored inverted; uint8 [n] each."""
    inverted = (prefix >> np.uint8(held - 1)) ^ np.uint8(1)
    cell = (prefix ^ (np.uint8(0) - inverted)) & np.uint8((1 << (held - 1)) - 1)
    return np.minimum(cell, np.uint8(CONTEXTS - 1)), inverted


def _contexts(held: int) -> int:
    return min(CONTEXTS, 1 << (held - 1))


def sort_bits(bits: np.ndarray, prefix: np.ndarray, held: int) -> tuple[np.ndarray, list[int]]:
    """Bits [n] of the plane behind `prefix` -> (folded bits grouped by context, where each group ends)."""
    context, inverted = _fold(prefix, held)
    folded = bits ^ inverted
    groups = [folded[context == i] for i in range(_contexts(held))]
    return np.concatenate(groups), [int(end) for end in np.cumsum([len(group) for group in groups])]


def unsort_bits(grouped: np.ndarray, prefix: np.ndarray, held: int) -> np.ndarray:
    """Inverse of `sort_bits`: bits [n] in C order."""
    context, inverted = _fold(prefix, held)
    folded = np.empty_like(grouped)
    start = 0
    if _contexts(held) == 1:
        return np.bitwise_xor(grouped, inverted)
    for i in range(_contexts(held)):
        member = context == i
        end = start + int(np.count_nonzero(member))
        folded[member] = grouped[start:end]
        start = end
    return np.bitwise_xor(folded, inverted)


def pack_part(symbols: np.ndarray, bits: int, prefix: np.ndarray, held: int) -> PackedPart:
    """The layout that codes `symbols` [n] (uint8, below 2^bits) best given the `held` bits before them, prefix [n]."""
    options = [PackedPart(bits, "tight", (pack(symbols, bits, "tight"),))]
    if bits in LAYOUTS["spaced"]:
        options.append(PackedPart(bits, "spaced", (pack(symbols, bits, "spaced"),)))
    if bits == 1 and held:
        grouped, ends = sort_bits(symbols, prefix, held)
        raw = np.packbits(grouped).tobytes()
        cuts = [0, *(end // 8 for end in ends[:-1]), len(raw)]
        options.append(PackedPart(bits, "sorted", tuple(raw[a:b] for a, b in pairwise(cuts))))
    costs = [cost_of_bits(option.segments) for option in options]
    best = min(range(len(options)), key=costs.__getitem__)
    if options[best].layout == "sorted" and costs[best] * SORTED_SAVES > costs[0] * (SORTED_SAVES - 1):
        best = 0
    return options[best]


def gather(parts: Sequence[PackedPart]) -> list[CodedPiece]:
    """Code parts, in order, as pieces: small neighbours share one, and with it their Huffman codes and framing."""
    pieces: list[CodedPiece] = []
    waiting: list[PackedPart] = []
    for i, part in enumerate(parts):
        waiting.append(part)
        if i + 1 == len(parts) or sum(entry.raw for entry in waiting) + parts[i + 1].raw > PIECE_BYTES:
            ends = list(accumulate(entry.raw for entry in waiting))
            codec, data = encode_bits([segment for entry in waiting for segment in entry.segments])
            pieces.append(CodedPiece(codec, data, ends[-1], (0, *ends[:-1])))
            waiting = []
    return pieces


def unpack_part(raw: bytes, bits: int, layout: str, prefix: np.ndarray, held: int) -> np.ndarray:
    """Inverse of `pack_part`: symbols uint8 [n]."""
    if layout != "sorted":
        return unpack(raw, prefix.size, bits, layout)
    return unsort_bits(unpack(raw, prefix.size, 1, "tight"), prefix, held)


# --- a whole tensor --------------------------------------------------------------------------------------------------


def split(u: np.ndarray, bits: int, widths: Sequence[int], caps: Sequence[int] | None = None) -> list[PackedPart]:
    """Codes u (uint8 [O, ...], `bits` bits) -> one packed part for each width, most significant planes first.

    `widths` add up to `bits`. `caps` [O], each 0..bits and never inside a part: channel o packs only the planes below
    caps[o].
    """
    rows = u.reshape(u.shape[0], -1)
    parts, held = [], 0
    for width in widths:
        kept = rows if caps is None else rows[np.asarray(caps) > held]
        flat = kept.reshape(-1)
        symbols = (flat >> np.uint8(bits - held - width)) & np.uint8((1 << width) - 1)
        prefix = (flat.astype(np.uint16) >> (bits - held)).astype(np.uint8)
        parts.append(pack_part(symbols, width, prefix, held))
        held += width
    return parts


def split_cheapest(u: np.ndarray, bits: int, base: int, caps: Sequence[int] | None = None) -> list[PackedPart]:
    """`split` with one part a plane, or the first `base` planes in one part if that is cheaper."""
    single = split(u, bits, [1] * bits, caps)
    if base < 2 or any(0 < cap < base for cap in caps or ()):
        return single
    joint = split(u >> np.uint8(bits - base), base, [base], None if caps is None else [min(c, base) for c in caps])
    return joint + single[base:] if coded_bytes(joint) <= coded_bytes(single[:base]) else single


def coded_bytes(parts: Sequence[PackedPart]) -> int:
    """What parts will cost, about: their coded bytes and the manifest's entries."""
    return sum(cost_of_bits(part.segments) + PART_BYTES for part in parts)


def join(
    parts: Sequence[tuple[int, str, bytes]], shape: Sequence[int], caps: Sequence[int] | None = None
) -> np.ndarray:
    """Inverse of `split`: (bits, layout, raw bytes) of the first parts -> prefix of all bits held, uint8 `shape`.

    A channel with a cap below the bits held has its `cap` bits in the low end of its prefix.
    """
    prefix = np.zeros(tuple(shape), np.uint8).reshape(shape[0], -1)
    held = 0
    for bits, layout, raw in parts:
        if caps is None:
            flat = prefix.reshape(-1)
            symbols = unpack_part(raw, bits, layout, flat, held)
            prefix = (_shifted(flat, bits) | symbols).reshape(prefix.shape)
        else:
            member = np.asarray(caps) > held
            flat = prefix[member].reshape(-1)
            symbols = unpack_part(raw, bits, layout, flat, held)
            prefix[member] = (_shifted(flat, bits) | symbols).reshape(-1, prefix.shape[1])
        held += bits
    return prefix.reshape(tuple(shape))


def _shifted(prefix: np.ndarray, bits: int) -> np.ndarray:
    return prefix << np.uint8(bits) if bits < 8 else np.zeros_like(prefix)


def container(prefix: np.ndarray, level: TensorLevel, dtype: str, caps: Sequence[int] | None = None) -> np.ndarray:
    """Prefix of `level.bits` bits -> container codes of `dtype`: (prefix - 2^(b-1)) * 2^shift + offset (FORMAT.md)."""
    if isinstance(level.offset, int):
        return np.take(_code_table(level.bits, level.shift, level.offset, dtype), prefix)
    codes = np.empty(prefix.shape, np.dtype(dtype))
    for cap in sorted(set(caps or ())):
        held = min(level.bits, cap)
        member = np.asarray(caps) == cap
        table = _code_table(held, level.shift + level.bits - held, level.offset[cap], dtype)
        codes[member] = table[prefix[member]]
    return codes


def _code_table(held: int, shift: int, offset: int, dtype: str) -> np.ndarray:
    """Prefix of `held` bits -> container code, [2^held]."""
    centred = np.arange(1 << held) - ((1 << held) >> 1)
    return ((centred << shift) + offset).astype(np.dtype(dtype))


# --- what the planes could cost at best ------------------------------------------------------------------------------


def _bits_of(counts: np.ndarray) -> float:
    """Total bits of an ideal order-0 code for these counts."""
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum())


def entropy_bytes(u: np.ndarray, bits: int, widths: Sequence[int], caps: Sequence[int] | None = None) -> list[float]:
    """Bytes of an ideal code for each part given the higher planes: order-0 entropy for the first, then conditional.

    Counts come from the tensor itself, so the bound is a little low for small tensors. Arguments as in `split`.
    """
    rows = u.reshape(u.shape[0], -1)
    bounds, held = [], 0
    for width in widths:
        kept = rows if caps is None else rows[np.asarray(caps) > held]
        joint = np.bincount(kept.reshape(-1) >> np.uint8(bits - held - width), minlength=1 << (held + width))
        before = joint.reshape(1 << held, -1).sum(1)
        bounds.append(max(0.0, _bits_of(joint) - _bits_of(before)) / 8)
        held += width
    return bounds
