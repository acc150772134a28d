"""qdeploy-run on an emulated GPU: the processor's codes, copies that are freed, the choice of a variant, packages."""

from __future__ import annotations

import json
import platform
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdeploy.bundle.write import write_bundle
from qdeploy.client.pull import pull
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.codegen import linker
from qdeploy.compile.cuda.toolchain import find_compiler
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import CompileError
from qdeploy.export.write import qdq_bytes
from qdeploy.files import canonical_json
from qdeploy.integer import dequantize, logits, quantize
from qdeploy.ladder import read_ladder
from qdeploy.package import package
from qdeploy.qdq import arrays, parse_model
from qdeploy.serve.app import serving
from qdeploy.target import SHIPPED, load_target
from tests.compile.cuda.emulate import driver_file, emulating, real_driver
from tests.nets_frozen import ladder_of
from tests.runner.programs import Ran, program, run

DIFFERS, BAD, MACHINE = 1, 2, 3
LEVELS = ("w2", "w4")
SLOT = 3  # blocks of GPU memory that one run at a time needs: input, activations, output
NO_DEVICE, FAILED = 100, 719  # of the CUDA driver


@dataclass(frozen=True)
class Files:
    """A ladder of two levels for a T4 and for this machine's processor; shared, so copy what you change."""

    onnx: dict[str, Path]
    both: Path  # an artifact with a variant for the processor and, behind it, one for the GPU
    gpu: Path  # the latter alone
    constant: Path  # for the GPU, w4 inside
    device: Path  # pulled for the GPU at w4
    images: np.ndarray
    codes: dict[str, np.ndarray]  # what the processor computes

    @property
    def x(self) -> Path:
        return self.onnx["w2"].parent / "x.npy"


def only(artifact: Path, number: int, to: Path) -> Path:
    """An artifact with one of the variants of `artifact`."""
    shutil.copytree(artifact, to)
    head = json.loads((to / "artifact.json").read_bytes())
    variant = head["variants"][number]
    head |= {"variants": [variant], "target": variant["target"]}
    head["files"] = {variant["library"]: head["files"][variant["library"]]}
    (to / "artifact.json").write_bytes(canonical_json(head))
    return to


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    if platform.machine() != "x86_64":
        pytest.skip(f"targets/t4.toml is for x86_64, this machine is {platform.machine()}")
    program("x86_64")
    folder = tmp_path_factory.mktemp("gpu")
    onnx = {name: folder / f"{name}.onnx" for name in LEVELS}
    for path, net in zip(onnx.values(), ladder_of(7, (2, 4)), strict=True):
        path.write_bytes(qdq_bytes(net))
    host, t4 = (load_target(SHIPPED / f"{name}.toml") for name in ("host", "t4"))
    with emulating("sm_75"):
        compile_model(onnx["w2"], [host, t4], folder / "both")
        compile_model(onnx["w4"], t4, folder / "constant", options=Options(constant=True))
    gpu, processor = only(folder / "both", 1, folder / "t4"), load_artifact(only(folder / "both", 0, folder / "host"))
    write_bundle(read_ladder(list(onnx.values())), [folder / "host", gpu], folder / "tree")
    with serving(folder / "tree") as url:
        pull(url, folder / "device", level="w4", target="t4", unsigned=True)
    images = np.random.default_rng(3).random((5, *processor.input_shape[1:]), np.float32)
    np.save(folder / "x.npy", images)
    codes = {}
    for name, path in onnx.items():
        packed = processor.prepare(arrays(parse_model(path.read_bytes())))
        codes[name] = np.concatenate([processor.codes(image[None], packed) for image in images])
    assert not np.array_equal(codes["w2"], codes["w4"])
    return Files(onnx, folder / "both", gpu, folder / "constant", folder / "device", images, codes)


@dataclass(frozen=True)
class Gpu:
    """How the emulated driver is put in front of a program, and what it has counted when that has ended."""

    folder: Path

    def run(self, *words: Any, capability: int = 75, fail: str = "") -> Ran:
        """qdeploy-run on a machine with that GPU; `fail` ("cuInit=100") lets a function of the driver fail."""
        self.log.unlink(missing_ok=True)
        variables = {"LD_LIBRARY_PATH": str(self.folder), "EMULATOR_LOG": str(self.log)}
        variables |= {"EMULATOR_CAPABILITY": str(capability), "EMULATOR_FAIL": fail}
        return run(*words, environment=variables)

    @property
    def log(self) -> Path:
        return self.folder / "log.json"

    @property
    def counts(self) -> Any:
        """Blocks of GPU memory that were never freed, the most at once, and uploads of parameters."""
        return json.loads(self.log.read_bytes())


