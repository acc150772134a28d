"""What a compiled kernel is, by content: two kernels with one signature are the same code, whatever network calls them.

A signature hashes a kernel's TIR. That holds its shapes, layouts, borders, register tile, and what was fused into it.
Weights whose zero point is not 0 make a convolution do more, which is decided at run time: they have another signature.
On a GPU it hashes the kernel's CUDA C++ and the numbers of the launch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from qdeploy.compile.cuda.launch import NOTHING, Launch
from qdeploy.compile.cuda.lower import CudaProgram, lower_cuda
from qdeploy.compile.cuda.spec import gpu_of
from qdeploy.compile.fuse import fuse
from qdeploy.compile.graph import Weights
from qdeploy.compile.llvm import resolve
from qdeploy.compile.lower import lower
from qdeploy.compile.pipeline import for_any_level, kernel_rows, narrow_containers, qdeploy_version
from qdeploy.compile.program import Call, Program
from qdeploy.files import canonical_json, sha256
from qdeploy.profile.bitops import read_values
from qdeploy.qdq import arrays, load_model
from qdeploy.target import Target

DIGITS = 16
UNSIGNED_MIDDLE = 128


@dataclass(frozen=True)
class Kernel:
    """One call of a run: the operator that it computes (as artifact.json has it) and the kernel's signature."""

    layer: str
    operator: str
    signature: str


def signatures(onnx_path: Path, target: Target) -> list[Kernel]:
    """The calls of one run, in the order of `Artifact.ticks`; nothing is compiled. Raises CompileError, ModelError.

    Holds for artifacts that were compiled with default options.
    """
    resolved = resolve(target)
    data, model = load_model(onnx_path)
    values = arrays(model)
    graph = for_any_level(read_values(onnx_path)[0], narrow_containers(onnx_path, data))
    program: Program
    if target.gpu:
        program = lower_cuda(fuse(graph, True), resolved.dot, gpu_of(target))
    else:
        program = lower(fuse(graph, resolved.dot.lookup != "none"), resolved.dot, 1, False, {})
    calls: dict[str, list[Call]] = {}
    for call in program.body:
        calls.setdefault(call.op, []).append(call)
    grouped = [calls.get(op.output, []) for op in program.graph.ops] + [[call] for call in program.way_out]
    known: dict[str, str] = {}  # printing TIR is slow
    shifted = {op.output for op in program.graph.ops if op.weights is not None and _shifted(op.weights, values)}
    return [
        Kernel(row["name"], row["operator"], _signature(_content(program, call, known), call.op in shifted))
        for row, same in zip(kernel_rows(program), grouped, strict=True)
        for call in same
    ]


def _shifted(weights: Weights, values: Mapping[str, np.ndarray]) -> bool:
    """Whether some weight zero point stands for another real value than the middle of the codes does."""
    middle = 0 if weights.signed else UNSIGNED_MIDDLE
    return weights.zero_point is not None and bool((values[weights.zero_point].astype(np.int64) != middle).any())


def _signature(content: str, shifted: bool) -> str:
    return sha256((content + " with weight zero points" * shifted).encode())[:DIGITS]


def _content(program: Program, call: Call, known: dict[str, str]) -> str:
    """All that decides how long a call takes. Its pointers, and the kernel's name, do not.

    On a GPU: the kernel's CUDA C++ (what it includes goes with the compiler's version), numbers, grid and block.
    """
    if isinstance(call, Launch):
        entries = program.entries if isinstance(program, CudaProgram) else ()
        named = re.compile(rf"\b{re.escape(call.kernel)}\b")
        source = [named.sub("kernel", text) for text in entries if named.search(text)]
        given = [place != NOTHING for place in call.args]
        return repr((source, given, call.numbers, call.grid, call.block))
    if call.kernel not in known:
        known[call.kernel] = str(program.kernels[call.kernel].without_attr("global_symbol").script())
    return known[call.kernel]


def fingerprint(target: Target, machine: str) -> str:
    """Hex digits of a target on a machine: instruction sets, and the processor or device that ran the code."""
    resolved = resolve(target)
    value = {"arch": target.arch, "cpu": resolved.cpu, "features": sorted(resolved.features), "machine": machine}
    value |= {"gpu": target.gpu} if target.gpu else {}
    return sha256(canonical_json(value))[:DIGITS]


def compiler_version() -> str:
    """Of everything that decides which code a kernel becomes."""
    return f"apache-tvm {version('apache-tvm')}, qdeploy {qdeploy_version()}"
