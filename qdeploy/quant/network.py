"""QuantNet: the network of vertical layering, every width in one module; with one width plain LSQ.

Batch norm and activation steps are separate for each width (section 4.2.2); weights and weight steps are shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from qdeploy.frozen import WeightBits
from qdeploy.quant.graph import Graph, Step
from qdeploy.quant.grid import container_bits
from qdeploy.quant.layers import MIN_STEP, ActivationQuantizer, WeightQuantizer
from qdeploy.quant.simulated import MIN_NORM_FACTOR, LayerCodes, SimulatedNet, safe
from qdeploy.recipe import Quantization
from qdeploy.space import LayerSpace, SubnetSpec


class QuantNet(SimulatedNet):
    """Weights of every width are prefixes of one top code; see the module's docstring."""

    def __init__(
        self, network: nn.Module, graph: Graph, name: str, choice: Quantization, signed_input: bool = False
    ) -> None:
        activations = choice.widths if choice.activation_bits == "same" else (8,)
        super().__init__(network, graph, name, activations, signed_input)
        self.choice = choice
        self.float_ends = choice.first_last == "float"
        self.weights = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self.streams = nn.ModuleDict()
        self.lows = nn.ModuleDict()
        for step in graph.layers:
            self._add_layer(step)
        for tensor, place in self.placements.items():
            if self.has_stream_quantizer(tensor):
                self.streams[safe(tensor)] = self._per_width(place.signed, low=False)
            if place.low:
                self.lows[safe(tensor)] = self._per_width(place.signed, low=True)

    def _add_layer(self, step: Step) -> None:
        layer = cast("nn.Conv2d | nn.Linear", step.module)
        if not self.is_float(step):
            top = 8 if step.name in self.fixed else self.choice.widths[-1]
            self.weights[safe(step.name)] = WeightQuantizer(layer.weight, top, self.choice.compensation)
        if step.norm is not None:
            own = nn.ModuleDict()
            for width in self.choice.widths:
                norm = nn.BatchNorm2d(step.norm.num_features, step.norm.eps, step.norm.momentum, step.norm.affine)
                norm.load_state_dict(step.norm.state_dict())
                own[str(width)] = norm
            self.norms[safe(step.name)] = own

    def _per_width(self, signed: bool, low: bool) -> nn.ModuleDict:
        return nn.ModuleDict({str(w): ActivationQuantizer(w if low else 8, signed) for w in self.choice.widths})

    # ---- specs -------------------------------------------------------------------------------------------------

    @property
    def widths(self) -> tuple[int, ...]:
        return self.choice.widths

    def layer_space(self, step: Step) -> LayerSpace:
        return LayerSpace(step.name, self.choice.widths, self.activation_choices)

    def uniform(self, width: int) -> SubnetSpec:
        activations = width if self.choice.activation_bits == "same" else 8
        bits = {s.name: (8, 8) if s.name in self.fixed else (width, activations) for s in self.graph.layers}
        return SubnetSpec.build(self.name, bits)

    @property
    def learned_in(self) -> tuple[SubnetSpec, ...]:
        return tuple(self.uniform(width) for width in self.choice.widths)

    def width_of(self, step: Step, spec: SubnetSpec) -> int:
        """Which width's own parameters (batch norm, 8-bit steps) belong to a step under `spec`.

        A layer's own weight width; for the fixed layers and for operators without weights the network's median width.
        """
        if step.op in ("conv", "linear") and step.name not in self.fixed:
            return spec[step.name].weight_bits
        free = sorted(entry.weight_bits for entry in spec.layers if entry.layer not in self.fixed)
        return free[len(free) // 2] if free else self.choice.widths[-1]

    # ---- what a spec selects -----------------------------------------------------------------------------------

    def norm(self, step: Step, spec: SubnetSpec) -> nn.BatchNorm2d | None:
        if step.norm is None:
            return None
        own = cast(nn.ModuleDict, self.norms[safe(step.name)])
        return cast(nn.BatchNorm2d, own[str(self.width_of(step, spec))])

    def stream_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer | None:
        if safe(tensor) not in self.streams:
            return None
        own = cast(nn.ModuleDict, self.streams[safe(tensor)])
        return cast(ActivationQuantizer, own[str(self.width_of(self.steps[tensor], spec))])

    def low_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer:
        own = cast(nn.ModuleDict, self.lows[safe(tensor)])
        return cast(ActivationQuantizer, own[str(self.low_width(tensor, spec))])

    def weight_quantizer(self, step: Step) -> WeightQuantizer:
        """The quantizer of a layer's weights; KeyError for a layer left in float."""
        return cast(WeightQuantizer, self.weights[safe(step.name)])

    def weight(self, step: Step, spec: SubnetSpec) -> Tensor:
        layer = cast("nn.Conv2d | nn.Linear", step.module)
        if self.is_float(step):
            return layer.weight
        return cast(Tensor, self.weight_quantizer(step)(layer.weight, spec[step.name].weight_bits))

    def layer_codes(self, step: Step, spec: SubnetSpec) -> LayerCodes:
        layer, quantizer = cast("nn.Conv2d | nn.Linear", step.module), self.weight_quantizer(step)
        bits = WeightBits(spec[step.name].weight_bits, quantizer.top, container_bits(quantizer.top))
        return LayerCodes(quantizer.codes(layer.weight, bits.bits), quantizer.container_step, 0, bits)

    # ---- parameters --------------------------------------------------------------------------------------------

    def own_parameters(self, width: int) -> list[nn.Parameter]:
        """Parameters that belong to one width alone: its batch norms and activation steps."""
        found: list[nn.Parameter] = []
        for group in (self.norms, self.streams, self.lows):
            for own in group.values():
                found += list(cast(nn.ModuleDict, own)[str(width)].parameters())
        return found

    def shared_parameters(self) -> list[nn.Parameter]:
        """Weights, biases and weight steps: what every width trains."""
        found: list[nn.Parameter] = []
        for step in self.graph.layers:
            found += list(cast(nn.Module, step.module).parameters())
        return found + list(self.weights.parameters())

    @torch.no_grad()
    def project(self) -> None:
        """Keep steps and batch-norm factors positive: runtimes refuse negative scales."""
        groups = (self.weights, self.streams, self.lows)
        steps: list[Tensor] = [p for group in groups for name, p in group.named_parameters() if name.endswith("step")]
        factors: list[Tensor] = [m.weight for m in self.norms.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
        torch._foreach_clamp_min_(steps, MIN_STEP)
        if factors:
            torch._foreach_clamp_min_(factors, MIN_NORM_FACTOR)


def levels(net: QuantNet) -> Mapping[int, SubnetSpec]:
    """The uniform specs of all trained widths."""
    return {width: net.uniform(width) for width in net.choice.widths}
