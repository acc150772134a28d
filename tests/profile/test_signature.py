"""Signatures of kernels: one for each call that is timed, equal for equal code; on processors and an emulated GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper

from qdeploy.compile.artifact import Artifact, load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.profile.signature import Kernel, fingerprint, signatures
from qdeploy.profile.timing import timed
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import SHIPPED, Target, load_target
from tests.compile.cuda.emulate import emulated, emulating, target_for
from tests.qdq_models import Net

HOST = load_target(SHIPPED / "host.toml")
GPU = target_for("sm_75")
ANY = 1000.0  # tests run on machines of any noise


def network(size: int, blocks: int) -> ModelProto:
    """`blocks` convolutions of one shape behind a stem."""
    net = Net((1, 4, size, size))
    x = net.q(net.node("HardSwish", net.q(net.node("Conv", net.q("x"), *net.weight(16, 4, 3, 3), pads=[1] * 4))))
    for _ in range(blocks):
        x = net.q(net.node("Conv", x, *net.weight(16, 16, 3, 3), pads=[1] * 4))
    return net.model(net.q(net.node("GlobalAveragePool", x)), 4, 14)


def kernels_of(model: ModelProto, folder: Path, target: Target) -> list[Kernel]:
    (folder / "m.onnx").write_bytes(canonical_bytes(model))
    if not target.gpu:
        return signatures(folder / "m.onnx", target)
    with emulating(target.gpu):
        return signatures(folder / "m.onnx", target)


def artifact_of(model: ModelProto, folder: Path, target: Target) -> Artifact:
    if target.gpu:
        return emulated(model, folder, target.gpu)
    (folder / "model.onnx").write_bytes(canonical_bytes(model))
    compile_model(folder / "model.onnx", target, folder / "artifact")
    return load_artifact(folder / "artifact")


@pytest.mark.parametrize("target", [HOST, GPU], ids=["processor", "gpu"])
def test_equal_code_has_one_signature(target: Target, tmp_path: Path) -> None:
    two, four = (kernels_of(network(8, blocks), tmp_path, target) for blocks in (2, 4))
    convolutions = [kernel.signature for kernel in four if kernel.operator == "conv"]
    # the last one's neighbour is not a convolution: on a processor it leaves no border for one
    assert len(convolutions) == 5 and len(set(convolutions[1:-1])) == 1 and convolutions[0] != convolutions[1]
    assert {kernel.signature for kernel in two} == {kernel.signature for kernel in four}
    larger = kernels_of(network(10, 2), tmp_path, target)
    assert [kernel.operator for kernel in larger] == [kernel.operator for kernel in two]
    assert all(a.signature != b.signature for a, b in zip(larger, two, strict=True) if a.operator == "conv")


def test_weights_with_a_zero_point_have_a_signature_of_their_own(tmp_path: Path) -> None:
    """Kernels find out at run time that they must sum their inputs."""
    model = network(8, 2)
    before = kernels_of(model, tmp_path, HOST)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {name for name, tensor in held.items() if len(tensor.dims) == 4}  # noqa: PLR2004
    zero = next(held[node.input[2]] for node in model.graph.node if node.input[0] in weights)
    zero.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero) + np.int8(3), zero.name))
    after = kernels_of(model, tmp_path, HOST)
    changed = [(a.layer, a.operator) for a, b in zip(before, after, strict=True) if a.signature != b.signature]
    assert changed and {operator for _, operator in changed} == {"conv"}


@pytest.mark.parametrize("target", [HOST, GPU], ids=["processor", "gpu"])
def test_what_is_timed_has_a_signature_each(target: Target, tmp_path: Path) -> None:
    model = network(6, 1)
    artifact = artifact_of(model, tmp_path, target)
    found, kernels = timed(artifact, arrays(model), ANY), kernels_of(model, tmp_path, target)
    rows = [row for row in artifact.description["kernels"] for _ in row["functions"]]
    assert [(row["name"], row["operator"]) for row in rows] == [(k.layer, k.operator) for k in kernels]
    assert len(found["kernels"]) == len(kernels) and np.all(np.diff(found["kernels"], axis=1) >= 0)
    assert (found["machine"] == "Emulated GPU") == bool(target.gpu)


def test_a_fingerprint_is_of_target_and_machine() -> None:
    others = [load_target(SHIPPED / f"{name}.toml") for name in ("x86-64", "x86-64-avx512", "raspberry-pi-5")]
    gpus = [Target("a", "x86_64", "cuda", "x86-64", gpu=gpu) for gpu in ("sm_75", "sm_87")]
    found = [fingerprint(target, "m") for target in [*others, *gpus]] + [fingerprint(others[0], "n")]
    assert len(set(found)) == len(found)
    assert fingerprint(replace(others[0], name="other", description="text", device="farm:1/key"), "m") == found[0]
