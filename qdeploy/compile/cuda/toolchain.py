"""CUDA C++ -> machine code: NVRTC, which pip installs, or nvcc of a CUDA toolkit. No GPU and no driver is needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qdeploy.errors import CompileError

OPTIONS = ("--std=c++17", "--fmad=false")  # a product and a sum are rounded twice, as docs/integers.md has it
NVRTC = ("libnvrtc.so.13", "libnvrtc.so.12")
REMEDY = "install it: pip install 'qdeploy[cuda]' (NVRTC, no root), or a CUDA toolkit with nvcc on the PATH"


@dataclass(frozen=True)
class Compiler:
    """One that was found: `archs` it makes machine code for, "sm_75" and so on."""

    path: str
    version: str  # "CUDA 13.0"
    archs: tuple[str, ...]


def cubin(source: str, arch: str) -> bytes:
    """An ELF file with the kernels of `source` as machine code for `arch`; raises CompileError."""
    compiler = compiler_for(arch)
    made = _with_nvcc if Path(compiler.path).name == "nvcc" else _with_nvrtc
    data = made(compiler.path, source, arch)
    if not data.startswith(b"\x7fELF") or b"__global__" in data or b".target sm_" in data:
        raise CompileError(f"{compiler.path} made no machine code for {arch}: install another CUDA compiler")
    return data


def compiler_for(arch: str) -> Compiler:
    """The CUDA compiler at hand, if it knows `arch`; raises CompileError that says how to get one."""
    found = find_compiler()
    if found is None:
        raise CompileError(f"CUDA targets need a CUDA compiler: {REMEDY}")
    if arch not in found.archs:
        known = f"{found.version} ({found.path}) makes machine code for {', '.join(found.archs)}, not for {arch}"
        raise CompileError(f"{known}: install a release that does, as pip install nvidia-cuda-nvrtc-cu12")
    return found


def find_compiler() -> Compiler | None:
    """NVRTC of a Python package, else nvcc, else NVRTC of the system; None where there is none."""
    for path in nvrtc_paths():
        if path.is_file():
            return _describe_nvrtc(str(path))
    if nvcc := shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    ):
        return _describe_nvcc(nvcc)
    for name in NVRTC:
        try:
            return _describe_nvrtc(name)
        except OSError:
            continue
    return None


def nvrtc_paths() -> list[Path]:
    """Where NVIDIA's Python packages keep NVRTC, newest first."""
    folders = [Path(folder, "nvidia") for folder in sys.path if folder]
    inside = ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12")
    return [folder / name for name in inside for folder in folders]


# nvcc ----------------------------------------------------------------------------------------------------------------


@cache
def _describe_nvcc(path: str) -> Compiler:
    codes = _nvcc([path, "--list-gpu-code"]).split()
    release = _nvcc([path, "--version"]).partition("release ")[2].partition(",")[0]
    return Compiler(path, f"CUDA {release}", tuple(code for code in codes if code.startswith("sm_")))


def _nvcc(command: Sequence[str]) -> str:
    """Its output; raises CompileError with the first line that tells."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise CompileError(f"{command[0]} cannot run ({e}): {REMEDY}") from e
    if done.returncode:
        raise CompileError(f"{command[0]} failed: {telling(done.stderr or done.stdout)}")
    return done.stdout


def telling(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it says nothing")


def _with_nvcc(path: str, source: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        inside, out = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        inside.write_text(source)
        _nvcc([path, "-cubin", f"-arch={arch}", *OPTIONS, "-o", str(out), str(inside)])
        return out.read_bytes()


# NVRTC ---------------------------------------------------------------------------------------------------------------


def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


@cache
def _describe_nvrtc(path: str) -> Compiler:
    library = _library(path)
    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(numbers)
    return Compiler(path, f"CUDA {major.value}.{minor.value}", tuple(f"sm_{number}" for number in numbers))


def _with_nvrtc(path: str, source: str, arch: str) -> bytes:
    library, program = _library(path), ctypes.c_void_p()
    options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS)]
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    if created:
        raise CompileError(f"{path} failed: {library.nvrtcGetErrorString(created).decode()}")
    try:
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise CompileError(f"{path} failed: {telling(log.rstrip(bytes(1)).decode(errors='replace'))}")
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    """A result of a program, by the pair of functions that give its size and its bytes."""
    count = ctypes.c_size_t()
    if code := size(program, ctypes.byref(count)):
        raise CompileError(f"NVRTC has no result (error {code}): install another release of it")
    buffer = ctypes.create_string_buffer(count.value)
    if code := get(program, buffer):
        raise CompileError(f"NVRTC has no result (error {code}): install another release of it")
    return buffer.raw
