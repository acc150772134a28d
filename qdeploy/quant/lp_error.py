"""Initial steps: the ones whose quantization error has the lowest L2.4 norm (EQ-Net)."""

from __future__ import annotations

import torch
from torch import Tensor

POWER = 2.4
FRACTIONS = 40  # candidates: equal parts of the step that clips nothing
GROUP_SAMPLE = 1 << 14  # values of a group that the error is measured on, evenly spaced
TINY = 1e-8


@torch.no_grad()
def lowest_error_steps(values: Tensor, lo: int, hi: int, zero_point: int) -> tuple[Tensor, Tensor]:
    """The best step of each group of values [groups, n] for codes lo..hi, and its error sum |x - x_hat|^2.4: [groups].

    The error is measured on at most GROUP_SAMPLE values of all groups together, and on 256 of each at least.
    """
    low, high = lo - zero_point, hi - zero_point
    widest = torch.full((len(values),), TINY)
    if high > 0:
        widest = torch.maximum(widest, values.amax(1) / high)
    if low < 0:
        widest = torch.maximum(widest, values.amin(1) / low)
    kept = max(256, GROUP_SAMPLE // len(values))  # noqa: PLR2004
    sample = values[:, :: -(-values.shape[1] // kept)]
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for part in range(1, FRACTIONS + 1):
        step = widest * (part / FRACTIONS)
        codes = (sample / step[:, None]).round_().clamp_(low, high)
        error = (codes * step[:, None] - sample).abs_().pow_(POWER).sum(1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best, least


@torch.no_grad()
def lowest_error_zero_point(values: Tensor, lo: int, hi: int) -> int:
    """The best zero point of one group of values [n] for codes lo..hi: about where the range puts it, or 0."""
    least, greatest = min(0.0, float(values.min())), max(0.0, float(values.max()))
    natural = lo + round(-least / max(greatest - least, TINY) * (hi - lo))
    candidates = {min(max(natural + shift, lo), hi) for shift in (-1, 0, 1)} | ({0} if lo <= 0 <= hi else set())
    return min(sorted(candidates), key=lambda z: float(lowest_error_steps(values[None], lo, hi, z)[1]))
