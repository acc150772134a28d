"""Kernels by themselves: compiled as the pipeline does, exported one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import tirx

from qdeploy.compile.codegen import ENTRY_PHASES, link, linker, write_object
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.target import Target, missing_features, request_tiles

CPUS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vpdpbusd": ("x86-64-v4", ("avx512vnni",)),
    "pmaddwd512": ("x86-64-v4", ()),
    "vpdpbusd256": ("x86-64-v3", ("avxvnni",)),
    "pmaddwd": ("x86-64-v3", ()),
    "portable": ("x86-64", ()),
    "amx": ("x86-64-v4", ("avx512vnni", "amx-tile", "amx-int8")),
}


def target_of(name: str) -> Resolved:
    """A target of CPUS; skips the test on a machine that cannot run it."""
    cpu, features = CPUS[name]
    resolved = resolve(Target("test", "x86_64", "llvm", cpu, features))
    if lacking := missing_features(resolved.features):
        pytest.skip(f"this machine has no {', '.join(lacking)}")
    if resolved.dot.tiles and not request_tiles():
        pytest.skip("the kernel of this machine does not give tiles")
    return resolved


def built(functions: Mapping[str, tirx.PrimFunc], target: Any) -> tvm.runtime.Module:
    """A loaded library of `functions`, called on tensors; `target`: tvm.target.Target."""
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder) / "kernels.o", Path(folder) / "lib.so"
        write_object(functions, ENTRY_PHASES, target, path, None)
        link(linker(), [path], "00", library)
        return tvm.runtime.load_module(str(library))
