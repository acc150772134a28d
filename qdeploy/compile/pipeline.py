"""compile_model: a QDQ ONNX file becomes an artifact folder. PHASES is the whole pipeline."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule, relax
from tvm.support import cc

from qdeploy.compile.artifact import DESCRIPTION, FORMAT, LIBRARY
from qdeploy.compile.graph import FLOAT_REASON, INTEGER, Graph
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.compile.lower import lower
from qdeploy.compile.read.handlers import read_graph
from qdeploy.errors import CompileError
from qdeploy.files import canonical_json, new_folder, sha256, write_atomic
from qdeploy.qdq import canonical_bytes, graph_digest, load_model, parse_model
from qdeploy.target import Target

Pass = Any
Phase = tuple[str, list[Callable[[], Pass]]]

# Kernels arrive scheduled, so there is nothing to legalize, fold or fuse: constants there are none.
PHASES: list[Phase] = [
    ("1-calls", [relax.transform.CallTIRRewrite, relax.transform.RemovePurityChecking]),
    ("2-memory", [relax.transform.StaticPlanBlockMemory]),
    (
        "3-vm",
        [
            relax.transform.LowerAllocTensor,
            relax.transform.KillAfterLastUse,
            relax.transform.LowerRuntimeBuiltin,
            relax.transform.ComputePrimValue,
            relax.transform.VMShapeLower,
            relax.transform.AttachGlobalSymbol,
        ],
    ),
]
# Storage rewriting would merge the kernels' register buffers and take them from the heap again (emit.local).
OPTIONS = {"tirx.disable_storage_rewrite": True}
LINK_OPTIONS = ["-s", "-Wl,--build-id=none", "-Wl,-z,relro,-z,now"]  # no names of temporary files, no stamps


@dataclass(frozen=True)
class Built:
    """A linked library and what its memory plan costs."""

    library: bytes
    arena_bytes: int


def compile_model(
    onnx_path: Path, target: Target, out: Path, force: bool = False, dump: Path | None = None,
    echo: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `out`/lib.so and `out`/artifact.json (docs/handovers.md); returns the latter's content.

    `dump` is a folder for the module after each phase. Raises ModelError for a damaged file, CompileError that lists
    every operator without an integer kernel, or for a missing linker, RecipeError for a cpu or feature that LLVM does
    not know, DeviceError when `out` exists (without `force`) or cannot be written. Equal input gives equal bytes.
    """
    say = echo or (lambda text: None)
    resolved = resolve(target)
    data, model = load_model(Path(onnx_path))
    graph = read_graph(parse_model(canonical_bytes(model), str(onnx_path)))
    say(f"{len(graph.ops)} operators, {len(graph.params)} parameters, for {resolved.cpu} ({resolved.dot.instruction})")
    with new_folder(Path(out), force) as folder:
        built = build(graph, resolved, dump)
        description = describe(graph, resolved, built, graph_digest(data))
        write_atomic(folder / LIBRARY, built.library)
        write_atomic(folder / DESCRIPTION, canonical_json(description))
    say(f"{len(built.library)} bytes of code, {built.arena_bytes} bytes of arena")
    return description


def build(graph: Graph, resolved: Resolved, dump: Path | None = None) -> Built:
    """Run PHASES, generate code and link it; raises CompileError."""
    try:
        module = lower(graph, resolved.dot)
        write_dump(dump, "0-relax", module)
        arena = 0
        with resolved.tvm, tvm.transform.PassContext(opt_level=3, config=OPTIONS):
            for name, passes in PHASES:
                module = tvm.transform.Sequential([make() for make in passes])(module)
                write_dump(dump, name, module)
                if name == "2-memory":
                    arena = planned_bytes(module["main"])
            executable = relax.build(module, target=resolved.tvm, relax_pipeline=None)
        return Built(link(executable), arena)
    except (RuntimeError, ValueError, TypeError) as e:
        reason = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
        raise CompileError(f"TVM cannot compile this model for {resolved.target.name}: {reason}") from e


def write_dump(folder: Path | None, phase: str, module: IRModule) -> None:
    """The module as text, for people."""
    if folder is not None:
        write_atomic(Path(folder) / f"{phase}.txt", module.script().encode())


def planned_bytes(function: Any) -> int:
    """Bytes of all storages that the memory plan allocates for one run, the output included."""
    total = 0

    def visit(expr: Any) -> None:
        nonlocal total
        if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.Op):
            return
        if expr.op.name in ("relax.memory.alloc_storage", "relax.vm.alloc_storage"):
            total += int(expr.args[0].values[0])
        elif expr.op.name == "relax.builtin.alloc_tensor":
            size = 1
            for n in expr.args[0].values:
                size *= int(n)
            total += size * tvm.DataType(str(expr.args[1].value)).itemsize

    relax.analysis.post_order_visit(function, visit)
    return total


def link(executable: Any) -> bytes:
    """The shared library of an executable; raises CompileError when there is no linker."""
    compiler = cc.get_cc()
    if compiler is None or shutil.which(compiler) is None:
        raise CompileError("linking needs a C++ compiler: install one (Debian: apt install g++) or set CXX")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / LIBRARY
        try:
            executable.export_library(str(path), workspace_dir=folder, cc=compiler, options=LINK_OPTIONS)
        except (RuntimeError, subprocess.SubprocessError, OSError) as e:
            reason = next((line for line in str(e).splitlines() if "error" in line.lower()), str(e).strip()[:200])
            raise CompileError(f"{compiler} cannot link the library: {reason}") from e
        return path.read_bytes()


def describe(graph: Graph, resolved: Resolved, built: Built, digest: str) -> dict[str, Any]:
    """The content of artifact.json."""
    target = resolved.target
    return {
        "format": FORMAT,
        "graph": digest,
        "target": {
            "name": target.name,
            "arch": target.arch,
            "kind": target.kind,
            "cpu": resolved.cpu,
            "features": list(resolved.features),
            "dot": resolved.dot.instruction,
        },
        "inputs": [{"name": graph.input, "dtype": "float32", "shape": list(graph.input_shape)}],
        "outputs": [{"name": graph.output_name, "dtype": "float32", "shape": list(graph.output_shape)}],
        "params": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in graph.params],
        "arena_bytes": built.arena_bytes,
        "kernels": kernels(graph),
        "versions": {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")} | {"qdeploy": qdeploy_version()},
        "files": {LIBRARY: sha256(built.library)},
    }


def qdeploy_version() -> str:
    """Version of this package, also from a source tree."""
    import qdeploy

    return str(qdeploy.__version__)


def kernels(graph: Graph) -> list[dict[str, Any]]:
    """One row an operator: what it is, shapes, and whether its arithmetic is integer, or float and why."""
    rows = []
    for op in graph.ops:
        row: dict[str, Any] = {
            "name": op.name,
            "operator": op.kind,
            "inputs": [list(graph.tensors[operand.tensor].shape) for operand in op.inputs],
            "output": list(graph.tensors[op.output].shape),
            "arithmetic": INTEGER.get(op.kind, "float"),
        }
        if op.kind in FLOAT_REASON:
            row["reason"] = FLOAT_REASON[op.kind]
        if op.kind == "conv":
            row["kernel"], row["groups"] = list(op.window.kernel), op.groups
        rows.append(row)
    return rows
