"""How the codes of one weight tensor nest between levels: one top tensor; a prefix, shift and offset for each level.

Decision D1 in numpy: container codes of a level are ((w >> d) << shift) + offset, w the codes of the finest level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qdeploy.bundle.planes import coded_bytes, split_cheapest
from qdeploy.bundle.tables import TensorLevel
from qdeploy.errors import BundleError

CODES = 256


@dataclass(frozen=True)
class Nested:
    """`u`: top codes in offset binary, uint8, `bits` bits; `levels`: how a level's container codes come from them.

    `caps`: how many planes of `u` say anything about each channel (axis 0), where that is fewer than all of them.
    """

    name: str
    u: np.ndarray
    bits: int
    levels: Mapping[str, TensorLevel]
    caps: tuple[int, ...] | None = None


def capped(nested: Nested) -> Nested:
    """`nested` with a cap for each channel whose codes stand on a coarser grid, if that makes the bundle smaller.

    The planes below a cap are 0 in such a channel, so a code follows from the others by the same shift and offset.
    """
    rows = nested.u.reshape(len(nested.u), -1)
    seen = np.bitwise_or.reduce(rows, axis=1).astype(np.int64)
    middle = 1 << nested.bits >> 1
    caps = tuple(
        0 if (row == middle).all() else nested.bits - min(nested.bits - 1, int(bits & -bits).bit_length() - 1)
        for row, bits in zip(rows, np.where(seen == 0, middle, seen).tolist(), strict=True)
    )
    if min(caps) == nested.bits:
        return nested
    base = lowest(nested)
    own = len(str(list(caps))) + len(nested.levels) * len(str([0] * nested.bits))
    if coded_bytes(split_cheapest(nested.u, nested.bits, base, caps)) + own >= coded_bytes(
        split_cheapest(nested.u, nested.bits, base)
    ):
        return nested
    levels = {
        name: TensorLevel(entry.bits, entry.shift, (int(np.max(entry.offset)),) * (nested.bits + 1))
        for name, entry in nested.levels.items()
    }
    return replace(nested, levels=levels, caps=caps)


def lowest(nested: Nested) -> int:
    """Planes of the lowest level that has any."""
    return min((entry.bits for entry in nested.levels.values() if entry.bits), default=nested.bits)


def nest(name: str, codes: Mapping[str, np.ndarray]) -> Nested | None:
    """Find how tensor `name` nests; `codes` are its container codes (int8 or uint8, one shape) by level.

    Every level gets the fewest bits that tell its codes apart. None when every level holds one value only: there is
    nothing to split. Raises BundleError that names the tensor, the level and how many weights stand in the way.
    """
    signed = {level: _signed(array) for level, array in codes.items()}
    used = {level: np.flatnonzero(np.bincount(array, minlength=CODES)) - CODES // 2 for level, array in signed.items()}
    if all(len(values) == 1 for values in used.values()):
        return None
    grids = {level: _grid(values) for level, values in used.items()}
    order = sorted(used, key=lambda level: (len(used[level]), np.ptp(grids[level][0])), reverse=True)
    refused = None
    for top in (level for level in order if len(used[level]) == len(used[order[0]])):  # ties: the data are too few
        try:
            return _nest_under(name, top, codes, signed, used[top])
        except BundleError as e:
            refused = refused or e
    raise refused or BundleError(f"tensor {name} has no levels")


def _nest_under(
    name: str, top: str, codes: Mapping[str, np.ndarray], signed: Mapping[str, np.ndarray], values: np.ndarray
) -> Nested:
    """`nest` with level `top`, of distinct codes `values`, as the finest."""
    grid, bits = _grid(values)
    entries = {}
    for level, array in signed.items():
        image = _image(name, level, top, array, signed[top])[values + CODES // 2]
        prefix = _fit(grid, image, bits)
        if prefix is None:
            raise BundleError(_no_prefix(name, level, top, values, image))
        base = CODES // 2 if codes[level].dtype == np.uint8 else 0
        entries[level] = TensorLevel(prefix[0], prefix[1], prefix[2] + base)
    table = np.zeros(CODES, np.uint8)
    table[values + CODES // 2] = grid + (1 << bits >> 1)
    return Nested(name, table[signed[top]].reshape(codes[top].shape), bits, entries)


def _signed(array: np.ndarray) -> np.ndarray:
    """int8 codes + 128, or uint8 codes, flat: index 0 stands for the least code."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat ^ np.uint8(CODES // 2) if array.dtype == np.int8 else flat


def _grid(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Sorted distinct codes -> indices w on the coarsest power-of-two grid, and bits N: -2^(N-1) <= w < 2^(N-1).

    A common head of all indices is dropped when that saves bits (a tensor of one sign, an unsigned container).
    """
    steps = int(np.bitwise_or.reduce(values - values[0])) if len(values) > 1 else 1
    index = (values - values[0] % (steps & -steps)) // (steps & -steps)  # the lowest bit set is the grid's unit
    bits = 1 + max(int(index[-1]).bit_length(), int(-index[0] - 1).bit_length() if index[0] < 0 else 0)
    apart = int((int(index[0]) + CODES) ^ (int(index[-1]) + CODES)).bit_length()
    if 0 < apart < bits:
        index = index - (int(index[0]) >> apart << apart) - (1 << apart >> 1)
        bits = apart
    return index, bits


def _image(name: str, level: str, top: str, array: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Code of `level` for each code of the top level, int64 [256]; BundleError when some weights disagree."""
    pairs = np.bincount(highest.astype(np.uint16) << 8 | array, minlength=CODES * CODES).reshape(CODES, CODES)
    astray = int(pairs.sum() - pairs.max(1).sum())
    if astray:
        raise BundleError(
            f"tensor {name} does not nest: {astray} of {array.size} weights of level {level} do not follow from their "
            f"codes at level {top}; export both levels from one training run, or bundle them apart"
        )
    return np.asarray(pairs.argmax(1) - CODES // 2)


def _fit(grid: np.ndarray, image: np.ndarray, bits: int) -> tuple[int, int, int] | None:
    """(b, shift, offset) of the least b with image == ((grid >> (bits - b)) << shift) + offset, or None."""
    if (image == image[0]).all():
        return 0, 0, int(image[0])
    for held in range(1, bits + 1):
        prefix = grid >> (bits - held)
        for shift in range(8):
            offset = image - (prefix << shift)
            low = int(offset[0]) - (1 << (held - 1) << shift)
            high = int(offset[0]) + ((1 << (held - 1)) - 1 << shift)
            if (offset == offset[0]).all() and low >= -(CODES // 2) and high < CODES // 2:
                return held, shift, int(offset[0])
    return None


def _no_prefix(name: str, level: str, top: str, values: np.ndarray, image: np.ndarray) -> str:
    """Why a level that follows from the top is still no prefix of it: show codes on both sides."""
    shown = ", ".join(f"{int(a)} -> {int(b)}" for a, b in list(zip(values, image, strict=True))[:6])
    return (
        f"tensor {name} does not nest: the codes of level {level} are no prefix of those of level {top} on any "
        f"power-of-two grid ({len(values)} distinct codes: {shown}, ...); its levels must be made by truncation"
    )
