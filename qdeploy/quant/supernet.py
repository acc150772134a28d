"""BatchQuantNet: any architecture of an elastic network, every layer at any width, from one set of weights (QFA).

Weights are quantized with one step a width (LSQ), or as prefixes of one top code (`weights = "vertical"`, vertical
layering inside the supernet). A step belongs to a whole tensor, so quantizing commutes with slicing: a subnet's codes
are a slice of the largest network's. Batch norm is shared by all subnets and estimated anew for each that is used.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qdeploy.errors import ModelError
from qdeploy.frozen import WeightBits
from qdeploy.nets.elastic import Blocks, Supernet, resized
from qdeploy.quant.batchquant import BatchQuantizer, RunningQuantizer
from qdeploy.quant.eqnet import ElasticActivationQuantizer, ElasticWeightQuantizer
from qdeploy.quant.graph import Graph, Step, read_graph
from qdeploy.quant.grid import container_bits
from qdeploy.quant.layers import MIN_STEP, ActivationQuantizer, WeightQuantizer
from qdeploy.quant.simulated import MIN_NORM_FACTOR, LayerCodes, SimulatedNet, safe
from qdeploy.recipe import BatchQuantization
from qdeploy.space import FLOAT_BITS, MAX_BITS, Architecture, LayerBits, LayerSpace, Reference, SubnetSpec

BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.")
KEPT_TEMPLATES = 64


class BatchQuantNet(SimulatedNet):
    """`network` is a plain float network, or a Supernet, whose largest network `graph` then describes.

    Of an elastic network only the blocks are searched; the layers around them have 8 bits. `shared` are the quantizers
    of a larger network, which this one, a subnet of it, uses; left out, it has its own.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: Graph,
        name: str,
        choice: BatchQuantization,
        fixed: Collection[str] = (),
        shared: BatchQuantNet | None = None,
    ) -> None:
        elastic = isinstance(network, Supernet)
        outside = [step.name for step in graph.layers if elastic and not BLOCK.match(step.name)]
        super().__init__(network, graph, name, choice.activation_bits, fixed=(*fixed, *outside))
        self.choice = choice
        self.weights, self.streams, self.lows = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self._templates: dict[Architecture, BatchQuantNet] = {}
        for step in graph.layers:
            key = safe(step.name)
            self.weights[key] = self._weight_quantizer(step) if shared is None else shared.weights[key]
        for tensor, place in self.placements.items():
            key = safe(tensor)
            if self.has_stream_quantizer(tensor):
                own = shared.streams[key] if shared is not None else None
                self.streams[key] = own or self._activation_quantizer(MAX_BITS, place.signed)
            if place.low:
                self.lows[key] = self._low_quantizers(place.signed) if shared is None else shared.lows[key]
        if shared is None:
            self._fit_fixed_steps()

    def _weight_quantizer(self, step: Step) -> nn.Module:
        weight = cast("nn.Conv2d | nn.Linear", step.module).weight
        fixed = step.name in self.fixed
        if self.choice.weights == "vertical":
            return WeightQuantizer(weight, MAX_BITS if fixed else self.choice.weight_bits[-1])
        return ElasticWeightQuantizer(
            weight, (MAX_BITS,) if fixed else self.choice.weight_bits, ("tensor",), ("symmetric",)
        )

    @torch.no_grad()
    def _fit_fixed_steps(self) -> None:
        """Steps of 8-bit layers hold the greatest weight; they are not learned: one update could turn so small a number
        around."""
        for step in self.graph.layers:
            if step.name in self.fixed:
                weight = cast("nn.Conv2d | nn.Linear", step.module).weight
                fitted = weight.abs().amax().clamp_min(MIN_STEP) / ((1 << (MAX_BITS - 1)) - 1)
                for parameter in self.weights[safe(step.name)].parameters():
                    parameter.requires_grad_(False).fill_(fitted)

    def _activation_quantizer(self, bits: int, signed: bool) -> ActivationQuantizer:
        estimator, affine = self.choice.estimator, self.choice.affine
        if estimator == "learned":
            return ElasticActivationQuantizer(bits, signed)
        if estimator == "running":
            return RunningQuantizer(bits, signed, affine)
        return BatchQuantizer(bits, signed, estimator, affine)

    def _low_quantizers(self, signed: bool) -> nn.ModuleDict:
        return nn.ModuleDict({str(b): self._activation_quantizer(b, signed) for b in self.choice.activation_bits})

    # ---- specs -------------------------------------------------------------------------------------------------

    @property
    def supernet(self) -> Supernet | None:
        """The elastic float network, None where the architecture is fixed."""
        return self.network if isinstance(self.network, Supernet) else None

    @property
    def widths(self) -> tuple[int, ...]:
        return self.choice.weight_bits

    @property
    def only(self) -> SubnetSpec | None:
        return self.choice.only

    @property
    def learned_in(self) -> tuple[SubnetSpec, ...]:
        return ()

    def layer_space(self, step: Step) -> LayerSpace:
        return LayerSpace(step.name, self.choice.weight_bits, self.choice.activation_bits)

    @property
    def shape_choices(self) -> dict[str, Any]:
        if self.supernet is None:
            return {}
        elastic = self.supernet.elastic
        names = ("depths", "kernels", "expands", "resolutions", "widths")
        return {name: getattr(elastic, name) for name in names}

    def block_of(self, step: Step) -> Reference | None:
        found = BLOCK.match(step.name) if self.supernet is not None else None
        return (int(found[1]), int(found[2])) if found else None

    def uniform(self, width: int) -> SubnetSpec:
        """The largest network, every layer that is not fixed with `width` bits.

        Activations have that width too, or the next one above it that they may have, or their greatest.
        """
        activations = next((b for b in self.choice.activation_bits if b >= width), self.choice.activation_bits[-1])
        spec = self.uniform_of(self.supernet.elastic.greatest if self.supernet else None, width, activations)
        self.check_spec(spec)
        return spec

    def uniform_blocks(self, blocks: Blocks | None, weight_bits: int, activation_bits: int) -> SubnetSpec:
        """`uniform_of` the network of `blocks` at the greatest resolution and base width."""
        chosen = None if self.supernet is None or blocks is None else self.supernet.elastic.with_shape(blocks)
        return self.uniform_of(chosen, weight_bits, activation_bits)

    def uniform_of(self, architecture: Architecture | None, weight_bits: int, activation_bits: int) -> SubnetSpec:
        """The network of `architecture` (None where it is fixed) with the same widths in all free layers."""
        blocks = () if architecture is None else architecture.stages
        present = [
            layer.layer
            for layer in self.space.layers
            if not layer.block or layer.block[1] < len(blocks[layer.block[0]])
        ]
        rows = [
            LayerBits(name, *((MAX_BITS, MAX_BITS) if name in self.fixed else (weight_bits, activation_bits)))
            for name in present
        ]
        return SubnetSpec(self.name, tuple(rows), architecture)

    def input_of(self, images: Tensor, spec: SubnetSpec) -> Tensor:
        return images if spec.architecture is None else resized(images, spec.architecture.resolution)

    # ---- what a spec selects -----------------------------------------------------------------------------------

    def norm(self, step: Step, spec: SubnetSpec) -> nn.BatchNorm2d | None:
        return step.norm

    def stream_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer | None:
        return cast(ActivationQuantizer, self.streams[safe(tensor)]) if safe(tensor) in self.streams else None

    def low_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer:
        own = cast(nn.ModuleDict, self.lows[safe(tensor)])
        return cast(ActivationQuantizer, own[str(self.low_width(tensor, spec))])

    def weight(self, step: Step, spec: SubnetSpec) -> Tensor:
        weight, entry = cast("nn.Conv2d | nn.Linear", step.module).weight, spec[step.name]
        if entry.weight_bits == FLOAT_BITS:
            return weight
        quantizer = self.weights[safe(step.name)]
        chosen = entry.weight_bits if isinstance(quantizer, WeightQuantizer) else entry
        return cast(Tensor, quantizer(weight, chosen))

    def layer_codes(self, step: Step, spec: SubnetSpec) -> LayerCodes:
        weight, entry = cast("nn.Conv2d | nn.Linear", step.module).weight, spec[step.name]
        quantizer = self.weights[safe(step.name)]
        if isinstance(quantizer, WeightQuantizer):
            bits = WeightBits(entry.weight_bits, quantizer.top, container_bits(quantizer.top))
            return LayerCodes(quantizer.codes(weight, bits.bits), quantizer.container_step, 0, bits)
        return cast(ElasticWeightQuantizer, quantizer).codes(weight, entry)

    # ---- subnets -----------------------------------------------------------------------------------------------

    def _smaller(self, network: nn.Module, shared: BatchQuantNet) -> BatchQuantNet:
        graph = read_graph(network, scoped=True)
        fixed = self.fixed & {step.name for step in graph.layers}
        return BatchQuantNet(network, graph, self.name, self.choice, fixed, shared)

    def _template(self, architecture: Architecture) -> BatchQuantNet:
        """The subnet of `architecture` without memory, with this network's quantizers; the last ones used are kept."""
        assert self.supernet is not None
        architecture = replace(architecture, resolution=None)  # all sizes of images have one
        template = self._templates.pop(architecture, None)
        template = template or self._smaller(self.supernet.template(architecture), self)
        self._templates[architecture] = template
        if len(self._templates) > KEPT_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        return template.train(self.training)

    def subnet(self, spec: SubnetSpec) -> BatchQuantNet:
        """A network of its own for the architecture of `spec`: slices, and quantizers, are copied."""
        if self.supernet is None:
            return copy.deepcopy(self)
        assert spec.architecture is not None
        return copy.deepcopy(self._smaller(self.supernet.copy_of(spec.architecture), self))

    def forward(self, x: Tensor, spec: SubnetSpec, trace: dict[str, Tensor] | None = None) -> Tensor:
        """As SimulatedNet's; the gradients of a smaller architecture go into the slices of the supernet's tensors.

        Images that have another size than `spec`'s are resized.
        """
        x = self.input_of(x, spec)
        if self.supernet is None or self._is_largest(spec):
            return super().forward(x, spec, trace)
        assert spec.architecture is not None
        template = self._template(spec.architecture)
        tensors = {f"network.{name}": tensor for name, tensor in self.supernet.slices(template.network).items()}
        return cast(Tensor, functional_call(template, tensors, (x, spec, trace)))

    def _is_largest(self, spec: SubnetSpec) -> bool:
        if self.supernet is None or spec.architecture is None:
            raise ModelError("the network is elastic: the spec needs an architecture")
        return self.supernet.is_whole(spec.architecture)

    # ---- parameters --------------------------------------------------------------------------------------------

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """Learned steps of weights."""
        return [parameter for parameter in self.weights.parameters() if parameter.requires_grad]

    def residual_parameters(self) -> list[nn.Parameter]:
        """Learned factors, or steps, and offsets of activations."""
        return [*self.streams.parameters(), *self.lows.parameters()]

    def network_parameters(self) -> list[nn.Parameter]:
        """Weights, biases, batch norms, kernel transforms."""
        return list(self.network.parameters())

    @torch.no_grad()
    def project(self) -> None:
        """Keep steps, factors and those of batch norm positive (runtimes refuse negative scales); fit 8-bit steps."""
        for module in self.modules():
            if isinstance(module, ElasticWeightQuantizer | ActivationQuantizer):
                module.project()
            elif isinstance(module, WeightQuantizer):
                module.step.clamp_(min=MIN_STEP)
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.clamp_(min=MIN_NORM_FACTOR)
        self._fit_fixed_steps()
