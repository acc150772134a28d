"""What a compiled kernel is, by content: two kernels with one signature are the same code, whatever network calls them.

A signature hashes a kernel's TIR. That holds its shapes, layouts, borders, register tile, and what was fused into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qdeploy.compile.fuse import fuse
from qdeploy.compile.llvm import resolve
from qdeploy.compile.lower import lower
from qdeploy.compile.pipeline import kernel_rows, qdeploy_version
from qdeploy.errors import CompileError
from qdeploy.files import canonical_json, sha256
from qdeploy.profile.bitops import read_values
from qdeploy.target import Target

DIGITS = 16


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
    if target.gpu:
        raise CompileError(f"target {target.name} computes on a GPU: kernels are told apart on processors only")
    graph, _ = read_values(onnx_path)
    program = lower(fuse(graph, resolved.dot.lookup != "none"), resolved.dot, 1, False, {})
    known: dict[str, str] = {}
    found = []
    for row in kernel_rows(program):
        for name in row["functions"]:
            if name not in known:
                text = str(program.kernels[name].without_attr("global_symbol").script())
                known[name] = sha256(text.encode())[:DIGITS]
            found.append(Kernel(row["name"], row["operator"], known[name]))
    return found


def fingerprint(target: Target, machine: str) -> str:
    """Hex digits of a target on a machine: instruction sets, and the processor or device that ran the code."""
    resolved = resolve(target)
    value = {"arch": target.arch, "cpu": resolved.cpu, "features": sorted(resolved.features), "machine": machine}
    return sha256(canonical_json(value))[:DIGITS]


def compiler_version() -> str:
    """Of everything that decides which code a kernel becomes."""
    return f"apache-tvm {version('apache-tvm')}, qdeploy {qdeploy_version()}"
