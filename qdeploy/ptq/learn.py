"""Learned rounding of one block: weights up or down, steps of activations and biases, by gradients through the block.

AdaRound (Nagel et al. 2020): a weight is s (floor(w / s) + h(v)) with the rectified sigmoid h in [0, 1]; a regularizer
drives h to 0 or 1. BRECQ (Li et al. 2021) learns all layers of a block together, with the steps of its activations
(LSQ, Esser et al. 2020), so that the block's output is close to the float network's.

The levels of a ladder share one top code a weight, so they are learned together, coarse to fine: in the first turn h
chooses between the two prefixes of the lowest level around the weight, in the next between two prefixes of the second
level below the prefix that was chosen, and so on. The loss of a turn is that of its level and all above it, which the
choice reaches too.
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
from qdeploy.ptq.weights import Level, Quantized
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
LEVEL_POWER = 0.5  # squared errors of levels are divided by this power of those at the start

Key = tuple[str, int]  # owner of an activation, width


@dataclass(frozen=True)
class Problem:
    """A block to learn at one level, or at all levels of a ladder together, lowest first.

    `start`: by layer, the weights of each level to begin with; `forms`: how each level's codes come from the top codes,
    which lie in `bounds`; `weights`: the float ones. `grids` by owner and width; those in `learned` may move, alike at
    all levels. `owners`: quantized activation -> owner. `widths`: the width of each activation's quantizer; `reads`:
    that at which a layer reads its input. The block's input is quantized already.
    """

    block: Block
    layers: Mapping[str, Layer]
    arrays: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    start: Mapping[str, Sequence[Quantized]]
    forms: Mapping[str, Sequence[Level]]
    bounds: Mapping[str, tuple[int, int]]
    grids: Mapping[Key, Grid]
    learned: frozenset[Key]
    owners: Mapping[str, str]
    widths: Mapping[str, int]
    reads: Mapping[str, int]

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return len(next(iter(self.start.values())))


@dataclass(frozen=True)
class Solution:
    """Weights at each level and grids of a block; its relative root-mean-square output error at each level before and
    after learning.
    """

    weights: dict[str, list[Quantized]]
    grids: dict[Key, Grid]
    before: list[float]
    after: list[float]


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


def top_codes(start: Sequence[Quantized], forms: Sequence[Level]) -> np.ndarray:
    """int64: the top codes that a layer's levels are made of."""
    best = int(np.argmax([form.bits for form in forms]))
    found: np.ndarray = (start[best].codes.astype(np.int64) - forms[best].offset) >> forms[best].shift
    return found


def other_codes(
    tops: np.ndarray, exact: np.ndarray, forms: Sequence[Level], turn: int, bounds: tuple[int, int]
) -> np.ndarray:
    """int64: the second candidate of each top code in a turn, the code itself where there is none.

    Its prefix at level `turn` is the neighbour on the side of the real weight `exact` (in container codes of that
    level), below the prefix of the level before; its later bits are the nearest to the weight.
    """
    form, below = forms[turn], (forms[turn - 1].bits if turn else 0)
    cut = form.top - form.bits
    prefix, (lo, hi) = tops >> cut, (end >> cut for end in bounds)
    if turn:
        parent = tops >> (form.top - below)
        lo = np.maximum(lo, parent << (form.bits - below))
        hi = np.minimum(hi, ((parent + 1) << (form.bits - below)) - 1)
    ideal = (exact - form.offset) / (1 << form.shift)
    side = np.where(ideal >= prefix, 1, -1)
    side = np.where((prefix + side > hi) | (prefix + side < lo), -side, side)
    other = prefix + side
    allowed = (other >= lo) & (other <= hi)
    near = np.rint(ideal * (1 << cut) + ((1 << cut) - 1) / 2).astype(np.int64)
    found = np.clip(near, np.maximum(other << cut, bounds[0]), np.minimum(((other + 1) << cut) - 1, bounds[1]))
    return np.where(allowed, found, tops)


