"""Integer graph -> Program: one TIR function for each different kernel, and the calls of `prepare` and of one image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod

from tvm import DataType, tirx

from qdeploy.compile.floating import FloatProgram, compile_region, copy_kernel
from qdeploy.compile.fuse import operands
from qdeploy.compile.graph import Graph, Op, Operand, Quantizer, Tensor, Weights, Window
from qdeploy.compile.kernels import elementwise, pack, pack_table, pointwise, shuffle
from qdeploy.compile.kernels.chain import CODES, Link, chain_kernel
from qdeploy.compile.kernels.conv import ConvSpec, conv_kernel
from qdeploy.compile.kernels.emit import QUANT
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.kernels.lookup import TABLE
from qdeploy.compile.kernels.pack_weights import WeightSpec, weights_kernel
from qdeploy.compile.kernels.requantize import Fused
from qdeploy.compile.kernels.spec import Choice
from qdeploy.compile.llvm import Dot
from qdeploy.compile.program import Call, Place, Program, aligned
from qdeploy.errors import CompileError

Kind = tuple[tuple[int, ...], str]  # shape and dtype of a packed tensor
INPUT, OUTPUT = Place("input"), Place("output")
THREAD_WORK = 1_000_000  # multiply-adds of a convolution below which waking other threads takes longer than it saves


def ready(graph: Graph) -> Graph:
    """`graph` with a copy before each convolution whose padding is another zero point than its tensor's border.

    That happens when a file repeats a quantizer's parameters under other names: the values are the same at every level
    that its author meant, but nothing says so.
    """
    tensors, ops = dict(graph.tensors), []
    for op in graph.ops:
        if op.kind == "conv" and any(op.window.padding):
            operand = op.inputs[0]
            source = tensors[operand.tensor]
            if operand.grid != source.quantizer.grid:
                name = f"{op.output}.input"
                tensors[name] = Tensor(name, source.shape, operand.grid)
                ops.append(Op("max_pool", name, (operand,), name, Window((1, 1))))
                op = replace(op, inputs=(Operand(name, operand.grid), *op.inputs[1:]))
        ops.append(op)
    return replace(graph, ops=tuple(ops), tensors=tensors)


def image_shape(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """One image's part of an input or output of `batch` images."""
    return (shape[0] // batch, *shape[1:]) if batch > 1 else shape


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return max(1, prod(shape)) * DataType(dtype).itemsize


def _named(function: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
    return function.with_attr("global_symbol", name)


def multiply_adds(op: Op, x: Layout, y: Layout) -> int:
    """Of a convolution."""
    return y.channels * y.height * y.width * prod(op.window.kernel) * x.channels // op.groups


class Lowering:
    """Makes one program. Packed tensors lie in the order in which `prepare` makes them."""

    def __init__(self, graph: Graph, dot: Dot, threads: int, indices: bool, choices: Mapping[ConvSpec, Choice]) -> None:
        self.graph, self.dot, self.threads = ready(graph), dot, threads
        self.indices, self.choices = indices, choices
        self.lanes = 16 if dot.neon else max(8, dot.lanes)  # codes that are moved at once
        borders = self.graph.borders()
        self.layouts = {n: Layout(*t.shape, borders[n]) for n, t in self.graph.tensors.items()}
        self.batch = graph.input_shape[0]
        self.kernels: dict[str, tirx.PrimFunc] = {}
        self.names: dict[Hashable, str] = {}
        self.params = {param.name: i for i, param in enumerate(graph.params)}
        self.packed: dict[Hashable, tuple[Place, ...]] = {}  # what was packed -> where
        self.packed_bytes = 0
        self.regions: dict[str, FloatProgram] = {}

    def convolutions(self) -> dict[str, ConvSpec]:
        """Every convolution by its output."""
        return {op.output: self._conv_spec(op) for op in self.graph.ops if op.kind == "conv"}

    def program(self) -> Program:
        """All calls; raises CompileError for an operator without a kernel."""
        regions = [op for op in self.graph.ops if op.region is not None]
        self.regions = {op.output: compile_region(op, f"float{i}") for i, op in enumerate(regions)}
        prepare = self._prepare()
        ops = [op for op in self.graph.ops if op.kind != "constant"]
        body = [call for op in ops for call in self._calls(op)]
        values = {op.output: self.layouts[op.output].size for op in ops if op.output in self.layouts}
        values |= {name: _bytes(kind.shape, kind.dtype) for name, kind in self.graph.floats.items()}
        for region in self.regions.values():
            values |= {name: _bytes(*kind) for name, kind in region.values.items()}
        codes_out = () if isinstance(self.graph.output, str) else (self._codes_out(self.graph.output),)
        return Program(
            self.graph, self.kernels, tuple(prepare), tuple(body), (self._way_out(),), codes_out, values,
            self.packed_bytes, self.convolutions(),
        )  # fmt: skip

    def _kernel(self, key: Hashable, label: str, make: Callable[[str], tirx.PrimFunc]) -> str:
        """Name of the kernel for `key`, which is made once."""
        if key not in self.names:
            name = self.names[key] = f"{label}_{len(self.names)}"
            self.kernels[name] = make(name)
        return self.names[key]

    def _call(
        self, key: Hashable, label: str, make: Callable[[str], tirx.PrimFunc], args: Sequence[Place], op: str = ""
    ) -> Call:
        """A call of the kernel for `key`."""
        name = self._kernel(key, label, make)
        types = [param.ty for param in self.kernels[name].params]
        size = sum(prod(int(n) for n in ty.shape) * DataType(str(ty.dtype)).itemsize for ty in types)
        return Call(name, tuple(args), size, op)

    # prepare

    def _stored(self, name: str | None) -> pack.Stored | None:
        if name is None:
            return None
        param = self.graph.params[self.params[name]]
        return pack.Stored(param.dtype, param.shape)

    def _params(self, names: Sequence[str | None]) -> list[Place]:
        return [Place("params", self.params[name]) for name in names if name is not None]

    def _keep(self, key: Hashable, kinds: Sequence[Kind]) -> tuple[Place, ...]:
        """Room for the packed tensors of `key`."""
        places = []
        for shape, dtype in kinds:
            places.append(Place("packed", self.packed_bytes))
            self.packed_bytes += aligned(prod(shape) * DataType(dtype).itemsize)
        self.packed[key] = tuple(places)
        return self.packed[key]

    def _prepare(self) -> list[Call]:
        calls = [self._same(*names) for names in self.graph.equal]
        calls += [self._pack_quantizer(quantizer) for quantizer in self._quantizers()]
        for op in self.graph.ops:
            if op.weights is not None:
                calls += self._pack_weights(op)
            elif op.kind in ("constant", "softmax"):
                calls.append(self._pack_op(op))
            if op.region is not None:
                calls += self._pack_region(op)
            table = op if op.then is None else op.then.op
            if table.kind == "table":
                calls += self._pack_table(table)
        if self.graph.softmax and not isinstance(self.graph.output, str):
            calls.append(self._pack_exponentials("softmax", self.graph.output))
        return calls

    def _quantizers(self) -> list[Quantizer]:
        """Every different quantizer: those that write tensors, then readers' grids that no writer has."""
        found = dict.fromkeys(tensor.quantizer for tensor in self.graph.tensors.values())
        readers = [operand for op in self.graph.ops for operand in operands(op)]
        if not isinstance(self.graph.output, str):
            readers.append(self.graph.output)
        for operand in readers:
            if operand.grid != self.graph.tensors[operand.tensor].quantizer.grid:
                found[operand.grid] = None
        return list(found)

    def _pack_quantizer(self, quantizer: Quantizer) -> Call:
        names = (quantizer.scale, quantizer.zero_point, quantizer.clip_min, quantizer.clip_max)
        scale, zero, least, most = (self._stored(name) for name in names)
        assert scale is not None
        spec = pack.QuantizerSpec(scale, zero, least, most, quantizer.low, quantizer.high)
        args = [*self._params(names), *self._keep(quantizer, [QUANT])]
        return self._call(spec, "pack_quantizer", lambda name: pack.quantizer_kernel(name, spec), args)

    def _conv_spec(self, op: Op) -> ConvSpec:
        x, y = self.layouts[op.inputs[0].tensor], self.layouts[op.output]
        threads = self.threads if multiply_adds(op, x, y) >= THREAD_WORK else 1
        assert op.weights is not None
        narrow = op.weights.reach <= self.dot.reach
        indices = self.indices and op.weights.few
        spec = ConvSpec(x, y, op.window, op.groups, self.dot, threads, narrow, indices, self._fused(op))
        return replace(spec, choice=self.choices.get(spec))

    def _fused(self, op: Op) -> Fused | None:
        """What a convolution does to its codes before it stores them."""
        if op.then is None:
            return None
        then = op.then.op
        if then.kind == "table":
            return Fused("table")
        a, b = then.inputs
        signed = (a.grid.signed, b.grid.signed, self.graph.tensors[op.output].quantizer.signed)
        return Fused("add", self.layouts[op.inputs[-1].tensor], a.tensor == op.then.tensor, signed)

    def _clip_weights(self, w: Weights) -> Call:
        """Codes of a weight with a Clip behind them."""
        names = (w.weight, *((w.scale, w.zero_point) if w.real else ()), w.clip_min, w.clip_max)
        stored = {name: self._stored(name) for name in names if name is not None}
        shapes = {name: part.shape for name, part in stored.items() if part is not None}
        codes = "int8" if w.signed else "uint8"

        def shape(name: str | None) -> tuple[int, ...] | None:
            return None if name is None else shapes[name]

        spec = shuffle.ClipSpec(
            "float32" if w.real else codes, shapes[w.weight], codes, shape(w.scale) if w.real else None,
            shape(w.zero_point) if w.real else None, shape(w.clip_min), shape(w.clip_max), int(w.order != "conv"),
        )  # fmt: skip
        args = [*self._params(names), *self._keep(w, [(spec.shape, codes)])]
        return self._call(spec, "clip_weights", partial(shuffle.clip_kernel, spec=spec), args)

    def _pack_weights(self, op: Op) -> list[Call]:
        w = op.weights
        assert w is not None
        conv = replace(self._conv_spec(op), then=None)
        names = (w.weight, w.scale, w.zero_point, w.bias, w.bias_scale, w.bias_zero_point)
        weight, scale, zero, bias, bias_scale, bias_zero = (self._stored(name) for name in names)
        assert weight is not None and scale is not None
        spec = WeightSpec(conv, weight, scale, zero, bias, bias_scale, bias_zero, w.order, w.signed)
        kinds: list[Kind] = [
            ((conv.weight_bytes,), "int8"), ((2 * conv.padded + 1,), "int32"), ((conv.padded,), "float32"),
        ]  # fmt: skip
        clips = []
        places = self._params(names)
        if w.clip_min is not None or w.clip_max is not None:
            clips = [self._clip_weights(w)]
            spec = replace(spec, weight=pack.Stored("int8" if w.signed else "uint8", weight.shape))
            places[0] = self.packed[w][0]
        args = [*(Place("number", n) for n in spec.sizes), *places]
        args += [self._grid(op.inputs[0]), self._quantizer(op.own), *self._keep(op.own, kinds)]
        kernel = self._kernel(spec.code, "pack_weights", lambda name: weights_kernel(name, spec.code))
        return [*clips, Call(kernel, tuple(args), 0, failure=spec.failure(w.weight))]

    def _pack_op(self, op: Op) -> Call:
        """What an operator without weights reads beside codes and quantizers."""
        if op.kind == "softmax":
            return self._pack_exponentials(op.output, op.inputs[0])
        if op.stored is not None:
            param, y = self.graph.params[self.params[op.stored]], self.layouts[op.output]
            if param.dtype == "float32":
                make = partial(pointwise.quantize_kernel, shape=(prod(param.shape),), y=y, dot=self.dot)
                args = [*self._params([op.stored]), self._quantizer(op.output)]
                args += self._keep(op.output, [((y.size,), "uint8")])
                return self._call(("pack_real_stored", y), "pack_real_stored", make, args)
            spec = pack_table.StoredSpec(param.dtype, param.shape, self.layouts[op.output])
            args = [*self._params([op.stored]), *self._keep(op.output, [((spec.layout.size,), "uint8")])]
            return self._call(spec, "pack_stored", lambda name: pack_table.stored_kernel(name, spec), args)
        term, operand = op.term, op.inputs[0]
        assert term is not None
        what = f"the table of {op.name} is for other values of {operand.grid.scale} and its zero point"
        key = (term, op.table, what if op.table is not None else "")
        args = [self._grid(operand), self._quantizer(op.output), *self._keep(op.output, [TABLE])]
        call = self._call(
            key, "pack_table", lambda name: pack_table.table_pack_kernel(name, term, op.table, what), args
        )
        return replace(call, failure=what)

    def _pack_table(self, op: Op) -> list[Call]:
        """The table of one operator, or of several steps."""
        if not op.steps:
            return [self._pack_op(op)]
        calls: list[Call] = []
        args: list[Place] = []
        links: list[Link] = []
        codes = [op.inputs[0].tensor]
        for step in op.steps:
            reads = tuple(codes.index(operand.tensor) for operand in step.inputs)
            if step.kind == "table":
                calls.append(self._pack_op(step))
                args += self.packed[step.output]
                links.append(Link(reads))
            else:
                args += [*(self._grid(operand) for operand in step.inputs), self._quantizer(step.output)]
                links.append(Link(reads, self._element(step, [CODES] * len(reads), CODES)))
            codes.append(step.output)
        args += self._keep(op.output, [TABLE])
        key = tuple(links)
        return [*calls, self._call(key, "pack_chain", lambda name: chain_kernel(name, key), args)]

    def _pack_exponentials(self, key: Hashable, operand: Operand) -> Call:
        args = [self._grid(operand), *self._keep(key, [elementwise.EXPONENTIALS])]
        return self._call("exponentials", "pack_exponentials", pack_table.exponentials_kernel, args)

    def _quantizer(self, tensor: str) -> Place:
        """Where the quantizer that writes `tensor` is."""
        return self.packed[self.graph.tensors[tensor].quantizer][0]

    def _grid(self, operand: Operand) -> Place:
        """Where a quantizer with the scale and zero point of `operand` is."""
        writer = self.graph.tensors[operand.tensor].quantizer
        return self.packed[writer if writer.grid == operand.grid else operand.grid][0]

    # one image

    def _codes(self, tensor: str) -> Place:
        """Where the codes of `tensor` are; a constant's are packed."""
        constants = {op.output for op in self.graph.ops if op.kind == "constant"}
        return self.packed[tensor][0] if tensor in constants else Place("values", tensor)

    def _way_out(self) -> Call:
        """float32 of the output's codes, or a float tensor as it is."""
        operand, shape = self.graph.output, image_shape(self.graph.output_shape, self.batch)
        if isinstance(operand, str):
            size = prod(shape)
            make = partial(copy_kernel, size=size, dtype="float32")
            return self._call(("copy", size), "copy", make, [Place("values", operand), OUTPUT])
        layout, codes = self.layouts[operand.tensor], self._codes(operand.tensor)
        if self.graph.softmax:
            args = [codes, *self.packed["softmax"], OUTPUT]
            return self._call(
                "softmax", "softmax_out", lambda name: elementwise.softmax_kernel(name, layout, None, shape), args
            )
        args = [codes, self._grid(operand), OUTPUT]
        return self._call(
            "dequantize", "dequantize", lambda name: pointwise.dequantize_kernel(name, layout, shape, self.dot), args
        )

    def _codes_out(self, operand: Operand) -> Call:
        """The output's codes as the file has them."""
        shape = image_shape(self.graph.output_shape, self.batch)
        layout, signed = self.layouts[operand.tensor], operand.grid.signed
        args = [self._codes(operand.tensor), OUTPUT]
        return self._call(
            "codes", "codes_out", lambda name: pointwise.codes_kernel(name, layout, shape, signed, self.dot), args
        )

    # float regions

    def _same(self, one: str, other: str) -> Call:
        """Parameters under two names that the graph takes for one."""
        a, b = (self.graph.params[self.params[name]] for name in (one, other))
        what = f"{one} and {other} have other values: they must be equal at every level"
        args, shapes = self._params([one, other]), (a.shape, b.shape)
        make = partial(shuffle.same_kernel, dtype=a.dtype, shapes=shapes, what=what)
        return replace(self._call(("same", a, b), "same", make, args), failure=what)

    def _pack_region(self, op: Op) -> list[Call]:
        """Its parameters as float32, and what TVM worked out."""
        assert op.region is not None
        calls = []
        for param in op.region.params:
            stored, scale, zero = (self._stored(name) for name in (param.stored, param.scale, param.zero_point))
            assert stored is not None
            zeros = (zero.shape, zero.dtype) if zero is not None else None
            scales = scale.shape if scale is not None else None
            spec = shuffle.RealSpec(stored.dtype, stored.shape, scales, zeros, param.axis, param.turned)
            kind = (stored.shape, "float32" if scale is not None else stored.dtype)
            if param not in self.packed:
                args = [*self._params([param.stored, param.scale, param.zero_point]), *self._keep(param, [kind])]
                calls.append(self._call(spec, "pack_real", partial(shuffle.real_kernel, spec=spec), args))
        for name, array in self.regions[op.output].constants.items():
            kind, values = (array.shape, array.dtype.name), tuple(array.reshape(-1).tolist())
            make = partial(shuffle.numbers_kernel, values=values, shape=array.shape, dtype=array.dtype.name)
            calls.append(self._call((values, *kind), "numbers", make, self._keep(name, [kind])))
        return calls

    def _region(self, op: Op) -> list[Call]:
        """The calls of a float region."""
        region, program = op.region, self.regions[op.output]
        assert region is not None
        packed: dict[str, Hashable] = {param.name: param for param in region.params}
        packed |= {name: name for name in program.constants}

        def place(name: str) -> Place:
            if name in packed:
                return self.packed[packed[name]][0]
            return INPUT if name == self.graph.input else Place("values", name)

        calls = []
        for i, call in enumerate(program.calls):
            make = partial(_named, call.function)
            args = [place(name) for name in call.args]
            calls.append(self._call((op.output, i), "float", make, args, op.output))
        return calls

    def _calls(self, op: Op) -> list[Call]:
        """All calls of one operator."""
        if op.region is not None:
            return self._region(op)
        if op.kind not in ("dequantize", "codes"):
            return [self._op(op)]
        operand, shape, x = op.inputs[0], self.graph.floats[op.output].shape, self.layouts[op.inputs[0].tensor]
        codes, out = self._codes(operand.tensor), Place("values", op.output)
        if op.kind == "dequantize":
            make = partial(pointwise.dequantize_kernel, x=x, shape=shape, dot=self.dot)
            return [self._call((op.kind, x, shape), op.kind, make, [codes, self._grid(operand), out], op.output)]
        signed = operand.grid.signed
        make = partial(pointwise.codes_kernel, x=x, shape=shape, signed=signed, dot=self.dot)
        return [self._call((op.kind, x, shape, signed), op.kind, make, [codes, out], op.output)]

    # integer operators

    def _op(self, op: Op) -> Call:
        """One operator; its kernel reads codes, then packed parameters."""
        y, lanes = self.layouts[op.output], self.lanes
        codes = [self._codes(operand.tensor) for operand in op.inputs]
        own = self.packed.get(op.own, ())
        key, make = self._recipe(op, [self.layouts[operand.tensor] for operand in op.inputs], y, lanes)
        args: list[Place]
        if op.kind == "quantize":
            args = [INPUT if op.source is None else Place("values", op.source)]
        elif op.then is not None:
            then = op.then.op
            fused = self.packed[op.output] if then.kind == "table" else codes[1:] + [self._grid(o) for o in then.inputs]
            args = [codes[0], *own, self._quantizer(op.own), *fused]
        elif op.kind in ("conv", "table", "softmax", "max_pool", "move", "insert", "shuffle"):
            args = [*codes, *own]
        else:
            args = [*codes, *(self._grid(operand) for operand in op.inputs)]
        args += [self._quantizer(op.output), Place("values", op.output)]
        return self._call(key, op.kind, make, args, op.output)

    def _recipe(
        self, op: Op, xs: list[Layout], y: Layout, lanes: int
    ) -> tuple[Hashable, Callable[[str], tirx.PrimFunc]]:
        """What tells an operator's kernel from others, and how to write it."""
        kind, window, count = op.kind, op.window, op.count_padding
        if kind == "conv":
            spec = self._conv_spec(op)
            return spec, lambda name: conv_kernel(name, spec)
        key: tuple[Hashable, ...] = (kind, *xs, y, window, count)
        if kind == "quantize":
            shape = (y.channels * y.height * y.width,)
            return key, lambda name: pointwise.quantize_kernel(name, shape, y, self.dot)
        if op.shuffle is not None:
            return (*key, op.shuffle), partial(shuffle.shuffle_kernel, x=xs[0], y=y, shuffle=op.shuffle, lanes=lanes)
        if kind == "insert":
            return key, partial(shuffle.insert_kernel, x=xs[0], y=y, window=window, lanes=lanes)
        if kind == "table":
            return key, lambda name: elementwise.table_kernel(name, xs[0], y, self.dot)
        if kind == "move":
            return key, lambda name: elementwise.move_kernel(name, xs[0], y, window, lanes)
        if kind == "softmax":
            return key, lambda name: elementwise.softmax_kernel(name, xs[0], y, ())
        if kind == "concat":
            grid = self.graph.tensors[op.output].quantizer.grid
            same = tuple(operand.grid == grid for operand in op.inputs)
            return (*key, same), lambda name: elementwise.concat_kernel(name, xs, same, y, self.dot)
        if kind in ("max_pool", "average_pool", "mean"):
            pool, signed = (
                pointwise.PoolSpec(xs[0], y, window, self.dot),
                self.graph.tensors[op.output].quantizer.signed,
            )
            if kind == "average_pool":
                return (*key, signed), lambda name: pointwise.average_pool_kernel(name, pool, count, signed)
            return key, lambda name: (pointwise.mean_kernel if kind == "mean" else pointwise.max_pool_kernel)(
                name, pool
            )
        element = self._element(op, xs, y)
        return element, lambda name: elementwise.elementwise_kernel(name, element)

    def _element(self, op: Op, xs: Sequence[Layout], y: Layout) -> elementwise.ElementSpec:
        """An element-wise operator between these layouts."""
        if op.term is None:
            raise CompileError(f"operator {op.name}: there is no kernel for {op.kind}")
        signed = (*(operand.grid.signed for operand in op.inputs), self.graph.tensors[op.output].quantizer.signed)
        return elementwise.ElementSpec(op.kind, op.term, tuple(xs), y, signed, self.dot)


def lower(
    graph: Graph, dot: Dot, threads: int = 1, indices: bool = False, choices: Mapping[ConvSpec, Choice] | None = None
) -> Program:
    """The program of a fused `graph` for a target that multiplies as `dot` says, at most `threads` threads a kernel.

    `indices`: weights with at most 16 different codes are kept in 4 bits each. `choices`: how to compute convolutions,
    as `convolutions` gives them, where it is not the cost models' way.
    """
    return Lowering(graph, dot, threads, indices, choices or {}).program()


def convolutions(graph: Graph, dot: Dot, threads: int = 1, indices: bool = False) -> list[ConvSpec]:
    """What `lower` makes of a graph's convolutions without `choices`; equal ones appear again."""
    return list(Lowering(graph, dot, threads, indices, {}).convolutions().values())
