"""Whole artifacts for GPUs on an emulated driver: packing, one upload a climb, float regions, threads, every error."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdeploy.client.artifact import unsuited
from qdeploy.compile.artifact import Artifact, load_artifact
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import DeviceError
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import LocalGpu, Target, local_gpu
from tests.compile.cuda.emulate import differences, driver, emulated, real_driver
from tests.qdq_models import Net

NO_DEVICE, OUT_OF_MEMORY, BAD_IMAGE, FAILED = 100, 2, 200, 719  # of the CUDA driver


def network(batch: int = 1) -> ModelProto:
    """A residual network with a table, a depthwise layer, a product and a float region in its middle."""
    net = Net((batch, 4, 8, 9))
    x = net.q(net.node("HardSwish", net.q(net.node("Conv", net.q("x"), *net.weight(12, 4, 3, 3), pads=[1] * 4))))
    y = net.q(net.node("Conv", x, *net.weight(12, 1, 3, 3), pads=[1] * 4, group=12))
    x = net.q(net.node("Add", x, y))
    x = net.q(net.node("LogSoftmax", x, axis=1))
    gate = net.q(net.node("HardSigmoid", net.q(net.node("GlobalAveragePool", x))))
    x = net.q(net.node("Conv", net.q(net.node("Mul", x, gate)), *net.weight(20, 12, 3, 3), strides=[2, 2]))
    x = net.q(net.node("Flatten", net.q(net.node("MaxPool", x, kernel_shape=[2, 2]))))
    return net.model(net.q(net.node("Gemm", x, *net.weight(120, 5, axis=1))), 2, 14)


def levels(model: ModelProto) -> list[dict[str, np.ndarray]]:
    """The file's own parameters, and others with its shapes."""
    values = arrays(model)
    other = {n: a[::-1].copy() if a.dtype == np.int8 and a.ndim > 1 else a for n, a in values.items()}
    return [values, other]


def images(artifact: Artifact, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 6, artifact.input_shape).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return network()


