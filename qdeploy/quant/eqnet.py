"""EQNet: elastic quantizers. Every layer has learned steps for each width, granularity and symmetry.

Weights and batch norms are shared by all specs; batch-norm statistics are estimated anew for each spec that is used.
The steps of a width are its own, so its codes are no prefixes of another width's: every precision is a file of its own.

Zero points are integers in training too (the offset is rounded, straight-through): one for a weight tensor, also where
steps are per channel, and one for an activation tensor. Activations behind a Relu have zero point 0; signed ones always
learn theirs, since integer kernels take it for nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.frozen import Quantizer, WeightBits
from qdeploy.quant.functions import quantize_affine
from qdeploy.quant.graph import Graph, Step
from qdeploy.quant.grid import container_bits
from qdeploy.quant.layers import MIN_STEP, ActivationQuantizer
from qdeploy.quant.lp_error import GROUP_SAMPLE, lowest_error_steps, lowest_error_zero_point
from qdeploy.quant.parallel import processes
from qdeploy.quant.simulated import MIN_NORM_FACTOR, LayerCodes, SimulatedNet, safe
from qdeploy.recipe import EQNetQuantization
from qdeploy.space import MAX_BITS, LayerBits, LayerSpace, SubnetSpec


def signed_range(bits: int) -> tuple[int, int]:
    """-2^(b-1), 2^(b-1) - 1."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


