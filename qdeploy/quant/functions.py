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

BORDER = 1e-6  # of a step: hardtanh_backward leaves out its bounds, which belong to the range


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b, without a temporary where both lie in memory in the same dense order."""
    for layout in (torch.contiguous_format, torch.channels_last):
        fits = layout is torch.contiguous_format or a.ndim == 4  # noqa: PLR2004
        if fits and a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout):
            return torch.dot(*(tensor.as_strided((tensor.numel(),), (1,)) for tensor in (a, b)))
    return (a * b).sum()


class QuantizeActivation(Function):
    """x_hat = (clamp(round(x / s) + z, 0, hi) - z) * s with a learned scalar step s and a fixed integer z.

    Most of a training step's time would go into this, so it works in place and saves nothing but its ends.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: int, hi: int) -> Tensor:
        ctx.bounds = (-zero_point, hi - zero_point)
        out = (x / step).clamp_(*ctx.bounds).round_().mul_(step)
        ctx.save_for_backward(x, step, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: PLR6301
        (grad,) = grads
        x, step, out = ctx.saved_tensors
        s, (low, high) = float(step), ctx.bounds
        inside = ((low - BORDER) * s, (high + BORDER) * s)
        through = torch.ops.aten.hardtanh_backward(grad, x, *inside)  # one pass: grad where x lies inside, else 0
        error = torch.ops.aten.hardtanh_backward(x, x, *inside).neg_().add_(out)
        scale = 1.0 / math.sqrt(x.numel() * max(high, 1))
        return through, inner_product(grad, error).div(s).mul_(scale).reshape(()), None, None


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


class QuantizeAffine(Function):
    """x_hat = (clamp(round(x / s) + z, lo, hi) - z) * s, z = round(o): learned step s and offset o, straight-through.

    `s` broadcasts against x ([], or one a channel), `o` is a scalar in code units. Gradient of s: LSQ's, times
    s^2 / mean(s^2), so that tiny steps of channels move by tiny amounts. Gradient of o: -s where x is clipped, 0
    elsewhere, divided by mean(s^2), which makes it the gradient of a real offset (as LSQ+ learns it) in codes. Both are
    scaled by 1 / sqrt(values of one step * hi). docs/adr/0010-elastic-quantizers.md says why.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, lo: int, hi: int) -> Tensor:
        zero_point = int(offset.round())
        ctx.bounds = (lo - zero_point, hi - zero_point)
        scaled = x / step
        out = scaled.clamp(*ctx.bounds).round_().mul_(step)
        ctx.save_for_backward(scaled, step, out)
        ctx.hi = hi
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        scaled, step, out = ctx.saved_tensors
        inside = (ctx.bounds[0] - BORDER, ctx.bounds[1] + BORDER)
        through = torch.ops.aten.hardtanh_backward(grad, scaled, *inside)
        error = torch.ops.aten.hardtanh_backward(scaled, scaled, *inside).neg_().add_(out / step)
        scale = 1.0 / math.sqrt(scaled.numel() / step.numel() * max(ctx.hi, 1))
        mean_square = step.square().mean()
        of_step = (grad * error).sum_to_size(step.shape) * (step.square() / mean_square) * scale
        of_offset = ((through - grad).sum_to_size(step.shape) * step).sum() / mean_square * scale
        return through, of_step, of_offset, None, None


def quantize_affine(x: Tensor, step: Tensor, offset: Tensor, lo: int, hi: int) -> Tensor:
    """Typed front of QuantizeAffine; same shape as `x`."""
    return QuantizeAffine.apply(x, step, offset, lo, hi)


def quantize_activation(x: Tensor, step: Tensor, zero_point: int, hi: int) -> Tensor:
    """Typed front of QuantizeActivation; same shape as `x`."""
    return QuantizeActivation.apply(x, step, zero_point, hi)


def quantize_weight(weight: Tensor, step: Tensor, top: int, shift: int, unit: int, offset: int, fine: float) -> Tensor:
    """Typed front of QuantizeWeight; same shape as `weight`."""
    return QuantizeWeight.apply(weight, step, top, shift, unit, offset, fine)
