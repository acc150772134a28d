"""Kernels by themselves: compiled as the pipeline does, exported one by one."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx

from qdeploy.compile.codegen import ENTRY_PHASES, PHASES, Phase, arch_of, link, linker, write_object
from qdeploy.compile.kernels.emit import on_pointers
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


class Kernels:
    """Kernels of a library by name, called as `main` calls them: on raw pointers, here those of tensors."""

    def __init__(self, path: Path) -> None:
        self.module = tvm.runtime.load_module(str(path))  # gives kernels that start threads what they call
        self.library = ctypes.CDLL(str(path))

    def __getitem__(self, name: str) -> Callable[..., None]:
        function = self.library[name]

        def call(*args: Any) -> None:
            places = [arg if isinstance(arg, int) else np.from_dlpack(arg).ctypes.data for arg in args]
            sized = [
                ctypes.c_int(p) if isinstance(a, int) else ctypes.c_void_p(p) for a, p in zip(args, places, strict=True)
            ]
            if function(*sized) != 0:
                raise RuntimeError(f"{name} failed")

        return call


def library_of(functions: Mapping[str, tirx.PrimFunc], phases: Sequence[Phase], target: Any, load: Callable) -> Any:
    """`load` of the path of a linked library."""
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder) / "kernels.o", Path(folder) / "lib.so"
        write_object(functions, phases, target, path, None)
        link(linker(arch_of(target)), [path], "00", library)
        return load(library)


def built(functions: Mapping[str, tirx.PrimFunc], target: Any) -> Kernels:
    """A loaded library of kernels; `target`: tvm.target.Target."""
    return library_of({name: on_pointers(f) for name, f in functions.items()}, PHASES, target, Kernels)


def exported(functions: Mapping[str, tirx.PrimFunc], target: Any) -> tvm.runtime.Module:
    """The same by TVM's calling convention, which checks arguments and has messages, and takes as long again."""
    return library_of(functions, ENTRY_PHASES, target, lambda path: tvm.runtime.load_module(str(path)))