@pytest.fixture
def gpu(tmp_path: Path) -> Gpu:
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "libcuda.so.1").symlink_to(driver_file())
    return Gpu(tmp_path / "driver")


@pytest.mark.parametrize(("mode", "held"), [("swap", 2), ("in-place", 1)])
def test_climbs_and_drops_give_the_processors_codes(
    files: Files, gpu: Gpu, tmp_path: Path, mode: str, held: int
) -> None:
    args = ("--level", "w2", "--climb", "w4,w2", "--mode", mode, "--codes", "--output", tmp_path / "y.npy", "--json")
    report = gpu.run(files.device, "--input", files.x, *args).report
    assert (report["target"], report["gpu"]) == ("t4", "Emulated GPU")
    for rows, level in zip(np.load(tmp_path / "y.npy"), ("w2", "w4", "w2"), strict=True):
        assert np.array_equal(rows, files.codes[level])
    assert gpu.counts == {"held": 0, "most": SLOT + held, "uploads": 3}


def test_an_artifact_with_its_level(files: Files, gpu: Gpu, tmp_path: Path) -> None:
    expected = tmp_path / "y.npy"
    np.save(expected, files.codes["w4"])
    found = gpu.run(files.constant, "--input", files.x, "--codes", "--expect", expected)
    assert found.code == 0 and found.out.startswith("target t4 on Emulated GPU, batch 1\n"), found.error
    assert gpu.counts == {"held": 0, "most": SLOT + 1, "uploads": 1}
    np.save(expected, files.codes["w2"])
    assert gpu.run(files.constant, "--input", files.x, "--codes", "--expect", expected).code == DIFFERS
    assert gpu.run(files.constant, "--json").report["gpu"] == "Emulated GPU"
    assert gpu.counts == {"held": 0, "most": 1, "uploads": 1}


def test_profile_names_every_kernel(files: Files, gpu: Gpu) -> None:
    row = gpu.run(files.device, "--input", files.x, "--profile", "--json").report["passes"][0]
    kernels = json.loads((files.gpu / "artifact.json").read_bytes())["variants"][0]["kernels"]
    assert [k["function"] for k in row["kernels"]] == [name for k in kernels for name in k["functions"]]
    assert all(k["ms"] > 0 for k in row["kernels"]) and gpu.counts["held"] == 0


def test_the_gpus_variant_is_taken_where_there_is_one(files: Files, gpu: Gpu, tmp_path: Path) -> None:
    cases = [(75, "", True), (76, "", True), (70, "", False), (90, "", False), (75, f"cuInit={NO_DEVICE}", False)]
    for number, fail, there in cases:
        args = ("--artifact", files.both, "--input", files.x, "--codes", "--output", tmp_path / "y.npy", "--json")
        report = gpu.run(files.device, *args, capability=number, fail=fail).report
        assert (report["gpu"], report["target"]) == (("Emulated GPU", "t4") if there else (None, "host"))
        assert np.array_equal(np.load(tmp_path / "y.npy"), files.codes["w4"])
        assert gpu.counts["uploads"] == there


@pytest.mark.parametrize(
    ("number", "fail", "message"),
    [
        (90, "", "the artifact has machine code for sm_75, but Emulated GPU is sm_90: compile it for that"),
        (87, "", "the artifact has machine code for sm_75, but Emulated GPU is sm_87: compile it for that"),
        (75, f"cuInit={NO_DEVICE}", "the NVIDIA driver finds no GPU: check CUDA_VISIBLE_DEVICES"),
        (75, f"cuModuleLoadData={FAILED}", "the driver refuses code of CUDA 13.0: update it"),
        (75, f"cuMemAlloc={FAILED}", "bytes on Emulated GPU (an emulated error)"),
        (75, f"cuMemcpyHtoD={FAILED}", "the parameters cannot be copied to Emulated GPU (an emulated error)"),
        (75, f"cuGraphLaunch={FAILED}", "the GPU refuses the network (an emulated error)"),
    ],
)
def test_a_machine_that_cannot_run_it_is_one_line(
    files: Files, gpu: Gpu, tmp_path: Path, number: int, fail: str, message: str
) -> None:
    args = ("--input", files.x, "--climb", "w2", "--output", tmp_path / "y.npy")
    found = gpu.run(files.device, *args, capability=number, fail=fail)
    assert (found.code, found.error.count("\n")) == (MACHINE, 1) and message in found.error, found.error
    assert gpu.counts["held"] == 0 and not (tmp_path / "y.npy").exists()


