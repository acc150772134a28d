"""ARM code without an ARM: libraries under qemu-user, called like those of this machine (tests/compile/kernels.py)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import tirx

from qdeploy.compile.artifact import read_description
from qdeploy.compile.codegen import ENTRY_PHASES, PHASES, linker
from qdeploy.compile.kernels.emit import on_pointers
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.errors import CompileError
from qdeploy.target import SHIPPED, load_target
from tests.compile.kernels import library_of

# target -> qemu's processor; version 7.2 has i8mm in `max` alone
TARGETS = {"raspberry-pi-4": "cortex-a72", "raspberry-pi-5": "cortex-a76", "neoverse-v1": "max"}
DTYPES = {"i": 0, "u": 1, "f": 2}  # numpy's kind -> DLPack's code


@functools.cache
def tools() -> tuple[str, Path, str]:
    """The emulator, the root of the emulated system's libraries, and the program that calls libraries."""
    emulator = next((found for name in ("qemu-aarch64-static", "qemu-aarch64") if (found := shutil.which(name))), None)
    if emulator is None:
        pytest.skip("there is no qemu-aarch64-static: apt install qemu-user-static")
    try:
        compiler = linker("aarch64")
    except CompileError as e:
        pytest.skip(str(e))
    library = subprocess.run([compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True)
    root = Path(library.stdout.strip()).resolve().parents[1]
    program = Path(tempfile.mkdtemp(prefix="qdeploy-arm-")) / "emulated"
    command = [compiler, "-w", "-x", "c", "-std=gnu17", "-O1", str(Path(__file__).parent / "emulated.c")]
    subprocess.run([*command, "-o", str(program), "-rdynamic", "-ldl", "-lm"], check=True)
    return emulator, root, str(program)


def target_of(name: str) -> Resolved:
    """A shipped target of TARGETS; skips the test where it cannot be built or emulated."""
    tools()
    return resolve(load_target(SHIPPED / f"{name}.toml"))


class Emulated:
    """A library in an emulated process. Functions are called by name on tensors (TVM's or numpy's) and numbers.

    A list of arrays arrives as the addresses of its elements.
    """

    def __init__(self, path: Path, cpu: str) -> None:
        emulator, root, program = tools()
        self.folder = tempfile.TemporaryDirectory()
        own = Path(self.folder.name) / "lib.so"
        shutil.copy(path, own)
        command = [emulator, "-cpu", cpu, "-L", str(root), program, str(own)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __del__(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.folder.cleanup()

    def __getitem__(self, name: str) -> Callable[..., None]:
        return functools.partial(self._call, name)

    def _call(self, name: str, *args: Any) -> None:
        arrays = [arg if isinstance(arg, int | list) else np.from_dlpack(arg) for arg in args]
        message = [word(len(name)), name.encode(), word(len(args))]
        for array in arrays:
            if isinstance(array, int):
                message += [word(-1), word(array)]
            elif isinstance(array, list):
                message += [word(-2), word(len(array))]
                message += [part for one in array for part in (word(one.nbytes), one.tobytes())]
            else:
                kind = DTYPES[array.dtype.kind] | 8 * array.dtype.itemsize << 8
                message += [word(array.nbytes), array.tobytes(), word(array.ndim), *map(word, array.shape), word(kind)]
        into, out = self.process.stdin, self.process.stdout
        assert into is not None and out is not None
        into.write(b"".join(message))
        into.flush()
        code = out.read(8)
        if len(code) < 8:
            raise RuntimeError(f"{name} ended the process, code {self.process.wait()}")
        for array in arrays:
            if isinstance(array, np.ndarray):
                data = out.read(array.nbytes)
                ctypes.memmove(array.ctypes.data, data, len(data))
        if int.from_bytes(code, "little", signed=True) != 0:
            raise RuntimeError(f"{name} failed")


class EmulatedArtifact:
    """The first variant of an artifact folder, its entry functions called as qdeploy.compile.artifact does."""

    def __init__(self, folder: Path, cpu: str) -> None:
        self.head = read_description(folder)
        self.variant = self.head["variants"][0]
        self.library = Emulated(folder / self.variant["library"], cpu)

    def prepare(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """uint8, one level's packed parameters."""
        packed = np.zeros(self.variant["packed_bytes"], np.uint8)
        values = [np.ascontiguousarray(params[row["name"]]) for row in self.head["params"]]
        self.library["__tvm_ffi_prepare"](values, packed)
        return packed

    def run(self, x: np.ndarray, packed: np.ndarray, function: str = "main") -> np.ndarray:
        """Outputs of `main`, or of `codes`."""
        output = self.head["outputs"][0]
        arena = np.zeros(self.variant["arena_bytes"], np.uint8)
        out = np.zeros(output["shape"], output["codes"] if function == "codes" else "float32")
        self.library[f"__tvm_ffi_{function}"](x, packed, arena, out)
        return out


def word(value: int) -> bytes:
    """int64"""
    return int(value).to_bytes(8, "little", signed=True)


def emulated(target: Any) -> Callable[[Path], Emulated]:
    """What loads a library for `target`, a tvm.target.Target of one of TARGETS."""
    cpu = str(target.attrs["mcpu"])
    return functools.partial(Emulated, cpu=cpu if cpu in TARGETS.values() else "max")


def built(functions: Mapping[str, tirx.PrimFunc], target: Any) -> Emulated:
    """An emulated library of kernels; `target`: tvm.target.Target of one of TARGETS."""
    return library_of({name: on_pointers(f) for name, f in functions.items()}, PHASES, target, emulated(target))


def exported(functions: Mapping[str, tirx.PrimFunc], target: Any) -> Emulated:
    """The same by TVM's calling convention; names begin with __tvm_ffi_."""
    return library_of(functions, ENTRY_PHASES, target, emulated(target))


def disassembly(path: Path) -> str:
    """Instructions of a library, one a line; skips the test where no tool for it is here."""
    tool = shutil.which(linker("aarch64").removesuffix("g++") + "objdump")
    if tool is None:
        pytest.skip("there is no aarch64-linux-gnu-objdump: apt install binutils-aarch64-linux-gnu")
    command = [tool, "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
