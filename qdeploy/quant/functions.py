"""Fake quantizers as autograd functions: one fused forward, one fused backward each.

LSQ (methods: learned step size quantization): q = clip(round(x / s), lo, hi), x_hat = q * s, straight-through rounding,
step gradient q - x/s inside the range and the bound outside, scaled by 1 / sqrt(number of elements * hi).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class QuantizeActivation(Function):
    """x_hat = (clamp(round(x / s) + z, 0, hi) - z) * s with a learned scalar step s and a fixed integer z."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: int, hi: int) -> Tensor:
        scaled = x / step
        codes = scaled.round().clamp_(-zero_point, hi - zero_point)
        ctx.save_for_backward(scaled, codes)
        ctx.bounds = (-zero_point, hi - zero_point)
        return codes * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: PLR6301
        (grad,) = grads
        scaled, codes = ctx.saved_tensors
        low, high = ctx.bounds
        inside = (scaled >= low) & (scaled <= high)
        error = torch.where(inside, codes - scaled, codes)
        scale = 1.0 / math.sqrt(scaled.numel() * max(high, 1))
        return grad * inside, (grad * error).sum().mul_(scale).reshape(()), None, None


class QuantizeWeight(Function):
    """Downsampled weight at one width: top codes, floor to `bits`, midpoint added (vertical layering eqs. 5, 6, 8).

    `shift` = N - b and `unit` = 2^(C - b), `offset` = m_b in container units, `fine` = 2^(N - C). Clipping is on the
    top level's range at every width; the compensation is part of the step's gradient.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917
        ctx: Any, weight: Tensor, step: Tensor, top: int, shift: int, unit: int, offset: int, fine: float
    ) -> Tensor:
        scaled = weight / step
        codes = scaled.round().clamp_(-(1 << (top - 1)), (1 << (top - 1)) - 1)
        if shift:
            codes = torch.floor(codes / (1 << shift))
        codes = (codes * unit + offset) * fine
        ctx.save_for_backward(scaled, codes)
        ctx.top = top
        return codes * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        scaled, codes = ctx.saved_tensors
        half = 1 << (ctx.top - 1)
        inside = (scaled >= -half) & (scaled <= half - 1)
        error = torch.where(inside, codes - scaled, codes)
        scale = 1.0 / math.sqrt(scaled.numel() * (half - 1))
        return (grad * inside, (grad * error).sum().mul_(scale).reshape(()), None, None, None, None, None)


def quantize_activation(x: Tensor, step: Tensor, zero_point: int, hi: int) -> Tensor:
    """Typed front of QuantizeActivation; same shape as `x`."""
    return QuantizeActivation.apply(x, step, zero_point, hi)


def quantize_weight(weight: Tensor, step: Tensor, top: int, shift: int, unit: int, offset: int, fine: float) -> Tensor:
    """Typed front of QuantizeWeight; same shape as `weight`."""
    return QuantizeWeight.apply(weight, step, top, shift, unit, offset, fine)
