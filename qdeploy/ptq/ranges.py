"""Ranges of activations from samples: min-max, percentile, least squared error, least divergence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 2048  # of the histogram behind mse and entropy
SHRINK = np.linspace(1.0, 0.3, 71)  # parts of an end that mse tries
ROUNDS = 2  # of one end after the other
MARGIN = 1.25  # times what was seen: other images have larger values


@dataclass(frozen=True)
class Samples:
    """What was seen of one activation: its extreme values, and some of its values. It always lies in `limits`."""

    low: float
    high: float
    values: np.ndarray
    limits: tuple[float, float] = (-np.inf, np.inf)


@dataclass(frozen=True)
class Grid:
    """An activation's quantizer: codes lo..hi of `dtype`, real value (code - zero_point) * scale."""

    scale: np.float32
    zero_point: int
    lo: int
    hi: int
    dtype: str

    def ends(self) -> tuple[float, float]:
        """The real values of the least and the greatest code."""
        return (self.lo - self.zero_point) * float(self.scale), (self.hi - self.zero_point) * float(self.scale)


def make_grid(low: float, high: float, bits: int, symmetry: str) -> Grid:
    """The grid of `bits` bits over [low, high] and 0: uint8 asymmetric, or int8 symmetric around 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetry == "symmetric":
        top = (1 << (bits - 1)) - 1
        scale = np.float32(max(-low, high) / top) or np.float32(1)
        return Grid(scale, 0, -top - 1, top, "int8")
    top = (1 << bits) - 1
    scale = np.float32((high - low) / top) or np.float32(1)
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, top)), 0, top, "uint8")


def find_grid(samples: Samples, bits: int, method: str, percentile: float, symmetry: str) -> Grid:
    """The grid for an activation by a calibration `method` (settings.CHOICES)."""
    low, high = samples.low, samples.high
    if method == "margin":
        low, high = max(low * MARGIN, samples.limits[0]), min(high * MARGIN, samples.limits[1])
    elif method == "percentile" and percentile < 100:
        tail = 100 - percentile
        a, b = np.percentile(samples.values, [tail, percentile])
        low, high = max(low, min(float(a), 0.0)), min(high, max(float(b), 0.0))
    elif method in ("mse", "entropy") and samples.values.size:
        counts, edges = np.histogram(samples.values, BINS, (min(low, 0.0), max(high, 0.0) or 1e-30))
        centres = (edges[:-1] + edges[1:]) / 2
        keep = counts > 0
        if method == "mse":
            low, high = _least_error(centres[keep], counts[keep], low, high, bits, symmetry)
        else:
            low, high = _least_divergence(counts, edges, low, high, bits)
    return make_grid(low, high, bits, symmetry)


def _squared(centres: np.ndarray, counts: np.ndarray, grid: Grid) -> float:
    codes = np.clip(np.rint(centres / grid.scale) + grid.zero_point, grid.lo, grid.hi)
    return float(counts @ ((codes - grid.zero_point) * grid.scale - centres) ** 2)


def _least_error(
    centres: np.ndarray, counts: np.ndarray, low: float, high: float, bits: int, symmetry: str
) -> tuple[float, float]:
    """The range of least mean squared error, one end after the other."""
    best, ends = _squared(centres, counts, make_grid(low, high, bits, symmetry)), [low, high]
    for _ in range(ROUNDS):
        for end in (1, 0):
            full = (low, high)[end]
            for part in SHRINK if full else ():
                tried = list(ends)
                tried[end] = full * float(part)
                error = _squared(centres, counts, make_grid(tried[0], tried[1], bits, symmetry))
                if error < best:
                    best, ends = error, tried
    return ends[0], ends[1]


def _least_divergence(counts: np.ndarray, edges: np.ndarray, low: float, high: float, bits: int) -> tuple[float, float]:
    """Part of [low, high], 0 at the same place in it, whose quantized histogram is nearest in Kullback-Leibler sense.

    The clipped mass goes into the end bins of the reference; the quantized one spreads each level's mass over its
    occupied bins (Migacz 2017, "8-bit inference with TensorRT"). 0 itself, which a Relu makes often and every grid
    holds exactly, does not count.
    """
    levels = 1 << bits
    zero = int(np.searchsorted(edges, 0.0, side="right")) - 1
    zero = min(max(zero, 0), BINS - 1)
    counts = np.where(np.arange(BINS) == zero, 0, counts)
    if not counts.any():
        return low, high
    best, part = np.inf, 1.0
    for share in np.linspace(0.15, 1.0, 86):
        first, last = int(zero * (1 - share)), int(np.ceil(zero + (BINS - zero) * share))
        if last - first < levels:
            continue
        inner = counts[first:last].astype(np.float64)
        if not inner.any():
            continue
        reference = inner.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        level = np.arange(len(inner)) * levels // len(inner)
        occupied = inner > 0
        mass = np.bincount(level, inner, levels)
        spread = np.bincount(level, occupied, levels)
        quantized = np.where(occupied, (mass / np.maximum(spread, 1))[level], 0)
        p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1e-30)
        seen = p > 0
        divergence = float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))))
        if divergence < best:
            best, part = divergence, float(share)
    return low * part, high * part
