"""The real compilers: machine code and nothing else in an artifact, and what is said where one is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qdeploy.compile.cuda import toolchain
from qdeploy.compile.cuda.library import device_source
from qdeploy.compile.cuda.spec import gpu_of
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import CompileError, RecipeError
from qdeploy.qdq import canonical_bytes
from qdeploy.target import Target, load_target
from tests.compile.cuda.emulate import TARGETS, fake_compiler, target_for
from tests.qdq_models import Net

KERNELS = [
    "KERNEL(gemm, ConvArgs, 128, kernels::conv_gemm<1, 1, 4, 16>)",
    "KERNEL(row, ConvArgs, 128, kernels::conv_gemv<16>)",
]
CUDA_MACHINE = (190).to_bytes(2, "little")  # EM_CUDA
PRODUCTS = {"sm_75": "IMMA.8816.U8.S8", "sm_87": "IMMA.16832.U8.S8", "sm_90": "IMMA.16832.U8.S8"}


def needs_compiler() -> None:
    if toolchain.find_compiler() is None:
        pytest.skip(f"there is no CUDA compiler here: {toolchain.REMEDY}")


def disassembler() -> str | None:
    """cuobjdump of a toolkit, or of NVIDIA's package."""
    inside = [Path(folder, "nvidia", "cu13", "bin", "cuobjdump") for folder in sys.path if folder]
    return shutil.which("cuobjdump") or next((str(path) for path in inside if path.exists()), None)


@pytest.mark.parametrize("arch", PRODUCTS)
def test_kernels_are_machine_code_of_tensor_cores(arch: str, tmp_path: Path) -> None:
    needs_compiler()
    code = toolchain.cubin(device_source(KERNELS), arch)
    assert code[:4] == b"\x7fELF" and code[18:20] == CUDA_MACHINE
    assert b".text.gemm" in code and b".text.row" in code
    assert not re.search(rb"__global__|\.target sm_|\.visible \.entry|#include", code)
    tool = disassembler()
    if tool is None:
        pytest.skip("machine code was made, but there is no cuobjdump to read it: pip install nvidia-cuda-cuobjdump")
    (tmp_path / "code.cubin").write_bytes(code)
    command = [tool, "-sass", str(tmp_path / "code.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.count(PRODUCTS[arch]) >= (32 if arch == "sm_75" else 8)
    assert "LDSM" in text and "IDP.4A.U8.S8" in text


@pytest.mark.parametrize("name", ["t4", "jetson-orin"])
def test_an_artifact_holds_machine_code_and_no_source(name: str, tmp_path: Path) -> None:
    needs_compiler()
    target = load_target(TARGETS / f"{name}.toml")
    if target.arch == "aarch64" and shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("there is no aarch64-linux-gnu-g++ for the host side")
    net = Net()
    path = tmp_path / "m.onnx"
    path.write_bytes(canonical_bytes(net.model(net.q(net.node("Conv", net.q("x"), *net.weight(8, 4, 3, 3))))))
    info = compile_model(path, target, tmp_path / "artifact")
    library = (tmp_path / "artifact" / "lib.so").read_bytes()
    inner = library.find(b"\x7fELF", 4)
    assert inner > 0 and library[inner + 18 : inner + 20] == CUDA_MACHINE
    assert library[18] == (183 if target.arch == "aarch64" else 62)  # EM_AARCH64, EM_X86_64
    assert not re.search(rb"__global__|__device__|\.target sm_|\.visible \.entry", library)
    assert info["variants"][0]["target"]["gpu"] == target.gpu


# Bad input -----------------------------------------------------------------------------------------------------------


def test_no_compiler_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    with pytest.raises(CompileError, match=r"need a CUDA compiler: install it: pip install 'qdeploy\[cuda\]'"):
        gpu_of(target_for("sm_75"))


def test_an_architecture_that_the_compiler_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    found = toolchain.Compiler("/opt/nvcc", "CUDA 14.0", ("sm_80", "sm_90"))
    monkeypatch.setattr(toolchain, "find_compiler", lambda: found)
    with pytest.raises(CompileError, match="CUDA 14.0 .* makes machine code for sm_80, sm_90, not for sm_75: install"):
        gpu_of(target_for("sm_75"))


def test_architectures_without_kernels() -> None:
    with pytest.raises(CompileError, match="kernels for sm_75, .*, not for sm_120: compile for the processor"):
        gpu_of(target_for("sm_120"))
    with pytest.raises(CompileError, match="not for sm_53, which has no tensor cores for bytes and which CUDA dropped"):
        gpu_of(target_for("sm_53"))


@pytest.mark.parametrize("gpu", ["75", "sm_7", "compute_75", "sm_90a", "T4"])
def test_names_that_are_no_architecture(gpu: str) -> None:
    with pytest.raises(RecipeError, match="is no architecture: write it as in"):
        gpu_of(target_for(gpu))


@pytest.mark.parametrize("options", [Options(threads=2), Options(indices=True), Options(tune=1.0)])
def test_options_of_processors_are_refused(options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qdeploy.compile.cuda.spec.compiler_for", fake_compiler)
    with pytest.raises(CompileError, match="are for processors: leave them out for target emulated"):
        compile_model(tmp_path / "none.onnx", target_for("sm_75"), tmp_path / "artifact", options=options)


def test_kind_and_gpu_go_together() -> None:
    for kind, gpu in (("cuda", ""), ("llvm", "sm_75")):
        with pytest.raises(RecipeError, match='kind "cuda" goes with gpu'):
            Target("t", "x86_64", kind, "x86-64", gpu=gpu)


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvcc"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo "release 13.0, V13";; --list-gpu-code) echo sm_75;;\n'
        '*) echo "kernels.cu(3): error: it is broken" >&2; exit 1;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(toolchain, "nvrtc_paths", lambda: [])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert toolchain.compiler_for("sm_75") == toolchain.Compiler(str(tool), "CUDA 13.0", ("sm_75",))
    with pytest.raises(CompileError, match="nvcc failed: kernels.cu.3.: error: it is broken"):
        toolchain.cubin("", "sm_75")


def test_source_instead_of_machine_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "compiler_for", lambda arch: toolchain.Compiler("nvcc", "CUDA 13.0", (arch,)))
    monkeypatch.setattr(toolchain, "_with_nvcc", lambda *_: b"// __global__ void f();")
    with pytest.raises(CompileError, match="made no machine code for sm_75"):
        toolchain.cubin("", "sm_75")
