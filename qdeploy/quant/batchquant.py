"""BatchQuant (QFA, eq. 5): activations are quantized by the extreme values of their own batch.

D = (x_max - x_min) / hi, z = clamp(-round(x_min / D), 0, hi), q = round(clamp(x / (D * g) + z + b, 0, hi)),
x_hat = (q - z - b) * D * g, with g (starts at 1) and b (starts at 0) learned for each tensor and width.

The offset z + b is rounded to an integer in training too (straight-through), so that a model's zero point is exact;
docs/adr/0011-batchquant-in-a-supernet.md says what that costs and what the other way would need.

RunningQuantizer is the common alternative that the method is compared with: running averages instead of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qdeploy.errors import ModelError
from qdeploy.frozen import Quantizer
from qdeploy.quant.functions import BORDER, inner_product, through_range, whole
from qdeploy.quant.layers import ActivationQuantizer
from qdeploy.quant.parallel import greatest, least, mean_of_parts, processes
from qdeploy.space import MAX_BITS

MIN_SPAN = 1e-6  # least x_max - x_min
MIN_FACTOR = 1e-2  # least g
MIN_VARIANCE = 1e-12  # keeps the root's gradient finite
MOMENTUM = 0.1  # a batch's part in a running average
Extremes = tuple[Tensor, Tensor]


# ---- extreme values, of the whole batch where several processes have a part of it ----------------------------------


def _axes(x: Tensor) -> tuple[int, ...]:
    """All but the channels'."""
    return (0, 2, 3) if x.ndim == 4 else (0,)  # noqa: PLR2004


def extremes(x: Tensor, signed: bool) -> Extremes:
    """Least and greatest value of a batch (eq. 7)."""
    return (least(x, ()) if signed else x.new_zeros(())), greatest(x, ())


def channel_mean(x: Tensor, signed: bool) -> Extremes:
    """Means over the channels of each channel's least and greatest value (eq. 8)."""
    return (least(x, _axes(x)).mean() if signed else x.new_zeros(())), greatest(x, _axes(x)).mean()


def three_sigma(x: Tensor, signed: bool) -> Extremes:
    """Mean and three standard deviations of a batch (eq. 9)."""
    mean = mean_of_parts(x.mean())
    if processes() == 1:
        spread = 3 * x.std(correction=0)
    else:
        spread = 3 * mean_of_parts((x - mean).square().mean()).clamp_min(MIN_VARIANCE).sqrt()
    return (mean - spread if signed else x.new_zeros(())), mean + spread


# each takes a tensor and whether it may be negative; if not, its least value is 0
ESTIMATORS: dict[str, Callable[[Tensor, bool], Extremes]] = {
    "channel-mean": channel_mean,
    "extremes": extremes,
    "three-sigma": three_sigma,
}


# ---- the quantizer -------------------------------------------------------------------------------------------------


