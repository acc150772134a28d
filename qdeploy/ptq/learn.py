"""Learned rounding of one block: weights up or down, steps of activations and biases, by gradients through the block.

AdaRound (Nagel et al. 2020): a weight is s (floor(w / s) + h(v)) with the rectified sigmoid h in [0, 1]; a regularizer
drives h to 0 or 1. BRECQ (Li et al. 2021) learns all layers of a block together, with the steps of its activations
(LSQ, Esser et al. 2020), so that the block's output is close to the float network's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import NodeProto
from torch import Tensor

from qdeploy.ptq.blocks import Block
from qdeploy.ptq.layers import Layer, spatial_pads
from qdeploy.ptq.place import MOVES
from qdeploy.ptq.ranges import Grid
from qdeploy.ptq.weights import Quantized
from qdeploy.qdq import attributes

GAMMA, ZETA = -0.1, 1.1  # the sigmoid is stretched to these and cut to [0, 1]
REGULARIZER = 0.01
HOT, COLD = 20.0, 2.0  # temperature of the regularizer
WARM_UP = 0.2  # part of the iterations without it
BATCH = 16
RATE, TRAVEL = 1e-3, 15.0  # learning rate of v; with few iterations so much over their number, that v gets anywhere
MAX_RATE = 0.1
STEP_RATE = 0.2  # rates of steps and biases, as parts of that of v
STEP_RANGE = (log(0.25), log(1.5))  # how far a step of activations may move

Key = tuple[str, int]  # owner of an activation, width


@dataclass(frozen=True)
class Problem:
    """A block to learn. `start`: weights to begin with, whose codes lie in `bounds`, and `weights` the float ones, by
    layer. `grids` by owner and width; those in `learned` may move. `owners`: quantized activation -> owner. `widths`:
    the width of each activation's quantizer; `reads`: that at which a layer reads its input. The block's input is
    quantized already.
    """

    block: Block
    layers: Mapping[str, Layer]
    arrays: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    start: Mapping[str, Quantized]
    bounds: Mapping[str, tuple[int, int]]
    grids: Mapping[Key, Grid]
    learned: frozenset[Key]
    owners: Mapping[str, str]
    widths: Mapping[str, int]
    reads: Mapping[str, int]


@dataclass(frozen=True)
class Solution:
    """Weights and grids of a block; its relative root-mean-square output error before and after learning."""

    weights: dict[str, Quantized]
    grids: dict[Key, Grid]
    before: float
    after: float


class _Quantize(torch.autograd.Function):
    """Quantize and back; gradients pass where codes are not cut, the step's is LSQ's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: int, lo: int, hi: int) -> Tensor:
        """x of any shape, step a scalar."""
        scaled = x / step
        codes = torch.clamp(torch.round(scaled) + zero, lo, hi) - zero
        inside = (scaled >= lo - zero) & (scaled <= hi - zero)
        ctx.save_for_backward(inside, torch.where(inside, codes - scaled, codes))
        return codes * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of x and step."""
        inside, slope = ctx.saved_tensors
        return gradients[0] * inside, (gradients[0] * slope).sum(), None, None, None


class _Rounded:
    """A layer's weights: base codes and the variable v that moves each by 0 to 1."""

    def __init__(self, layer: Layer, weight: np.ndarray, start: Quantized, bounds: tuple[int, int]) -> None:
        form = [-1 if i == layer.axis and start.scale.ndim else 1 for i in range(weight.ndim)]
        self.scale = torch.from_numpy(start.scale.reshape(form if start.scale.ndim else ()).astype(np.float32))
        self.zero = torch.from_numpy(start.zero_point.reshape(form if start.scale.ndim else ()).astype(np.float32))
        self.lo, self.hi = bounds
        exact = torch.from_numpy(np.ascontiguousarray(weight)) / self.scale + self.zero
        codes = torch.from_numpy(start.codes.astype(np.float32))
        below = torch.floor(exact)
        self.base = torch.where(codes < below, codes, torch.where(codes > below + 1, codes - 1, below))
        self.base = torch.where(self.base >= self.hi, self.hi - 1.0, self.base).clamp_min(self.lo)
        up = codes - self.base  # halfway between the real weight and the code to begin with, on the code's side
        part = (up + (exact - self.base).clamp(0.02, 0.98)) / 2
        part = (part - GAMMA) / (ZETA - GAMMA)
        self.v = torch.log(part / (1 - part)).requires_grad_()

    def up(self) -> Tensor:
        """h(v)."""
        return torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def values(self, up: Tensor) -> Tensor:
        """Real weights for moves `up`."""
        return (self.base + up - self.zero) * self.scale

    def codes(self) -> np.ndarray:
        """int8 codes as they are rounded in the end."""
        hard = (self.base + (self.up() >= 0.5)).clamp(self.lo, self.hi)  # noqa: PLR2004
        return np.asarray(hard.detach().numpy().astype(np.int8))


