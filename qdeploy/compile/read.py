"""QDQ ONNX -> integer graph. Everything that cannot become an integer kernel is refused by name, all of it at once.

A float value of the file is one of three things: a *view* (exactly the real values of an activation's codes), a
*result* (what an operator computes, waiting for its QuantizeLinear), or a stored parameter behind a DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from qdeploy.compile.graph import Graph, Op, Operand, Param, Quantizer, Tensor, Weights, Window
from qdeploy.compile.values import Input, Refused, Result, Stored, Value, View, pool_window, window_of
from qdeploy.errors import CompileError
from qdeploy.qdq import arrays, attributes, numeric_roles

MAX_CODES = 2**30  # offsets inside a tensor are int32


class Reader:
    """One pass over a canonical model's nodes."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.arrays = arrays(model)
        self.roles = numeric_roles(model)
        self.values: dict[str, Value] = {}
        self.codes: dict[str, str | None] = {}  # ONNX value of codes -> tensor
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.used: dict[str, None] = {}  # parameters in order of first use
        self.flat: set[str] = set()  # tensors that the file sees as [1, N]
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def read(self) -> Graph:
        """The whole graph; raises CompileError that lists every problem."""
        problems: list[str] = []
        try:
            input_name, input_shape = self._input()
        except Refused as e:
            raise CompileError(f"the model cannot be compiled: {e}") from e
        for node in self.model.graph.node:
            try:
                self._node(node)
            except Refused as e:
                problems.append(f"{node.op_type} {node.name or node.output[0]}: {e}")
                for name in node.output:
                    self.values[name] = self.codes[name] = None
        try:
            output, output_shape = self._output()
        except Refused as e:
            if not problems or self.values.get(self.model.graph.output[0].name) is not None:
                problems.append(str(e))
        if problems:
            raise CompileError(f"the model cannot be compiled: {'; '.join(problems)}")
        name = self.model.graph.output[0].name
        params = tuple(Param(n, self.arrays[n].dtype.name, self.arrays[n].shape) for n in self.used)
        live_ops, live = _live(self.ops, output)
        tensors = {n: t for n, t in self.tensors.items() if n in live}
        return Graph(input_name, input_shape, name, output_shape, output, live_ops, tensors, params)

    # inputs and outputs

    def _input(self) -> tuple[str, tuple[int, ...]]:
        inputs = [value for value in self.model.graph.input if value.name not in self.arrays]
        if len(inputs) != 1:
            raise Refused(f"it has {len(inputs)} inputs, exactly one is supported")
        name, kind = inputs[0].name, inputs[0].type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
        if kind.elem_type != TensorProto.FLOAT or len(dims) not in (2, 4):
            raise Refused(f"input {name} is not float32 [1, C, H, W] or [1, N]")
        if dims[0] not in (0, 1) or min(dims[1:]) < 1:  # an open batch is compiled for one image
            raise Refused(f"input {name} has shape {dims}: batch 1 and fixed sizes are needed")
        shape = _three(dims[1:])
        if int(np.prod(shape)) > MAX_CODES:
            raise Refused(f"input {name} is too large")
        self.values[name] = Input(shape, len(dims) == 2)
        return name, (1, *dims[1:])

    def _output(self) -> tuple[Operand, tuple[int, ...]]:
        outputs = self.model.graph.output
        if len(outputs) != 1:
            raise Refused(f"it has {len(outputs)} outputs, exactly one is supported")
        name = outputs[0].name
        value = self.values.get(name)
        if not isinstance(value, View):
            raise Refused(f"output {name} is not quantized: put QuantizeLinear and DequantizeLinear behind it")
        shape = self.tensors[value.operand.tensor].shape
        return value.operand, (1, int(np.prod(shape))) if value.flat else (1, *shape)

    # nodes

    def _node(self, node: NodeProto) -> None:
        handlers = {
            "QuantizeLinear": self._quantize, "DequantizeLinear": self._dequantize, "Clip": self._clip,
            "Relu": self._relu, "Conv": self._conv, "Gemm": self._gemm, "MatMul": self._matmul, "Add": self._add,
            "MaxPool": self._max_pool, "AveragePool": self._average_pool, "GlobalAveragePool": self._global_pool,
            "ReduceMean": self._reduce_mean, "Flatten": self._flatten, "Reshape": self._flatten,
            "Identity": self._identity,
        }  # fmt: skip
        if node.domain not in ("", "ai.onnx") or node.op_type not in handlers:
            raise Refused("this operator has no integer kernel")
        if any(name in self.values and self.values[name] is None for name in node.input) or any(
            name in self.codes and self.codes[name] is None for name in node.input
        ):
            for name in node.output:  # the cause is in the list already
                self.values[name] = self.codes[name] = None
            return
        handlers[node.op_type](node)

    def _param(self, name: str, dtypes: tuple[type, ...], what: str) -> str:
        """Check and note the use of a run-time parameter."""
        if name not in self.arrays:
            raise Refused(f"{what} {name} is not an initializer")
        if name not in self.roles:
            raise Refused(f"{what} {name} is also used in another way: give it an initializer of its own")
        if self.arrays[name].dtype.type not in dtypes:
            allowed = " or ".join(np.dtype(d).name for d in dtypes)
            raise Refused(f"{what} {name} is {self.arrays[name].dtype}, not {allowed}")
        self.used[name] = None
        return name

    def _scalar(self, name: str, dtypes: tuple[type, ...], what: str) -> str:
        self._param(name, dtypes, what)
        if self.arrays[name].size != 1:
            raise Refused(f"{what} {name} has {self.arrays[name].size} values: activations are quantized per tensor")
        return name

    def _grid(self, node: NodeProto) -> Quantizer:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear over an activation."""
        scale = self._scalar(node.input[1], (np.float32,), "scale")
        if len(node.input) < 3 or not node.input[2]:
            return Quantizer(scale, None, False)
        zero = self._scalar(node.input[2], (np.uint8, np.int8), "zero point")
        return Quantizer(scale, zero, self.arrays[zero].dtype == np.int8)

    def _quantize(self, node: NodeProto) -> None:
        if attributes(node).get("output_dtype", 0) not in (0, TensorProto.UINT8):
            raise Refused("only uint8 without a zero point, or the zero point's own type, is supported")
        quantizer, out, codes = self._grid(node), node.output[0], node.output[0]
        readers = self.readers.get(out, [])
        if len(readers) == 1 and readers[0].op_type == "Clip":
            quantizer = self._clipped(quantizer, readers[0])
            codes = readers[0].output[0]
        self.codes[out] = self.codes[codes] = self._store(out, quantizer, self.values.get(node.input[0]), codes)

    def _clipped(self, quantizer: Quantizer, clip: NodeProto) -> Quantizer:
        dtype = np.int8 if quantizer.signed else np.uint8
        bounds = [self._scalar(n, (dtype,), "bound") if n else None for n in (*clip.input[1:], "", "")[:2]]
        return replace(quantizer, clip_min=bounds[0], clip_max=bounds[1])

    def _store(self, name: str, quantizer: Quantizer, value: Value, codes: str) -> str:
        """Emit what makes tensor `name` of `value`; returns the tensor that holds the codes."""
        if isinstance(value, View):
            source = self.tensors[value.operand.tensor]
            same = value.operand.grid == source.quantizer.grid == quantizer.grid
            clips = (quantizer.clip_min, quantizer.clip_max)
            if same and clips in ((None, None), (source.quantizer.clip_min, source.quantizer.clip_max)):
                if value.flat and codes not in self.flat:
                    self.flat.add(codes)
                return source.name  # the same codes again
            op, shape, flat = Op("requantize", name, (value.operand,), name), source.shape, value.flat
        elif isinstance(value, Input):
            op, shape, flat = Op("quantize", name, (), name), value.shape, value.flat
        elif isinstance(value, Result):
            quantizer = replace(quantizer, low=value.low, high=value.high)
            op, shape, flat = replace(value.op, output=name), value.shape, value.flat
        else:
            raise Refused("its input is no activation")
        if flat:
            self.flat.add(codes)
        self._emit(op, Tensor(name, shape, quantizer))
        return name

    def _emit(self, op: Op, tensor: Tensor) -> None:
        if int(np.prod(tensor.shape)) > MAX_CODES:
            raise Refused("its output is too large")
        self.tensors[tensor.name] = tensor
        self.ops.append(op)

    def _dequantize(self, node: NodeProto) -> None:
        name, out = node.input[0], node.output[0]
        if name in self.arrays:
            zero = node.input[2] if len(node.input) > 2 and node.input[2] else None
            axis = attributes(node).get("axis", 1)
            self.values[out] = Stored(name, node.input[1], zero, axis if isinstance(axis, int) else 1)
            return
        tensor = self.codes.get(name)
        if tensor is None:
            raise Refused("its input is neither an initializer nor the output of a QuantizeLinear")
        grid = self._grid(node)
        if grid.signed != self.tensors[tensor].quantizer.signed:
            raise Refused("its zero point's type is not its QuantizeLinear's")
        self.values[out] = View(Operand(tensor, grid), name in self.flat)

    def _clip(self, node: NodeProto) -> None:
        """Integer: read with its QuantizeLinear, or a second width of codes that others read too. Float: a bound."""
        source = node.input[0]
        if source in self.codes:
            tensor = self.codes[source]
            assert tensor is not None  # refused values are caught before
            if node.output[0] in self.codes:
                return
            old = self.tensors[tensor].quantizer
            view = View(Operand(tensor, old.grid), source in self.flat)
            clipped = self._clipped(old.grid, node)
            self.codes[node.output[0]] = self._store(node.output[0], clipped, view, node.output[0])
            return
        low, high = (self._constant(node, i) for i in (1, 2))
        self._bound(node, low, high)

    def _constant(self, node: NodeProto, i: int) -> float | None:
        if len(node.input) <= i or not node.input[i]:
            return None
        array = self.arrays.get(node.input[i])
        if array is None or array.size != 1 or not np.isfinite(array).all():
            raise Refused(f"bound {node.input[i]} is not one stored finite number")
        return float(array.reshape(()))

    def _relu(self, node: NodeProto) -> None:
        self._bound(node, 0.0, None)

    def _bound(self, node: NodeProto, low: float | None, high: float | None) -> None:
        result = self._as_result(node, node.input[0])
        lows = [b for b in (result.low, low) if b is not None]
        highs = [b for b in (result.high, high) if b is not None]
        if lows and highs and max(lows) > min(highs):
            raise Refused("its bounds leave nothing")
        result = replace(result, low=max(lows, default=None), high=min(highs, default=None))
        self.values[node.output[0]] = result

    def _as_result(self, node: NodeProto, name: str) -> Result:
        """A value that waits for its quantizer; the real values of codes wait as a requantization."""
        value = self.values.get(name)
        if isinstance(value, Result):
            return value
        if isinstance(value, View):
            op = Op("requantize", node.name or node.output[0], (value.operand,), "")
            return Result(op, self.tensors[value.operand.tensor].shape, value.flat)
        raise Refused(f"input {name} is not an activation: put QuantizeLinear and DequantizeLinear before it")

    def _view(self, name: str) -> View:
        value = self.values.get(name)
        if isinstance(value, View):
            return value
        if isinstance(value, Result):
            raise Refused(f"input {name} of {value.op.name} is not quantized: put QuantizeLinear behind it")
        raise Refused(f"input {name} is not a quantized activation")

    # operators

    def _conv(self, node: NodeProto) -> None:
        view, a = self._view(node.input[0]), attributes(node)
        channels, height, width = self.tensors[view.operand.tensor].shape
        if view.flat:
            raise Refused("its input is not [1, C, H, W]")
        weights = self._weights(node, 0)
        shape = self.arrays[weights.weight].shape
        if len(shape) != 4:
            raise Refused(f"its weight has {len(shape)} axes: only convolutions over H, W are supported")
        groups = int(a.get("group", 1))
        if groups < 1 or shape[1] * groups != channels or shape[0] % groups:
            raise Refused(f"weight {list(shape)} in {groups} groups does not fit {channels} channels")
        window = window_of(a, (shape[2], shape[3]), (height, width))
        self._result(node, Op("conv", "", (view.operand,), "", window, groups, weights), shape[0], window, view)

    def _result(self, node: NodeProto, op: Op, channels: int, window: Window, view: View) -> None:
        _, height, width = self.tensors[view.operand.tensor].shape
        size = window.output(height, width)
        if min(size) < 1:
            raise Refused(f"its window does not fit into {height} x {width}")
        op = replace(op, name=node.name or node.output[0])
        self.values[node.output[0]] = Result(op, (channels, *size), False)

    def _weights(self, node: NodeProto, axis: int) -> Weights:
        """Weight and bias of Conv (axis 0), Gemm or MatMul (axis of its output channels)."""
        stored = self.values.get(node.input[1])
        if not isinstance(stored, Stored):
            raise Refused(f"weight {node.input[1]} is not an initializer behind DequantizeLinear")
        weight = self._param(stored.codes, (np.int8, np.uint8), "weight")
        shape = self.arrays[weight].shape
        if len(shape) not in (2, 4):
            raise Refused(f"weight {weight} has {len(shape)} axes")
        channels = shape[axis]
        self._per_channel(stored, len(shape), axis, channels, (np.int8, np.uint8))
        bias = self.values.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if len(node.input) > 2 and node.input[2] and not isinstance(bias, Stored):
            raise Refused(f"bias {node.input[2]} is not an int32 initializer behind DequantizeLinear")
        signed = self.arrays[weight].dtype == np.int8
        if stored.zero_point is not None and self.arrays[stored.zero_point].dtype != self.arrays[weight].dtype:
            raise Refused(f"zero point {stored.zero_point} is not of its weight's type")
        common = (weight, signed, stored.scale, stored.zero_point)
        if not isinstance(bias, Stored):
            return Weights(*common, None, None, None, channels, axis == 1)
        name = self._param(bias.codes, (np.int32,), "bias")
        if self.arrays[name].shape != (channels,):
            raise Refused(f"bias {name} has shape {list(self.arrays[name].shape)}, not [{channels}]")
        self._per_channel(bias, 1, 0, channels, (np.int32,))
        return Weights(*common, name, bias.scale, bias.zero_point, channels, axis == 1)

    def _per_channel(self, stored: Stored, rank: int, axis: int, channels: int, dtypes: tuple[type, ...]) -> None:
        """Scale and zero point of a stored tensor: one value, or one a channel along `axis`."""
        names = [(stored.scale, (np.float32,), "scale")]
        if stored.zero_point is not None:
            names.append((stored.zero_point, dtypes, "zero point"))  # type: ignore[arg-type]
        for name, kinds, what in names:
            self._param(name, kinds, what)
            size = self.arrays[name].size
            if size != 1 and (self.arrays[name].shape != (channels,) or stored.axis % rank != axis):
                raise Refused(f"{what} {name} is neither one value nor one for each of {channels} output channels")

    def _linear(self, node: NodeProto, axis: int) -> None:
        view = self._view(node.input[0])
        weights = self._weights(node, axis)
        shape = self.arrays[weights.weight].shape
        source = self.tensors[view.operand.tensor].shape
        if not view.flat or len(shape) != 2 or shape[1 - axis] != int(np.prod(source)):
            raise Refused(f"weight {list(shape)} does not fit an input of {[1, *source]}: flatten it to [1, N]")
        window = Window((source[1], source[2]))
        op = Op("conv", node.name or node.output[0], (view.operand,), "", window, 1, weights)
        self.values[node.output[0]] = Result(op, (weights.channels, 1, 1), True)

    def _gemm(self, node: NodeProto) -> None:
        a = attributes(node)
        if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
            raise Refused("only alpha = beta = 1 and transA = 0 are supported")
        self._linear(node, 0 if a.get("transB", 0) else 1)

    def _matmul(self, node: NodeProto) -> None:
        self._linear(node, 1)

    def _add(self, node: NodeProto) -> None:
        a, b = (self._view(name) for name in node.input)
        shape, other = (self.tensors[v.operand.tensor].shape for v in (a, b))
        if shape != other or a.flat != b.flat:
            raise Refused(f"it adds {list(shape)} and {list(other)}: only equal shapes are supported")
        op = Op("add", node.name or node.output[0], (a.operand, b.operand), "")
        self.values[node.output[0]] = Result(op, shape, a.flat)

    def _image(self, node: NodeProto) -> tuple[View, tuple[int, int, int]]:
        view = self._view(node.input[0])
        if view.flat:
            raise Refused("its input is not [1, C, H, W]")
        return view, self.tensors[view.operand.tensor].shape

    def _max_pool(self, node: NodeProto) -> None:
        """Moves codes, so its output has its input's grid at once, whether or not a quantizer follows."""
        view, (channels, height, width) = self._image(node)
        if len(node.output) > 1:
            raise Refused("its second output is not supported")
        window, ceil = pool_window(attributes(node), (height, width))
        size = window.output(height, width, ceil)
        if min(size) < 1:
            raise Refused(f"its window does not fit into {height} x {width}")
        source = self.tensors[view.operand.tensor].quantizer
        grid = source if source.grid == view.operand.grid else view.operand.grid
        name = f"{node.output[0]}.pooled"
        op = Op("max_pool", node.name or node.output[0], (view.operand,), name, window)
        self._emit(op, Tensor(name, (channels, *size), replace(grid, low=None, high=None)))
        self.values[node.output[0]] = View(Operand(name, view.operand.grid), False)

    def _average_pool(self, node: NodeProto) -> None:
        view, (channels, height, width) = self._image(node)
        a = attributes(node)
        window, ceil = pool_window(a, (height, width))
        if ceil or window.dilation != (1, 1):
            raise Refused("ceil_mode and dilations are not supported")
        op = Op("average_pool", "", (view.operand,), "", window, count_padding=bool(a.get("count_include_pad", 0)))
        self._result(node, op, channels, window, view)

    def _global_pool(self, node: NodeProto) -> None:
        view, (channels, height, width) = self._image(node)
        window = Window((height, width))
        self._result(node, Op("average_pool", "", (view.operand,), "", window), channels, window, view)

    def _reduce_mean(self, node: NodeProto) -> None:
        a = attributes(node)
        axes: Any = a.get("axes")
        if len(node.input) > 1 and node.input[1]:
            stored = self.arrays.get(node.input[1])
            axes = None if stored is None else stored.reshape(-1).tolist()
        if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            raise Refused("only the mean over H and W (axes 2 and 3) is supported")
        self._global_pool(node)
        result = self.values[node.output[0]]
        if not a.get("keepdims", 1) and isinstance(result, Result):
            self.values[node.output[0]] = replace(result, flat=True)

    def _flatten(self, node: NodeProto) -> None:
        value = self.values.get(node.input[0])
        if not isinstance(value, View | Result):
            raise Refused("its input is not an activation")
        shape = self.tensors[value.operand.tensor].shape if isinstance(value, View) else value.shape
        count = int(np.prod(shape))
        a = attributes(node)
        if node.op_type == "Flatten":
            if a.get("axis", 1) not in ((1, -1) if value.flat else (1, -3)):
                raise Refused("only axis 1 is supported")
        else:
            target = self.arrays.get(node.input[1])
            if target is None or target.reshape(-1).tolist() not in (
                [1, -1],
                [1, count],
                [-1, count],
                [0, -1],
                [0, count],
            ):
                raise Refused("only a reshape to [1, N] is supported")
        self.values[node.output[0]] = replace(value, flat=True)

    def _identity(self, node: NodeProto) -> None:
        source, out = node.input[0], node.output[0]
        if source in self.codes:
            self.codes[out] = self.codes[source]
            if source in self.flat:
                self.flat.add(out)
        elif source in self.values:
            self.values[out] = self.values[source]
        else:
            raise Refused("its input is not an activation")


def _three(dims: list[int]) -> tuple[int, int, int]:
    return (dims[0], dims[1], dims[2]) if len(dims) == 3 else (dims[0], 1, 1)


def _live(ops: list[Op], output: Operand) -> tuple[tuple[Op, ...], set[str]]:
    """The operators that the output needs, and the tensors that they make."""
    needed, kept = {output.tensor}, []
    for op in reversed(ops):
        if op.output in needed:
            kept.append(op)
            needed.update(operand.tensor for operand in op.inputs)
    return tuple(reversed(kept)), needed


def read_graph(model: ModelProto) -> Graph:
    """The integer graph of a canonical model; raises CompileError that lists every node which cannot be taken."""
    return Reader(model).read()
