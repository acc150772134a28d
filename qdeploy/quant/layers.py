"""Quantizers as small torch modules: one learned step each, one way to ask for integers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.errors import ModelError
from qdeploy.frozen import Quantizer
from qdeploy.quant.functions import quantize_activation, quantize_weight
from qdeploy.quant.grid import container_bits, container_codes, midpoint
from qdeploy.quant.parallel import gathered
from qdeploy.space import MAX_BITS

MIN_STEP = 1e-6


class ActivationQuantizer(nn.Module):
    """uint8 quantizer of one tensor at one width, with a learned step.

    Unsigned tensors (behind a Relu) use codes 0..2^b-1 and zero point 0; signed ones 2^(b-1). The step starts from the
    first batch that comes through.
    """

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.zero_point = 1 << (bits - 1) if signed else 0
        self.hi = (1 << bits) - 1
        self.step = nn.Parameter(torch.ones(()))
        self.ready: Tensor
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.observed: list[tuple[float, float]] | None = None  # (mean square, greatest magnitude) of batches seen

    def initialise(self, x: Tensor) -> None:
        """Set the step from one batch: 2 * mean|x| / sqrt(Q_p) below 8 bits (LSQ), max|x| / Q_p at 8."""
        magnitude = x.detach().abs()
        positive = self.hi - self.zero_point
        start = magnitude.max() / positive if self.bits == MAX_BITS else 2 * magnitude.mean() / math.sqrt(positive)
        self.step.data.copy_(start.clamp_min(1e-5))
        self.ready.fill_(True)

    def forward(self, x: Tensor, ceiling: float = math.inf) -> Tensor:
        """The dequantized codes of `x`; an unsigned quantizer may be given the input of a Relu (with a `ceiling`)."""
        if not self.ready or self.observed is not None:
            seen = x.detach() if self.signed else x.detach().clamp(0.0, ceiling)
            if not self.ready:
                self.initialise(gathered(seen.float()))
            if self.observed is not None:
                self.observed.append((float(seen.square().mean()), float(seen.abs().max())))
        return self.quantize(x, ceiling)

    @property
    def clips_relu(self) -> bool:
        """True when codes 0..hi are the clip that a Relu is, so that the Relu need not be computed."""
        return not self.signed

    def quantize(self, x: Tensor, ceiling: float = math.inf) -> Tensor:
        """The dequantized codes of `x`, values above `ceiling` taken as `ceiling`."""
        return quantize_activation(x, self.step, self.zero_point, self.hi, ceiling)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the step positive."""
        self.step.clamp_(min=MIN_STEP)

    def frozen(self, clip: bool) -> Quantizer:
        """The integer quantizer that this one simulates."""
        if not self.ready:
            raise ModelError("a quantizer never saw data: train or calibrate the network first")
        return Quantizer(float(self.step.detach()), self.zero_point, 0, self.hi if clip else 255, clip)


class WeightQuantizer(nn.Module):
    """Weight codes at a top width N with one learned step; every lower width is a truncation (vertical layering).

    With widths = (b,) it is plain LSQ at b bits. The step starts at 2 * mean|w| / sqrt(2^N - 1), one for the tensor.
    """

    def __init__(self, weight: Tensor, top: int, compensation: bool = True) -> None:
        super().__init__()
        self.top, self.compensation = top, compensation
        start = 2 * weight.detach().abs().mean().clamp_min(1e-8) / math.sqrt((1 << top) - 1)
        self.step = nn.Parameter(start.reshape(()).float())

    @torch.no_grad()
    def per_channel(self, weight: Tensor) -> None:
        """Give every output channel the step that its greatest weight needs."""
        greatest = weight.detach().abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        fallback = greatest.max().clamp_min(1e-8)
        self.step = nn.Parameter(torch.where(greatest > 0, greatest, fallback) / ((1 << (self.top - 1)) - 1))

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        container = container_bits(self.top)
        offset = midpoint(bits, self.top) if self.compensation else 0
        fine = 2.0 ** (self.top - container)
        shift, unit = self.top - bits, 1 << (container - bits)
        return quantize_weight(weight, self.step, self.top, shift, unit, offset, fine)

    def top_codes(self, weight: Tensor) -> np.ndarray:
        """Raw codes at the top width, int32, the shape of `weight`."""
        half = 1 << (self.top - 1)
        return (weight.detach() / self.step.detach()).round().clamp(-half, half - 1).to(torch.int32).numpy()

    def codes(self, weight: Tensor, bits: int) -> np.ndarray:
        """int8 container codes at width `bits`."""
        return container_codes(self.top_codes(weight), bits, self.top, self.compensation)

    @property
    def container_step(self) -> np.ndarray:
        """Real value of one container unit, s_N * 2^(N - C): float64 scalar, or [O] where the step is per channel."""
        step = self.step.detach().double().numpy()
        return (step.reshape(-1) if step.ndim else step) * 2.0 ** (self.top - container_bits(self.top))
