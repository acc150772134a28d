"""Artifacts on a real GPU: codes against the processor's, climbs, and times against ONNX Runtime (`make test-gpu`)."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdeploy.compile.artifact import Artifact, load_artifact
from qdeploy.compile.cuda import toolchain
from qdeploy.compile.cuda.spec import GPUS
from qdeploy.compile.pipeline import compile_model
from qdeploy.profile.latency import rounds, summary
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import LocalGpu, Target, local_gpu
from tests.compile.cuda.test_artifact import levels, network
from tests.compile.cuda.test_kernels import EXTREMES, OTHERS, conv_net
from tests.compile.test_conv import SHAPES
from tests.gpu.peers import peer
from tests.qdq_models import Net, mobile_net, quantized

EMULATED = "Emulated GPU"
ROUNDS = 21
SLOWER = 1.1  # as slow as a peer, but for noise


@pytest.fixture(scope="module")
def gpu() -> LocalGpu:
    """The GPU of this machine; skips where there is none, or nothing compiles for it."""
    found = local_gpu()
    if isinstance(found, str):
        pytest.skip(f"no GPU to test on: {found}")
    if found.name == EMULATED:
        pytest.skip("no GPU to test on: other tests of this process have loaded an emulated driver")
    compiler = toolchain.find_compiler()
    if compiler is None or found.arch not in compiler.archs or found.arch not in GPUS:
        pytest.skip(f"nothing here compiles for {found.name} ({found.arch}): {toolchain.REMEDY}")
    return found


def pair(model: ModelProto, gpu: LocalGpu, folder: Path) -> tuple[Artifact, Artifact]:
    """The model for the GPU and for the processor."""
    (folder / "m.onnx").write_bytes(canonical_bytes(model))
    arch = platform.machine()
    for name, kind, own in (("gpu", "cuda", gpu.arch), ("cpu", "llvm", "")):
        compile_model(folder / "m.onnx", Target(name, arch, kind, "host", gpu=own), folder / name, force=True)
    return load_artifact(folder / "gpu"), load_artifact(folder / "cpu")


def differing(model: ModelProto, ours: Artifact, host: Artifact, spread: float) -> int:
    """Outputs that differ, of a few images."""
    packed, theirs, count = ours.prepare(arrays(model)), host.prepare(arrays(model)), 0
    for seed in range(5):
        x = np.random.default_rng(seed).normal(0, spread, ours.input_shape).astype(np.float32)
        count += int((ours.run(x, packed) != host.run(x, theirs)).sum())
    return count


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_convolutions(i: int, gpu: LocalGpu, tmp_path: Path) -> None:
    for k, extreme in enumerate(EXTREMES):
        net = conv_net(SHAPES[i], extreme, 1 + k % 2, np.random.default_rng(i))
        model = net.model(net.last)  # type: ignore[attr-defined]
        assert differing(model, *pair(model, gpu, tmp_path), 8) == 0


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators(name: str, gpu: LocalGpu, tmp_path: Path) -> None:
    net = Net((3, 20, 4, 5))
    net.store("s2", np.float32(0.0737))
    net.store("s3", np.float32(0.0519))
    model = net.model(OTHERS[name](net))
    assert differing(model, *pair(model, gpu, tmp_path), 6) == 0


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_mobile_networks(large: bool, signed: bool, gpu: LocalGpu, tmp_path: Path) -> None:
    model = quantized(mobile_net(large), tmp_path, 13, signed)
    assert differing(model, *pair(model, gpu, tmp_path), 1) == 0


def test_a_climb_between_inferences(gpu: LocalGpu, tmp_path: Path) -> None:
    model = network()
    ours, host = pair(model, gpu, tmp_path)
    packed, theirs = ([one.prepare(values) for values in levels(model)] for one in (ours, host))
    x = np.random.default_rng(0).normal(0, 6, ours.input_shape).astype(np.float32)
    for level in (0, 1, 0, 1, 1, 0):
        assert np.array_equal(ours.run(x, packed[level]), host.run(x, theirs[level]))
    times = ours.ticks(x, packed[0])()
    assert (times > 0).all()


@pytest.mark.parametrize("large", [False, True])
def test_no_slower_than_onnx_runtime(large: bool, gpu: LocalGpu, tmp_path: Path) -> None:
    """And within a step of it: its float kernels round elsewhere."""
    model = quantized(mobile_net(large), tmp_path, 13, False, 128)
    ours, _ = pair(model, gpu, tmp_path)
    x = np.random.default_rng(0).normal(0, 1, ours.input_shape).astype(np.float32)
    provider, run, output = peer(model.SerializeToString(), x)
    packed = ours.prepare(arrays(model))
    got, want = ours.run(x, packed), output()
    step = np.unique(np.abs(got[got != 0])).min() if got.any() else 1.0
    assert np.abs(got - want).max() <= 2.01 * step
    first, second = (summary(times)["median"] for times in rounds((ours.runner(x, packed), run), ROUNDS))
    print(f"{gpu.name}, {gpu.arch}: {first:.3f} ms, {provider} {second:.3f} ms")
    assert first <= SLOWER * second, f"{first:.3f} ms on {gpu.name}, {provider} takes {second:.3f} ms"
