"""Whole models for ARM: bit for bit what x86 computes, with the instructions that they are for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.codegen import linker
from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import CompileError, DeviceError
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import SHIPPED, load_target
from tests.compile import arm, test_fuse, test_models
from tests.qdq_models import Net

# what each target's dense and depthwise kernels are made of
PROOF = {
    "raspberry-pi-4": {"smull", "smlal", "sadalp"},
    "raspberry-pi-5": {"sdot"},
    "neoverse-v1": {"usmmla", "usdot", "sudot"},
}
FORBIDDEN = {"raspberry-pi-4": {"sdot", "usmmla"}, "raspberry-pi-5": {"usmmla", "usdot"}, "neoverse-v1": {"smull"}}


def batch_of_odd_sizes(net: Net) -> str:
    """Strides, dilation, groups, uneven padding, channels that fill no vector; depthwise and fully connected layers."""
    x = net.q(test_models.conv(net, net.q("x"), 18, 5, 3, 3, pads=[0, 1, 2, 0], strides=[2, 1]))
    x = net.q(test_models.conv(net, x, 18, 1, 3, 3, group=18, pads=[1, 1, 1, 1]))
    x = net.q(test_models.conv(net, x, 18, 1, 3, 3, group=18, pads=[2, 2, 2, 2], dilations=[2, 2]))
    x = net.q(test_models.conv(net, x, 33, 6, 3, 2, group=3, dilations=[1, 2]))
    x = net.q(net.node("GlobalAveragePool", net.q(test_models.conv(net, x, 7, 33, 1, 1))))
    return net.q(net.node("Gemm", net.node("Flatten", x), *net.weight(7, 13, axis=1)))


def model_of(name: str) -> ModelProto:
    if name == "odd batch":
        net = Net((3, 5, 9, 8))
        return net.model(batch_of_odd_sizes(net), 2)
    if name in test_fuse.NETS:
        return test_fuse.model_of(name, np.int8 if name == "residual" else np.uint8)[1]
    return test_models.made(name)[0]


Built = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """(model, target) -> artifact folder, made once."""
    arm.tools()
    folder = tmp_path_factory.mktemp("models")

    @cache
    def made(model: str, target: str) -> Path:
        path, out = folder / f"{model}.onnx", folder / f"{model} {target}"
        path.write_bytes(canonical_bytes(model_of(model)))
        compile_model(path, load_target(SHIPPED / f"{target}.toml"), out)
        return out

    return made


CASES = [("odd batch", name) for name in arm.TARGETS]
CASES += [("chains", "raspberry-pi-4"), ("chains", "neoverse-v1"), ("residual", "raspberry-pi-5")]
CASES += [(model, "raspberry-pi-4") for model in ("read twice", "tokens", "parts")]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_arm_computes_what_x86_does(model: str, name: str, artifact_of: Built) -> None:
    here = load_artifact(artifact_of(model, "x86-64"))
    there = arm.EmulatedArtifact(artifact_of(model, name), arm.TARGETS[name])
    params = arrays(model_of(model))
    packed, sent = here.prepare(params), there.prepare(params)
    rng = np.random.default_rng(0)
    for spread in (1, 4, 1e9):
        x = rng.normal(0, spread, here.input_shape).astype(np.float32)
        np.testing.assert_array_equal(there.run(x, sent), here.run(x, packed))
        if there.head["outputs"][0]["codes"]:
            np.testing.assert_array_equal(there.run(x, sent, "codes"), here.codes(x, packed))


@pytest.mark.parametrize("name", arm.TARGETS)
def test_the_disassembly_has_the_instructions(name: str, artifact_of: Built) -> None:
    text = arm.disassembly(artifact_of("odd batch", name) / "lib.so")
    found = Counter(re.findall(r"^\s*[0-9a-f]+:\s+(\w+)", text, re.MULTILINE))
    assert all(found[one] >= 4 for one in PROOF[name]), found
    assert not any(found[one] for one in FORBIDDEN[name]), found


def test_another_architecture_is_refused(artifact_of: Built) -> None:
    with pytest.raises(DeviceError, match="target raspberry-pi-5 is for aarch64 machines, this one is x86_64: compile"):
        load_artifact(artifact_of("odd batch", "raspberry-pi-5"))


def test_a_missing_cross_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.delenv("QDEPLOY_CROSS_AARCH64", raising=False)
    with pytest.raises(
        CompileError, match=r"needs the cross-compiler aarch64-linux-gnu-g\+\+: install it .*or name one"
    ):
        linker("aarch64")
    monkeypatch.setenv("QDEPLOY_CROSS_AARCH64", "/nowhere/g++")
    with pytest.raises(CompileError, match=r"QDEPLOY_CROSS_AARCH64 names /nowhere/g\+\+, which is no program here"):
        linker("aarch64")
    unpacked = tmp_path / "cross" / "usr" / "bin" / "aarch64-linux-gnu-g++"
    unpacked.parent.mkdir(parents=True)
    unpacked.write_text("#!/bin/sh\n")
    unpacked.chmod(0o755)
    monkeypatch.delenv("QDEPLOY_CROSS_AARCH64")
    assert linker("aarch64") == str(unpacked)