class _Network:
    """The block with its parameters, run on batches."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rounded = {
            name: _Rounded(problem.layers[name], problem.weights[name], start, problem.bounds[name])
            for name, start in problem.start.items()
        }
        self.biases = {
            name: torch.from_numpy(start.bias.copy()).requires_grad_()
            for name, start in problem.start.items()
            if start.bias is not None
        }
        self.steps = {key: torch.zeros((), requires_grad=key in problem.learned) for key in problem.grids}
        self.adds = {layer.adds: name for name, layer in problem.layers.items() if layer.adds}
        self.arrays = {
            name: torch.from_numpy(np.array(problem.arrays[name]))
            for node in problem.block.nodes
            for name in node.input
            if name in problem.arrays
        }

    def quantize(self, x: Tensor, key: Key) -> Tensor:
        """x rounded by the grid of `key`."""
        grid = self.problem.grids[key]
        step = float(grid.scale) * torch.exp(self.steps[key].clamp(*STEP_RANGE))
        found: Tensor = _Quantize.apply(x, step, grid.zero_point, grid.lo, grid.hi)
        return found

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> Tensor:
        """The block's output for inputs x [n, ...] that are quantized already."""
        problem, values = self.problem, {self.problem.block.input: x}
        for node in problem.block.nodes:
            inputs = [self._read(values, node, i) for i in range(len(node.input))]
            if node.name in problem.layers:
                out = _layer(node, problem.layers[node.name], inputs[0], weights[node.name], biases.get(node.name))
            elif node.name in self.adds:
                stored = 0 if node.input[0] in self.arrays else 1
                out = inputs[1 - stored] + biases[self.adds[node.name]]
            else:
                out = OPERATORS[node.op_type](node, inputs)
            name = node.output[0]
            if name in problem.owners and node.op_type not in MOVES:
                out = self.quantize(out, (problem.owners[name], problem.widths[name]))
            values[name] = out
        return values[problem.block.output]

    def _read(self, values: dict[str, Tensor], node: NodeProto, i: int) -> Tensor:
        name = node.input[i]
        if name in self.arrays:
            return self.arrays[name]
        if not name:
            return torch.empty(0)
        bits = self.problem.reads.get(node.name) if i == 0 else None
        if bits is None or bits >= self.problem.widths.get(name, bits):
            return values[name]
        return self.quantize(values[name], (self.problem.owners[name], bits))

    def forward(self, x: Tensor, hard: bool) -> Tensor:
        """The block with soft weights, or with weights as they are rounded in the end."""
        weights = {}
        for name, rounded in self.rounded.items():
            up = rounded.up()
            weights[name] = rounded.values((up >= 0.5).float() if hard else up)  # noqa: PLR2004
        return self(x, weights, self.biases)