class _Rounded:
    """A layer's weights in one turn: top codes, their second candidates, and the variable v that moves to these."""

    def __init__(self, problem: Problem, name: str, tops: np.ndarray, turn: int) -> None:
        layer, start, forms = problem.layers[name], problem.start[name], problem.forms[name]
        weight, form = problem.weights[name], [1] * problem.weights[name].ndim
        form[layer.axis] = -1
        scales = [one.scale.reshape(form if one.scale.ndim else ()).astype(np.float64) for one in start]
        zeros = [one.zero_point.reshape(form if one.scale.ndim else ()).astype(np.float64) for one in start]
        exact = weight / scales[turn] + zeros[turn]
        self.tops, self.others = tops, other_codes(tops, exact, forms, turn, problem.bounds[name])
        self.here, self.move = [], []
        for level, scale, zero in zip(forms, scales, zeros, strict=True):
            ends = [(level.codes(codes) - zero) * scale for codes in (self.tops, self.others)]
            self.here.append(torch.from_numpy(ends[0].astype(np.float32)))
            self.move.append(torch.from_numpy((ends[1] - ends[0]).astype(np.float32)))
        codes = [forms[turn].codes(codes) for codes in (self.tops, self.others)]
        moved = np.where(codes[1] == codes[0], 1, codes[1] - codes[0])
        part = np.clip((exact - codes[0]) / moved, 0.02, 0.98) / 2  # halfway between the code and the real weight
        part = torch.from_numpy(((part - GAMMA) / (ZETA - GAMMA)).astype(np.float32))
        self.v = torch.log(part / (1 - part)).requires_grad_()

    def up(self, hard: bool) -> Tensor:
        """h(v), or what it is rounded to in the end."""
        soft = torch.clamp(torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA, 0, 1)
        return (soft >= 0.5).float() if hard else soft  # noqa: PLR2004

    def values(self, level: int, up: Tensor) -> Tensor:
        """Real weights at a level for moves `up`."""
        return self.here[level] + up * self.move[level]

    def codes(self) -> np.ndarray:
        """int64 top codes as they are rounded in the end."""
        return np.where(self.up(hard=True).detach().numpy() > 0, self.others, self.tops)


class _Network:
    """The block with its parameters, run on batches at any level."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.tops = {name: top_codes(start, problem.forms[name]) for name, start in problem.start.items()}
        self.biases = [
            {
                name: torch.from_numpy(bias.copy()).requires_grad_()
                for name, start in problem.start.items()
                if (bias := start[level].bias) is not None
            }
            for level in range(problem.levels)
        ]
        self.steps = {key: torch.zeros((), requires_grad=key in problem.learned) for key in problem.grids}
        self.adds = {layer.adds: name for name, layer in problem.layers.items() if layer.adds}
        self.arrays = {
            name: torch.from_numpy(np.array(problem.arrays[name]))
            for node in problem.block.nodes
            for name in node.input
            if name in problem.arrays
        }
        self.begin(0)

    def begin(self, turn: int) -> None:
        """Make the variables of a turn."""
        self.rounded = {name: _Rounded(self.problem, name, tops, turn) for name, tops in self.tops.items()}

    def undecided(self) -> bool:
        """True when some weight has two candidates in this turn."""
        return any((rounded.others != rounded.tops).any() for rounded in self.rounded.values())

    def snapshot(self) -> tuple[dict[str, np.ndarray], list[Tensor]]:
        """Codes, and what learning changes beside them."""
        return dict(self.tops), [parameter.detach().clone() for parameter in self._parameters()]

    def restore(self, kept: tuple[dict[str, np.ndarray], list[Tensor]]) -> None:
        """Inverse of snapshot()."""
        self.tops = dict(kept[0])
        with torch.no_grad():
            for parameter, old in zip(self._parameters(), kept[1], strict=True):
                parameter.copy_(old)

    def _parameters(self) -> list[Tensor]:
        return [*self.steps.values(), *(bias for level in self.biases for bias in level.values())]

    def quantize(self, x: Tensor, key: Key) -> Tensor:
        """x rounded by the grid of `key`."""
        grid = self.problem.grids[key]
        step = float(grid.scale) * torch.exp(self.steps[key].clamp(*STEP_RANGE))
        found: Tensor = _Quantize.apply(x, step, grid.zero_point, grid.lo, grid.hi)
        return found

    def run(self, x: Tensor, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> Tensor:
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

    def forward(self, level: int, x: Tensor, hard: bool) -> Tensor:
        """The block at a level with soft weights, or with weights as they are rounded in the end."""
        weights = {name: rounded.values(level, rounded.up(hard)) for name, rounded in self.rounded.items()}
        return self.run(x, weights, self.biases[level])


def learn_block(problem: Problem, x: Sequence[np.ndarray], y: np.ndarray, iterations: int, seed: int) -> Solution:
    """Learn from each level's quantized inputs `x` of the block and its float outputs `y`, float32 [n, ...].

    A ladder's turns have `iterations` each. One thread, seeded: equal input gives equal results. A turn that does not
    lower the levels' errors on all of x, weighed as in the loss, is undone.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network = _Network(problem)
        inputs, target = [torch.from_numpy(one) for one in x], torch.from_numpy(y)
        before = after = _errors(network, inputs, target)
        counts = (np.maximum(before[0], 1e-12) / np.maximum(before, 1e-12)) ** (2 * LEVEL_POWER)
        best = network.snapshot()
        for turn in range(problem.levels):
            network.begin(turn)
            if turn and not network.undecided():
                continue
            _optimize(network, inputs, target, counts, turn, iterations, seed)
            found = _errors(network, inputs, target)
            network.tops = {name: rounded.codes() for name, rounded in network.rounded.items()}
            if counts @ found**2 < counts @ after**2:
                best, after = network.snapshot(), found
            else:
                network.restore(best)
    finally:
        torch.set_num_threads(threads)
    return _solution(network, before, after)


