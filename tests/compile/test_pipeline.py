"""Whole models: compiled codes equal the integer reference, one artifact runs every level, builds are reproducible."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto

from qdeploy.compile import codegen
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import CompileError, DeviceError, ModelError, RecipeError
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet, Quantizer
from qdeploy.integer import dequantize, run
from qdeploy.qdq import arrays, canonical_bytes, graph_digest, parse_model
from qdeploy.target import Target, load_target
from tests.nets_frozen import Builder, ladder_of, random_frozen
from tests.qdq_models import Net

TARGET = load_target(Path(__file__).parents[2] / "targets" / "x86-64.toml")
HOST = Target("host", "x86_64", "llvm", "host")


def built(net: FrozenNet, folder: Path, target: Target = TARGET) -> tuple[Path, bytes]:
    data = qdq_bytes(net)
    (folder / "m.onnx").write_bytes(data)
    compile_model(folder / "m.onnx", target, folder / "artifact")
    return folder / "artifact", data


def assert_equal(artifact: Path, data: bytes, net: FrozenNet, codes: np.ndarray) -> None:
    loaded = load_artifact(artifact)
    packed = loaded.prepare(arrays(parse_model(data)))
    want = run(net, codes, [net.output])[net.output]
    images = dequantize(codes, net.activations[net.input].quantizer)
    got = np.concatenate([loaded.codes(image[None], packed) for image in images])
    np.testing.assert_array_equal(got, want)
    out = np.concatenate([loaded.run(image[None], packed) for image in images])
    np.testing.assert_array_equal(out, dequantize(want, net.activations[net.output].quantizer))


def test_one_artifact_runs_every_level(tmp_path: Path) -> None:
    levels = ladder_of(3, (2, 3, 4), depthwise=True, max_pool=True, width=17, size=14)
    artifact, _ = built(levels[0], tmp_path, HOST)
    for net in levels:
        assert_equal(artifact, qdq_bytes(net), net, net.golden[net.input])


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 1, "width": 3, "size": 9, "bits": 8, "top": 8},
        {"groups": 2, "dilation": 2, "width": 6, "size": 7, "residual": False, "requantize": False},
    ],
)
def test_networks_and_extreme_images(options: dict, tmp_path: Path) -> None:
    net = random_frozen(5, **options)
    shape = net.golden[net.input].shape[1:]
    stripes = np.indices(shape).sum(0) % 2 * 255
    extremes = np.stack([np.zeros(shape), np.full(shape, 255), stripes]).astype(np.uint8)
    artifact, data = built(net, tmp_path)
    assert_equal(artifact, data, net, np.concatenate([net.golden[net.input], extremes]))


def test_sums_are_rounded_once_each(tmp_path: Path) -> None:
    """Every pair of codes, with steps in the ratio 1 : 3 : 2 so that a fused multiply-add moves thousands of ties."""
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256))).astype(np.uint8).reshape(1, 2, 256, 256)
    b = Builder(np.random.default_rng(0), pairs)
    for name, step, row in (("a", 0.1, [1, 0]), ("b", 0.3, [0, 1])):
        b.layer(name, "image", (1, 2, 1, 1), 8, 8, padding=[0, 0, 0, 0])
        b.tensors[f"{name}.weight"] = np.array(row, np.int8).reshape(1, 2, 1, 1)
        b.tensors[f"{name}.weight_scale"] = np.array([step * 64], np.float32)
        b.tensors[f"{name}.bias"] = np.zeros(1, np.int32)
        b.activations[f"{name}.out"] = replace(
            b.activations[f"{name}.out"], quantizer=Quantizer(float(np.float32(step)), 117)
        )
    out = b.add("sum", "a.out", "b.out", relu=False)
    b.activations[out] = replace(b.activations[out], quantizer=Quantizer(float(np.float32(0.2)), 117))
    net = b.net(out)
    net = replace(net, golden=run(net, pairs)).check()
    assert np.array_equal(net.golden["a.out"], pairs[:, :1])  # the two convolutions only pick a channel
    artifact, data = built(net, tmp_path)
    assert_equal(artifact, data, net, pairs)


def test_equal_input_gives_equal_bytes_and_dumps_every_phase(
    tmp_path: Path, device_environment: dict[str, str]
) -> None:
    net = random_frozen(1, width=4, size=6, blocks=1)
    data = qdq_bytes(net)
    (tmp_path / "m.onnx").write_bytes(data)
    lines: list[str] = []
    first = compile_model(tmp_path / "m.onnx", TARGET, tmp_path / "a", dump=tmp_path / "dump", echo=lines.append)
    script = f"""
