"""The integer graph in slow and obvious numpy: what every kernel has to equal, code for code.

`qdeploy.integer` says it for the operators of a FrozenNet; this is the authority for all that files of others contain.
docs/integers.md is the prose of both. Codes are uint8 [C, H, W]; float32 operations are rounded once each, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qdeploy.compile.expression import evaluate
from qdeploy.compile.graph import Graph, Op, Operand, Quantizer, Tensor, Weights, Window
from qdeploy.errors import CompileError

SHIFT = 128  # int8 codes + 128 are uint8 codes
F32 = np.float32


@dataclass(frozen=True)
class Grid:
    """The values of a quantizer: float32 scale, and zero point and bounds of uint8 codes."""

    scale: np.float32
    zero_point: int
    low: int = 0
    high: int = 255

    def real(self, codes: np.ndarray) -> np.ndarray:
        """Dequantize."""
        return (codes.astype(np.int32) - np.int32(self.zero_point)).astype(F32) * self.scale

    def codes(self, steps: np.ndarray) -> np.ndarray:
        """float32 in units of the scale -> codes: round half to even, add the zero point, clamp."""
        return np.clip(np.rint(steps) + F32(self.zero_point), self.low, self.high).astype(np.uint8)


class Evaluator:
    """One level of a graph: `params` are the file's initializers."""

    def __init__(self, graph: Graph, params: Mapping[str, np.ndarray]) -> None:
        self.graph, self.params = graph, params

    def codes(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Codes of every tensor for one input, float32 of the graph's input shape."""
        found: dict[str, np.ndarray] = {}
        for op in self.graph.ops:
            handler: Callable[[Op, list[np.ndarray]], np.ndarray] | None = {
                "conv": self._conv, "max_pool": self._max_pool, "average_pool": self._average_pool,
                "concat": self._concat, "move": self._move, "constant": self._constant, "softmax": self._softmax,
            }.get(op.kind)  # fmt: skip
            if op.kind == "quantize":
                grid = self.grid(self.graph.tensors[op.output].quantizer)
                real = np.asarray(x, F32).reshape(self.graph.tensors[op.output].shape)
                found[op.output] = grid.codes(real / grid.scale)
            else:
                inputs = [found[operand.tensor] for operand in op.inputs]
                found[op.output] = (handler or self._elementwise)(op, inputs)
            assert found[op.output].shape == self.graph.tensors[op.output].shape, op.name
        return found

    def output(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The network's float32 output, and its codes before the last step, in the file's own dtype."""
        graph = self.graph
        codes = self.codes(x)[graph.output.tensor]
        grid = self.grid(graph.output.grid)
        real = self._probabilities(codes, grid) if graph.softmax else grid.real(codes)
        own = (codes.astype(np.int32) - SHIFT).astype(np.int8) if graph.output.grid.signed else codes
        return real.reshape(graph.output_shape), own.reshape(graph.output_shape)

    def grid(self, quantizer: Quantizer) -> Grid:
        """Values of a quantizer, its bounds included."""

        def code(name: str | None, default: int) -> int:
            if name is None:
                return default
            return int(self.params[name].reshape(())) + (SHIFT if quantizer.signed else 0)

        grid = Grid(F32(self.params[quantizer.scale].reshape(())), code(quantizer.zero_point, 0))
        low, high = code(quantizer.clip_min, 0), code(quantizer.clip_max, 255)
        if quantizer.low is not None:
            low = max(low, int(grid.codes(np.asarray(F32(quantizer.low) / grid.scale))))
        if quantizer.high is not None:
            high = min(high, int(grid.codes(np.asarray(F32(quantizer.high) / grid.scale))))
        return Grid(grid.scale, grid.zero_point, low, high)

    def _target(self, op: Op) -> Grid:
        return self.grid(self.graph.tensors[op.output].quantizer)

    def _real(self, operand: Operand, codes: np.ndarray) -> np.ndarray:
        return self.grid(operand.grid).real(codes)

    # operators

    def _elementwise(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        if op.term is None:
            raise CompileError(f"operator {op.name}: {op.kind} has no definition")
        target = self._target(op)
        if op.table is not None:
            grid = self.grid(op.inputs[0].grid)
            if (float(grid.scale), grid.zero_point) != (op.table.scale, op.table.zero_point):
                raise CompileError(f"the table of {op.name} is for other values of {op.inputs[0].grid.scale}")
            real = np.array(op.table.values, F32)[inputs[0]]
        else:
            reals = [self._real(operand, codes) for operand, codes in zip(op.inputs, inputs, strict=True)]
            real = evaluate(op.term, reals)
        return np.broadcast_to(target.codes(real / target.scale), self.graph.tensors[op.output].shape)

    def _conv(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        assert op.weights is not None
        source, target = self.grid(op.inputs[0].grid), self._target(op)
        weight, scale = self._weight(op.weights)
        weight = weight.reshape(op.weights.channels, -1, *op.window.kernel)
        x = pad(inputs[0].astype(np.int64) - source.zero_point, op.window, 0)
        height, width = op.window.output(*inputs[0].shape[1:])
        per_group, outputs = weight.shape[1], weight.shape[0] // op.groups
        acc = np.zeros((weight.shape[0], height, width), np.int64)
        for i in range(op.window.kernel[0]):
            for j in range(op.window.kernel[1]):
                tap = tap_of(x, op.window, i, j, height, width)
                for g in range(op.groups):
                    part = tap[g * per_group : (g + 1) * per_group]
                    rows = slice(g * outputs, (g + 1) * outputs)
                    acc[rows] += np.einsum("oc,chw->ohw", weight[rows, :, i, j], part)
        unit = source.scale * scale
        acc += self._bias(op.weights, unit)[:, None, None]
        return target.codes(acc.astype(np.int32).astype(F32) * (unit / target.scale)[:, None, None])

    def _weight(self, w: Weights) -> tuple[np.ndarray, np.ndarray]:
        """Weights [O, ...] without their zero point, and one float32 scale an output channel."""
        stored = self.params[w.weight].T if w.transposed else self.params[w.weight]
        column = (-1, *(1,) * (stored.ndim - 1))
        scale = np.broadcast_to(self.params[w.scale].reshape(-1), w.channels)
        zero = self.params[w.zero_point] if w.zero_point is not None else np.zeros(1)
        zeros = np.broadcast_to(zero.astype(np.int64).reshape(-1), w.channels).reshape(column)
        if stored.dtype == np.float32:
            low = -SHIFT if w.signed else 0
            stored = np.clip(np.rint(stored / scale.reshape(column)) + zeros.astype(F32), low, low + 255)
        return stored.astype(np.int64) - zeros, scale

    def _bias(self, w: Weights, unit: np.ndarray) -> np.ndarray:
        """int64 in units of s_x * s_w; a bias in a unit of its own is converted in float64."""
        if w.bias is None:
            return np.zeros(w.channels, np.int64)
        limit = 2.0**31 - 1
        if w.bias_scale is None:
            real = self.params[w.bias].astype(np.float64) / unit.astype(np.float64)
            return np.clip(np.rint(real), -limit, limit).astype(np.int64)
        zero = self.params[w.bias_zero_point].astype(np.int64) if w.bias_zero_point is not None else 0
        value = self.params[w.bias].astype(np.int64) - zero
        own = np.broadcast_to(self.params[w.bias_scale].reshape(-1), w.channels)
        converted = np.clip(np.rint(value * (own.astype(np.float64) / unit.astype(np.float64))), -limit, limit)
        return np.where(own == unit, value, converted.astype(np.int64))

    def _max_pool(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        target, shape = self._target(op), self.graph.tensors[op.output].shape
        x, best = pad(inputs[0], op.window, 0, shape[1:]), np.zeros(shape, np.uint8)
        for i in range(op.window.kernel[0]):
            for j in range(op.window.kernel[1]):
                best = np.maximum(best, tap_of(x, op.window, i, j, *shape[1:]))
        return np.clip(best, target.low, target.high).astype(np.uint8)

    def _average_pool(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        source, target, shape = self.grid(op.inputs[0].grid), self._target(op), self.graph.tensors[op.output].shape
        x = pad(inputs[0].astype(np.int64) - source.zero_point, op.window, 0)
        there = pad(np.ones_like(inputs[0], np.int64), op.window, int(op.count_padding))
        acc, area = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i in range(op.window.kernel[0]):
            for j in range(op.window.kernel[1]):
                acc += tap_of(x, op.window, i, j, *shape[1:])
                area += tap_of(there, op.window, i, j, *shape[1:])
        return target.codes(acc.astype(F32) * (source.scale / (target.scale * area.astype(F32))))

    def _concat(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        target = self._target(op)
        real = np.concatenate([self._real(o, codes) for o, codes in zip(op.inputs, inputs, strict=True)])
        return target.codes(real / target.scale)

    def _move(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        shape = self.graph.tensors[op.output].shape
        out = np.full(shape, self._target(op).zero_point, np.uint8)
        (down, across), (top, left) = op.window.stride, op.window.padding[:2]
        for h in range(shape[1]):
            for w in range(shape[2]):
                row, column = (h - top) // down, (w - left) // across
                if 0 <= row < inputs[0].shape[1] and 0 <= column < inputs[0].shape[2]:
                    out[:, h, w] = inputs[0][:, row, column]
        return out

    def _constant(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        assert op.stored is not None
        tensor: Tensor = self.graph.tensors[op.output]
        codes = self.params[op.stored].astype(np.int32) + (SHIFT if tensor.quantizer.signed else 0)
        return codes.reshape(tensor.shape).astype(np.uint8)

    def _softmax(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        target = self._target(op)
        return target.codes(self._probabilities(inputs[0], self.grid(op.inputs[0].grid)) / target.scale)

    def _probabilities(self, codes: np.ndarray, grid: Grid) -> np.ndarray:
        """float32 softmax over channels, from exponentials of code distances in float64."""
        parts = exponentials(grid.scale)[codes.max(0).astype(np.int64) - codes]
        total = np.zeros(codes.shape[1:])
        for part in parts:  # in the order of channels
            total = total + part
        return (parts / total).astype(F32)


def exponentials(scale: np.float32) -> np.ndarray:
    """float64 [256]: exp(-d * scale), by a series for exp(-scale / 256), 8 squarings and repeated products."""
    t = min(np.float64(scale), np.float64(256)) / 256
    value = np.float64(1)
    for n in range(20, 0, -1):
        value = 1 - t * value / n
    for _ in range(8):
        value = value * value
    out = np.ones(256)
    for d in range(255):
        out[d + 1] = out[d] * value
    return out


def pad(x: np.ndarray, window: Window, fill: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """[C, H, W] with the window's padding, and more of it where `size` outputs need more (ceil_mode)."""
    top, left, bottom, right = window.padding
    if size is not None:
        reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(
            size, window.stride, window.kernel, window.dilation, strict=True)]  # fmt: skip
        bottom, right = max(bottom, reach[0] - top - x.shape[1]), max(right, reach[1] - left - x.shape[2])
    return np.pad(x, ((0, 0), (top, bottom), (left, right)), constant_values=fill)


def tap_of(x: np.ndarray, window: Window, i: int, j: int, height: int, width: int) -> np.ndarray:
    """What position (i, j) of the window sees in padded `x`, for every one of height x width outputs."""
    (sh, sw), (dh, dw) = window.stride, window.dilation
    return x[:, i * dh : i * dh + (height - 1) * sh + 1 : sh, j * dw : j * dw + (width - 1) * sw + 1 : sw]
