"""From a RUN folder to files: what EQ-Net runs can do that others cannot, and what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from qdeploy.bundle.write import write_bundle
from qdeploy.data import Dataset
from qdeploy.errors import BundleError, RecipeError
from qdeploy.export import export_onnx
from qdeploy.extract import choose_spec
from qdeploy.files import canonical_json, write_atomic
from qdeploy.frozen import FrozenNet, load_frozen, save_frozen
from qdeploy.ladder import read_ladder
from qdeploy.qdq import arrays, load_model
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.subnet import extract
from qdeploy.train.run import accuracy, load_run


@pytest.fixture(scope="module")
def net(elastic_run: Path) -> SimulatedNet:
    return load_run(elastic_run)[1]


def test_an_asymmetric_mix_freezes_and_exports_with_its_zero_points(
    net: SimulatedNet, fashion_sample: Dataset, fashion_test: Dataset, tmp_path: Path
) -> None:
    spec, few = net.space.sample(Random(3)), fashion_test.take(500)
    chosen = {(e.granularity, e.symmetry, e.weight_bits) for e in spec.layers[1:-1]}
    assert {c[0] for c in chosen} == {"tensor", "channel"} and {c[1] for c in chosen} == {"symmetric", "asymmetric"}
    frozen = extract(net, spec, "mix", fashion_sample.images, few)
    parity = frozen.report["parity"]["simulation"]
    assert parity["differing"] <= 1e-3 * parity["codes"] and parity["largest_step"] <= 1
    simulated = accuracy(calibrated(net, spec, fashion_sample.images), spec, few)
    # barely trained, so many images stand at ties, which int32 biases decide; the codes themselves are compared above
    assert abs(frozen.report["accuracy"] - simulated) <= 3.0
    save_frozen(frozen, tmp_path / "frozen")
    loaded = load_frozen(tmp_path / "frozen")
    assert loaded.spec == spec
    sidecar = export_onnx(loaded, tmp_path / "mix.onnx")  # held to ONNX Runtime, operator by operator
    assert sidecar["parity"]["largest_step"] <= 1 and sidecar["spec_id"] == spec.id
    stored = arrays(load_model(tmp_path / "mix.onnx")[1])
    for entry in spec.layers:
        points = stored[f"{entry.layer}.weight_zero_point"]
        assert len(np.unique(points)) == 1 and len(points) == len(stored[f"{entry.layer}.weight"])
        own = frozen.tensors.get(f"{entry.layer}.weight_zero_point")
        assert points[0] == (0 if own is None else own)
        assert own is None or entry.symmetry == "asymmetric"
    assert any(f"{entry.layer}.weight_zero_point" in frozen.tensors for entry in spec.layers)


def test_batch_norm_is_estimated_for_each_spec(net: SimulatedNet, fashion_sample: Dataset) -> None:
    means = []
    for width in (2, 8):
        tuned = calibrated(net, net.uniform(width), fashion_sample.images)
        means.append([step.norm.running_mean.clone() for step in tuned.graph.steps if step.norm is not None])
    same = [np.array_equal(a.numpy(), b.numpy()) for a, b in zip(*means, strict=True)]
    assert same == [True] + [False] * (len(same) - 1)  # the first layer has 8 bits in both


def frozen_at(net: SimulatedNet, width: int, images: np.ndarray) -> FrozenNet:
    return extract(net, net.uniform(width), "elastic", images, None)


def test_a_ladder_of_independent_widths_is_refused_with_the_reason(
    net: SimulatedNet, fashion_sample: Dataset, tmp_path: Path
) -> None:
    for width in (2, 8):
        export_onnx(frozen_at(net, width, fashion_sample.images), tmp_path / f"w{width}.onnx")
    paths = [tmp_path / "w2.onnx", tmp_path / "w8.onnx"]
    with pytest.raises(BundleError, match=r"own at 2 and at 8 bits .as EQ-Net learns them.*bundle each precision"):
        read_ladder(paths)
    write_bundle(read_ladder(paths[:1]), [], tmp_path / "tree")  # one precision is a bundle
    sidecar = tmp_path / "w2.onnx.json"
    write_atomic(sidecar, canonical_json(json.loads(sidecar.read_bytes()) | {"weights": {"x": 3}}))
    with pytest.raises(BundleError, match="weights is damaged"):
        read_ladder(paths)


def test_choices_of_the_command_line(net: SimulatedNet, tmp_path: Path) -> None:
    assert isinstance(net, EQNet)
    options = {"granularity": "channel", "symmetry": "asymmetric"}
    assert choose_spec(net, 4, None, None, None, options) == net.uniform(4, "channel", "asymmetric")
    assert choose_spec(net, 4, None, None, None, {}) == net.uniform(4)
    spec = net.space.sample(Random(0))
    write_atomic(tmp_path / "spec.json", canonical_json(spec.to_json()))
    assert choose_spec(net, None, None, tmp_path / "spec.json", None, {}) == spec
    with pytest.raises(RecipeError, match="no prefixes of high-bit"):
        choose_spec(net, None, 20.0, None, None, {})
    with pytest.raises(RecipeError, match="--granularity goes with --bits"):
        choose_spec(net, None, None, tmp_path / "spec.json", None, options)
    with pytest.raises(RecipeError, match=r"--bits 3 was not trained: choose from \[2, 4, 8\]"):
        choose_spec(net, 3, None, None, None, {})
