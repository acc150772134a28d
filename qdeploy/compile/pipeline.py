"""compile_model: a QDQ ONNX file becomes an artifact folder.

read_graph   ONNX -> integer graph                                   (read/)
fuse         fewer operators, the same codes                         (fuse.py)
lower        integer graph -> kernels and calls                      (lower.py)
plan         where activations lie in the arena                      (plan.py)
entries      prepare, main, codes and profile as TIR                 (entry.py)
library      codegen.PHASES, LLVM and the linker                     (codegen.py)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.compile.artifact import DESCRIPTION, FORMAT, identity, opened
from qdeploy.compile.codegen import library
from qdeploy.compile.cuda.library import cuda_library
from qdeploy.compile.cuda.lower import CudaProgram, lower_cuda
from qdeploy.compile.cuda.spec import DOT, gpu_of
from qdeploy.compile.dump import write_phases
from qdeploy.compile.entry import arena_bytes, entry_functions
from qdeploy.compile.fuse import fuse, parts
from qdeploy.compile.graph import ANY_CODE, FLOAT_REASON, INTEGER, Graph, Op, Weights
from qdeploy.compile.kernels.conv import way
from qdeploy.compile.kernels.join import join_kernel
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.compile.lower import convolutions, lower
from qdeploy.compile.plan import plan
from qdeploy.compile.program import Program
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.tune import choices, default_cache
from qdeploy.errors import CompileError, DeviceError, ModelError
from qdeploy.files import canonical_json, new_folder, parse_json, read_bytes, sha256, write_atomic
from qdeploy.qdq import arrays, canonical_bytes, graph_digest, load_model, parse_model
from qdeploy.target import TILE_FEATURES, Target, missing_features, request_tiles

Description = dict[str, Any]
NARROW_CONTAINER = 7  # bits: codes in -64..64, so that on AVX2 two products fit 16 bits
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to compile beside the target.

    threads: how many threads large layers are spread over; constant: the file's own parameters, packed, belong to the
    artifact, which then runs without any; shape: the input's name and sizes, where the file leaves some open; indices:
    weights with at most 16 different codes stay in 4 bits each; tune: seconds in which ways to compute convolutions are
    measured; cache: the file of what was measured, which is also read without `tune` (None: tune.default_cache).
    """

    threads: int = 1
    constant: bool = False
    shape: tuple[str, tuple[int, ...]] | None = None
    indices: bool = False
    tune: float = 0.0
    cache: Path | None = None


def compile_model(
    onnx_path: Path, target: Target | Sequence[Target], out: Path, force: bool = False, dump: Path | None = None,
    echo: Echo | None = None, options: Options | None = None,
) -> Description:  # fmt: skip
    """Write libraries and `out`/artifact.json (docs/handovers.md); returns the latter's content.

    Several targets, best first, give one artifact with a library each; loading it takes the first that the machine can
    run. `dump` is a folder for what each phase makes (dump.py, codegen.py). Raises ModelError for a damaged file,
    CompileError that lists every operator without an integer kernel, or for a missing linker, RecipeError for a cpu or
    feature that LLVM does not know, DeviceError when `out` exists (without `force`) or cannot be written, or when
    `constant` needs a target that this machine cannot run. Equal input gives equal bytes.
    """
    say, options = echo or (lambda text: None), options or Options()
    targets = [resolve(one) for one in ([target] if isinstance(target, Target) else target)]
    check_gpus(targets, options)
    if options.constant:
        check_runs_here(targets, "packing constants", "--constant")
    if options.tune:
        check_runs_here(targets, "tuning", "--tune")
    data, model = load_model(Path(onnx_path))
    parsed = parse_model(canonical_bytes(model), str(onnx_path))
    graph = read_graph(parsed, options.shape)
    if not options.constant:
        graph = for_any_level(graph, narrow_containers(Path(onnx_path), data))
    with new_folder(Path(out), force) as folder:
        head = describe(graph, targets, graph_digest(data), options)
        for resolved in targets:
            counts = f"{len(graph.ops)} operators, {len(graph.params)} parameters"
            say(f"{counts}, for {resolved.target.gpu or resolved.cpu} ({target_json(resolved)['dot']})")
            name = f"-{resolved.target.name}" if len(targets) > 1 else ""
            phases = dump and Path(dump) / name.strip("-")
            code, variant = build(graph, resolved, head, f"lib{name}.so", phases, options, say)
            add_file(folder, head, variant["library"], code)
            head["variants"].append(variant)
            say(f"{len(code)} bytes of code, {variant['arena_bytes']} bytes of arena")
        write_atomic(folder / DESCRIPTION, canonical_json(head))
        if options.constant:
            store_packed(folder, head, arrays(parsed))
    return head


