"""Float regions: TVM's own importer and kernels for operators that have no integer one.

A region's ONNX model becomes Relax, its operators tensor programs, neighbours fused; each is written as a kernel over
buffers like those in kernels/, with the loop over the last axis innermost, so that LLVM vectorizes it. Sums run in the
order of the reduction, one float32 addition after another.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from onnx import ModelProto
from tvm import relax, s_tir, tirx
from tvm.relax.frontend.onnx import from_onnx

from qdeploy.compile.graph import Op, Region
from qdeploy.compile.kernels.emit import Buffer, chunks, load, prim_func, store
from qdeploy.errors import CompileError

LANES = 16  # of a copy
SPATIAL, REDUCTION = 0, 2  # kinds of a tensor program's axes
MAX_CONSTANT = 4096  # elements of a constant that TVM makes itself: they are written out as code

IMPORT = [
    relax.transform.DecomposeOpsForInference,
    relax.transform.LegalizeOps,
    relax.transform.AnnotateTIROpPattern,
    relax.transform.FuseOps,
    relax.transform.FuseTIR,
    relax.transform.DeadCodeElimination,
]
WRITE = [
    s_tir.transform.LowerInitBlock,
    s_tir.transform.PlanAndUpdateBufferAllocationLocation,
    s_tir.transform.ConvertBlocksToOpaque,
    s_tir.transform.CompactBufferAllocation,
    s_tir.transform.LowerMatchBuffer,
    s_tir.transform.StmtSimplify,
    s_tir.transform.LowerOpaqueBlock,
    s_tir.transform.RewriteUnsafeSelect,
]


@dataclass(frozen=True)
class FloatCall:
    """A kernel and the names of its buffers: scratch ones, what it reads, what it writes."""

    function: tirx.PrimFunc
    args: tuple[str, ...]


@dataclass
class FloatProgram:
    """A region's kernels in order.

    Buffers are the region's inputs, parameters and outputs by their names, `values`: shapes and dtypes of those
    between them, and `constants`: numbers that TVM worked out.
    """

    calls: list[FloatCall] = field(default_factory=list)
    values: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)


def compile_region(op: Op, label: str) -> FloatProgram:
    """The kernels of a region; `label` leads the names of what lies between them.

    Raises CompileError that names the region's operators where TVM cannot take one, or leaves a shape open.
    """
    region = op.region
    assert region is not None
    model = ModelProto.FromString(region.model)
    noise = io.StringIO()  # the importer prints before it raises
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(noise), tvm.target.Target("llvm"):
            warnings.simplefilter("ignore")
            module = from_onnx(model, sanitize_input_names=False)
            module = tvm.transform.Sequential([make() for make in IMPORT])(module)
    except Exception as e:  # importers of single operators raise whatever numpy, ONNX or TVM raise
        reason = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
        raise CompileError(f"{_nodes(region)} cannot be compiled in float either: {reason}") from e
    return _Writer(region, label, module).program


def _nodes(region: Region) -> str:
    """The region's operators and why they have no integer kernels."""
    found = [f"{kind} {name} ({reason})" for kind, name, reason in region.nodes]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{', '.join(found[:3])}{more}"


