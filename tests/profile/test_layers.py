"""The per-layer profile on a real artifact. No assertion looks at a clock."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.kernels import dots
from qdeploy.compile.llvm import choose_dot, resolve
from qdeploy.compile.pipeline import compile_model
from qdeploy.export.write import qdq_bytes
from qdeploy.profile import latency as timing
from qdeploy.profile import peak as peaks
from qdeploy.profile.bitops import bitops
from qdeploy.profile.latency import load_pair
from qdeploy.profile.layers import bound, by_row, called, kind, repeated
from qdeploy.profile.peak import Peak, amx_kernel, depth, measured_peak, tile_kernel, tiles
from qdeploy.profile.report import profile, render
from qdeploy.target import load_target, missing_features, request_tiles
from tests.nets_frozen import random_frozen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    (folder / "m.onnx").write_bytes(qdq_bytes(random_frozen(3, width=4, size=6, blocks=2)))
    compile_model(folder / "m.onnx", load_target(ROOT / "targets" / "x86-64.toml"), folder / "a")
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    monkeypatch.setattr(timing, "BLOCK", 1e-5)
    monkeypatch.setattr(peaks, "SECONDS", 1e-3)


def test_every_kernel_has_a_row_and_every_multiply_add_is_counted(folder: Path) -> None:
    found = profile(folder / "a", folder / "m.onnx", 3, layers=True)
    assert json.loads(json.dumps(found)) == found
    rows = found["layers"]
    described = called(load_artifact(folder / "a").description["kernels"])
    assert {row["name"] for row in described} <= {row["layer"] for row in rows}
    assert sum(row["macs"] for row in rows) == bitops(folder / "m.onnx")["total"]["macs"]["value"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert all(row["reason"] for row in rows if row["arithmetic"] == "float")
    assert found["peak"]["gops"] > 0 and all(copy["gbytes_s"] > 0 for copy in found["peak"]["copies"])
    text = render(found)
    for row in rows:
        assert row["layer"][-31:] in text
    assert "fp32 ONNX Runtime" in found["why"][0] and found["why"][0] in text


def test_ticks_are_of_a_whole_run(folder: Path) -> None:
    artifact, packed, _ = load_pair(folder / "a", folder / "m.onnx")
    x = np.random.default_rng(0).standard_normal(artifact.input_shape).astype(np.float32)
    times, runs = repeated(artifact.ticks(x, packed), lambda: None, 2)
    rows = artifact.description["kernels"]
    assert times.shape == (2, sum(len(row["functions"]) for row in rows)) and runs.shape == (2,)
    assert (times >= 0).all() and (times.sum(1) > 0).all()


def test_a_row_has_the_time_of_all_its_calls() -> None:
    rows = [{"functions": ["a"]}, {"functions": []}, {"functions": ["b", "c"]}, {"functions": ["d"]}]
    times = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert by_row(times, rows).tolist() == [[1.0, 5.0, 4.0], [5.0, 13.0, 8.0]]


def test_kinds_and_limits() -> None:
    conv = {"operator": "conv", "groups": 1, "kernel": [3, 3], "inputs": [[8, 4, 4]], "output": [8, 4, 4]}
    assert kind(conv) == "conv 3x3"
    assert kind(conv | {"groups": 8}) == "depthwise conv"
    assert kind(conv | {"groups": 2}) == "grouped conv"
    assert kind(conv | {"kernel": [4, 4], "output": [8, 1, 1]}) == "fully connected"
    assert kind({"operator": "add"}) == "add"
    assert [bound(0.9, 0.1), bound(0.3, 0.6), bound(0.2, 0.2)] == ["arithmetic", "memory", "neither"]
    peak = Peak(1.0, tuple(float(size) for size in peaks.SIZES))
    assert peak.bandwidth(1) == peaks.SIZES[0] and peak.bandwidth(1 << 40) == peaks.SIZES[-1]


@pytest.mark.parametrize("features", [("avx2",), ("sse2",)])
def test_the_peak_kernel_multiplies_what_it_says(features: tuple[str, ...]) -> None:
    """Its sums equal numpy's, so that nothing was optimized away."""
    import tvm

    dot = choose_dot(set(features))
    pixels, blocks = tiles(dot)[0]
    function, sizes = tile_kernel(dot, pixels, blocks, 2)
    kernel = peaks.built(function, resolve(load_target(ROOT / "targets" / "x86-64.toml")).tvm)
    random = np.random.default_rng(1)
    x, w = random.integers(0, 256, sizes[0], np.uint8), random.integers(-127, 128, sizes[1], np.int8)
    out = tvm.runtime.tensor(np.zeros(sizes[2], np.int32))
    kernel(tvm.runtime.tensor(x), tvm.runtime.tensor(w), out)
    steps, length = depth(dot)[0], sizes[0] // pixels // 4
    a = x.reshape(pixels, length, 4)[:, :steps].astype(np.int64)
    parts = w.reshape(length, blocks, dots.steps(dot), dot.lanes, -1)[:steps].astype(np.int64)
    b = parts.swapaxes(2, 3).reshape(steps, blocks, dot.lanes, 4)
    wanted = np.einsum("mki,kjli->mjl", a, b)
    assert np.array_equal(out.numpy().reshape(2, *wanted.shape), np.stack([wanted] * 2))
    assert measured_peak(features).operations > 0


def test_the_tile_kernel_multiplies_what_it_says() -> None:
    import tvm

    resolved = resolve(load_target(ROOT / "targets" / "x86-64-amx.toml"))
    if missing_features(resolved.features) or not request_tiles():
        pytest.skip("this machine has no AMX tiles")
    random = np.random.default_rng(1)
    x, w = random.integers(0, 256, (16, 64), np.uint8), random.integers(-128, 128, (16, 16, 4), np.int8)
    out = tvm.runtime.tensor(np.zeros(1024, np.int32))
    peaks.built(amx_kernel(3), resolved.tvm)(tvm.runtime.tensor(x.reshape(-1)), tvm.runtime.tensor(w.reshape(-1)), out)
    one = np.einsum("rqi,qli->rl", x.reshape(16, 16, 4).astype(np.int64), w.astype(np.int64))
    assert np.array_equal(out.numpy().reshape(4, 16, 16), np.stack([3 * one] * 4))


def test_float_networks_compute_what_the_quantized_ones_approximate(folder: Path) -> None:
    import onnxruntime

    from qdeploy.profile.float_model import float_model

    model = onnx.load(folder / "m.onnx")
    before = model.SerializeToString()
    made = float_model(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(made)
    kinds = {node.op_type for node in made.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear", "Clip"} and "Conv" in kinds
    assert all(value.data_type == onnx.TensorProto.FLOAT for value in made.graph.initializer)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    outputs = [onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"input": x})[0] for m in (model, made)]
    assert np.corrcoef(*(o.reshape(-1) for o in outputs))[0, 1] > 0.9
