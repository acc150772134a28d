"""QuantNet: a quantized network that mirrors a float one, every width in one module.

Where activations are quantized (docs/adr/0004-where-activations-are-quantized.md): a layer's activation width applies
to its input tensor. A tensor that only such layers read has one quantizer of that width. Any other tensor (convolution
outputs before an addition, the residual stream, pooled outputs, the network's output) has 8 bits at every level, and
the layers that read it at a lower width share a second quantizer behind the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.errors import ModelError, RecipeError
from qdeploy.frozen import KEEPS_CODES
from qdeploy.quant.graph import Graph, Step
from qdeploy.quant.layers import ActivationQuantizer, WeightQuantizer
from qdeploy.recipe import Quantization
from qdeploy.space import SubnetSpec

INPUT_SCALE = 1.0 / 255.0  # images are float32 in [0, 1], so input codes are the pixels themselves
MIN_NORM_FACTOR = 1e-3
STREAM = ("add", "global_average_pool")  # the residual stream and pooled outputs have 8 bits at every level
PASSES_SIGN = ("max_pool", "global_average_pool", "flatten", "requantize")


@dataclass(frozen=True)
class Placement:
    """Which quantizers a tensor has: `stream` at 8 bits, `low` at the readers' width, or both."""

    tensor: str
    stream: bool
    low: bool
    signed: bool

    @property
    def low_name(self) -> str:
        """Name of the low-width tensor: its own where the tensor has no 8-bit form."""
        return f"{self.tensor}.low" if self.stream else self.tensor


def _safe(name: str) -> str:
    """torch forbids dots in module names."""
    return name.replace(".", "/")


