"""Gradients through rounding (Schaefer et al. 2023, section 3.2): the straight-through one, scaled by five functions.

With r = x - round(x) in steps and g the gradient, g times
ste 1; ewgs 1 + d * sign(g) * r; pbgs 1 + d * |r|; acos 1 + d * sin(pi r); tanh 1 + d * sign(g) * tanh(a r);
invtanh 1 + d * sign(g) * arctanh(a r), for |a| < 2, since |r| <= 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qdeploy.quant.functions import BORDER, in_layout, inner_product, through_range


@dataclass(frozen=True)
class GradientScaling:
    """One of the module's functions, by its name, with d = `delta` and a = `alpha`."""

    name: str
    delta: float
    alpha: float

    def __call__(self, gradient: Tensor, residual: Tensor) -> Tensor:
        """The scaled gradient; both tensors have one shape."""
        if self.name == "ste":
            return gradient
        part, sided = {
            "ewgs": (lambda r: r, True),
            "pbgs": (torch.abs, False),
            "acos": (lambda r: torch.sin(math.pi * r), False),
            "tanh": (lambda r: torch.tanh(self.alpha * r), True),
            "invtanh": (lambda r: torch.atanh(self.alpha * r), True),
        }[self.name]
        weight = gradient.abs() if sided else gradient
        return torch.addcmul(gradient, weight, part(residual), value=self.delta)


class QuantizeRange(Function):
    """x_hat = s * round(clip(x, low, q) / s), low = -q or, unsigned, 0 (eq. 1, rounded behind the clip).

    s and q broadcast against x. The scaled straight-through gradient goes on to x inside the range, to q where x is
    clipped to +-q, and to s as round(v) - v with v = clip(x) / s, the second term scaled like the rest.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, bound: Tensor, signed: bool, scaling: GradientScaling) -> Tensor:  # noqa: PLR0913, PLR0917
        ratio = bound / step
        clipped = x / step
        torch.minimum(clipped, ratio, out=clipped)
        clipped = torch.maximum(clipped, -ratio, out=clipped) if signed else clipped.clamp_min_(0.0)
        out = clipped.round().mul_(step)
        ctx.save_for_backward(x, clipped, out, step, bound)
        ctx.choice = (signed, scaling)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, clipped, out, step, bound = ctx.saved_tensors
        signed, scaling = ctx.choice
        grad = in_layout(grads[0], x)
        through = scaling(grad, torch.addcdiv(clipped, out, step, value=-1.0))
        if step.numel() > 1:
            outside = (x.abs() if signed else (x - bound / 2).abs()) > (bound if signed else bound / 2)
            inside = through.masked_fill(outside, 0.0)
        else:
            least, most = -float(bound) if signed else 0.0, float(bound)
            inside = through_range(through, x, least - BORDER * most, most * (1 + BORDER))

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return inner_product(a, b).reshape(step.shape) if step.numel() == 1 else (a * b).sum_to_size(step.shape)

        whole = dot(through, clipped)
        of_step = dot(grad, out) / step - whole
        of_bound = (whole - dot(inside, clipped)) * step / bound  # clipped is +-bound / step wherever it was clipped
        return inside, of_step, of_bound, None, None


def quantize_range(x: Tensor, step: Tensor, bound: Tensor, signed: bool, scaling: GradientScaling) -> Tensor:
    """Typed front of QuantizeRange; same shape as `x`, float32."""
    return QuantizeRange.apply(x, step, bound, signed, scaling)


class CodeWidth(Function):
    """Bits of the codes -n..n (signed) or 0..n, n = round(2^k): ceil(log2(n + 1)), one more if signed.

    Gradient: that of log2(2^k + 1), as if nothing were rounded.
    """

    @staticmethod
    def forward(ctx: Any, octaves: Tensor, signed: bool) -> Tensor:
        ratio = octaves.exp2()
        ctx.save_for_backward(ratio)
        return (torch.frexp(ratio.round()).exponent + int(signed)).to(octaves.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: PLR6301
        (ratio,) = ctx.saved_tensors
        return grads[0] * ratio / (ratio + 1), None


def code_width(octaves: Tensor, signed: bool) -> Tensor:
    """Typed front of CodeWidth; `octaves` = log2(range / step)."""
    return CodeWidth.apply(octaves, signed)
