"""CUDA artifacts without a GPU: kernels compiled for the host, and a driver that runs them thread by thread.

`libcuda.so.1` is found by its name among the libraries that a process has loaded, so the artifact's own host side,
machine code apart, is what runs here: packing, uploads, graphs, float regions, errors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdeploy.compile.artifact import Artifact, load_artifact
from qdeploy.compile.codegen import linker
from qdeploy.compile.cuda import library, spec, toolchain
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import Target

HERE = Path(__file__).parent / "emulator"
TARGETS = Path(__file__).parents[3] / "targets"
FOLDER = tempfile.TemporaryDirectory(prefix="qdeploy-emulated-")
OPTIONS = ["-std=c++17", "-O0", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]


def compiled(source: str, name: str, *options: str) -> Path:
    """A shared library of C++ text, made once for a text."""
    digest = hashlib.sha256("\0".join([source, *options]).encode()).hexdigest()[:16]
    out = Path(FOLDER.name, f"{name}-{digest}.so")
    if not out.exists():
        text = out.with_suffix(".cc")
        text.write_text(source)
        subprocess.run([linker(), *OPTIONS, *options, "-o", str(out), str(text)], check=True)
    return out


def real_driver() -> bool:
    """Whether libcuda.so.1 is installed here."""
    code = "import ctypes; ctypes.CDLL('libcuda.so.1')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def driver_file() -> Path:
    """The emulated libcuda.so.1 for other processes, under another name."""
    return compiled((HERE / "driver.cc").read_text(), "libcuda", "-Wl,-soname,libcuda.so.1")


@functools.cache
def driver() -> ctypes.CDLL:
    """The emulated libcuda.so.1, from now on the one of this process; skips where there is a real one."""
    if real_driver():
        pytest.skip("this machine has an NVIDIA driver, for which the emulated one cannot stand in: make test-gpu")
    return ctypes.CDLL(str(driver_file()), ctypes.RTLD_GLOBAL)


def fake_compiler(arch: str) -> toolchain.Compiler:
    """One that knows every GPU of the table."""
    return toolchain.Compiler("none", "CUDA 13.0", tuple(spec.GPUS))


@contextmanager
def emulating(arch: str) -> Iterator[None]:
    """Inside, compiled models carry the path of emulated kernels in place of machine code."""
    driver().emulator_capability(int(arch.removeprefix("sm_")))
    ptx = f"#define __CUDA_ARCH__ {arch.removeprefix('sm_')}0\n" + (HERE / "ptx.cuh").read_text()

    def cubin(source: str, arch: str) -> bytes:
        begin = source.index("namespace kernels {")
        path = compiled(f"{ptx}\n{source[begin:]}", "kernels", f"-I{HERE}")
        return str(path).encode() + b"\0"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "cubin", cubin)
        patch.setattr(library, "compiler_for", fake_compiler)
        patch.setattr(spec, "compiler_for", fake_compiler)
        yield


def target_for(arch: str) -> Target:
    """A target for a GPU of `arch` in this machine."""
    return Target("emulated", platform.machine(), "cuda", "host", gpu=arch)


def emulated(model: ModelProto, folder: Path, arch: str = "sm_75", options: Options | None = None) -> Artifact:
    """`model` compiled and loaded."""
    path = folder / "model.onnx"
    path.write_bytes(canonical_bytes(model))
    with emulating(arch):
        compile_model(path, target_for(arch), folder / "artifact", force=True, options=options)
    return load_artifact(folder / "artifact")


def differences(model: ModelProto, artifact: Artifact, x: np.ndarray) -> int:
    """How many outputs, real ones and codes, are not those of the reference."""
    values = arrays(model)
    evaluator, packed = Evaluator(read_graph(model, None), values), artifact.prepare(values)
    real, codes = evaluator.output(x)
    found = int((artifact.run(x, packed) != real).sum())
    if artifact.description["outputs"][0]["codes"]:
        found += int((artifact.codes(x, packed) != codes).sum())
    return found
