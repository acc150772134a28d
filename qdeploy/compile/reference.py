"""The integer graph in slow and obvious numpy: what every kernel has to equal, code for code.

`qdeploy.integer` says it for the operators of a FrozenNet; this is the authority for all that files of others contain.
docs/integers.md is the prose of both. Codes are uint8 [C, H, W]; float32 operations are rounded once each, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qdeploy.compile.expression import evaluate
from qdeploy.compile.graph import Graph, Op, Operand, Quantizer, RealParam, Region, Tensor, Weights, Window, swapped
from qdeploy.errors import CompileError
from qdeploy.integer import Affine, added, multiplied

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
        """Codes of every tensor, and values of every float tensor, for one image, float32 [1, ...]."""
        found: dict[str, np.ndarray] = {self.graph.input: np.asarray(x, F32)}
        for op in self.graph.ops:
            handler: Callable[[Op, list[np.ndarray]], np.ndarray] | None = {
                "conv": self._conv, "max_pool": self._max_pool, "average_pool": self._average_pool, "mean": self._mean,
                "concat": self._concat, "move": self._move, "constant": self._constant, "softmax": self._softmax,
                "shuffle": self._shuffle, "insert": self._insert,
            }.get(op.kind)  # fmt: skip
            if op.region is not None:
                found |= self._region(op.region, found)
                continue
            if op.kind in ("dequantize", "codes"):
                codes = found[op.inputs[0].tensor]
                real = self._real(op.inputs[0], codes) if op.kind == "dequantize" else _own(codes, op.inputs[0])
                found[op.output] = real.reshape(self.graph.floats[op.output].shape)
                continue
            if op.kind == "quantize":
                grid = self.grid(self.graph.tensors[op.output].quantizer)
                real = found[op.source or self.graph.input].reshape(self.graph.tensors[op.output].shape)
                found[op.output] = grid.codes(real / grid.scale)
            else:
                inputs = [found[operand.tensor] for operand in op.inputs]
                found[op.output] = (handler or self._elementwise)(op, inputs)
                if op.then is not None:
                    own = {op.then.tensor: found[op.output]} | found
                    inputs = [own[operand.tensor] for operand in op.then.op.inputs]
                    found[op.output] = self._elementwise(op.then.op, inputs)
            assert found[op.output].shape == self.graph.tensors[op.output].shape, op.name
        return found

    def output(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The network's float32 output for a batch, and its codes before the last step, in the file's own dtype."""
        graph, images = self.graph, [self._output(image[None]) for image in np.asarray(x, F32)]
        real, own = (np.concatenate([image[i].reshape(-1) for image in images]) for i in (0, 1))
        return real.reshape(graph.output_shape), own.reshape(graph.output_shape)

    def _output(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One image's output and its codes; a float tensor has none, so it stands for them."""
        operand, found = self.graph.output, self.codes(image)
        if isinstance(operand, str):
            return found[operand], found[operand]
        codes, grid = found[operand.tensor], self.grid(operand.grid)
        real = self._probabilities(codes, grid) if self.graph.softmax else grid.real(codes)
        return real, _own(codes, operand)

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
        if op.steps:
            found = {op.inputs[0].tensor: inputs[0]}
            for step in op.steps:
                found[step.output] = self._elementwise(step, [found[operand.tensor] for operand in step.inputs])
            return found[op.output]
        target = self._target(op)
        shape = np.broadcast_shapes(*(codes.shape for codes in inputs))
        if op.term is None:
            raise CompileError(f"operator {op.name}: {op.kind} has no definition")
        if op.kind in ("add", "mul"):
            return np.broadcast_to(self._pair(op, inputs), shape)
        if op.table is not None:
            grid = self.grid(op.inputs[0].grid)
            if (float(grid.scale), grid.zero_point) != (op.table.scale, op.table.zero_point):
                raise CompileError(f"the table of {op.name} is for other values of {op.inputs[0].grid.scale}")
            real = np.array(op.table.values, F32)[inputs[0]]
        else:
            reals = [self._real(operand, codes) for operand, codes in zip(op.inputs, inputs, strict=True)]
            real = evaluate(op.term, reals)
        return np.broadcast_to(target.codes(real / target.scale), shape)

    def _pair(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        """A sum or product of two activations, on the file's own codes."""
        target, signed = self._target(op), self.graph.tensors[op.output].quantizer.signed
        quantizers = [operand.grid for operand in op.inputs]
        shifts = [SHIFT if q.signed else 0 for q in quantizers]
        codes = [x.astype(np.int32) - shift for x, shift in zip(inputs, shifts, strict=True)]
        grids: list[Affine] = [
            (self.grid(q).scale, self.grid(q).zero_point - shift) for q, shift in zip(quantizers, shifts, strict=True)
        ]
        shift = SHIFT if signed else 0
        own = (target.scale, target.zero_point - shift)
        if op.kind == "mul":
            real = multiplied(codes[0], codes[1], grids[0], grids[1], own)
        else:
            first, second = (1, 0) if swapped(inputs[0].shape, inputs[1].shape) else (0, 1)
            real = added(codes[first], codes[second], grids[first], grids[second], own)
        return np.clip(np.rint(real) + F32(shift), target.low, target.high).astype(np.uint8)

    def _conv(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        assert op.weights is not None
        source, target = self.grid(op.inputs[0].grid), self.grid(self.graph.tensors[op.own].quantizer)
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
        stored = self.params[w.weight].T if w.order == "matmul" else self.params[w.weight]
        if w.order == "transposed conv":
            stored = self._flipped(stored, w.channels)
        column = (-1, *(1,) * (stored.ndim - 1))
        scale = np.broadcast_to(self.params[w.scale].reshape(-1), w.channels)
        zero = self.params[w.zero_point] if w.zero_point is not None else np.zeros(1)
        zeros = np.broadcast_to(zero.astype(np.int64).reshape(-1), w.channels).reshape(column)
        if stored.dtype == np.float32:
            low = -SHIFT if w.signed else 0
            stored = np.clip(np.rint(stored / scale.reshape(column)) + zeros.astype(F32), low, low + 255)
        bounds = [None if name is None else self.params[name].reshape(()) for name in (w.clip_min, w.clip_max)]
        if bounds[0] is not None:
            stored = np.maximum(stored, bounds[0])
        if bounds[1] is not None:
            stored = np.minimum(stored, bounds[1])
        return stored.astype(np.int64) - zeros, scale

    def _flipped(self, stored: np.ndarray, channels: int) -> np.ndarray:
        """[I, O/groups, ...] -> [O, I/groups, ...], back to front in each spatial axis."""
        inputs, each = stored.shape[:2]
        groups = channels // each
        parts = stored.reshape(groups, inputs // groups, each, *stored.shape[2:]).swapaxes(1, 2)
        whole = parts.reshape(channels, inputs // groups, *stored.shape[2:])
        return np.flip(whole, tuple(range(2, stored.ndim)))

    def _bias(self, w: Weights, unit: np.ndarray) -> np.ndarray:
        """int64 in units of s_x * s_w; a bias in a unit of its own is converted in float64."""
        if w.bias is None:
            return np.zeros(w.channels, np.int64)
        limit = 2.0**31 - 1
        if w.bias_scale is None:
            real = self.params[w.bias].reshape(-1).astype(np.float64) / unit.astype(np.float64)
            return np.clip(np.rint(real), -limit, limit).astype(np.int64)
        zero = self.params[w.bias_zero_point].astype(np.int64) if w.bias_zero_point is not None else 0
        value = self.params[w.bias].reshape(-1).astype(np.int64) - zero
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
        x = pad(source.real(inputs[0]), op.window, 0, shape[1:])
        there = pad(np.ones_like(inputs[0], F32), op.window, int(op.count_padding), shape[1:])
        total, area = np.zeros(shape, F32), np.zeros(shape, F32)
        for i in range(op.window.kernel[0]):
            for j in range(op.window.kernel[1]):
                total += tap_of(x, op.window, i, j, *shape[1:])
                area += tap_of(there, op.window, i, j, *shape[1:])
        shift = SHIFT if self.graph.tensors[op.output].quantizer.signed else 0  # the file's own zero point counts here
        codes = np.rint(total / area / target.scale + F32(target.zero_point - shift)) + F32(shift)
        return np.clip(codes, target.low, target.high).astype(np.uint8)

    def _mean(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        source, target, (_, height, width) = self.grid(op.inputs[0].grid), self._target(op), inputs[0].shape
        acc = (inputs[0].astype(np.int64) - source.zero_point).sum((1, 2), keepdims=True)
        return target.codes(acc.astype(F32) * (source.scale / (target.scale * F32(height * width))))

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

    def _insert(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        shape = self.graph.tensors[op.output].shape
        out = np.full(shape, self._target(op).zero_point, np.uint8)
        (down, across), (top, left) = op.window.stride, op.window.padding[:2]
        for h in range(inputs[0].shape[1]):
            for w in range(inputs[0].shape[2]):
                row, column = h * down + top, w * across + left
                if 0 <= row < shape[1] and 0 <= column < shape[2]:
                    out[:, row, column] = inputs[0][:, h, w]
        return out

    def _shuffle(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        assert op.shuffle is not None
        places = np.full(op.shuffle.sizes, op.shuffle.offset)
        for axis, step in enumerate(op.shuffle.steps):
            places += np.indices(op.shuffle.sizes, sparse=True)[axis] * step
        return inputs[0].reshape(-1)[places].reshape(self.graph.tensors[op.output].shape)

    def _region(self, region: Region, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a float region; ONNX's reference evaluator may differ from other runtimes in the last bits."""
        from onnx import ModelProto
        from onnx.reference import ReferenceEvaluator

        model = ModelProto.FromString(region.model)
        values = [found[name] for name in region.inputs] + [self._parameter(param) for param in region.params]
        feeds = dict(zip((info.name for info in model.graph.input), values, strict=True))
        return dict(zip(region.outputs, ReferenceEvaluator(model).run(None, feeds), strict=True))

    def _parameter(self, param: RealParam) -> np.ndarray:
        stored = self.params[param.stored]
        if param.turned:
            return self._parameter(replace(param, turned=False)).T
        if param.scale is None:
            return stored
        column = [-1 if i == param.axis % max(1, stored.ndim) else 1 for i in range(stored.ndim)]

        def along(values: np.ndarray) -> np.ndarray:
            return values.reshape(()) if values.size == 1 else values.reshape(column)

        codes = stored.astype(np.int32)
        if param.zero_point is not None:
            codes = codes - along(self.params[param.zero_point].astype(np.int32))
        return codes.astype(F32) * along(self.params[param.scale])

    def _constant(self, op: Op, inputs: list[np.ndarray]) -> np.ndarray:
        assert op.stored is not None
        tensor: Tensor = self.graph.tensors[op.output]
        stored = self.params[op.stored]
        if stored.dtype == F32:
            grid = self.grid(tensor.quantizer)
            return grid.codes(stored / grid.scale).reshape(tensor.shape)
        codes = stored.astype(np.int32) + (SHIFT if tensor.quantizer.signed else 0)
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


def _own(codes: np.ndarray, operand: Operand) -> np.ndarray:
    """Codes as the file has them."""
    return (codes.astype(np.int32) - SHIFT).astype(np.int8) if operand.grid.signed else codes


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