from pathlib import Path
from qdeploy.compile.pipeline import compile_model
from qdeploy.target import load_target
folder = Path({str(tmp_path)!r})
compile_model(folder / "m.onnx", load_target(Path("targets/x86-64.toml")), folder / "b")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2], env=device_environment)
    for name in ("lib.so", "artifact.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(lines) == 2 and "parameters" in lines[0]
    dumped = {p.name for p in (tmp_path / "dump").iterdir()}
    phases = ["5-written", *(name for name, _ in codegen.PHASES)]
    assert {f"{phase}-kernels{i}.txt" for phase in phases for i in range(codegen.PARTS)} < dumped
    assert {"1-read.txt", "2-fused.txt", "3-calls.txt", "4-plan.txt", "7-packed-entry.txt"} < dumped
    assert first["graph"] == graph_digest(data)
    assert first["target"]["cpu"] == "x86-64-v3" and "avx2" in first["target"]["features"]
    (variant,) = first["variants"]
    assert variant["arena_bytes"] >= 10 * 4 and variant["target"] == first["target"]
    assert {k["arithmetic"] for k in variant["kernels"] if k["operator"] == "conv"} == {"integer"}
    assert all("reason" in k for k in variant["kernels"] if k["arithmetic"] == "float")
    with pytest.raises(DeviceError, match="not empty"):
        compile_model(tmp_path / "m.onnx", TARGET, tmp_path / "a")


def reference(model: ModelProto, x: np.ndarray) -> np.ndarray:
    """Node by node as the file says: float convolutions between Q and DQ."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def foreign(net: Net, output: str, folder: Path, rank: int = 4) -> tuple[ModelProto, Path]:
    model = net.model(output, rank)
    (folder / "m.onnx").write_bytes(canonical_bytes(model))
    compile_model(folder / "m.onnx", TARGET, folder / "artifact")
    return model, folder / "artifact"


def test_signed_activations_unsigned_weights_and_other_peoples_habits(tmp_path: Path) -> None:
    """int8 activations, uint8 weights with zero points, one scale a tensor, no bias, Relu6 as a Clip, repeated
    quantizers under other names before a padded convolution, a bias in its own unit, MatMul.
    """
    net = Net((1, 4, 7, 5), np.int8)
    rng = np.random.default_rng(2)
    net.store("zero", np.float32(0))
    net.store("one", np.float32(0.9))
    x = net.node("QuantizeLinear", "x", "s", "z")
    other = (net.store("s_again", np.float32(0.1)), net.store("z_again", np.int8(3)))
    x = net.node("DequantizeLinear", x, *other)
    w = net.store("w", rng.integers(0, 256, (6, 4, 3, 3)).astype(np.uint8))
    w = net.node("DequantizeLinear", w, net.store("ws", np.float32(0.004)), net.store("wz", np.uint8(121)))
    x = net.node("Clip", net.node("Conv", x, w, pads=[1, 1, 1, 1]), "zero", "one")
    net.store("s2", np.float32(0.01))
    x = net.q(x, "s2", net.store("z2", np.int8(-120)))
    weight, bias = net.weight(5, 6, 1, 1)
    x = net.q(net.node("Conv", x, weight, bias))
    x = net.node(
        "Reshape", net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), net.store("n", np.array([1, -1]))
    )
    out = net.q(net.node("MatMul", x, *net.weight(30, 7, axis=1, bias=False)))
    model, artifact = foreign(net, out, tmp_path, 2)
    loaded = load_artifact(artifact)
    packed = loaded.prepare(arrays(model))
    differing = 0
    for _ in range(20):
        image = rng.normal(0, 4, (1, 4, 7, 5)).astype(np.float32)
        codes = loaded.codes(image, packed)
        assert codes.dtype == np.int8
        step = np.rint((loaded.run(image, packed) - reference(model, image)) / np.float32(0.1))
        assert np.abs(step).max() <= 1  # its convolutions are float: ties may fall otherwise
        differing += int(np.count_nonzero(step))
    assert differing <= 4


def test_average_pools_with_and_without_their_padding(tmp_path: Path) -> None:
    for include in (0, 1):
        net = Net((1, 5, 6, 7))
        net.store("s3", np.float32(0.0737))
        pool = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 1, 0, 1], "count_include_pad": include}
        out = net.q(net.node("AveragePool", net.q("x"), **pool), "s3")
        folder = tmp_path / str(include)
        folder.mkdir()
        model, artifact = foreign(net, out, folder)
        loaded = load_artifact(artifact)
        packed = loaded.prepare(arrays(model))
        image = np.random.default_rng(include).normal(2, 5, (1, 5, 6, 7)).astype(np.float32)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(loaded.run(image, packed), session.run(None, {"x": image})[0])


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_frozen(1, width=4, size=6, blocks=1)
    path, out = tmp_path / "m.onnx", tmp_path / "out"
    path.write_bytes(qdq_bytes(net)[:-9])
    with pytest.raises(ModelError):
        compile_model(path, TARGET, out)
    path.write_bytes(qdq_bytes(net))
    with pytest.raises(RecipeError, match="knows no x86_64 cpu"):
        compile_model(path, Target("t", "x86_64", "llvm", "pentium9"), out)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match="needs a C\\+\\+ compiler: install one"):
        compile_model(path, TARGET, out)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CompileError, match="false cannot link the library .*: name a C.. compiler"):
        compile_model(path, TARGET, out)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