class QuantizeBatch(Function):
    """x_hat = (clamp(round(x / s) + z, 0, hi) - z) * s, z = round(o), straight-through.

    Gradient of s: code - x / s inside the range, the bound outside; of o: -s where x is clipped, 0 elsewhere. Neither
    is scaled: g and b have no unit, and with LSQ's factor they would hardly move.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, hi: int) -> Tensor:
        zero_point = whole(offset)
        low, high = -zero_point, hi - zero_point
        out = (x / step).clamp_(low, high).round_().mul_(step)
        ctx.save_for_backward(x, out)
        ctx.numbers = (float(step), low, high)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, out = ctx.saved_tensors
        s, low, high = ctx.numbers
        through = through_range(grad, x, (low - BORDER) * s, (high + BORDER) * s)
        of_step = (inner_product(grad, out) - inner_product(through, x)).div(s)
        of_offset = (through.sum() - grad.sum()).mul(s)
        return through, of_step.reshape(()), of_offset.reshape(()), None


def quantize_batch(x: Tensor, step: Tensor, offset: Tensor, hi: int) -> Tensor:
    """Typed front of QuantizeBatch; same shape as `x`."""
    return QuantizeBatch.apply(x, step, offset, hi)


class BatchQuantizer(ActivationQuantizer):
    """See the module's docstring. Outside training it uses extreme values that calibration averaged.

    Tensors of 8 bits take the extremes of the whole batch: their codes are fine enough, and nothing is clipped.
    Gradients flow through the extreme values of lower widths alone. Without `affine` there is no g and b.
    """

    def __init__(self, bits: int, signed: bool, estimator: str, affine: bool = True) -> None:
        super().__init__(bits, signed)
        del self.step  # D * g instead
        self.estimate = extremes if bits == MAX_BITS else ESTIMATORS[estimator]
        self.affine = affine
        if affine:
            self.gamma = nn.Parameter(torch.ones(()))
            self.beta = nn.Parameter(torch.zeros(()))
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.batches = 0  # behind the averages `low` and `high`
        self.collecting = False

    def reset_extremes(self) -> None:
        """Forget the averages; until `eval` is called again, every batch is estimated for itself and counted."""
        self.collecting, self.batches = True, 0
        self.ready.fill_(False)
        self.training = True

    def train(self, mode: bool = True) -> BatchQuantizer:
        """As any module's; it ends collecting."""
        self.collecting = False
        super().train(mode)
        return self

    def scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Step D * g, and the offset z + b, from extreme values: scalars."""
        delta = (high - low).clamp_min(MIN_SPAN) / self.hi
        zero_point = (-(low.detach() / delta.detach()).round()).clamp(0, self.hi)
        if not self.affine:
            return delta, zero_point
        return delta * self.gamma, (zero_point + self.beta).clamp(0, self.hi)

    def _extremes(self, x: Tensor) -> Extremes:
        if not self.training:
            if not self.ready:
                raise ModelError("BatchQuant's extreme values were not estimated: calibrate the network for this spec")
            return self.low, self.high
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.bits < MAX_BITS):
            low, high = self._of_batch(x)
        if self.collecting:
            with torch.no_grad():
                self.batches += 1
                self.low += (low - self.low) / self.batches
                self.high += (high - self.high) / self.batches
                self.ready.fill_(True)
        return low, high

    def _of_batch(self, x: Tensor) -> Extremes:
        """This batch's extreme values, moved so that the grid holds zero."""
        low, high = self.estimate(x, self.signed)
        return low.clamp_max(0.0), high.clamp_min(0.0)

    @property
    def clips_relu(self) -> bool:
        """False: a learned offset lets codes below the zero point stand for negative values."""
        return False

    def forward(self, x: Tensor, ceiling: float = math.inf) -> Tensor:
        """The dequantized codes of `x`; `ceiling` is for quantizers that clip a Relu's input."""
        x = x.float()  # under autocast a convolution gives bfloat16
        return quantize_batch(x, *self.scale(*self._extremes(x)), self.hi)

    @torch.no_grad()
    def frozen(self, clip: bool) -> Quantizer:
        """The integer quantizer of the calibrated network."""
        if not self.ready:
            raise ModelError("BatchQuant's extreme values were not estimated: calibrate the network for this spec")
        step, offset = self.scale(self.low, self.high)
        return Quantizer(float(step), int(offset.round()), 0, self.hi if clip else 255, clip)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the factor positive and the offset among the codes."""
        if self.affine:
            self.gamma.clamp_(min=MIN_FACTOR)
            self.beta.clamp_(-self.hi, self.hi)


class RunningQuantizer(BatchQuantizer):
    """Quantizes by running averages of each batch's least and greatest value, in training too.

    No gradient flows through them. They are not estimated anew for a subnet, but for a tensor that training never saw.
    """

    def __init__(self, bits: int, signed: bool, affine: bool = True) -> None:
        super().__init__(bits, signed, "extremes", affine)

    def reset_extremes(self) -> None:
        """Keep the averages of training."""
        if not self.ready:
            self.training = True

    @torch.no_grad()
    def _extremes(self, x: Tensor) -> Extremes:
        if self.training:
            rate = MOMENTUM if self.ready else 1.0
            for average, found in zip((self.low, self.high), self._of_batch(x), strict=True):
                average.lerp_(found, rate)
            self.ready.fill_(True)
            return self.low, self.high
        return super()._extremes(x)
