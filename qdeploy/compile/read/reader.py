"""The state of one pass over a QDQ ONNX file, and the nodes that every model has: inputs, Q, DQ, Clip, the output.

A float value of the file is one of three things: a *view* (exactly the real values of an activation's codes), a
*result* (what an operator computes, waiting for its QuantizeLinear), or a stored parameter behind a DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from qdeploy.compile.expression import operand, tabulate
from qdeploy.compile.graph import Graph, Op, Operand, Param, Quantizer, Table, Tensor
from qdeploy.compile.read.values import Input, Refused, Result, Shape, Stored, Value, View
from qdeploy.errors import CompileError
from qdeploy.qdq import arrays, attributes, numeric_roles

MAX_CODES = 2**30  # offsets inside a tensor are int32
SHIFT = 128  # int8 codes + 128 are uint8 codes
Handler = Callable[["Reader", NodeProto], None]


class Reader:
    """One pass over a canonical model's nodes; `handlers` says by operator what reads them (handlers.py)."""

    def __init__(self, model: ModelProto, handlers: Mapping[str, Handler]) -> None:
        self.model, self.handlers = model, handlers
        self.arrays = arrays(model)
        self.roles = numeric_roles(model)
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 13)
        self.values: dict[str, Value] = {}
        self.codes: dict[str, str | None] = {}  # ONNX value of codes -> tensor
        self.quantized: dict[str, Stored] = {}  # ONNX value -> float initializer that a QuantizeLinear reads
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
            output, output_shape, softmax = self._output()
        except Refused as e:
            if not problems or self.values.get(self.model.graph.output[0].name) is not None:
                problems.append(str(e))
        if problems:
            raise CompileError(f"the model cannot be compiled: {'; '.join(problems)}")
        name = self.model.graph.output[0].name
        params = tuple(Param(n, self.arrays[n].dtype.name, self.arrays[n].shape) for n in self.used)
        live_ops, live = _live(self.ops, output)
        tensors = {n: t for n, t in self.tensors.items() if n in live}
        return Graph(input_name, input_shape, name, output_shape, output, live_ops, tensors, params, softmax)

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

    def _output(self) -> tuple[Operand, tuple[int, ...], bool]:
        outputs = self.model.graph.output
        if len(outputs) != 1:
            raise Refused(f"it has {len(outputs)} outputs, exactly one is supported")
        name = outputs[0].name
        value = self.values.get(name)
        softmax = isinstance(value, Result) and value.op.kind == "softmax" and (value.low, value.high) == (None, None)
        if isinstance(value, Result) and softmax:
            operand, flat = value.op.inputs[0], value.flat
        elif isinstance(value, View):
            operand, flat = value.operand, value.flat
        else:
            raise Refused(f"output {name} is not quantized: put QuantizeLinear and DequantizeLinear behind it")
        shape = self.tensors[operand.tensor].shape
        return operand, (1, int(np.prod(shape))) if flat else (1, *shape), softmax

    # nodes

    def _node(self, node: NodeProto) -> None:
        handler = self.handlers.get(node.op_type)
        if node.domain not in ("", "ai.onnx") or handler is None:
            raise Refused("this operator has no integer kernel")
        if any(name in self.values and self.values[name] is None for name in node.input) or any(
            name in self.codes and self.codes[name] is None for name in node.input
        ):
            for name in node.output:  # the cause is in the list already
                self.values[name] = self.codes[name] = None
            return
        handler(self, node)

    def param(self, name: str, dtypes: tuple[type, ...], what: str) -> str:
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

    def real(self, name: str, what: str) -> str:
        """Note the use of a float32 initializer that is part of the graph's structure, the same at every level."""
        if name not in self.arrays or self.arrays[name].dtype != np.float32:
            raise Refused(f"{what} {name} is not a float32 initializer")
        if name in self.roles:
            raise Refused(f"{what} {name} is also a quantizer's parameter: give it an initializer of its own")
        self.used[name] = None
        return name

    def scalar(self, name: str, dtypes: tuple[type, ...], what: str) -> str:
        self.param(name, dtypes, what)
        if self.arrays[name].size != 1:
            raise Refused(f"{what} {name} has {self.arrays[name].size} values: activations are quantized per tensor")
        return name

    def _grid(self, node: NodeProto) -> Quantizer:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear over an activation."""
        scale = self.scalar(node.input[1], (np.float32,), "scale")
        if len(node.input) < 3 or not node.input[2]:
            return Quantizer(scale, None, False)
        zero = self.scalar(node.input[2], (np.uint8, np.int8), "zero point")
        return Quantizer(scale, zero, self.arrays[zero].dtype == np.int8)

    def quantize(self, node: NodeProto) -> None:
        if attributes(node).get("output_dtype", 0) not in (0, TensorProto.UINT8):
            raise Refused("only uint8 without a zero point, or the zero point's own type, is supported")
        if node.input[0] in self.arrays:
            self.quantized[node.output[0]] = replace(_stored(node), real=True)
            return
        quantizer, out, codes = self._grid(node), node.output[0], node.output[0]
        readers = self.readers.get(out, [])
        if len(readers) == 1 and readers[0].op_type == "Clip":
            quantizer = self._clipped(quantizer, readers[0])
            codes = readers[0].output[0]
        self.codes[out] = self.codes[codes] = self._store(out, quantizer, self.values.get(node.input[0]), codes)

    def _clipped(self, quantizer: Quantizer, clip: NodeProto) -> Quantizer:
        dtype = np.int8 if quantizer.signed else np.uint8
        bounds = [self.scalar(n, (dtype,), "bound") if n else None for n in (*clip.input[1:], "", "")[:2]]
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
            op, shape, flat = Op("requantize", name, (value.operand,), name, term=operand(0)), source.shape, value.flat
        elif isinstance(value, Input):
            op, shape, flat = Op("quantize", name, (), name), value.shape, value.flat
        elif isinstance(value, Result):
            quantizer = replace(quantizer, low=value.low, high=value.high)
            op, shape, flat = replace(self._tabled(value.op), output=name), value.shape, value.flat
        else:
            raise Refused("its input is no activation")
        if flat:
            self.flat.add(codes)
        self.emit(op, Tensor(name, shape, quantizer))
        return name

    def _tabled(self, op: Op) -> Op:
        """`op` with its real values worked out where no kernel can do that."""
        if op.term is None or op.term.plain:
            return op
        if len(op.inputs) > 1:
            raise Refused(f"{op.name} has a function of several activations: put QuantizeLinear before or behind it")
        grid = op.inputs[0].grid
        scale = float(self.arrays[grid.scale].reshape(()))
        zero = int(self.arrays[grid.zero_point].reshape(())) if grid.zero_point is not None else 0
        zero += SHIFT if grid.signed else 0
        values = tabulate(op.term, scale, zero)
        if not np.isfinite(values).all():
            raise Refused(f"{op.name} has values that are not finite")
        return replace(op, table=Table(scale, zero, tuple(values.tolist())))

    def emit(self, op: Op, tensor: Tensor) -> None:
        if int(np.prod(tensor.shape)) > MAX_CODES:
            raise Refused("its output is too large")
        self.tensors[tensor.name] = tensor
        self.ops.append(op)

    def dequantize(self, node: NodeProto) -> None:
        name, out = node.input[0], node.output[0]
        if name in self.arrays:
            self.values[out] = _stored(node)
            return
        if name in self.quantized:
            given = self.quantized[name]
            if replace(_stored(node), codes=given.codes, real=True) != given:
                raise Refused("its scale, zero point or axis is not its QuantizeLinear's")
            self.values[out] = given
            return
        tensor = self.codes.get(name)
        if tensor is None:
            raise Refused("its input is neither an initializer nor the output of a QuantizeLinear")
        grid = self._grid(node)
        if grid.signed != self.tensors[tensor].quantizer.signed:
            raise Refused("its zero point's type is not its QuantizeLinear's")
        self.values[out] = View(Operand(tensor, grid), name in self.flat)

    def clip_codes(self, node: NodeProto) -> None:
        """An integer Clip: read with its QuantizeLinear, or a second width of codes that others read too."""
        source = node.input[0]
        tensor = self.codes[source]
        assert tensor is not None  # refused values are caught before
        if node.output[0] in self.codes:
            return
        old = self.tensors[tensor].quantizer
        view = View(Operand(tensor, old.grid), source in self.flat)
        clipped = self._clipped(old.grid, node)
        self.codes[node.output[0]] = self._store(node.output[0], clipped, view, node.output[0])

    # what operators ask for

    def view(self, name: str) -> View:
        """A value that is an activation's codes; raises Refused."""
        value = self.values.get(name)
        if isinstance(value, View):
            return value
        if isinstance(value, Result):
            raise Refused(f"input {name} of {value.op.name} is not quantized: put QuantizeLinear behind it")
        raise Refused(f"input {name} is not a quantized activation")

    def image(self, node: NodeProto) -> tuple[View, Shape]:
        """The first input as [1, C, H, W]; raises Refused."""
        view = self.view(node.input[0])
        if view.flat:
            raise Refused("its input is not [1, C, H, W]")
        return view, self.tensors[view.operand.tensor].shape

    def shape_of(self, value: View | Result) -> Shape:
        """[C, H, W] of an activation."""
        return self.tensors[value.operand.tensor].shape if isinstance(value, View) else value.shape

    def put(self, node: NodeProto, op: Op, shape: Shape, flat: bool) -> None:
        """The node's output waits for its quantizer."""
        if min(shape) < 1:
            raise Refused(f"its window does not fit: the output would be {list(shape)}")
        self.values[node.output[0]] = Result(replace(op, name=node.name or node.output[0]), shape, flat)

    def put_moved(self, node: NodeProto, op: Op, shape: Shape, flat: bool) -> None:
        """The node moves codes, so its output has its input's grid at once, whether or not a quantizer follows."""
        if min(shape) < 1:
            raise Refused(f"its window does not fit: the output would be {list(shape)}")
        operand = op.inputs[0]
        source, grid = self.tensors[operand.tensor].quantizer, operand.grid
        if op.kind == "max_pool" and source.grid == grid:
            grid = replace(source, low=None, high=None)  # its codes are in the same integer bounds
        name = f"{node.output[0]}.moved"
        self.emit(replace(op, name=node.name or node.output[0], output=name), Tensor(name, shape, grid))
        self.values[node.output[0]] = View(Operand(name, operand.grid), flat)

    def numbers(self, node: NodeProto, attribute: str, place: int) -> list[int] | None:
        """Integers that older opsets keep in an attribute and newer ones in input `place`; None where neither is."""
        if len(node.input) > place and node.input[place]:
            stored = self.arrays.get(node.input[place])
            if stored is None or stored.dtype.kind != "i":
                raise Refused(f"{attribute} {node.input[place]} is not stored in the file")
            return [int(v) for v in stored.reshape(-1)]
        given = attributes(node).get(attribute)
        return None if given is None else [int(v) for v in given]


def _stored(node: NodeProto) -> Stored:
    zero = node.input[2] if len(node.input) > 2 and node.input[2] else None
    axis = attributes(node).get("axis", 1)
    return Stored(node.input[0], node.input[1], zero, axis if isinstance(axis, int) else 1)


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
