"""The state of one pass over a QDQ ONNX file, and the nodes that every model has: Q, DQ, integer Clips, the output.

A float value of the file is one of four things: a *view* (exactly the real values of an activation's codes), a
*result* (what an integer operator computes, waiting for its QuantizeLinear), a stored parameter behind a
DequantizeLinear, or *real*: float numbers that operators without integer kernels make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from qdeploy.compile.expression import operand, tabulate
from qdeploy.compile.graph import (
    FloatTensor,
    Graph,
    Op,
    Operand,
    Param,
    Quantizer,
    RealParam,
    Shuffle,
    Table,
    Tensor,
)
from qdeploy.compile.read.normalize import Normal, opset_of
from qdeploy.compile.read.regions import CODES, EMBEDDED, INDEXED, FloatNode, Item, arrange, check_indices
from qdeploy.compile.read.values import Dims, Impossible, Real, Refused, Result, Shape, Stored, Value, View, three
from qdeploy.errors import CompileError
from qdeploy.qdq import arrays, attributes, numeric_roles

MAX_CODES = 2**30  # offsets inside a tensor are int32
SHIFT = 128  # int8 codes + 128 are uint8 codes
Handler = Callable[["Reader", NodeProto], None]


class Reader:
    """One pass over a normal model's nodes; `handlers` says by operator what reads them (handlers.py)."""

    def __init__(self, model: ModelProto, normal: Normal, handlers: Mapping[str, Handler]) -> None:
        self.model, self.handlers = normal.model, handlers
        self.types, self.batch = normal.types, normal.batch
        self.arrays, self.computed = arrays(normal.model), normal.computed
        self.roles = numeric_roles(model)  # what the file's digest leaves out: a level's own values
        self.opset = opset_of(normal.model)
        self.values: dict[str, Value] = {}
        self.codes: dict[str, str | None] = {}  # ONNX value of codes -> tensor
        self.dims: dict[str, Dims] = {}  # ONNX value of codes -> its shape in the file
        self.quantized: dict[str, Stored] = {}  # ONNX value -> stored codes, or float values that a Q reads
        self.tensors: dict[str, Tensor] = {}
        self.floats: dict[str, FloatTensor] = {}
        self.program: list[Item] = []
        self.used: dict[str, None] = {}  # parameters in order of first use
        self.equal: dict[tuple[str, str], None] = {}  # parameters that must have equal values at every level
        self.readers: dict[str, list[NodeProto]] = {}
        self.makers: dict[str, NodeProto] = {}
        for node in self.model.graph.node:
            self.makers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def read(self) -> Graph:
        """The whole graph; raises CompileError that lists every problem."""
        problems: list[str] = []
        given = self.types[self.model.graph.input[0].name]
        if int(np.prod(given.shape)) > MAX_CODES:
            raise CompileError(f"the model cannot be compiled: input {given.name} is too large")
        self.floats[given.name] = given
        self.values[given.name] = Real(given.name, given.shape)
        for node in self.model.graph.node:
            try:
                self._node(node)
            except Impossible as e:
                problems.append(f"{node.op_type} {node.name or node.output[0]}: {e}")
                for name in node.output:
                    self.values[name] = self.codes[name] = None
        try:
            output, output_shape, softmax = self._output()
        except Impossible as e:
            if not problems or self.values.get(self.model.graph.output[0].name) is not None:
                problems.append(str(e))
        if problems:
            raise CompileError(f"the model cannot be compiled: {'; '.join(problems)}")
        last = output if isinstance(output, str) else output.tensor
        ops = arrange(self.program, last, self.arrays, self.floats, self.opset)
        tensors = {op.output: self.tensors[op.output] for op in ops if op.output in self.tensors}
        live = {name for op in ops for name in (*op.reads, *op.writes)}
        return Graph(
            given.name, (self.batch, *given.shape[1:]), self.model.graph.output[0].name, output_shape, output, ops,
            {n: t for n, t in self.tensors.items() if n in tensors},
            tuple(Param(n, self.arrays[n].dtype.name, self.arrays[n].shape) for n in self.used), softmax,
            {n: t for n, t in self.floats.items() if n in live and n != given.name}, tuple(self.equal),
        )  # fmt: skip

    def _output(self) -> tuple[Operand | str, tuple[int, ...], bool]:
        outputs = self.model.graph.output
        if len(outputs) != 1:
            raise Impossible(f"it has {len(outputs)} outputs, exactly one is supported")
        name = outputs[0].name
        value = self.values.get(name)
        softmax = isinstance(value, Result) and value.op.kind == "softmax" and (value.low, value.high) == (None, None)
        if isinstance(value, Result) and softmax and value.moved is None:
            return value.op.inputs[0], self._whole(value.dims), True
        if isinstance(value, View):
            return value.operand, self._whole(value.dims), False
        if name not in self.types or name == self.model.graph.input[0].name:
            raise Impossible(f"output {name} is no result of the network")
        self.realize(name, "it is the network's output, without a quantizer")
        kind = self.types[name]
        if kind.dtype != "float32":
            raise Impossible(f"output {name} is {kind.dtype}: only float32 can be returned")
        return name, self._whole(kind.shape), False

    def _whole(self, dims: Dims) -> Dims:
        """Shape for the batch of a value that has `dims` for one image."""
        return (self.batch * dims[0], *dims[1:]) if dims else ()

    # nodes

    def _node(self, node: NodeProto) -> None:
        """Read one node; what its handler refuses becomes part of a float region. Raises Impossible."""
        if any(name in seen and seen[name] is None for name in node.input for seen in (self.values, self.codes)):
            for name in node.output:  # the cause is in the list already
                self.values[name] = self.codes[name] = None
            return
        handler = self.handlers.get(node.op_type) if not node.domain else None
        try:
            if handler is None:
                raise Refused("this operator has no integer kernel")
            handler(self, node)
        except (IndexError, KeyError, ValueError, TypeError) as e:
            raise Impossible(f"it has other inputs or attributes than ONNX says ({type(e).__name__}: {e})") from e
        except Refused as e:
            self._float(node, str(e))
            for name in filter(None, node.output):
                self.values[name] = Real(name, self.types[name].shape, self.types[name].dtype)

    # float regions

    def _float(self, node: NodeProto, reason: str) -> None:
        """Add `node` to the float operators, and before it what it reads; raises Impossible."""
        if node.output[0] in self.floats:
            return
        if node.domain:
            raise Impossible(f"{reason}, and operators of {node.domain} have no float one either")
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            raise Impossible(f"{reason}, and control flow has no float one either: export the model without it")
        outputs = [name for name in node.output if name]
        if unknown := [name for name in outputs if name not in self.types]:
            raise Impossible(f"{reason}, and the shape of its output {unknown[0]} is not fixed by the file")
        if any(int(np.prod(self.types[name].shape)) > MAX_CODES for name in outputs):
            raise Impossible("its output is too large")
        if node.op_type in INDEXED:
            stored = None if node.input[1] in self.roles else self.arrays.get(node.input[1])
            check_indices(node, self.types[node.input[0]].shape, stored)
        node, matrix = self._plain_gemm(node)
        reads: dict[str, None] = {}
        params: dict[RealParam, None] = {} if matrix is None else {matrix: None}
        for name in dict.fromkeys(filter(None, node.input)):
            if matrix is not None and name == matrix.name:
                continue
            param = self._real_param(name)
            if param is not None:
                params[param] = None
            elif name not in self.arrays:
                reads[self.realize(name, f"{node.op_type} {node.name or node.output[0]} reads it in float")] = None
        self.floats.update({name: self.types[name] for name in outputs})
        self.program.append(FloatNode(node, reason, tuple(reads), tuple(params)))

    def _plain_gemm(self, node: NodeProto) -> tuple[NodeProto, RealParam | None]:
        """A Gemm that transposes a stored matrix becomes one of the matrix as `prepare` turns it, once a level."""
        param = (
            self._real_param(node.input[1]) if node.op_type == "Gemm" and attributes(node).get("transB", 0) else None
        )
        if param is None:
            return node, None
        matrix = replace(param, name=f"{param.name}.turned", turned=not param.turned)
        plain = NodeProto()
        plain.CopyFrom(node)
        plain.input[1] = matrix.name
        del plain.attribute[:]
        plain.attribute.extend(a for a in node.attribute if a.name != "transB")
        return plain, matrix

    def _real_param(self, name: str) -> RealParam | None:
        """What `prepare` makes of the file's tensors for a float operator; None for other values."""
        stored = self.values.get(name)
        if isinstance(stored, Stored) and not (stored.real or stored.clipped):
            parts = (stored.codes, stored.scale, stored.zero_point)
            held = all(part is None or (part in self.arrays and part not in self.computed) for part in parts)
            if held and self._dequantizable(stored):
                self.used.update(dict.fromkeys(part for part in parts if part is not None))
                return RealParam(name, *parts, stored.axis, stored.turned)
            return None
        array = self.arrays.get(name)
        if (
            array is None
            or name in self.computed
            or (name not in self.roles and (array.dtype != np.float32 or array.size < EMBEDDED))
        ):
            return None
        self.used[name] = None
        return RealParam(name, name)

    def _dequantizable(self, stored: Stored) -> bool:
        """True for codes and parameters of the plain kinds."""
        array, scale = self.arrays[stored.codes], self.arrays[stored.scale]
        plain = array.dtype.name in ("int8", "uint8", "int32") and scale.dtype == np.float32
        length = array.shape[stored.axis] if -array.ndim <= stored.axis < array.ndim else 1
        return plain and scale.size in (1, length) and scale.ndim < 2

    def realize(self, name: str, why: str) -> str:
        """Have a value in float; returns the float tensor that holds it. Raises Impossible."""
        value = self.values.get(name)
        if isinstance(value, Real) or name in self.floats:
            return name
        if isinstance(value, View):
            self.floats[name] = FloatTensor(name, value.dims)
            self.program.append(Op("dequantize", name, (value.operand,), name))
        elif name in self.codes and self.codes[name] is not None:
            return self._own_codes(name)
        elif name in self.makers:
            self._float(self.makers[name], why)
        else:
            raise Impossible(f"its input {name} is not a value of the main graph")
        return name

    def _own_codes(self, name: str) -> str:
        """The codes of ONNX value `name` in the file's own form."""
        tensor, label = self.codes[name], f"{name}{CODES}"
        assert tensor is not None
        grid = self.tensors[tensor].quantizer.grid
        if label not in self.floats:
            self.floats[label] = FloatTensor(label, self.dims[name], "int8" if grid.signed else "uint8")
            self.program.append(Op("codes", label, (Operand(tensor, grid),), label))
        return label

    # parameters

    def param(self, name: str, dtypes: tuple[type, ...], what: str) -> str:
        """Check and note the use of a run-time parameter."""
        if name not in self.arrays or name in self.computed:
            raise Refused(f"{what} {name} is not an initializer of the file")
        if self.arrays[name].dtype.type not in dtypes:
            allowed = " or ".join(np.dtype(d).name for d in dtypes)
            raise Refused(f"{what} {name} is {self.arrays[name].dtype}, not {allowed}")
        self.used[name] = None
        return name

    def real(self, name: str, what: str) -> str:
        """Note the use of a float32 initializer that is part of the graph's structure, the same at every level."""
        if name not in self.arrays or name in self.computed or self.arrays[name].dtype != np.float32:
            raise Refused(f"{what} {name} is not a float32 initializer of the file")
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

    # Q and DQ

    def quantize(self, node: NodeProto) -> None:
        """QuantizeLinear of an activation, with the integer Clip behind it; or of float weights."""
        if attributes(node).get("output_dtype", 0) not in (0, TensorProto.UINT8):
            raise Refused("only uint8 without a zero point, or the zero point's own type, is supported")
        source, out, codes = node.input[0], node.output[0], node.output[0]
        if source in self.arrays:
            self.quantized[out] = replace(_stored(node), real=True)
            return
        quantizer = self._grid(node)
        readers = self.readers.get(out, [])
        if len(readers) == 1 and readers[0].op_type == "Clip":
            quantizer = self._clipped(quantizer, readers[0])
            codes = readers[0].output[0]
        value = self.values.get(source)
        try:
            tensor = self._store(out, quantizer, value)
        except Refused as e:
            if not isinstance(value, Result):
                raise
            self.realize(source, str(e))
            value = Real(source, self.types[source].shape)
            tensor = self._store(out, quantizer, value)
        self.codes[out] = self.codes[codes] = tensor
        self.dims[out] = self.dims[codes] = _dims(value)

    def _clipped(self, quantizer: Quantizer, clip: NodeProto) -> Quantizer:
        bounds = self._bounds(clip, np.int8 if quantizer.signed else np.uint8)
        return replace(quantizer, clip_min=bounds[0], clip_max=bounds[1])

    def _bounds(self, clip: NodeProto, dtype: type) -> list[str | None]:
        return [self.scalar(n, (dtype,), "bound") if n else None for n in (*clip.input[1:], "", "")[:2]]

    def _store(self, name: str, quantizer: Quantizer, value: Value) -> str:
        """Emit what makes tensor `name` of `value`; returns the tensor that holds the codes."""
        if isinstance(value, View):
            source = self.tensors[value.operand.tensor]
            same = value.operand.grid == source.quantizer.grid == quantizer.grid
            clips = (quantizer.clip_min, quantizer.clip_max)
            if same and clips in ((None, None), (source.quantizer.clip_min, source.quantizer.clip_max)):
                return source.name  # the same codes again
            self.emit(
                Op("requantize", name, (value.operand,), name, term=operand(0)), Tensor(name, source.shape, quantizer)
            )
        elif isinstance(value, Real) and value.dtype == "float32":
            own = None if value.name == self.model.graph.input[0].name else value.name
            self.emit(Op("quantize", name, (), name, source=own), Tensor(name, three(value.dims), quantizer))
        elif isinstance(value, Result):
            quantizer = replace(quantizer, low=value.low, high=value.high)
            target = name if value.moved is None else f"{name}.unmoved"
            op = replace(self._tabled(value.op), output=target)
            self.emit(op, Tensor(target, value.shape, quantizer))
            if value.moved is not None:
                moved = Op("shuffle", f"{op.name}.moved", (Operand(target, quantizer.grid),), name, shuffle=value.moved)
                self.emit(moved, Tensor(name, three(value.dims), quantizer))
        else:
            raise Refused("its input is no activation")
        return name

    def _tabled(self, op: Op) -> Op:
        """`op` with its real values worked out where no kernel can do that."""
        if op.term is None or op.term.plain:
            return op
        if len(op.inputs) > 1:
            raise Refused("it is a function of several activations: put QuantizeLinear before or behind it")
        grid = op.inputs[0].grid
        scale = float(self.arrays[grid.scale].reshape(()))
        zero = int(self.arrays[grid.zero_point].reshape(())) if grid.zero_point is not None else 0
        zero += SHIFT if grid.signed else 0
        values = tabulate(op.term, scale, zero)
        if not np.isfinite(values).all():
            raise Refused("some of its values are not finite")
        return replace(op, table=Table(scale, zero, tuple(values.tolist())))

    def emit(self, op: Op, tensor: Tensor) -> None:
        if int(np.prod(tensor.shape)) > MAX_CODES:
            raise Refused("its output is too large")
        self.tensors[tensor.name] = tensor
        self.program.append(op)

    def dequantize(self, node: NodeProto) -> None:
        """DequantizeLinear of stored codes, or of an activation's."""
        name, out = node.input[0], node.output[0]
        if name in self.arrays:
            self.values[out] = _stored(node)
            return
        if name in self.quantized:
            self.values[out] = self._dequantized(node, self.quantized[name])
            return
        tensor = self.codes.get(name)
        if tensor is None:
            raise Refused("its input is neither an initializer nor the output of a QuantizeLinear")
        grid, written = self._grid(node), self.tensors[tensor].quantizer.grid
        if grid.signed != written.signed:
            raise Refused("its zero point's type is not its QuantizeLinear's")
        if self._agree(grid.scale, written.scale) and self._agree(grid.zero_point, written.zero_point):
            grid = written
        self.values[out] = View(Operand(tensor, grid), self.dims[name])

    def _dequantized(self, node: NodeProto, given: Stored) -> Stored:
        """What a DequantizeLinear makes of stored codes behind a Clip, or of float values behind a QuantizeLinear."""
        own = _stored(node)
        if not given.real:
            return replace(own, codes=given.codes, clip_min=given.clip_min, clip_max=given.clip_max)
        same = self._agree(own.scale, given.scale) and self._agree(own.zero_point, given.zero_point)
        if not same or (own.axis != given.axis and self.arrays[own.scale].size > 1):
            raise Refused("its scale, zero point or axis is not its QuantizeLinear's")
        return given

    def _agree(self, one: str | None, other: str | None) -> bool:
        """True for equal parameters; two of them under different names then have to be equal at every level."""
        if one == other:
            return True
        if one not in self.arrays or other not in self.arrays or self.computed & {one, other}:
            return False
        a, b = self.arrays[one], self.arrays[other]
        if a.dtype != b.dtype or a.size != b.size or not np.array_equal(a.reshape(-1), b.reshape(-1)):
            return False
        self.equal[one, other] = None
        self.used.update({one: None, other: None})
        return True

    def clip_codes(self, node: NodeProto) -> None:
        """An integer Clip: read with its QuantizeLinear, or a second width of codes that others read too."""
        source = node.input[0]
        tensor = self.codes[source]
        assert tensor is not None  # refused values are caught before
        if node.output[0] in self.codes:
            return
        old, out = self.tensors[tensor].quantizer, node.output[0]
        view = View(Operand(tensor, old.grid), self.dims[source])
        self.codes[out] = self._store(out, self._clipped(old.grid, node), view)
        self.dims[out] = view.dims

    def clip_stored(self, node: NodeProto) -> None:
        """An integer Clip of stored codes, or of float weights behind their QuantizeLinear."""
        source = node.input[0]
        given = self.quantized.get(source, Stored(source, "", None, 0))
        if given.clipped:
            raise Refused("its input is cut already")
        kind = self.types[source].dtype
        if kind not in ("int8", "uint8"):
            raise Refused(f"its input is {kind}")
        low, high = self._bounds(node, np.dtype(kind).type)
        self.quantized[node.output[0]] = replace(given, clip_min=low, clip_max=high)

    # what operators ask for

    def view(self, name: str) -> View:
        """A value that is an activation's codes; raises Refused."""
        value = self.values.get(name)
        if isinstance(value, View):
            return value
        if isinstance(value, Result):
            raise Refused(f"input {name} of {value.op.name} is not quantized: put QuantizeLinear behind it")
        if isinstance(value, Real):
            raise Refused(f"input {name} is float: put QuantizeLinear and DequantizeLinear before it")
        raise Refused(f"input {name} is not a quantized activation")

    def image(self, node: NodeProto) -> tuple[View, Shape]:
        """The first input as [1, C, H, W]; raises Refused."""
        view = self.view(node.input[0])
        if len(view.dims) != 4 or view.dims[0] != 1:
            raise Refused(f"its input {list(view.dims)} is not [1, C, H, W]")
        view = self.shaped(view)
        return view, self.tensors[view.operand.tensor].shape

    def shaped(self, view: View) -> View:
        """The same values in a tensor of shape three(dims): itself, or a copy."""
        shape = three(view.dims)
        if self.tensors[view.operand.tensor].shape == shape:
            return view
        return self.shuffled(view, Shuffle((prod(shape),), (1,)), view.dims, f"{view.operand.tensor}.{shape}")

    def shuffled(self, view: View, shuffle: Shuffle, dims: Dims, name: str) -> View:
        """A copy of a tensor's codes in another order, as a tensor of shape three(dims)."""
        if name not in self.tensors:
            op = Op("shuffle", name, (view.operand,), name, shuffle=shuffle)
            self.emit(op, Tensor(name, three(dims), view.operand.grid))
        return View(Operand(name, view.operand.grid), dims)

    def shape_of(self, value: View | Result) -> Shape:
        """[C, H, W] of an activation's tensor."""
        return self.tensors[value.operand.tensor].shape if isinstance(value, View) else value.shape

    def put(self, node: NodeProto, op: Op, shape: Shape, dims: Dims, moved: Shuffle | None = None) -> None:
        """The node's output waits for its quantizer."""
        if min(shape) < 1:
            raise Refused(f"its window does not fit: the output would be {list(shape)}")
        named = replace(op, name=node.name or node.output[0])
        self.values[node.output[0]] = Result(named, shape, dims, moved=moved)

    def put_moved(self, node: NodeProto, op: Op, shape: Shape, dims: Dims) -> None:
        """The node moves codes, so its output has its input's grid at once, whether or not a quantizer follows."""
        if min(shape) < 1:
            raise Refused(f"its window does not fit: the output would be {list(shape)}")
        operand = op.inputs[0]
        source, grid = self.tensors[operand.tensor].quantizer, operand.grid
        if op.kind == "max_pool" and source.grid == grid:
            grid = replace(source, low=None, high=None)  # its codes are in the same integer bounds
        name = f"{node.output[0]}.moved"
        self.emit(replace(op, name=node.name or node.output[0], output=name), Tensor(name, shape, grid))
        self.values[node.output[0]] = View(Operand(name, operand.grid), dims)

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


def _dims(value: Value) -> Dims:
    assert isinstance(value, View | Result | Real)
    return value.dims