def _solution(network: _Network, before: np.ndarray, after: np.ndarray) -> Solution:
    """What the network has learned, as codes and grids."""
    problem, weights = network.problem, dict[str, list[Quantized]]()
    for name, start in problem.start.items():
        weights[name] = []
        for level, (one, form) in enumerate(zip(start, problem.forms[name], strict=True)):
            bias = None if one.bias is None else network.biases[level][name].detach().numpy().copy()
            codes = form.codes(network.tops[name]).astype(np.int8)
            weights[name].append(replace(one, codes=codes, bias=bias))
    grids = {}
    for key in problem.learned:
        factor = float(network.steps[key].detach().clamp(*STEP_RANGE).exp())
        grids[key] = replace(problem.grids[key], scale=np.float32(float(problem.grids[key].scale) * factor))
    return Solution(weights, grids, before.tolist(), after.tolist())


def _optimize(  # noqa: PLR0913, PLR0917
    network: _Network, x: Sequence[Tensor], y: Tensor, counts: np.ndarray, turn: int, iterations: int, seed: int
) -> None:
    """Adam on v, biases and, in the first turn, steps; the regularizer's temperature falls after the warm-up."""
    rate = min(MAX_RATE, max(RATE, TRAVEL / iterations))
    steps = [step for step in network.steps.values() if step.requires_grad and turn == 0]
    biases = [bias for level in network.biases[turn:] for bias in level.values()]
    optimizer = torch.optim.Adam(
        [
            {"params": [rounded.v for rounded in network.rounded.values()], "lr": rate},
            {"params": [*steps, *biases], "lr": rate * STEP_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    power = max(float(y.pow(2).mean()), 1e-12)
    generator = torch.Generator().manual_seed(seed)
    channels = y.shape[1] if y.dim() > 1 else 1
    for i in range(iterations):
        picked = torch.randperm(len(y), generator=generator)[:BATCH]
        part = (i / iterations - WARM_UP) / (1 - WARM_UP)
        optimizer.zero_grad()
        for level in range(turn, len(x)):  # one level's graph at a time is held
            error = (network.forward(level, x[level][picked], hard=False) - y[picked]).pow(2).mean() / power
            (error * channels * float(counts[level])).backward()
        if part >= 0:
            heat = COLD + (HOT - COLD) * (1 - part)
            terms = [1 - (2 * rounded.up(hard=False) - 1).abs().pow(heat) for rounded in network.rounded.values()]
            (REGULARIZER * torch.stack([term.sum() for term in terms]).sum()).backward()
        optimizer.step()
        schedule.step()


def _errors(network: _Network, x: Sequence[Tensor], y: Tensor) -> np.ndarray:
    """float64 [levels]: relative root-mean-square errors of the block's output as it is rounded in the end."""
    power, found = max(float(y.double().pow(2).sum()), 1e-30), []
    with torch.no_grad():
        for level, inputs in enumerate(x):
            total = 0.0
            for start in range(0, len(y), BATCH):
                out = network.forward(level, inputs[start : start + BATCH], hard=True)
                total += float((out - y[start : start + BATCH]).double().pow(2).sum())
            found.append((total / power) ** 0.5)
    return np.array(found)


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
