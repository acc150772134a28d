"""Fake quantizers as autograd functions: one fused forward, one fused backward each.

LSQ (methods: learned step size quantization): q = clip(round(x / s), lo, hi), x_hat = q * s, straight-through rounding,
step gradient q - x/s inside the range and the bound outside, scaled by 1 / sqrt(number of elements * hi).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function

from qdeploy.errors import DivergenceError
from qdeploy.quant.parallel import processes

BORDER = 1e-6  # of a step: hardtanh_backward leaves out its bounds, which belong to the range


def whole(offset: Tensor) -> int:
    """A scalar offset as the zero point that it is rounded to; DivergenceError where training has made it no number."""
    value = float(offset.round())
    if not math.isfinite(value):
        raise DivergenceError("an activation or an offset is no longer finite: lower the learning rate")
    return int(value)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b, without a temporary where both lie in memory in the same dense order."""
    for layout in (torch.contiguous_format, torch.channels_last):
        fits = layout is torch.contiguous_format or a.ndim == 4  # noqa: PLR2004
        if fits and a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout):
            return torch.dot(*(tensor.as_strided((tensor.numel(),), (1,)) for tensor in (a, b)))
    return (a * b).sum()


def in_layout(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` with the strides of `x`: pooling layers hand back another layout, which slows down all that follows."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def through_range(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Straight-through gradient: `grad` where x lies in [low, high], else 0; one pass over memory."""
    return torch.ops.aten.hardtanh_backward(grad, x, low, high)


class QuantizeActivation(Function):
    """x_hat = (clamp(round(min(x, ceiling) / s) + z, 0, hi) - z) * s learned scalar step s, fixed integer z.

    With z = 0 that is also the quantizer of relu(x), and with a finite ceiling of relu6(x), gradients included.

    Most of a training step's time would go into this, so it makes as few passes over memory as torch allows and saves
    nothing but its ends. The step's gradient, sum of grad * (x_hat - x where x is inside) / s, is the difference of two
    inner products.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: int, hi: int, ceiling: float) -> Tensor:
        s, low, high = float(step), -zero_point, hi - zero_point
        greatest = min(high, round(ceiling / s)) if ceiling < (high + 1) * s else high
        out = (x / step).clamp_(low, greatest).round_().mul_(step)
        ctx.save_for_backward(x, out)
        ctx.numbers = (s, low, high, ceiling)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: PLR6301
        x, out = ctx.saved_tensors
        grad = in_layout(grads[0], x)
        s, low, high, ceiling = ctx.numbers
        greatest = (high + BORDER) * s
        through = through_range(grad, x, (low - BORDER) * s, min(greatest, ceiling))
        error = inner_product(grad, out) - inner_product(through, x)
        if ceiling < greatest:  # values above the ceiling are inside the range, as the ceiling itself
            error -= ceiling * torch.ops.aten.threshold_backward(grad, x, ceiling).sum()
        scale = 1.0 / math.sqrt(x.numel() * processes() * max(high, 1))
        return through, error.mul_(scale / s).reshape(()), None, None, None


class QuantizeWeight(Function):
    """Downsampled weight at one width: top codes, floor to `bits`, midpoint added (vertical layering eqs. 5, 6, 8).

    `shift` = N - b and `unit` = 2^(C - b), `offset` = m_b in container units, `fine` = 2^(N - C). Clipping is on the
    top level's range at every width; the compensation is part of the step's gradient.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(  # noqa: PLR0913, PLR0917
        ctx: Any, weight: Tensor, step: Tensor, top: int, shift: int, unit: int, offset: int, fine: float
    ) -> Tensor:
        half = 1 << (top - 1)
        codes = (weight / step).round_().clamp_(-half, half - 1)
        if shift:
            codes.mul_(0.5**shift).floor_()
        out = codes.mul_(unit * fine).add_(offset * fine).mul_(step)
        ctx.save_for_backward(weight, step, out)
        ctx.half = half
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        weight, step, out = ctx.saved_tensors
        s, half = float(step), ctx.half
        through = through_range(grad, weight, (-half - BORDER) * s, (half - 1 + BORDER) * s)
        error = inner_product(grad, out) - inner_product(through, weight)
        scale = 1.0 / math.sqrt(weight.numel() * (half - 1))
        return through, error.mul_(scale / s).reshape(()), None, None, None, None, None


class QuantizeAffine(Function):
    """x_hat = (clamp(round(x / s) + z, lo, hi) - z) * s, z = round(o): learned step s and offset o, straight-through.

    `s` broadcasts against x ([], or one a channel), `o` is a scalar in code units. Gradient of s: LSQ's, times
    s^2 / mean(s^2), so that tiny steps of channels move by tiny amounts. Gradient of o: -s where x is clipped, 0
    elsewhere, divided by mean(s^2), which makes it the gradient of a real offset (as LSQ+ learns it) in codes. Both are
    scaled by 1 / sqrt(values of one step in all `parts` of a batch * hi). docs/adr/0010-elastic-quantizers.md says why.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(  # noqa: PLR0913, PLR0917
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor, lo: int, hi: int, parts: int
    ) -> Tensor:
        zero_point = whole(offset)
        ctx.bounds = (lo - zero_point, hi - zero_point)
        scaled = x / step
        out = scaled.clamp(*ctx.bounds).round_().mul_(step)
        ctx.save_for_backward(scaled, step, out)
        ctx.scale = 1.0 / math.sqrt(x.numel() * parts / step.numel() * max(hi, 1))
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        scaled, step, out = ctx.saved_tensors
        inside = (ctx.bounds[0] - BORDER, ctx.bounds[1] + BORDER)
        through = torch.ops.aten.hardtanh_backward(grad, scaled, *inside)
        error = torch.ops.aten.hardtanh_backward(scaled, scaled, *inside).neg_().add_(out / step)
        mean_square = step.square().mean()
        of_step = (grad * error).sum_to_size(step.shape) * (step.square() / mean_square) * ctx.scale
        of_offset = ((through - grad).sum_to_size(step.shape) * step).sum() / mean_square * ctx.scale
        return through, of_step, of_offset, None, None, None


def quantize_affine(x: Tensor, step: Tensor, offset: Tensor, lo: int, hi: int, parts: int = 1) -> Tensor:
    """Typed front of QuantizeAffine; same shape as `x`."""
    return QuantizeAffine.apply(x, step, offset, lo, hi, parts)


def quantize_activation(x: Tensor, step: Tensor, zero_point: int, hi: int, ceiling: float = math.inf) -> Tensor:
    """Typed front of QuantizeActivation; same shape as `x`."""
    return QuantizeActivation.apply(x, step, zero_point, hi, ceiling)


def quantize_weight(weight: Tensor, step: Tensor, top: int, shift: int, unit: int, offset: int, fine: float) -> Tensor:
    """Typed front of QuantizeWeight; same shape as `weight`."""
    return QuantizeWeight.apply(weight, step, top, shift, unit, offset, fine)