def build(
    graph: Graph, resolved: Resolved, head: Description, name: str, dump: Path | None = None,
    options: Options | None = None, say: Echo = lambda text: None,
) -> tuple[bytes, Description]:  # fmt: skip
    """The library for one target and its entry of artifact.json; raises CompileError."""
    options = options or Options()
    try:
        gpu = resolved.target.gpu
        fused = fuse(graph, bool(gpu) or resolved.dot.lookup != "none")
        how = (fused, resolved.dot, options.threads, options.indices)
        chosen = {}
        if options.tune or options.cache is not None:
            cache = options.cache or default_cache()
            chosen = choices(convolutions(*how), resolved, cache, options.tune, say)
        program = lower_cuda(fused, resolved.dot, gpu_of(resolved.target)) if gpu else lower(*how, chosen)
        memory = plan(program.values, program.lives())
        variant = {
            "library": name,
            "target": target_json(resolved),
            "arena_bytes": arena_bytes(memory),
            "packed_bytes": program.packed_bytes,
            "packed": name.replace("lib", "packed").replace(".so", ".bin") if head["constant"] else None,
            "kernels": kernel_rows(program),
        }
        if dump is not None:
            write_phases(dump, graph, fused, program, memory)
        if isinstance(program, CudaProgram):
            return cuda_library(program, memory, resolved, identity(head, variant), dump), variant
        entries, common = entry_functions(graph, program, memory), {"join": join_kernel("join", resolved.features)}
        return library(program.kernels, entries, resolved.tvm, identity(head, variant), dump, common, echo=say), variant
    except (RuntimeError, ValueError, TypeError) as e:
        reason = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
        raise CompileError(f"TVM cannot compile this model for {resolved.target.name}: {reason}") from e


