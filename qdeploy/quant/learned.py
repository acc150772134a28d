"""Quantizers whose width is learned: a step and a range each, of every output channel or of a tensor (eqs. 1 and 2 of
Schaefer et al. 2023, "Edge inference with fully differentiable quantized mixed precision neural networks").

Both are kept as logarithms to base 2, so that one update rule fits tensors of any scale. The width follows from them:
codes reach n = round(range / step), which takes ceil(log2(n + 1)) bits, and one for the sign.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.errors import ModelError
from qdeploy.frozen import Quantizer, WeightBits
from qdeploy.quant.gradients import GradientScaling, code_width, quantize_range
from qdeploy.quant.grid import container_bits
from qdeploy.quant.layers import ActivationQuantizer
from qdeploy.quant.simulated import LayerCodes
from qdeploy.space import MAX_BITS, MIN_BITS

SIGMAS = 3.0  # Gaussian calibration of weights: mean +- 3 deviations
LONGEST = 0.5  # octaves that an update may move
LEAST_RANGE = 1e-3  # of a channel, as a part of the layer's greatest: a bias must fit int32 at its scale
TINY = 1e-12


class LearnedRange(nn.Module):
    """Step and range of one tensor [], or of each output channel [O]; gradients wait in `pending` for an update."""

    def __init__(self, shape: tuple[int, ...], signed: bool) -> None:
        super().__init__()
        self.signed_codes = signed
        self.log_step = nn.Parameter(torch.zeros(shape))
        self.log_range = nn.Parameter(torch.zeros(shape))
        self.pending: Tensor
        self.register_buffer("pending", torch.zeros(2, *shape))

    def reach(self, bits: int) -> int:
        """The greatest code of a width."""
        return (1 << (bits - int(self.signed_codes))) - 1

    @property
    def octaves(self) -> Tensor:
        """log2(range / step)."""
        return self.log_range - self.log_step

    def _legal(self, octaves: Tensor) -> Tensor:
        """Within what the least and the greatest width can hold."""
        least = 1 if self.signed_codes else self.reach(MIN_BITS - 1) + 1
        return octaves.clamp(math.log2(least), math.log2(self.reach(MAX_BITS)))

    @property
    def width(self) -> Tensor:
        """Bits of the codes, whole numbers of the parameters' shape; differentiable."""
        return code_width(self.octaves, self.signed_codes)

    def coarser_width(self, coarser: float) -> Tensor:
        """The width that `settle` would leave."""
        return code_width(self._legal(self.octaves - coarser), self.signed_codes)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The greatest code n, whole numbers of the parameters' shape."""
        return self.octaves.exp2().round()

    @torch.no_grad()
    def start(self, reach: Tensor, bits: int) -> None:
        """Begin with a range that reaches `reach`, at a width."""
        self.log_range.copy_(reach.log2())
        self.set_width(bits)

    @torch.no_grad()
    def set_width(self, bits: int) -> None:
        """Change the step to the range's at a width."""
        self.log_step.copy_(self.log_range - math.log2(self.reach(bits)))

    @torch.no_grad()
    def collect(self) -> None:
        """Add this step's gradients to those that wait for the next update."""
        for row, parameter in enumerate((self.log_step, self.log_range)):
            if parameter.grad is not None:
                self.pending[row] += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def keep_width(self) -> None:
        """Let the gradients that wait move step and range alike."""
        self.pending.copy_(self.pending.sum(0, keepdim=True).expand_as(self.pending))

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Go `rate` octaves for a gradient of 1 against those that wait; the width stays legal."""
        change = (rate * self.pending).clamp(-LONGEST, LONGEST)
        octaves = self._legal(self.octaves - (change[1] - change[0]))
        self.log_step.sub_(change[0])
        self.log_range.copy_(self.log_step + octaves)
        self.pending.zero_()

    @torch.no_grad()
    def settle(self, coarser: float) -> None:
        """End learning the width: that of steps `coarser` octaves larger, all of whose codes are then used."""
        widths = self.coarser_width(coarser) - int(self.signed_codes)
        self.log_step.copy_(self.log_range - (widths.exp2() - 1).log2())


class LearnedWeight(LearnedRange):
    """The weights of one layer, a step and a range for each output channel."""

    def __init__(self, weight: Tensor, bits: int, scaling: GradientScaling) -> None:
        super().__init__((weight.shape[0],), signed=True)
        self.scaling = scaling
        self.channel = weight[0].numel()
        flat = weight.detach().reshape(weight.shape[0], -1)
        mean, deviation = flat.mean(1), flat.std(1, correction=0)
        reach = mean.abs() + SIGMAS * deviation
        self.start(reach.clamp_min(max(LEAST_RANGE * float(reach.max()), TINY)), bits)

    def _shaped(self, values: Tensor, weight: Tensor) -> Tensor:
        return values.exp2().reshape(-1, *[1] * (weight.ndim - 1))

    def forward(self, weight: Tensor) -> Tensor:
        """The dequantized codes of `weight` [O, ...]."""
        step, bound = (self._shaped(values, weight) for values in (self.log_step, self.log_range))
        return quantize_range(weight.float(), step, bound, True, self.scaling)

    @torch.no_grad()
    def layer_codes(self, weight: Tensor) -> LayerCodes:
        """Container codes: a channel of fewer bits than the widest stands on a coarser grid of the same container."""
        step, reach = self._shaped(self.log_step, weight), self.codes().reshape(-1, *[1] * (weight.ndim - 1))
        raw = torch.minimum(torch.maximum((weight / step).round(), -reach), reach).to(torch.int32).numpy()
        widths = self.width.to(torch.int32).numpy()
        top = int(widths.max())
        spare = container_bits(top) - widths
        codes = raw << spare.reshape(-1, *[1] * (weight.ndim - 1))
        unit = self.log_step.exp2().double().numpy() * 2.0**-spare
        channels = tuple(int(width) for width in widths)
        return LayerCodes(codes.astype(np.int8), unit, 0, WeightBits(top, top, container_bits(top), channels))


class LearnedActivation(ActivationQuantizer):
    """One activation tensor. Its range starts at a percentile of what the first batch holds."""

    def __init__(self, bits: int, signed: bool, percentile: float, scaling: GradientScaling) -> None:
        super().__init__(bits, signed)
        del self.step  # that of `range` instead
        self.range = LearnedRange((), signed)
        self.percentile, self.scaling = percentile, scaling
        self.range.start(torch.ones(()), bits)

    def initialise(self, x: Tensor) -> None:
        """Take the percentile of |x|."""
        values = x.detach().abs().reshape(-1)
        above = max(1, round(values.numel() * (1 - self.percentile / 100)))
        self.range.start(values.topk(above).values[-1].clamp_min(1e-5), self.bits)
        self.ready.fill_(True)

    def quantize(self, x: Tensor, ceiling: float = math.inf) -> Tensor:
        """The dequantized codes of `x`, values above `ceiling` taken as `ceiling`."""
        x = x.float() if math.isinf(ceiling) else x.float().clamp_max(ceiling)
        step, bound = self.range.log_step.exp2(), self.range.log_range.exp2()
        return quantize_range(x, step, bound, self.signed, self.scaling)

    def set_width(self, bits: int) -> None:
        """Begin at a width."""
        self.bits = bits
        self.range.set_width(bits)

    def project(self) -> None:
        """A logarithm has no illegal values, and an update keeps the width legal."""

    @torch.no_grad()
    def frozen(self, clip: bool) -> Quantizer:
        """The integer quantizer that this one simulates; its codes are clipped to the learned range."""
        if not self.ready:
            raise ModelError("a quantizer never saw data: train or calibrate the network first")
        reach, bits = int(self.range.codes()), int(self.range.width)
        zero_point = 1 << (bits - 1) if self.signed else 0
        low = zero_point - reach if self.signed else 0
        return Quantizer(float(self.range.log_step.exp2()), zero_point, low, zero_point + reach, True)
