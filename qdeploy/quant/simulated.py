"""SimulatedNet: what the quantized networks of all methods share. It mirrors a float network in integers' arithmetic.

Where activations are quantized (docs/adr/0004-where-activations-are-quantized.md): a layer's activation width applies
to its input tensor. A tensor that only such layers read has one quantizer of that width. Any other tensor (convolution
outputs before an addition, the residual stream, pooled outputs, the network's output) has 8 bits at every level, and
the layers that read it at a lower width share a second quantizer behind the first.

A method says what a layer may choose (`layer_space`) and which weight, batch norm and quantizers a spec selects.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.errors import ModelError
from qdeploy.frozen import KEEPS_CODES, WeightBits
from qdeploy.quant.graph import Graph, Step
from qdeploy.quant.layers import ActivationQuantizer
from qdeploy.space import FLOAT_BITS, LayerSpace, Reference, SearchSpace, SubnetSpec

INPUT_SCALE = 1.0 / 255.0  # images are float32 in [0, 1], so input codes are the pixels themselves
MIN_NORM_FACTOR = 1e-3
STREAM = ("add", "global_average_pool")  # the residual stream and pooled outputs have 8 bits at every level
PASSES_SIGN = ("max_pool", "global_average_pool", "flatten", "requantize", "mul")
UNSIGNED = ("hard_sigmoid",)


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


@dataclass(frozen=True)
class LayerCodes:
    """A layer's weight as integers: real value = (codes - zero_point) * step.

    `codes` int8 of the weight's shape, on the grid that `bits` names; `step` float64, a scalar or [O].
    """

    codes: np.ndarray
    step: np.ndarray
    zero_point: int
    bits: WeightBits


def _of_pooled(graph: Graph) -> set[str]:
    """Layers that read one value a channel: they cost nothing, and their few numbers weigh whole channels."""
    pooled, found = set(), set()
    for step in graph.steps:
        if step.op == "global_average_pool" or step.inputs and all(name in pooled for name in step.inputs):
            pooled.add(step.name)
            if step.op in ("conv", "linear"):
                found.add(step.name)
    return found


def safe(name: str) -> str:
    """torch forbids dots in module names."""
    return name.replace(".", "/")


class SimulatedNet(nn.Module, ABC):
    """Simulates the integer network of any spec; forward takes the spec as an argument.

    `graph` is `read_graph(network)`; `activation_choices` are the widths of the tensors that layers other than the
    first and the last read ((8,): nothing varies); `signed_input` says that inputs may be negative. `fixed` names the
    layers that have 8 bits in every spec: the first and the last (or float), those that read pooled tensors, as in
    squeeze-excite, and what a method adds.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: Graph,
        name: str,
        activation_choices: tuple[int, ...],
        signed_input: bool = False,
        fixed: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.network, self.graph, self.name, self.activation_choices = network, graph, name, activation_choices
        self.steps = {step.name: step for step in graph.steps}
        layers = graph.layers
        if len(layers) < 2:  # noqa: PLR2004
            raise ModelError("a network needs at least two conv or linear layers to be quantized")
        self.fixed = {layers[0].name, layers[-1].name, *_of_pooled(graph), *fixed}
        self.placements = {p.tensor: p for p in self._place(signed_input)}

    # ---- what a method says ------------------------------------------------------------------------------------

    float_ends = False  # the first and last layer are left in float

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """Weight widths of the uniform specs, rising."""

    @abstractmethod
    def layer_space(self, step: Step) -> LayerSpace:
        """What may vary in one layer that is not fixed, but for `shares`."""

    @abstractmethod
    def uniform(self, width: int) -> SubnetSpec:
        """The spec in which every layer but the first and the last has `width` bits."""

    @abstractmethod
    def weight(self, step: Step, spec: SubnetSpec) -> Tensor:
        """Dequantized weight of a layer under `spec`."""

    @abstractmethod
    def layer_codes(self, step: Step, spec: SubnetSpec) -> LayerCodes:
        """The integers that `weight` dequantizes."""

    @abstractmethod
    def norm(self, step: Step, spec: SubnetSpec) -> nn.BatchNorm2d | None:
        """The batch norm that `step` uses under `spec`."""

    @abstractmethod
    def stream_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer | None:
        """The 8-bit quantizer of `tensor`, or None where it takes over its input's codes or has no 8-bit form."""

    @abstractmethod
    def low_quantizer(self, tensor: str, spec: SubnetSpec) -> ActivationQuantizer:
        """The quantizer of `tensor` at its readers' width."""

    @property
    @abstractmethod
    def learned_in(self) -> tuple[SubnetSpec, ...]:
        """Specs that activation steps were learned in, each by itself; a mix of them has its ranges estimated anew.

        Empty where every step was learned in many mixes.
        """

    @property
    def only(self) -> SubnetSpec | None:
        """The one subnet that was trained alone, if one was."""
        return None

    @property
    def levels(self) -> dict[str, SubnetSpec]:
        """What a run reports on: its uniform specs by width, or the one that was trained alone."""
        if self.only is not None:
            return {"only": self.only}
        return {str(width): self.uniform(width) for width in self.widths}

    def input_of(self, images: Tensor, spec: SubnetSpec) -> Tensor:
        """What a network of `spec` reads of images [n, C, H, W] in [0, 1]: those, or resized ones."""
        return images

    # ---- where quantizers stand --------------------------------------------------------------------------------

    def is_float(self, step: Step) -> bool:
        """True for a layer left in float."""
        return self.float_ends and step.name in (self.graph.layers[0].name, self.graph.layers[-1].name)

    def reads_low(self, step: Step) -> bool:
        """True for a layer whose input's width varies."""
        varies = self.activation_choices != (8,)
        return varies and step.op in ("conv", "linear") and step.name not in self.fixed

    def low_readers(self, tensor: str) -> list[Step]:
        """The layers that read `tensor` at a width that varies, in order; they have one activation width."""
        return [step for step in self.graph.consumers(tensor) if self.reads_low(step)]

    def _place(self, signed_input: bool) -> list[Placement]:
        found: dict[str, Placement] = {}
        signed = {self.graph.input: signed_input}
        for step in self.graph.steps:
            inherited = any(signed[name] for name in step.inputs) if step.op in PASSES_SIGN else step.op not in UNSIGNED
            signed[step.name] = inherited and not step.relu
        for tensor in (self.graph.input, *(step.name for step in self.graph.steps)):
            readers = self.graph.consumers(tensor)
            low = any(self.reads_low(step) for step in readers)
            stream = not readers or not all(self.reads_low(step) for step in readers)
            maker = self.steps.get(tensor)
            stream = stream or maker is None or maker.op in (*KEEPS_CODES, *STREAM)
            found[tensor] = Placement(tensor, stream, low, signed[tensor])
        return list(found.values())

    def has_stream_quantizer(self, tensor: str) -> bool:
        """True for an 8-bit tensor with a quantizer of its own: not the image, nor one that keeps its input's codes."""
        maker = self.steps.get(tensor)
        return self.placements[tensor].stream and maker is not None and maker.op not in KEEPS_CODES

    # ---- specs -------------------------------------------------------------------------------------------------

    @cached_property
    def space(self) -> SearchSpace:
        """What may vary, nothing where one subnet was trained alone. Layers that read one tensor share their
        activation width."""
        layers: list[LayerSpace] = []
        for step in self.graph.layers:
            own = LayerSpace(step.name, (8,), (8,)) if step.name in self.fixed else self.layer_space(step)
            leader = self.low_readers(step.inputs[0])[0].name if self.reads_low(step) else step.name
            shares = leader if leader != step.name else None
            layers.append(replace(own, shares=shares, block=self.block_of(step)))
        found = SearchSpace(self.name, tuple(layers), **self.shape_choices)
        return found if self.only is None else found.alone(self.only)

    @property
    def shape_choices(self) -> dict[str, Any]:
        """Depths, kernels and expansions of an elastic network, as `SearchSpace` takes them."""
        return {}

    def block_of(self, step: Step) -> Reference | None:
        """The elastic block that a layer belongs to."""
        return None

    def subnet(self, spec: SubnetSpec) -> SimulatedNet:
        """A network of its own for `spec`, which may be changed."""
        return copy.deepcopy(self)

    def check_spec(self, spec: SubnetSpec) -> None:
        """Raise RecipeError unless this network can take `spec`; names the layer and its choices."""
        self.space.check(spec)

    def low_width(self, tensor: str, spec: SubnetSpec) -> int:
        """Activation width of the layers that read `tensor` at a low width."""
        return spec[self.low_readers(tensor)[0].name].activation_bits

    # ---- simulation --------------------------------------------------------------------------------------------

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
        elif step.op == "mul":
            x = inputs[0] * inputs[1]
        elif step.op == "hard_swish":
            x = F.hardswish(x)
        elif step.op == "hard_sigmoid":
            x = F.hardsigmoid(x)
        elif step.op == "max_pool":
            a = step.attributes
            x = F.max_pool2d(x, tuple(a["kernel"]), tuple(a["stride"]), tuple(a["padding"][:2]))
        elif step.op == "global_average_pool":
            x = F.adaptive_avg_pool2d(x, 1)
        elif step.op == "flatten":
            x = torch.flatten(x, 1)
        if step.relu and relu:
            # hardtanh is clamp with a gradient of one pass
            x = F.relu(x) if step.ceiling is None else F.hardtanh(x, 0.0, step.ceiling)
        return x

    def _clips_relu(self, tensor: str, spec: SubnetSpec) -> bool:
        """True when the first quantizer of `tensor` makes the Relu in front of it superfluous."""
        if self.placements[tensor].stream:
            quantizer = self.stream_quantizer(tensor, spec)
            return quantizer is not None and quantizer.clips_relu
        return self.low_width(tensor, spec) != FLOAT_BITS and self.low_quantizer(tensor, spec).clips_relu

    def forward(self, x: Tensor, spec: SubnetSpec, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Logits [n, classes] of images [n, C, H, W] in [0, 1] under `spec`.

        `trace`, if given, receives every quantized tensor under its FrozenNet name.
        """
        streams = {self.graph.input: x}
        lows: dict[str, Tensor] = {}
        trace = {} if trace is None else trace

        def record(tensor: str, value: Tensor, ceiling: float = math.inf) -> None:
            place = self.placements[tensor]
            if place.stream:
                quantizer = self.stream_quantizer(tensor, spec)
                streams[tensor] = trace[tensor] = quantizer(value, ceiling) if quantizer is not None else value
                value, ceiling = streams[tensor], math.inf
            if place.low:
                real = self.low_width(tensor, spec) == FLOAT_BITS
                low = value if real else self.low_quantizer(tensor, spec)(value, ceiling)
                lows[tensor] = trace[place.low_name] = low

        trace[self.graph.input] = x
        if self.placements[self.graph.input].low:
            record(self.graph.input, x)
        for step in self.graph.steps:
            source = lows if self.reads_low(step) else streams
            clips = step.relu and self._clips_relu(step.name, spec)
            result = self.compute(step, [source[name] for name in step.inputs], spec, relu=not clips)
            if step.name == self.graph.output and self.float_ends:
                return result
            record(step.name, result, step.ceiling if clips and step.ceiling is not None else math.inf)
        return streams[self.graph.output]
