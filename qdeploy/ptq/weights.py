"""Grids and codes of weights: separate ones of any width, and ladders whose low-bit codes are prefixes of the top ones.

A *level* of a ladder (docs/adr/0002-how-a-ladder-nests.md) makes container codes ((w >> (N - b)) << (C - b)) + m of the
top codes w of N bits; one width alone is the ladder (b,) with C = N and m = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.ptq.layers import Layer, rows, unrows

SHRINK = np.linspace(1.0, 0.4, 25)  # parts of the full range that are tried for a grid
FULL = 8  # the width at which nothing is clipped


@dataclass(frozen=True)
class Level:
    """How a level's container codes come from top codes of `top` bits: its `bits`, the `shift` C - b and `offset` m."""

    bits: int
    top: int
    shift: int
    offset: int

    def codes(self, w: np.ndarray) -> np.ndarray:
        """Container codes, int64, of top codes."""
        prefix: np.ndarray = w.astype(np.int64) >> (self.top - self.bits)
        return (prefix << self.shift) + self.offset


def ladder_levels(widths: Sequence[int], compensated: bool = True) -> tuple[Level, ...]:
    """The levels of ascending `widths` on one grid; without compensation m is 0. One width is a grid of its own.

    C is 7 for a top of at most 6 bits, else 8; m_b = 2^(C-1-b) - 2^(C-1-N) is the middle of the interval that a
    truncated code stands for, floored at C = N = 8 where it is half a unit.
    """
    top = max(widths)
    if len(widths) == 1:
        return (Level(top, top, 0, 0),)
    container = 7 if top <= 6 else 8
    levels = []
    for bits in widths:
        if not compensated or bits == top:
            offset = 0
        elif top == container:
            offset = (1 << (container - 1 - bits)) - 1
        else:
            offset = (1 << (container - 1 - bits)) - (1 << (container - 1 - top))
        levels.append(Level(bits, top, container - bits, offset))
    return tuple(levels)


@dataclass(frozen=True)
class Quantized:
    """One layer's weights at one level: int8 `codes` of the weight's shape, float32 `scale` and int8 `zero_point` per
    output channel ([O], or [] for one in all), and the float32 `bias` or None.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bias: np.ndarray | None

    def real(self, layer: Layer) -> np.ndarray:
        """float32: what the codes stand for."""
        matrix = (rows(layer, self.codes).astype(np.float32) - self._column(self.zero_point)) * self._column(self.scale)
        return unrows(layer, matrix.astype(np.float32), self.codes.shape)

    @staticmethod
    def _column(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).reshape(-1, 1)


@dataclass(frozen=True)
class Grid:
    """Top codes lo..hi; `scale` [O, 1] of a container unit, `zero` [O, 1] in top codes (0 where symmetric)."""

    scale: np.ndarray
    zero: np.ndarray
    lo: int
    hi: int


def values(level: Level, w: np.ndarray, grid: Grid) -> np.ndarray:
    """float64: what top codes [O, K] stand for at a level."""
    real: np.ndarray = (level.codes(w) - grid.zero) * grid.scale
    return real


def bounds(top: int, count: int, symmetry: str) -> tuple[int, int]:
    """The least and the greatest top code of `top` bits of `count` levels: symmetric 8 bits alone leave -128 out."""
    high = (1 << (top - 1)) - 1
    return (-high if symmetry == "symmetric" and count == 1 and top == FULL else -high - 1), high


def fit_grid(
    matrix: np.ndarray, levels: Sequence[Level], granularity: str, symmetry: str, importance: np.ndarray,
    level_weights: np.ndarray,
) -> Grid:  # fmt: skip
    """The grid of least weighted squared error over all levels, float64 [O, 1] for weights [O, K].

    `importance` [O, K] or [1, K] weighs the weights (second moments of the inputs), `level_weights` the levels. An
    8-bit width alone covers the whole range.
    """
    top, unit = levels[-1].top, 1 << (levels[-1].shift)
    lo, hi = bounds(top, len(levels), symmetry)
    if symmetry == "asymmetric":
        low, high = np.minimum(matrix.min(1), 0), np.maximum(matrix.max(1), 0)
    else:
        high = np.abs(matrix).max(1)
        low = -high
    if granularity == "tensor":
        low, high = (np.full_like(v, e) for v, e in ((low, low.min(initial=0)), (high, high.max(initial=0))))
    span = (hi - lo) if symmetry == "asymmetric" else (hi - lo) / 2 + (0 if lo == -hi else 0.5)
    full = np.where(high > low, (high - low) if symmetry == "asymmetric" else high, 1.0) / span
    best, chosen = np.full(len(matrix), np.inf), Grid(full[:, None] / unit, np.zeros((len(matrix), 1)), lo, hi)
    for part in SHRINK if not (len(levels) == 1 and top == FULL) else SHRINK[:1]:
        step = (full * part)[:, None]
        zero = np.clip(np.rint(lo - low[:, None] * part / step), lo, hi) if symmetry == "asymmetric" else 0 * step
        grid = Grid(step / unit, zero, lo, hi)
        w = nearest(matrix, levels, grid)
        errors = [(importance * (values(level, w, grid) - matrix) ** 2).sum(1) for level in levels]
        error = level_weights @ np.stack(errors)
        if granularity == "tensor":
            error = np.full_like(error, error.sum())
        better = (error < best)[:, None]
        best = np.minimum(best, error)
        chosen = Grid(np.where(better, grid.scale, chosen.scale), np.where(better, zero, chosen.zero), lo, hi)
    return chosen


def nearest(matrix: np.ndarray, levels: Sequence[Level], grid: Grid) -> np.ndarray:
    """Top codes [O, K] nearest to the weights at the top level."""
    top = levels[-1]
    return np.clip(np.rint(matrix / (grid.scale * (1 << top.shift)) + grid.zero), grid.lo, grid.hi).astype(np.int64)