class QuantNet(nn.Module):
    """Simulates the integer network at any choice of widths; forward takes the choice as an argument.

    `graph` is `read_graph(network)`; `signed_input` says that inputs may be negative. `fixed` names the layers that
    stay at 8 bits (or float) at every level. Batch norm and activation steps are separate for each width (vertical
    layering, section 4.2.2); weights and weight steps are shared.
    """

    def __init__(
        self, network: nn.Module, graph: Graph, name: str, choice: Quantization, signed_input: bool = False
    ) -> None:
        super().__init__()
        self.network, self.graph, self.name, self.choice = network, graph, name, choice
        self.steps = {step.name: step for step in self.graph.steps}
        layers = self.graph.layers
        if len(layers) < 2:  # noqa: PLR2004
            raise ModelError("a network needs at least two conv or linear layers to be quantized")
        self.fixed = {layers[0].name, layers[-1].name}
        self.placements = {p.tensor: p for p in self._place(signed_input)}
        self.weights = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self.streams = nn.ModuleDict()
        self.lows = nn.ModuleDict()
        for step in layers:
            self._add_layer(step)
        for placement in self.placements.values():
            self._add_quantizers(placement)

    @property
    def float_ends(self) -> bool:
        return self.choice.first_last == "float"

    def is_float(self, step: Step) -> bool:
        """True for the first and last layer under the paper's option of leaving them in float."""
        return self.float_ends and step.name in self.fixed

    def reads_low(self, step: Step) -> bool:
        varies = self.choice.activation_bits == "same"
        return varies and step.op in ("conv", "linear") and step.name not in self.fixed

    def _place(self, signed_input: bool) -> list[Placement]:
        found: dict[str, Placement] = {}
        signed = {self.graph.input: signed_input}
        for step in self.graph.steps:
            signed[step.name] = signed[step.inputs[0]] if step.op in PASSES_SIGN and not step.relu else not step.relu
        for tensor in (self.graph.input, *(step.name for step in self.graph.steps)):
            readers = self.graph.consumers(tensor)
            low = any(self.reads_low(step) for step in readers)
            stream = not readers or not all(self.reads_low(step) for step in readers)
            maker = self.steps.get(tensor)
            stream = stream or maker is None or maker.op in (*KEEPS_CODES, *STREAM)
            found[tensor] = Placement(tensor, stream, low, signed[tensor])
        return list(found.values())

    def _add_layer(self, step: Step) -> None:
        layer = cast("nn.Conv2d | nn.Linear", step.module)
        if not self.is_float(step):
            top = 8 if step.name in self.fixed else self.choice.widths[-1]
            compensation = self.choice.compensation
            self.weights[_safe(step.name)] = WeightQuantizer(layer.weight, top, compensation)
        if step.norm is not None:
            own = nn.ModuleDict()
            for width in self.choice.widths:
                norm = nn.BatchNorm2d(step.norm.num_features, step.norm.eps, step.norm.momentum, step.norm.affine)
                norm.load_state_dict(step.norm.state_dict())
                own[str(width)] = norm
            self.norms[_safe(step.name)] = own

    def _add_quantizers(self, place: Placement) -> None:
        maker = self.steps.get(place.tensor)
        if place.stream and maker is not None and maker.op not in KEEPS_CODES:
            self.streams[_safe(place.tensor)] = self._per_width(place.signed, low=False)
        if place.low:
            self.lows[_safe(place.tensor)] = self._per_width(place.signed, low=True)

    def _per_width(self, signed: bool, low: bool) -> nn.ModuleDict:
        return nn.ModuleDict({str(w): ActivationQuantizer(w if low else 8, signed) for w in self.choice.widths})

    # ---- specs -------------------------------------------------------------------------------------------------

    def uniform(self, width: int) -> SubnetSpec:
        """The level at which every layer but the first and the last has `width` bits."""
        activations = width if self.choice.activation_bits == "same" else 8
        bits = {s.name: (8, 8) if s.name in self.fixed else (width, activations) for s in self.graph.layers}
        return SubnetSpec.build(self.name, bits)

    def check_spec(self, spec: SubnetSpec) -> None:
        """Raise RecipeError unless this network can take `spec`; names the layer and its choices."""
        if spec.network != self.name:
            raise RecipeError(f"the spec is for network {spec.network!r}, this one is {self.name!r}")
        names = [step.name for step in self.graph.layers]
        if [entry.layer for entry in spec.layers] != names:
            raise RecipeError(f"the spec's layers are not the network's: those are {', '.join(names)}")
        widths = self.choice.widths
        for entry in spec.layers:
            fixed = entry.layer in self.fixed
            choices = (8,) if fixed else widths
            if entry.weight_bits not in choices:
                raise RecipeError(f"weight_bits of {entry.layer} is {entry.weight_bits}: choose from {list(choices)}")
            choices = widths if self.choice.activation_bits == "same" and not fixed else (8,)
            if entry.activation_bits not in choices:
                raise RecipeError(
                    f"activation_bits of {entry.layer} is {entry.activation_bits}: choose from {list(choices)}"
                )
        for tensor, place in self.placements.items():
            readers = [s.name for s in self.graph.consumers(tensor) if self.reads_low(s)]
            if place.low and len({spec[name].activation_bits for name in readers}) > 1:
                raise RecipeError(f"{' and '.join(readers)} read one tensor: they need the same activation_bits")

    def width_of(self, step: Step, spec: SubnetSpec) -> int:
        """Which width's own parameters (batch norm, 8-bit steps) belong to a step under `spec`.

        A layer's own weight width; for the fixed layers and for operators without weights the network's median width.
        """
        if step.op in ("conv", "linear") and step.name not in self.fixed:
            return spec[step.name].weight_bits
        free = sorted(entry.weight_bits for entry in spec.layers if entry.layer not in self.fixed)
        return free[len(free) // 2] if free else self.choice.widths[-1]

    def low_width(self, tensor: str, spec: SubnetSpec) -> int:
        """Activation width of the layers that read `tensor` at a low width."""
        reader = next(s for s in self.graph.consumers(tensor) if self.reads_low(s))
        return spec[reader.name].activation_bits

    # ---- simulation --------------------------------------------------------------------------------------------

    def norm(self, step: Step, spec: SubnetSpec) -> nn.BatchNorm2d | None:
        """The batch norm that `step` uses under `spec`."""
        if step.norm is None:
            return None
        own = cast(nn.ModuleDict, self.norms[_safe(step.name)])
        return cast(nn.BatchNorm2d, own[str(self.width_of(step, spec))])

    def stream_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer | None:
        """The 8-bit quantizer of `tensor`, or None where it takes over its input's codes or has no 8-bit form."""
        if _safe(tensor) not in self.streams:
            return None
        own = cast(nn.ModuleDict, self.streams[_safe(tensor)])
        return cast(ActivationQuantizer, own[str(self.width_of(self.steps[tensor], spec))])

    def low_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer:
        """The quantizer of `tensor` at its readers' width."""
        own = cast(nn.ModuleDict, self.lows[_safe(tensor)])
        return cast(ActivationQuantizer, own[str(self.low_width(tensor, spec))])

    def weight_quantizer(self, step: Step) -> WeightQuantizer:
        """The quantizer of a layer's weights; KeyError for a layer left in float."""
        return cast(WeightQuantizer, self.weights[_safe(step.name)])

    def weight(self, step: Step, spec: SubnetSpec) -> Tensor:
        """Dequantized weight of a layer under `spec`."""
        layer = cast("nn.Conv2d | nn.Linear", step.module)
        if self.is_float(step):
            return layer.weight
        return cast(Tensor, self.weight_quantizer(step)(layer.weight, spec[step.name].weight_bits))

    def compute(self, step: Step, inputs: Sequence[Tensor], spec: SubnetSpec, relu: bool = True) -> Tensor:
        """Float result of one step before its output's quantizer, its Relu included unless `relu` is False."""
        x = inputs[0]
        if step.op == "conv":
            layer = cast(nn.Conv2d, step.module)
            top, left, bottom, right = step.attributes["padding"]
            padding = (top, left)
            if (top, left) != (bottom, right):
                x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
            x = F.conv2d(x, self.weight(step, spec), layer.bias, layer.stride, padding, layer.dilation, layer.groups)
            norm = self.norm(step, spec)
            x = norm(x) if norm is not None else x
        elif step.op == "linear":
            x = F.linear(x, self.weight(step, spec), cast(nn.Linear, step.module).bias)
        elif step.op == "add":
            x = inputs[0] + inputs[1]
        elif step.op == "max_pool":
            a = step.attributes
            x = F.max_pool2d(x, tuple(a["kernel"]), tuple(a["stride"]), tuple(a["padding"][:2]))
        elif step.op == "global_average_pool":
            x = F.adaptive_avg_pool2d(x, 1)
        elif step.op == "flatten":
            x = torch.flatten(x, 1)
        if step.relu and relu:
            x = F.relu(x) if step.ceiling is None else x.clamp(0.0, step.ceiling)
        return x

    def forward(self, x: Tensor, spec: SubnetSpec, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Logits [n, classes] of images [n, C, H, W] in [0, 1] under `spec`.

        `trace`, if given, receives every quantized tensor under its FrozenNet name.
        """
        streams = {self.graph.input: x}
        lows: dict[str, Tensor] = {}
        trace = {} if trace is None else trace

        def record(tensor: str, value: Tensor) -> None:
            place = self.placements[tensor]
            if place.stream:
                quantizer = self.stream_quantizer(tensor, spec)
                streams[tensor] = trace[tensor] = quantizer(value) if quantizer is not None else value
                value = streams[tensor]
            if place.low:
                lows[tensor] = trace[place.low_name] = self.low_quantizer(tensor, spec)(value)

        trace[self.graph.input] = x
        if self.placements[self.graph.input].low:
            record(self.graph.input, x)
        for step in self.graph.steps:
            source = lows if self.reads_low(step) else streams
            result = self.compute(step, [source[name] for name in step.inputs], spec)
            if step.name == self.graph.output and self.float_ends:
                return result
            record(step.name, result)
        return streams[self.graph.output]

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
        for group in (self.weights, self.streams, self.lows):
            for name, parameter in group.named_parameters():
                if name.endswith("step"):
                    parameter.clamp_(min=1e-6)
        for module in self.norms.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.clamp_(min=MIN_NORM_FACTOR)


def levels(net: QuantNet) -> Mapping[int, SubnetSpec]:
    """The uniform specs of all trained widths."""
    return {width: net.uniform(width) for width in net.choice.widths}