def learn_block(problem: Problem, x: np.ndarray, y: np.ndarray, iterations: int, seed: int) -> Solution:
    """Learn from the block's quantized inputs `x` and float outputs `y`, float32 [n, ...].

    One thread, seeded: equal input gives equal results. What learning does not improve on all of x stays as it was.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network = _Network(problem)
        inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
        before = _error(network, inputs, targets)
        _optimize(network, inputs, targets, iterations, seed)
        after = _error(network, inputs, targets)
    finally:
        torch.set_num_threads(threads)
    if not after < before:
        kept = {key: problem.grids[key] for key in problem.learned}
        return Solution(dict(problem.start), kept, before, before)
    weights = {
        name: replace(
            start,
            codes=network.rounded[name].codes(),
            bias=None if start.bias is None else network.biases[name].detach().numpy().copy(),
        )
        for name, start in problem.start.items()
    }
    grids = {}
    for key in problem.learned:
        factor = float(network.steps[key].detach().clamp(*STEP_RANGE).exp())
        grids[key] = replace(problem.grids[key], scale=np.float32(float(problem.grids[key].scale) * factor))
    return Solution(weights, grids, before, after)


def _optimize(network: _Network, x: Tensor, y: Tensor, iterations: int, seed: int) -> None:
    """Adam on v, biases and steps; the regularizer's temperature falls after the warm-up."""
    rate = min(MAX_RATE, max(RATE, TRAVEL / iterations))
    steps = [step for step in network.steps.values() if step.requires_grad]
    biases = list(network.biases.values())
    optimizer = torch.optim.Adam(
        [
            {"params": [rounded.v for rounded in network.rounded.values()], "lr": rate},
            {"params": [*steps, *biases], "lr": rate * STEP_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    power = max(float(y.pow(2).mean()), 1e-12)
    generator = torch.Generator().manual_seed(seed)
    for i in range(iterations):
        picked = torch.randperm(len(x), generator=generator)[:BATCH]
        error = (network.forward(x[picked], hard=False) - y[picked]).pow(2).mean() / power
        channels = y.shape[1] if y.dim() > 1 else 1
        loss = error * channels
        part = (i / iterations - WARM_UP) / (1 - WARM_UP)
        if part >= 0:
            heat = COLD + (HOT - COLD) * (1 - part)
            terms = [1 - (2 * rounded.up() - 1).abs().pow(heat) for rounded in network.rounded.values()]
            loss = loss + REGULARIZER * torch.stack([term.sum() for term in terms]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _error(network: _Network, x: Tensor, y: Tensor) -> float:
    """Relative root-mean-square error of the block's output as it is rounded in the end."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(x), BATCH):
            found = network.forward(x[start : start + BATCH], hard=True)
            total += float((found - y[start : start + BATCH]).double().pow(2).sum())
    return (total / max(float(y.double().pow(2).sum()), 1e-30)) ** 0.5


# Operators -----------------------------------------------------------------------------------------------------------


def _layer(node: NodeProto, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution or matrix product."""
    if layer.op != "Conv":
        product = x @ (weight.T if layer.op == "Gemm" and layer.axis == 0 else weight)
        return product if bias is None or layer.adds else product + bias
    a, axes = attributes(node), weight.dim() - 2
    strides, dilations = (list(a.get(key, [1] * axes)) for key in ("strides", "dilations"))
    pads = spatial_pads(a, tuple(x.shape[2:]), tuple(weight.shape[2:]), strides, dilations)
    if all(before == behind for before, behind in pads):
        around = [before for before, _ in pads]
    else:
        x, around = F.pad(x, [n for pair in reversed(pads) for n in pair]), [0] * axes
    convolve = F.conv2d if axes == 2 else F.conv1d  # noqa: PLR2004
    return convolve(x, weight, bias, strides, around, dilations, layer.groups)


def _clip(node: NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    low, high = (inputs[i] if len(inputs) > i and inputs[i].numel() else None for i in (1, 2))
    return torch.clamp(inputs[0], low, high)


def _hard_sigmoid(node: NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    a = attributes(node)
    return torch.clamp(inputs[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1)


def _flatten(node: NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0].flatten(attributes(node).get("axis", 1))


def _window(node: NodeProto, inputs: Sequence[Tensor]) -> tuple[Tensor, list[int], list[int]]:
    """A pool's input with its padding, kernel and strides."""
    a, x = attributes(node), inputs[0]
    kernel, axes = list(a["kernel_shape"]), len(a["kernel_shape"])
    strides = list(a.get("strides", [1] * axes))
    pads = spatial_pads(a, tuple(x.shape[2:]), tuple(kernel), strides, [1] * axes)
    fill = float("-inf") if node.op_type == "MaxPool" else 0.0
    return F.pad(x, [n for pair in reversed(pads) for n in pair], value=fill), kernel, strides


def _max_pool(node: NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    x, kernel, strides = _window(node, inputs)
    found: Tensor = F.max_pool2d(x, kernel, strides)
    return found


def _average_pool(node: NodeProto, inputs: Sequence[Tensor]) -> Tensor:
    x, kernel, strides = _window(node, inputs)
    return F.avg_pool2d(x, kernel, strides)


OPERATORS: dict[str, Callable[[NodeProto, Sequence[Tensor]], Tensor]] = {
    "Add": lambda node, inputs: inputs[0] + inputs[1],
    "Sub": lambda node, inputs: inputs[0] - inputs[1],
    "Mul": lambda node, inputs: inputs[0] * inputs[1],
    "Div": lambda node, inputs: inputs[0] / inputs[1],
    "Relu": lambda node, inputs: F.relu(inputs[0]),
    "Clip": _clip,
    "LeakyRelu": lambda node, inputs: F.leaky_relu(inputs[0], attributes(node).get("alpha", 0.01)),
    "Sigmoid": lambda node, inputs: torch.sigmoid(inputs[0]),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda node, inputs: F.hardswish(inputs[0]),
    "Tanh": lambda node, inputs: torch.tanh(inputs[0]),
    "GlobalAveragePool": lambda node, inputs: inputs[0].mean(list(range(2, inputs[0].dim())), keepdim=True),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Concat": lambda node, inputs: torch.cat(list(inputs), attributes(node)["axis"]),
    "Flatten": _flatten,
    "Identity": lambda node, inputs: inputs[0],
    "Dropout": lambda node, inputs: inputs[0],
}


def unlearnable(block: Block, layers: Mapping[str, Layer]) -> str | None:
    """Why a block cannot be learned; None when it can. `layers` are the network's quantized ones."""
    adds = {layer.adds for layer in layers.values()}
    for node in block.nodes:
        a = attributes(node)
        if node.name in layers:
            if layers[node.name].solvable:
                continue
        elif node.name in adds or (node.op_type in OPERATORS and not node.domain and len(node.output) == 1):
            two = len(a.get("kernel_shape", (1, 1))) == 2  # noqa: PLR2004
            odd = a.get("ceil_mode", 0) or any(d != 1 for d in a.get("dilations", ()))
            padded = any(a.get("pads", ())) or a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
            excludes = node.op_type == "AveragePool" and padded and not a.get("count_include_pad", 0)
            if two and not odd and not excludes:
                continue
        return f"{node.op_type} {node.name} cannot be learned through"
    return None