def test_no_driver_at_all(files: Files) -> None:
    if real_driver():
        pytest.skip("this machine has an NVIDIA driver")
    found = run(files.device, "--input", files.x)
    message = (
        "error: this machine has no NVIDIA driver (libcuda.so.1): install it, or use an artifact for the processor"
    )
    assert (found.code, found.error) == (MACHINE, f"{message}\n")


def test_a_damaged_level_keeps_no_memory_of_the_gpu(files: Files, gpu: Gpu, tmp_path: Path) -> None:
    device = Path(shutil.copytree(files.device, tmp_path / "device"))
    largest = max((device / "objects").iterdir(), key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    for mode in ("swap", "in-place"):
        for cut in range(1, len(data), len(data) // 4):
            largest.write_bytes(data[:-cut])
            found = gpu.run(device, "--level", "w2", "--input", files.x, "--climb", "w4", "--mode", mode)
            assert found.code == BAD and found.error.count("\n") == 1
            assert not gpu.log.exists() or gpu.counts["held"] == 0


# --- packages --------------------------------------------------------------------------------------------------------


def unpacked(path: Path, to: Path) -> Path:
    with tarfile.open(path) as tar:
        tar.extractall(to, filter="data")
    return to / "qdeploy"


def test_a_package_for_a_gpu_tests_itself_by_the_reference(files: Files, gpu: Gpu, tmp_path: Path) -> None:
    t4 = load_target(SHIPPED / "t4.toml")
    package(files.gpu, t4, tmp_path / "p.tar.gz", model=files.onnx["w4"])
    folder = unpacked(tmp_path / "p.tar.gz", tmp_path)
    for name in ("images.npy", "expected.npy"):  # emulation takes long: not all of them
        np.save(tmp_path / name, np.load(folder / "selftest" / name)[:8])
    args = ("--artifact", folder / "artifact", "--input", tmp_path / "images.npy", "--codes", "--json")
    found = gpu.run(folder / "device", *args, "--expect", tmp_path / "expected.npy").report
    assert found["gpu"] == "Emulated GPU" and found["expect"] == {"compared": 80, "differing": 0}


def test_packages_are_for_machines_with_that_gpu(files: Files, tmp_path: Path) -> None:
    targets = [load_target(SHIPPED / f"{name}.toml") for name in ("host", "h100", "jetson-orin")]
    reasons = [
        "needs a GPU of sm_75, which host lacks",
        "is for a GPU of sm_75, h100 has sm_90",
        "jetson-orin is aarch64",
    ]
    for target, reason in zip(targets, reasons, strict=True):
        with pytest.raises(CompileError, match=reason):
            package(files.gpu, target, tmp_path / "p.tar.gz", model=files.onnx["w4"])
    assert not list(tmp_path.iterdir())


def test_a_package_for_jetson_orin(tmp_path: Path) -> None:
    orin, compiler = load_target(SHIPPED / "jetson-orin.toml"), find_compiler()
    if compiler is None or orin.gpu not in compiler.archs:
        pytest.skip("there is no CUDA compiler for sm_87: pip install 'qdeploy[cuda]'")
    try:
        linker("aarch64")
    except CompileError as e:
        pytest.skip(str(e))
    program("aarch64")
    (net,) = ladder_of(7, (4,), blocks=1)
    (tmp_path / "net.onnx").write_bytes(qdq_bytes(net))
    compile_model(tmp_path / "net.onnx", orin, tmp_path / "artifact")
    package(tmp_path / "artifact", orin, tmp_path / "p.tar.gz", model=tmp_path / "net.onnx")
    folder = unpacked(tmp_path / "p.tar.gz", tmp_path)
    for name in ("bin/qdeploy-run", "bin/libtvm_runtime.so", "artifact/lib.so"):
        assert (folder / name).read_bytes()[18:20] == (183).to_bytes(2, "little"), f"{name} is not for aarch64"
    inputs = quantize(np.load(folder / "selftest" / "images.npy"), net.activations[net.input].quantizer)
    codes = np.load(folder / "selftest" / "expected.npy")
    assert np.array_equal(dequantize(codes, net.activations[net.output].quantizer), logits(net, inputs))
    assert '[ "$(uname -m)" = aarch64 ]' in (folder / "install.sh").read_text()