def narrow_containers(path: Path, data: bytes) -> frozenset[str]:
    """Layers whose codes lie in -64..64 at every level: the sidecar of an exported model gives them 7-bit containers.

    Empty where there is no sidecar, or that of another file.
    """
    beside = Path(f"{path}.json")
    if not beside.is_file():
        return frozenset()
    sidecar = parse_json(read_bytes(beside, "the sidecar", ModelError), str(beside), ModelError)
    if not isinstance(sidecar, dict) or sidecar.get("model") != sha256(data):
        return frozenset()
    try:
        return frozenset(node for node, bits in sidecar["weights"].items() if bits["container"] <= NARROW_CONTAINER)
    except (KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{beside} is no sidecar of an exported model: export again, or remove it") from e


def for_any_level(graph: Graph, narrow: Collection[str] = ()) -> Graph:
    """`graph` less what the file's own weights prove of their codes: other levels have others.

    Those of the layers `narrow` stay in -64..64 (docs/integers.md, containers).
    """

    def known(weights: Weights) -> Weights:
        reach = 1 << (NARROW_CONTAINER - 1) if weights.weight.removesuffix(".weight") in narrow else ANY_CODE
        return replace(weights, reach=reach)

    ops = (op if op.weights is None else replace(op, weights=known(op.weights)) for op in graph.ops)
    return replace(graph, ops=tuple(ops))


# What this machine must be able to run ------------------------------------------------------------------------------


def check_runs_here(targets: Sequence[Resolved], what: str, option: str) -> None:
    """Raise DeviceError for a target whose code this machine cannot run, so that it cannot do `what` either."""
    for resolved in targets:
        lacking = missing_features(resolved.features)
        if not lacking and set(TILE_FEATURES) & set(resolved.features) and not request_tiles():
            lacking = list(TILE_FEATURES)
        if lacking:
            raise DeviceError(
                f"{what} runs the code of target {resolved.target.name}, but this machine's cpu lacks "
                f"{', '.join(lacking)}: compile on a machine that has them, or without {option}"
            )


def check_gpus(targets: Sequence[Resolved], options: Options) -> None:
    """Raise for a GPU that cannot be compiled for, and for options that only processors have."""
    for resolved in targets:
        if resolved.target.gpu:
            gpu_of(resolved.target)
            if options.threads > 1 or options.indices or options.tune:
                what = "--threads, --weights packed and --tune are for processors"
                raise CompileError(f"{what}: leave them out for target {resolved.target.name}")


def add_file(folder: Path, head: Description, name: str, data: bytes) -> None:
    """Write a file of the artifact and its digest."""
    write_atomic(folder / name, data)
    head["files"][name] = sha256(data)


def store_packed(folder: Path, head: Description, values: Mapping[str, np.ndarray]) -> None:
    """Pack `values` with each library and write the results beside them."""
    for variant in head["variants"]:
        packed = opened(head, variant, (folder / variant["library"]).read_bytes()).pack(values)
        add_file(folder, head, variant["packed"], packed.tensor.numpy().tobytes())
    write_atomic(folder / DESCRIPTION, canonical_json(head))


# artifact.json -------------------------------------------------------------------------------------------------------


def describe(graph: Graph, targets: Sequence[Resolved], digest: str, options: Options) -> Description:
    """artifact.json before its variants and files are known."""
    least = target_json(targets[-1])
    return {
        "format": FORMAT,
        "graph": digest,
        "target": least if len(targets) == 1 else least | {"name": "auto"},
        "threads": options.threads,
        "constant": options.constant,
        "inputs": [{"name": graph.input, "dtype": "float32", "shape": list(graph.input_shape)}],
        "outputs": [
            {
                "name": graph.output_name,
                "dtype": "float32",
                "codes": graph.coded or "",
                "shape": list(graph.output_shape),
            }
        ],
        "params": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in graph.params],
        "variants": [],
        "versions": {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")} | {"qdeploy": qdeploy_version()},
        "files": {},
    }


def target_json(resolved: Resolved) -> Description:
    """A target as artifact.json has it."""
    target = resolved.target
    gpu = {"gpu": target.gpu} if target.gpu else {}
    return gpu | {
        "name": target.name,
        "arch": target.arch,
        "kind": target.kind,
        "cpu": resolved.cpu,
        "features": list(resolved.features),
        "dot": DOT if target.gpu else resolved.dot.instruction,
    }


def qdeploy_version() -> str:
    """Version of this package, also from a source tree."""
    import qdeploy

    return str(qdeploy.__version__)


def kernel_rows(program: Program) -> list[Description]:
    """One row an operator, then the way out: shapes, functions in call order, whether its arithmetic is integer."""
    rows = [operator_row(program.graph, op) for op in program.graph.ops]
    for op, row in zip(program.graph.ops, rows, strict=True):
        calls = [call for call in program.body if call.op == op.output]  # of a constant there are none
        row |= {"functions": [call.kernel for call in calls], "bytes": sum(call.bytes for call in calls)}
        if (spec := program.convolutions.get(op.output)) is not None:
            row |= {"way": asdict(way(spec)), "weight_bytes": spec.weight_bytes}
            row |= {"weights": "4-bit" if spec.packed else "int8"}
    for call in program.way_out:
        label = call.kernel.rpartition("_")[0] or call.kernel
        shape = list(program.graph.shape_of(program.graph.result))
        row = {"name": label, "operator": label, "inputs": [shape], "output": shape}
        row |= {"arithmetic": "float", "reason": "the output is float32", "bytes": call.bytes}
        rows.append(row | {"functions": [call.kernel]})
    return rows


def operator_row(graph: Graph, op: Op) -> Description:
    """What an operator is, and why where it is not integer."""
    row: Description = {
        "name": op.name,
        "operator": op.kind,
        "inputs": [list(graph.shape_of(name)) for name in op.reads],
        "output": list(graph.shape_of(op.output)),
        "arithmetic": INTEGER.get(op.kind, "float"),
    }
    if op.kind in FLOAT_REASON:
        row["reason"] = FLOAT_REASON[op.kind]
    if op.region is not None:
        reasons = dict.fromkeys(f"{kind}: {why}" for kind, _, why in op.region.nodes)
        row["reason"] = "; ".join([*reasons][:3]) + (" and others" if len(reasons) > 3 else "")
        row["nodes"] = [{"operator": kind, "name": name, "reason": why} for kind, name, why in op.region.nodes]
    if len(found := parts(op)) > 1:
        row["fused"] = [part.name for part in found]
    if op.kind == "conv":
        row["kernel"], row["groups"] = list(op.window.kernel), op.groups
    return row