@pytest.fixture(scope="module")
def folder(model: ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact for a GPU, with its constants, and one for the processor beside it."""
    folder = tmp_path_factory.mktemp("cuda")
    driver().emulator_fail(b"cuInit", NO_DEVICE)  # compiling and packing need no GPU
    try:
        emulated_compile(model, folder)
    finally:
        driver().emulator_heal()
    compile_model(folder / "model.onnx", Target("host", platform.machine(), "llvm", "host"), folder / "host")
    return folder


def emulated_compile(model: ModelProto, folder: Path) -> None:
    with pytest.raises(DeviceError, match="finds no GPU"):  # loading it does
        emulated(model, folder, "sm_87", Options(constant=True))


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    driver().emulator_capability(87)
    return load_artifact(folder / "artifact")


def test_outputs_and_codes_are_those_of_the_processor(folder: Path, artifact: Artifact, model: ModelProto) -> None:
    host = load_artifact(folder / "host")
    for values in levels(model):
        packed, theirs = artifact.prepare(values), host.prepare(values)
        for seed in range(3):
            x = images(artifact, seed)
            assert np.array_equal(artifact.run(x, packed), host.run(x, theirs))
            assert np.array_equal(artifact.codes(x, packed), host.codes(x, theirs))
    assert np.array_equal(artifact.run(images(artifact)), host.run(images(artifact), host.prepare(arrays(model))))


def test_batches_equal_the_reference(tmp_path: Path) -> None:
    net = Net((3, 4, 7, 6))
    x = net.q(net.node("Conv", net.q("x"), *net.weight(20, 4, 3, 3), pads=[1] * 4))
    x = net.q(net.node("Concat", x, net.q(net.node("Relu", net.q("x"))), axis=1))
    model = net.model(net.q(net.node("Conv", x, *net.weight(9, 24, 1, 1))))
    artifact = emulated(model, tmp_path)
    assert differences(model, artifact, images(artifact)) == 0


def test_a_climb_is_one_upload_and_a_swap_none(artifact: Artifact, model: ModelProto) -> None:
    gpu, (low, high) = driver(), levels(model)
    first = artifact.prepare(low)
    want = artifact.run(images(artifact), first)
    uploads, held = gpu.emulator_calls(b"cuMemcpyHtoD"), gpu.emulator_allocations()
    second = artifact.prepare(high)
    assert gpu.emulator_calls(b"cuMemcpyHtoD") == uploads + 1
    assert gpu.emulator_allocations() == held + 1
    other = artifact.run(images(artifact), second)
    assert not np.array_equal(other, want)
    assert np.array_equal(artifact.run(images(artifact), first), want)
    assert np.array_equal(artifact.run(images(artifact), second), other)
    recorded = gpu.emulator_calls(b"cuStreamBeginCapture")
    assert np.array_equal(artifact.run(images(artifact), second), other)
    assert gpu.emulator_calls(b"cuStreamBeginCapture") == recorded
    assert gpu.emulator_calls(b"cuMemcpyHtoD") == uploads + 1
    del second
    assert gpu.emulator_allocations() == held


def test_threads_share_an_artifact(artifact: Artifact, model: ModelProto) -> None:
    packed = [artifact.prepare(values) for values in levels(model)]
    want = [artifact.run(images(artifact, i), packed[i % 2]) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(3):
            if not np.array_equal(artifact.run(images(artifact, i), packed[i % 2]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_profile_times_every_kernel(artifact: Artifact, model: ModelProto) -> None:
    times = artifact.ticks(images(artifact), artifact.prepare(arrays(model)))()
    rows = artifact.description["kernels"]
    assert len(times) == sum(len(row["functions"]) for row in rows) and (times > 0).all()


def test_what_is_in_the_description(artifact: Artifact) -> None:
    target, rows = artifact.description["target"], artifact.description["kernels"]
    assert (target["kind"], target["gpu"], target["dot"]) == ("cuda", "sm_87", "mma.u8.s8")
    functions = {name for row in rows for name in row["functions"]}
    assert {"conv_depthwise", "mean", "mul", "quantize", "dequantize"} <= functions
    assert any(name.startswith("conv_gemm") for name in functions)
    floats = [row for row in rows if row["operator"] == "float"]
    assert floats and all(node["reason"] for row in floats for node in row["nodes"])


@pytest.mark.parametrize(
    ("function", "result", "message"),
    [
        ("cuInit", NO_DEVICE, "the NVIDIA driver finds no GPU"),
        ("cuInit", 3, "the NVIDIA driver does not start .an emulated error"),
        ("cuModuleLoadData", BAD_IMAGE, "the driver refuses code of CUDA 13.0: update it, or compile"),
    ],
)
def test_a_machine_that_cannot_run_it(folder: Path, function: str, result: int, message: str) -> None:
    gpu = driver()
    gpu.emulator_capability(87)
    gpu.emulator_fail(function.encode(), result)
    try:
        with pytest.raises(DeviceError, match=message):
            load_artifact(folder / "artifact")
    finally:
        gpu.emulator_heal()


@pytest.mark.parametrize("number", [75, 86, 90])
def test_another_gpu_is_named(folder: Path, number: int) -> None:
    gpu = driver()
    gpu.emulator_capability(number)
    try:
        with pytest.raises(DeviceError, match=f"code for sm_87, but Emulated GPU is sm_{number}: compile it for that"):
            load_artifact(folder / "artifact")
    finally:
        gpu.emulator_capability(87)


@pytest.mark.parametrize(
    ("function", "result", "message"),
    [
        ("cuMemcpyHtoD", FAILED, "the parameters cannot be copied to Emulated GPU"),
        ("cuMemAlloc", OUT_OF_MEMORY, "no room for [0-9]+ bytes on Emulated GPU"),
    ],
)
def test_a_failed_upload_leaves_the_old_level(
    artifact: Artifact, model: ModelProto, function: str, result: int, message: str
) -> None:
    gpu, packed = driver(), artifact.prepare(arrays(model))
    want, held = artifact.run(images(artifact), packed), gpu.emulator_allocations()
    gpu.emulator_fail(function.encode(), result)
    try:
        with pytest.raises(DeviceError, match=message):
            artifact.prepare(levels(model)[1])
    finally:
        gpu.emulator_heal()
    assert gpu.emulator_allocations() == held
    assert np.array_equal(artifact.run(images(artifact), packed), want)


@pytest.mark.parametrize("function", ["cuGraphLaunch", "cuStreamSynchronize"])
def test_a_failed_run_is_one_line_and_the_next_one_runs(artifact: Artifact, model: ModelProto, function: str) -> None:
    gpu, packed = driver(), artifact.prepare(arrays(model))
    want = artifact.run(images(artifact), packed)
    gpu.emulator_fail(function.encode(), FAILED)
    try:
        with pytest.raises(DeviceError, match="the GPU (refuses the network|failed) .an emulated error.$"):
            artifact.run(images(artifact), packed)
    finally:
        gpu.emulator_heal()
    assert np.array_equal(artifact.run(images(artifact), packed), want)


def test_parameters_that_were_not_uploaded(artifact: Artifact, model: ModelProto) -> None:
    with pytest.raises(DeviceError, match="not on the GPU: upload them first"):
        artifact.run(images(artifact), artifact.pack(arrays(model)))


def test_no_driver_at_all(folder: Path) -> None:
    if real_driver():
        pytest.skip("this machine has an NVIDIA driver")
    code = f"from qdeploy.compile.artifact import load_artifact; load_artifact({str(folder / 'artifact')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DeviceError: this machine has no NVIDIA driver (libcuda.so.1): install it" in done.stderr


def test_equal_input_gives_equal_bytes(folder: Path, model: ModelProto, tmp_path: Path) -> None:
    driver().emulator_capability(87)
    emulated(model, tmp_path, "sm_87", Options(constant=True))
    for name in ("artifact.json", "lib.so", "packed.bin"):
        assert (tmp_path / "artifact" / name).read_bytes() == (folder / "artifact" / name).read_bytes()
    assert canonical_bytes(model) == (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("number", "arch", "runs"),
    [(75, "sm_75", True), (86, "sm_80", True), (80, "sm_86", False), (87, "sm_80", False), (89, "sm_87", False),
     (87, "sm_87", True), (90, "sm_89", False), (90, "sm_9x", False)],
)  # fmt: skip
def test_which_machine_code_a_gpu_takes(number: int, arch: str, runs: bool) -> None:
    gpu = driver()
    gpu.emulator_capability(number)
    try:
        assert local_gpu() == LocalGpu("Emulated GPU", f"sm_{number}", 1, "13.0")
        target = {"arch": platform.machine(), "features": [], "gpu": arch}
        why = unsuited(target)
        assert why is None if runs else why and f"sm_{number}" in why and arch in why
    finally:
        gpu.emulator_capability(87)
