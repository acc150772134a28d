"""Integer graph -> Relax module: `prepare`, `main` and `codes`, and one TIR function for each different kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from tvm import IRModule, relax, tirx

from qdeploy.compile.graph import Graph, Op, Operand, Quantizer, Tensor, Window
from qdeploy.compile.kernels import elementwise, pack, pack_table, pointwise
from qdeploy.compile.kernels.conv import ConvSpec, conv_kernel
from qdeploy.compile.kernels.emit import QUANT
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.llvm import Dot
from qdeploy.errors import CompileError

Var = Any  # relax.Var or another Relax expression


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
                op = replace(op, inputs=(Operand(name, operand.grid),))
        ops.append(op)
    return replace(graph, ops=tuple(ops), tensors=tensors)


class Lowering:
    """Emits one module. Packed parameters are made in order of first use and are `main`'s arguments in that order."""

    def __init__(self, graph: Graph, dot: Dot) -> None:
        self.graph, self.dot = ready(graph), dot
        self.lanes = max(8, dot.lanes)
        borders = self.graph.borders()
        self.layouts = {n: Layout(*t.shape, borders[n]) for n, t in self.graph.tensors.items()}
        self.builder = relax.BlockBuilder()
        self.kernels: dict[Hashable, Any] = {}
        self.params = {param.name: param for param in graph.params}
        self.packed: dict[Hashable, list[int]] = {}  # what was packed -> places among the packed tensors
        self.kinds: list[tuple[tuple[int, ...], str]] = []  # shape and dtype of each packed tensor

    def module(self) -> IRModule:
        """prepare(params...) -> tuple; main(input, packed...) -> float32; codes(input, packed...) -> codes."""
        self._prepare()
        self._network("main")
        self._network("codes")
        return self.builder.finalize()

    def _kernel(self, key: Hashable, label: str, make: Callable[[str], tirx.PrimFunc]) -> Any:
        """The kernel for `key`, made once."""
        if key not in self.kernels:
            name = f"{label}_{len(self.kernels)}"
            self.kernels[key] = self.builder.add_func(make(name), name)
        return self.kernels[key]

    def _call(self, kernel: Any, args: Sequence[Var], shape: tuple[int, ...], dtype: str) -> Var:
        return self.builder.emit(relax.call_tir(kernel, relax.Tuple(list(args)), relax.TensorType(shape, dtype)))

    # prepare

    def _stored(self, name: str | None) -> pack.Stored | None:
        return None if name is None else pack.Stored(self.params[name].dtype, self.params[name].shape)

    def _prepare(self) -> None:
        variables = {
            param.name: relax.Var(f"p{i}", relax.TensorType(param.shape, param.dtype))
            for i, param in enumerate(self.graph.params)
        }
        with self.builder.function("prepare", list(variables.values())):
            results: list[Var] = []

            def keep(key: Hashable, values: list[tuple[Var, tuple[int, ...], str]]) -> None:
                self.packed[key] = list(range(len(results), len(results) + len(values)))
                for value, shape, dtype in values:
                    results.append(value)
                    self.kinds.append((shape, dtype))

            for quantizer in self._quantizers():
                keep(quantizer, [(self._pack_quantizer(quantizer, variables), *QUANT)])
            for op in self.graph.ops:
                if op.weights is not None:
                    keep(op.output, self._pack_weights(op, variables, results))
                elif op.kind in ("table", "constant", "softmax"):
                    keep(op.output, [self._pack_op(op, variables, results)])
            if self.graph.softmax:
                keep("softmax", [self._pack_exponentials(self.graph.output, results)])
            self.builder.emit_func_output(relax.Tuple(results))

    def _quantizers(self) -> list[Quantizer]:
        """Every different quantizer: those that write tensors, then readers' grids that no writer has."""
        found = dict.fromkeys(tensor.quantizer for tensor in self.graph.tensors.values())
        operands = [operand for op in self.graph.ops for operand in op.inputs] + [self.graph.output]
        for operand in operands:
            if operand.grid != self.graph.tensors[operand.tensor].quantizer.grid:
                found[operand.grid] = None
        return list(found)

    def _pack_quantizer(self, quantizer: Quantizer, variables: dict[str, Var]) -> Var:
        names = (quantizer.scale, quantizer.zero_point, quantizer.clip_min, quantizer.clip_max)
        scale, zero, least, most = (self._stored(name) for name in names)
        assert scale is not None
        spec = pack.QuantizerSpec(scale, zero, least, most, quantizer.low, quantizer.high)
        kernel = self._kernel(spec, "pack_quantizer", lambda name: pack.quantizer_kernel(name, spec))
        return self._call(kernel, [variables[name] for name in names if name is not None], *QUANT)

    def _conv_spec(self, op: Op) -> ConvSpec:
        x, y = self.layouts[op.inputs[0].tensor], self.layouts[op.output]
        return ConvSpec(x, y, op.window, op.groups, self.dot)

    def _pack_weights(
        self, op: Op, variables: dict[str, Var], results: list[Var]
    ) -> list[tuple[Var, tuple[int, ...], str]]:
        w = op.weights
        assert w is not None
        conv = self._conv_spec(op)
        names = (w.weight, w.scale, w.zero_point, w.bias, w.bias_scale, w.bias_zero_point)
        weight, scale, zero, bias, bias_scale, bias_zero = (self._stored(name) for name in names)
        assert weight is not None and scale is not None
        spec = pack.WeightSpec(conv, weight, scale, zero, bias, bias_scale, bias_zero, w.transposed, w.signed)
        kernel = self._kernel(spec, "pack_weights", lambda name: pack.pack_kernel(name, spec))
        args = [variables[name] for name in names if name is not None]
        args += [results[i] for i in (self._grid_place(op.inputs[0]), self._place(op.output))]
        kinds: list[tuple[tuple[int, ...], str]] = [
            ((conv.weight_bytes,), "int8"), ((2 * conv.padded + 1,), "int32"), ((conv.padded,), "float32"),
        ]  # fmt: skip
        types = [relax.TensorType(shape, dtype) for shape, dtype in kinds]
        value = self.builder.emit(relax.call_tir(kernel, relax.Tuple(args), types))
        return [(self.builder.emit(relax.TupleGetItem(value, i)), *kind) for i, kind in enumerate(kinds)]

    def _pack_op(self, op: Op, variables: dict[str, Var], results: list[Var]) -> tuple[Var, tuple[int, ...], str]:
        """What an operator without weights reads beside codes and quantizers."""
        if op.kind == "softmax":
            return self._pack_exponentials(op.inputs[0], results)
        if op.stored is not None:
            spec = pack_table.StoredSpec(
                self.params[op.stored].dtype, self.params[op.stored].shape, self.layouts[op.output]
            )
            kernel = self._kernel(spec, "pack_stored", lambda name: pack_table.stored_kernel(name, spec))
            shape = (spec.layout.size,)
            return self._call(kernel, [variables[op.stored]], shape, "uint8"), shape, "uint8"
        term, operand = op.term, op.inputs[0]
        assert term is not None
        what = f"the table of {op.name} is for other values of {operand.grid.scale} and its zero point"
        key = (term, op.table, what if op.table is not None else "")
        kernel = self._kernel(key, "pack_table", lambda name: pack_table.table_pack_kernel(name, term, op.table, what))
        args = [results[i] for i in (self._grid_place(operand), self._place(op.output))]
        return self._call(kernel, args, *elementwise.TABLE), *elementwise.TABLE

    def _pack_exponentials(self, operand: Operand, results: list[Var]) -> tuple[Var, tuple[int, ...], str]:
        kernel = self._kernel("exponentials", "pack_exponentials", pack_table.exponentials_kernel)
        args = [results[self._grid_place(operand)]]
        return self._call(kernel, args, *elementwise.EXPONENTIALS), *elementwise.EXPONENTIALS

    def _place(self, tensor: str) -> int:
        """Where the quantizer that writes `tensor` is among the packed tensors."""
        return self.packed[self.graph.tensors[tensor].quantizer][0]

    def _grid_place(self, operand: Operand) -> int:
        """Where a quantizer with the scale and zero point of `operand` is."""
        writer = self.graph.tensors[operand.tensor].quantizer
        return self.packed[writer if writer.grid == operand.grid else operand.grid][0]

    # main and codes

    def _network(self, name: str) -> None:
        graph = self.graph
        x = relax.Var("input", relax.TensorType(graph.input_shape, "float32"))
        packed = [relax.Var(f"k{i}", relax.TensorType(*kind)) for i, kind in enumerate(self.kinds)]
        with self.builder.function(name, [x, *packed]):
            values: dict[str, Var] = {}
            for op in graph.ops:
                values[op.output] = self._op(op, x, packed, values)
            source, layout = values[graph.output.tensor], self.layouts[graph.output.tensor]
            shape, signed = graph.output_shape, graph.output.grid.signed
            if name == "main":
                out = self._way_out(source, layout, packed)
            else:
                kernel = self._kernel(
                    "codes", "codes_out", lambda label: pointwise.codes_kernel(label, layout, shape, signed)
                )
                out = self._call(kernel, [source], shape, "int8" if signed else "uint8")
            self.builder.emit_func_output(out)

    def _way_out(self, source: Var, layout: Layout, packed: list[Var]) -> Var:
        """float32 of the output's codes."""
        shape = self.graph.output_shape
        if self.graph.softmax:
            kernel = self._kernel(
                "softmax", "softmax_out", lambda label: elementwise.softmax_kernel(label, layout, None, shape)
            )
            args = [source, packed[self.packed["softmax"][0]]]
        else:
            kernel = self._kernel(
                "dequantize", "dequantize", lambda label: pointwise.dequantize_kernel(label, layout, shape)
            )
            args = [source, packed[self._grid_place(self.graph.output)]]
        return self._call(kernel, args, shape, "float32")

    def _op(self, op: Op, x: Var, packed: list[Var], values: dict[str, Var]) -> Var:
        """Emit one operator; its inputs are codes, then packed parameters."""
        if op.kind == "constant":
            return packed[self.packed[op.output][0]]
        y, lanes = self.layouts[op.output], self.lanes
        codes = [values[operand.tensor] for operand in op.inputs]
        grids = [packed[self._grid_place(operand)] for operand in op.inputs]
        own = [packed[i] for i in self.packed.get(op.output, [])]
        quant = packed[self._place(op.output)]
        key, make = self._recipe(op, [self.layouts[operand.tensor] for operand in op.inputs], y, lanes)
        reads = {
            "quantize": [x], "conv": [*codes, *own], "table": [*codes, *own], "softmax": [*codes, *own],
            "max_pool": codes, "move": codes,
        }  # fmt: skip
        args = [*reads.get(op.kind, [*codes, *grids]), quant]
        return self._call(self._kernel(key, op.kind, make), args, (y.size,), "uint8")

    def _recipe(
        self, op: Op, xs: list[Layout], y: Layout, lanes: int
    ) -> tuple[Hashable, Callable[[str], tirx.PrimFunc]]:
        """What tells an operator's kernel from others, and how to write it."""
        kind, window, count, shape = op.kind, op.window, op.count_padding, self.graph.input_shape
        if kind == "conv":
            spec = self._conv_spec(op)
            return spec, lambda name: conv_kernel(name, spec)
        key: tuple[Hashable, ...] = (kind, *xs, y, window, count)
        if kind == "quantize":
            return key, lambda name: pointwise.quantize_kernel(name, shape, y, lanes)
        if kind == "table":
            return key, lambda name: elementwise.table_kernel(name, xs[0], y)
        if kind == "move":
            return key, lambda name: elementwise.move_kernel(name, xs[0], y, window, lanes)
        if kind == "softmax":
            return key, lambda name: elementwise.softmax_kernel(name, xs[0], y, ())
        if kind == "concat":
            grid = self.graph.tensors[op.output].quantizer.grid
            same = tuple(operand.grid == grid for operand in op.inputs)
            return (*key, same), lambda name: elementwise.concat_kernel(name, xs, same, y, lanes)
        if kind in ("max_pool", "average_pool"):
            pool = pointwise.PoolSpec(xs[0], y, window, lanes)
            if kind == "max_pool":
                return key, lambda name: pointwise.max_pool_kernel(name, pool)
            return key, lambda name: pointwise.average_pool_kernel(name, pool, count)
        term = op.term
        if term is None:
            raise CompileError(f"operator {op.name}: there is no kernel for {kind}")
        return (*key, term), lambda name: elementwise.elementwise_kernel(name, term, xs, y, lanes)


def lower(graph: Graph, dot: Dot) -> IRModule:
    """The Relax module of `graph` for a target that multiplies as `dot` says."""
    return Lowering(graph, dot).module()