class ElasticWeightQuantizer(nn.Module):
    """Steps [widths, 1] or [widths, O], and offsets [widths] where asymmetric, for each granularity and symmetry."""

    def __init__(
        self, weight: Tensor, bits: tuple[int, ...], granularities: tuple[str, ...], symmetries: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.bits = bits
        self.steps = nn.ParameterDict()
        self.offsets = nn.ParameterDict()
        flat = weight.detach().reshape(weight.shape[0], -1)
        for symmetry in symmetries:
            points = [
                lowest_error_zero_point(flat.reshape(-1), *signed_range(b)) if symmetry == "asymmetric" else 0
                for b in bits
            ]
            for granularity in granularities:
                groups = flat if granularity == "channel" else flat.reshape(1, -1)
                rows = [lowest_error_steps(groups, *signed_range(b), z)[0] for b, z in zip(bits, points, strict=True)]
                self.steps[f"{granularity} {symmetry}"] = nn.Parameter(torch.stack(rows))
                if symmetry == "asymmetric":
                    self.offsets[f"{granularity} {symmetry}"] = nn.Parameter(torch.tensor(points, dtype=torch.float32))

    def _select(self, entry: LayerBits, ndim: int) -> tuple[Tensor, Tensor]:
        """Step that broadcasts against the weight, and offset."""
        key, row = (
            f"{entry.granularity or 'tensor'} {entry.symmetry or 'symmetric'}",
            self.bits.index(entry.weight_bits),
        )
        step = self.steps[key][row]
        offset = self.offsets[key][row] if key in self.offsets else torch.zeros(())
        return (step.reshape(-1, *[1] * (ndim - 1)) if step.numel() > 1 else step.reshape(())), offset

    def forward(self, weight: Tensor, entry: LayerBits) -> Tensor:
        step, offset = self._select(entry, weight.ndim)
        return quantize_affine(weight, step, offset, *signed_range(entry.weight_bits))

    @torch.no_grad()
    def codes(self, weight: Tensor, entry: LayerBits) -> LayerCodes:
        """Codes and zero point in container units: as fine as int8 allows, for the sake of the int32 bias."""
        step, offset = self._select(entry, weight.ndim)
        bits = entry.weight_bits
        lo, hi = signed_range(bits)
        zero_point = int(offset.round())
        raw = (weight / step).round().clamp(lo - zero_point, hi - zero_point).to(torch.int32).numpy() + zero_point
        container = container_bits(bits)
        spare = container - bits
        unit = step.double().numpy().reshape(-1) if step.ndim else step.double().numpy()
        return LayerCodes(
            (raw << spare).astype(np.int8), unit / (1 << spare), zero_point << spare, WeightBits(bits, bits, container)
        )

    @torch.no_grad()
    def project(self) -> None:
        """Keep steps positive and offsets among the codes."""
        for step in self.steps.values():
            step.clamp_(min=MIN_STEP)
        low, high = (torch.tensor([float(signed_range(b)[end]) for b in self.bits]) for end in (0, 1))
        for offset in self.offsets.values():
            offset.copy_(torch.minimum(torch.maximum(offset, low), high))


class ElasticActivationQuantizer(ActivationQuantizer):
    """As its base, but that a signed tensor's zero point is learned, and both start at the lowest L2.4 error."""

    def __init__(self, bits: int, signed: bool) -> None:
        super().__init__(bits, signed)
        if signed:
            self.offset = nn.Parameter(torch.tensor(float(self.zero_point)))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        values = x.detach().reshape(-1)
        values = values[:: -(-values.numel() // GROUP_SAMPLE)]
        zero_point = lowest_error_zero_point(values, 0, self.hi) if self.signed else 0
        step, _ = lowest_error_steps(values[None], 0, self.hi, zero_point)
        self.step.copy_(step[0])
        if self.signed:
            self.offset.fill_(zero_point)
        self.ready.fill_(True)

    def quantize(self, x: Tensor, ceiling: float = math.inf) -> Tensor:
        if self.signed:  # nothing with a Relu comes here, so there is no ceiling
            return quantize_affine(x, self.step, self.offset, 0, self.hi, processes())
        return super().quantize(x, ceiling)

    def frozen(self, clip: bool) -> Quantizer:
        found = super().frozen(clip)
        return replace(found, zero_point=int(self.offset.detach().round())) if self.signed else found

    @torch.no_grad()
    def project(self) -> None:
        """Keep the step positive and the offset among the codes."""
        self.step.clamp_(min=MIN_STEP)
        if self.signed:
            self.offset.clamp_(0, self.hi)


class EQNet(SimulatedNet):
    """See the module's docstring. Activation steps belong to a tensor and a width; 8-bit streams have one step each."""

    def __init__(self, network: nn.Module, graph: Graph, name: str, choice: EQNetQuantization) -> None:
        super().__init__(network, graph, name, choice.activation_bits)
        self.choice = choice
        self.weights = nn.ModuleDict()
        self.streams = nn.ModuleDict()
        self.lows = nn.ModuleDict()
        for step in graph.layers:
            weight = cast("nn.Conv2d | nn.Linear", step.module).weight
            fixed = step.name in self.fixed
            bits, granularities, symmetries = (
                ((MAX_BITS,), ("tensor",), ("symmetric",))
                if fixed
                else (choice.weight_bits, choice.granularity, choice.symmetry)
            )
            self.weights[safe(step.name)] = ElasticWeightQuantizer(weight, bits, granularities, symmetries)
        for tensor, place in self.placements.items():
            if self.has_stream_quantizer(tensor):
                self.streams[safe(tensor)] = ActivationQuantizer(MAX_BITS, place.signed)
            if place.low:
                own = {str(b): ElasticActivationQuantizer(b, place.signed) for b in choice.activation_bits}
                self.lows[safe(tensor)] = nn.ModuleDict(own)

    # ---- specs -------------------------------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        return self.choice.weight_bits

    @property
    def only(self) -> SubnetSpec | None:
        return self.choice.only

    def layer_space(self, step: Step) -> LayerSpace:
        c = self.choice
        return LayerSpace(step.name, c.weight_bits, c.activation_bits, c.granularity, c.symmetry)

    def uniform(self, width: int, granularity: str | None = None, symmetry: str | None = None) -> SubnetSpec:
        """Every layer but the first and the last with `width` bits, `granularity` and `symmetry` (the first choices).

        Activations have that width too, or the next one above it that they may have, or their greatest.
        """
        activations = next((b for b in self.choice.activation_bits if b >= width), self.choice.activation_bits[-1])
        chosen = granularity or self.choice.granularity[0], symmetry or self.choice.symmetry[0]
        return self.uniform_pair(width, activations, *chosen)

    def uniform_pair(self, weight_bits: int, activation_bits: int, granularity: str, symmetry: str) -> SubnetSpec:
        """The same choices in every layer but the first and the last."""
        chosen = (weight_bits, activation_bits, granularity, symmetry)
        names = [step.name for step in self.graph.layers]
        layers = tuple(LayerBits(name, 8, 8) if name in self.fixed else LayerBits(name, *chosen) for name in names)
        spec = SubnetSpec(self.name, layers)
        self.check_spec(spec)
        return spec

    @property
    def learned_in(self) -> tuple[SubnetSpec, ...]:
        return ()

    # ---- what a spec selects -----------------------------------------------------------------------------------

    def norm(self, step: Step, spec: SubnetSpec) -> nn.BatchNorm2d | None:
        return step.norm

    def stream_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer | None:
        return cast(ActivationQuantizer, self.streams[safe(tensor)]) if safe(tensor) in self.streams else None

    def low_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer:
        own = cast(nn.ModuleDict, self.lows[safe(tensor)])
        return cast(ActivationQuantizer, own[str(self.low_width(tensor, spec))])

    def weight(self, step: Step, spec: SubnetSpec) -> Tensor:
        quantizer, layer = self.weights[safe(step.name)], cast("nn.Conv2d | nn.Linear", step.module)
        return cast(Tensor, quantizer(layer.weight, spec[step.name]))

    def layer_codes(self, step: Step, spec: SubnetSpec) -> LayerCodes:
        quantizer = cast(ElasticWeightQuantizer, self.weights[safe(step.name)])
        return quantizer.codes(cast("nn.Conv2d | nn.Linear", step.module).weight, spec[step.name])

    # ---- parameters --------------------------------------------------------------------------------------------

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """Steps and offsets."""
        return [*self.weights.parameters(), *self.streams.parameters(), *self.lows.parameters()]

    def network_parameters(self) -> list[nn.Parameter]:
        """Weights, biases, batch norms."""
        return list(self.network.parameters())

    @torch.no_grad()
    def project(self) -> None:
        """Keep steps and batch-norm factors positive (runtimes refuse negative scales) and offsets among the codes."""
        for module in self.modules():
            if isinstance(module, ElasticWeightQuantizer | ActivationQuantizer):
                module.project()
        for step in self.graph.steps:
            if step.norm is not None and step.norm.affine:
                step.norm.weight.clamp_(min=MIN_NORM_FACTOR)
