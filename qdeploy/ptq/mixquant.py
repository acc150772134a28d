"""MixQuant: a weight width for each layer from its own quantization errors (Kloberdanz and Le 2023, algorithm 1).

QE(b) is the error of asymmetric per-layer quantization to b bits. A layer gets the smallest b with
QE(b) <= QEM * QE(8); the algorithm is printed as an argmin, which would always be 8 bits, and its text asks for the
smallest. QEM, the multiplier, is the knob between accuracy and size:

* criterion "mse", mean((w - w')^2): errors grow about fourfold a bit, so QEM is useful from 4 (7 bits) to 300 (4 bits);
* criterion "relative", mean(|w - w'| / |w|) over w != 0: they grow about twofold; the paper's 1.1 to 3.5 belongs here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qdeploy.errors import ModelError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
CRITERIA = ("mse", "relative")
CHUNK = 1 << 13  # weights that stay in the first cache while all widths are tried


def quantization_errors(weight: np.ndarray, criterion: str = "mse") -> np.ndarray:
    """float64 [7]: QE(b) for b in WIDTHS of one float32 weight of any shape.

    One pass over the weights in pieces, in place: no array of the weight's size is made but its own.
    """
    flat = np.ascontiguousarray(weight, np.float32).reshape(-1)
    low, high = min(float(flat.min(initial=0)), 0.0), max(float(flat.max(initial=0)), 0.0)
    errors = np.zeros(len(WIDTHS))
    if high == low:
        return errors
    steps = [np.float32((high - low) / ((1 << bits) - 1)) for bits in WIDTHS]
    inverses = [np.float32(1) / step for step in steps]
    # the least code is rint(low / step) by definition of the zero point; the greatest can be rounded past its end
    tops = [np.rint(np.float32(low) * one) + (1 << bits) - 1 for one, bits in zip(inverses, WIDTHS, strict=True)]
    clamped = [np.rint(np.float32(high) * one) > top for one, top in zip(inverses, tops, strict=True)]
    size = min(CHUNK, flat.size)
    scaled, codes, inverse = (np.empty(size, np.float32) for _ in range(3))
    for start in range(0, flat.size, size):
        piece = flat[start : start + size]
        t, c, over = scaled[: piece.size], codes[: piece.size], inverse[: piece.size]
        if criterion == "relative":
            np.abs(piece, out=over)
            over[over == 0] = np.inf
            np.reciprocal(over, out=over)
        for i, step in enumerate(steps):
            np.multiply(piece, inverses[i], out=t)
            np.rint(t, out=c)
            if clamped[i]:
                np.minimum(c, tops[i], out=c)
            np.subtract(t, c, out=t)
            if criterion == "mse":
                errors[i] += float(np.dot(t, t)) * float(step) ** 2
            else:
                np.abs(t, out=t)
                errors[i] += float(np.dot(t, over)) * float(step)
    count = flat.size if criterion == "mse" else max(1, int(np.count_nonzero(flat)))
    return errors / count


def error_table(weights: Mapping[str, np.ndarray], criterion: str = "mse") -> dict[str, np.ndarray]:
    """QE of every layer; all that any QEM needs."""
    if criterion not in CRITERIA:
        raise ModelError(f"criterion {criterion!r} is unknown: choose from {', '.join(CRITERIA)}")
    return {name: quantization_errors(weight, criterion) for name, weight in weights.items()}


def choose(table: Mapping[str, np.ndarray], qem: float) -> dict[str, int]:
    """The smallest width of each layer with QE(b) <= qem * QE(8); raises ModelError unless qem >= 1."""
    if not qem >= 1:
        raise ModelError(f"QEM {qem:g} is below 1: no width but 8 bits could satisfy it, give 1 or more")
    return {name: WIDTHS[int(np.argmax(errors <= qem * errors[-1]))] for name, errors in table.items()}


def thresholds(table: Mapping[str, np.ndarray]) -> np.ndarray:
    """Every QEM at which some layer's width changes, ascending, from 1 up."""
    ratios = [errors[:-1] / errors[-1] for errors in table.values() if errors[-1] > 0]
    found = np.concatenate([[1.0], *ratios])
    return np.unique(found[found >= 1])


def size_bits(chosen: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Bits of all weights together."""
    return sum(bits * sizes[name] for name, bits in chosen.items())


def for_size(table: Mapping[str, np.ndarray], size: Callable[[Mapping[str, int]], int], limit: int) -> float:
    """The least QEM whose widths make size(widths) <= limit; raises ModelError when not even 2 bits do."""
    candidates = _rounded_up(thresholds(table))
    place = _first(candidates, lambda qem: size(choose(table, qem)) <= limit)
    if place is None:
        least = size(choose(table, float(candidates[-1])))
        raise ModelError(f"no widths make the weights as small as {limit} bits: the least is {least}")
    return float(candidates[place])


def for_accuracy(
    table: Mapping[str, np.ndarray], accuracy: Callable[[Mapping[str, int]], float], bound: float
) -> float:
    """A QEM as large as keeps accuracy(widths) >= bound, found by bisection; raises ModelError when 8 bits do not.

    Accuracy falls as QEM grows but for noise, so a larger QEM that also holds may be passed over.
    """
    candidates = _rounded_up(thresholds(table))
    if (best := accuracy(choose(table, 1.0))) < bound:
        raise ModelError(f"even 8 bits reach {best:.2f}%, not {bound:g}%: lower the bound or check the calibration")
    place = _first(candidates, lambda qem: accuracy(choose(table, qem)) < bound)
    return float(candidates[-1] if place is None else candidates[max(0, place - 1)])


def _rounded_up(ratios: np.ndarray) -> np.ndarray:
    """The product with QE(8) may be rounded below QE(b): take the next numbers up."""
    return np.asarray(ratios * (1 + 1e-12))


def _first(candidates: Sequence[float] | np.ndarray, holds: Callable[[float], bool]) -> int | None:
    """Bisection for the first candidate that holds, if holding is monotone; None when the last does not."""
    if not holds(float(candidates[-1])):
        return None
    low, high = -1, len(candidates) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(float(candidates[middle])) else (middle, high)
    return high