class _Writer:
    """Walks the imported `main` and writes a kernel for each call."""

    def __init__(self, region: Region, label: str, module: tvm.IRModule) -> None:
        self.region, self.label, self.module = region, label, module
        self.program = FloatProgram()
        main = module["main"]
        names = [*region.inputs, *(param.name for param in region.params)]
        # what a variable stands for: the name of a buffer, or a list of them for a tuple
        self.buffers: dict[Any, Any] = dict(zip(main.params, names, strict=True))
        bindings = [binding for block in main.body.blocks for binding in block.bindings]
        for binding in bindings:
            self._bind(binding.var, binding.value)
        found = self._names(main.body.body)
        self._name_outputs(found if isinstance(found, list) else [found])

    def _refuse(self, why: str) -> CompileError:
        return CompileError(f"{_nodes(self.region)} cannot be compiled in float either: {why}")

    def _names(self, value: Any) -> Any:
        """Buffer of an expression; a list for a tuple."""
        if isinstance(value, relax.Tuple):
            return [self._names(part) for part in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._names(value.tuple_value)[value.index]
        if isinstance(value, tvm.ir.GenericConst):
            array = value.value.numpy()
            if array.size > MAX_CONSTANT:
                raise self._refuse(f"it needs a table of {array.size} numbers")
            name = f"{self.label}.constant{len(self.program.constants)}"
            self.program.constants[name] = array
            return name
        if value not in self.buffers:
            raise self._refuse(f"TVM leaves {value} open")
        return self.buffers[value]

    def _bind(self, var: Any, value: Any) -> None:
        if not isinstance(value, relax.Call):
            self.buffers[var] = self._names(value)
            return
        if not isinstance(value.op, tvm.ir.Op) or value.op.name != "relax.call_tir":
            raise self._refuse(f"TVM has no kernel for {value.op}")
        outs = [self._value(kind) for kind in _fields(var.ty)]
        self.buffers[var] = outs if isinstance(var.ty, relax.TupleType) else outs[0]
        given = self.module[value.args[0]]
        if "call_packed" in str(given):
            raise self._refuse("it calls a library that artifacts do not carry")
        function, inner = _written(given)
        args = [self._names(arg) for arg in value.args[1].fields]
        spaces = [self._new(shape, dtype) for shape, dtype in inner]
        self.program.calls.append(FloatCall(function, (*spaces, *args, *outs)))

    def _value(self, kind: Any) -> str:
        shape = kind.shape.values if isinstance(kind.shape, relax.ShapeExpr) else None
        if shape is None or not all(isinstance(n, tirx.IntImm) for n in shape):
            raise self._refuse("the shape of a result depends on values")
        return self._new(tuple(int(n) for n in shape), str(kind.dtype))

    def _new(self, shape: tuple[int, ...], dtype: str) -> str:
        name = f"{self.label}.value{len(self.program.values)}"
        self.program.values[name] = (shape, dtype)
        return name

    def _name_outputs(self, found: list[str]) -> None:
        """Give results the names of the region's outputs; what has a name already is copied."""
        graph = ModelProto.FromString(self.region.model).graph
        for name, info in zip(found, graph.output, strict=True):
            sizes = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
            if name in self.program.values and self.program.values[name][0] != sizes:
                raise self._refuse(f"TVM makes {list(self.program.values[name][0])} of {info.name} {list(sizes)}")
        renamed: dict[str, str] = {}
        for name, output in zip(found, self.region.outputs, strict=True):
            if name in self.program.values and name not in renamed:
                renamed[name] = output
        self.program.calls = [
            FloatCall(call.function, tuple(renamed.get(arg, arg) for arg in call.args)) for call in self.program.calls
        ]
        kinds = {renamed.get(name, name): kind for name, kind in self.program.values.items()}
        for name, output, info in zip(found, self.region.outputs, graph.output, strict=True):
            if renamed.get(name) != output:
                size = int(np.prod([d.dim_value for d in info.type.tensor_type.shape.dim]))
                dtype = np.dtype(_numpy(info.type.tensor_type.elem_type)).name
                copy = copy_kernel("copy", size, dtype)
                self.program.calls.append(FloatCall(copy, (renamed.get(name, name), output)))
        self.program.values = {name: kind for name, kind in kinds.items() if name not in self.region.outputs}


def _numpy(elem_type: int) -> Any:
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(elem_type)


def _fields(kind: Any) -> list[Any]:
    """Types of a tensor or of a tuple's parts."""
    return list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]


def _written(function: tirx.PrimFunc) -> tuple[tirx.PrimFunc, list[tuple[tuple[int, ...], str]]]:
    """The function as plain loops, its inner buffers the first arguments; and their shapes and dtypes."""
    function = _scheduled(function)
    root = function.body.block
    inner = list(root.alloc_buffers)
    bare = s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, root.body, root.init, [], root.match_buffers,
        root.annotations,
    )  # fmt: skip
    body = s_tir.SBlockRealize(function.body.iter_values, function.body.predicate, bare)
    function = tirx.PrimFunc([*inner, *function.params], body, function.ret_type, function.attrs)
    module = tvm.transform.Sequential([make() for make in WRITE])(tvm.IRModule({"main": function}))
    return module["main"], [(tuple(int(n) for n in b.ty.shape), str(b.ty.dtype)) for b in inner]


def _scheduled(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Sums with the last output axis innermost; the order of each sum's terms stays."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        loops = schedule.get_loops(block)
        kinds = [axis.iter_type for axis in schedule.get(block).iter_vars]
        spatial = [loop for loop, kind in zip(loops, kinds, strict=False) if kind == SPATIAL]
        sums = [loop for loop, kind in zip(loops, kinds, strict=False) if kind == REDUCTION]
        if len(loops) == len(kinds) == len(spatial) + len(sums) and spatial and sums:
            schedule.reorder(*spatial[:-1], *sums, spatial[-1])
            schedule.decompose_reduction(block, sums[0])
    return schedule.mod["main"]


def copy_kernel(name: str, size: int, dtype: str) -> tirx.PrimFunc:
    """`size` elements as they are."""

    def body(x: Buffer, y: Buffer) -> None:
        chunks(size, LANES, lambda i, n: store(y, load(x, i, n), i, n))

    return prim_func(name, [("x", (size,), dtype), ("y", (size,), dtype)], body)
