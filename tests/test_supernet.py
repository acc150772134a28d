"""From a supernet to files: any architecture and widths, ladders of one architecture, and the compiled network."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from qdeploy import integer
from qdeploy.bundle.write import write_bundle
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.data import Dataset
from qdeploy.errors import BundleError, RecipeError
from qdeploy.export import export_onnx
from qdeploy.extract import choose_spec
from qdeploy.files import canonical_json, write_atomic
from qdeploy.frozen import load_frozen, save_frozen
from qdeploy.ladder import read_ladder
from qdeploy.qdq import arrays, load_model
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.subnet import extract
from qdeploy.target import load_target
from qdeploy.train.run import accuracy, load_run, train
from tests.train.runs import supernet_recipe

TARGET = load_target(Path(__file__).parents[1] / "targets" / "x86-64.toml")


def trained(tmp_path_factory: pytest.TempPathFactory, **choice: object) -> BatchQuantNet:
    run = tmp_path_factory.mktemp("supernet") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("level_accuracy", "top1"):  # not what is tested here
            patch.setattr(f"qdeploy.train.run.{name}", lambda *_: 0.0)
        train(supernet_recipe(images=768, stages=1, **choice), run, None, lambda _: None)
    net = load_run(run)[1]
    assert isinstance(net, BatchQuantNet)
    return net


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> BatchQuantNet:
    return trained(tmp_path_factory)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> BatchQuantNet:
    return trained(tmp_path_factory, weights="vertical")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_subnet_freezes_exports_and_compiles_to_the_same_codes(
    seed: int, net: BatchQuantNet, fashion_sample: Dataset, fashion_test: Dataset, tmp_path: Path
) -> None:
    spec, few = net.space.sample(Random(seed)), fashion_test.take(200)
    frozen = extract(net, spec, "mix", fashion_sample.images[:512], few)
    assert {"mul", "hard_swish", "hard_sigmoid", "add"} <= {node.op for node in frozen.nodes}
    parity = frozen.report["parity"]["simulation"]
    assert parity["differing"] <= 1e-3 * parity["codes"] and parity["largest_step"] <= 1
    simulated = accuracy(calibrated(net, spec, fashion_sample.images[:512]), spec, few)
    assert abs(frozen.report["accuracy"] - simulated) <= 2.0  # four of 200 images
    save_frozen(frozen, tmp_path / "frozen")
    loaded = load_frozen(tmp_path / "frozen")
    assert loaded.spec == spec and loaded.nodes == frozen.nodes
    path = tmp_path / "mix.onnx"
    sidecar = export_onnx(loaded, path)  # held to ONNX Runtime, operator by operator
    assert sidecar["parity"]["largest_step"] <= 1 and sidecar["spec_id"] == spec.id
    if seed == 1:
        compile_model(path, TARGET, tmp_path / "artifact")
        artifact = load_artifact(tmp_path / "artifact")
        packed = artifact.prepare(arrays(load_model(path)[1]))
        codes = few.images[:8]
        expected = integer.logits(frozen, codes)
        for image, wanted in zip(codes, expected, strict=True):
            x = integer.dequantize(image[None], frozen.activations[frozen.input].quantizer)
            np.testing.assert_array_equal(artifact.run(x, packed)[0], wanted)


def test_specs_of_one_architecture_whose_bits_rise_are_a_ladder(
    nested: BatchQuantNet, fashion_sample: Dataset, tmp_path: Path
) -> None:
    top = nested.space.sample(Random(4))
    assert top.architecture is not None
    blocks = top.architecture.stages
    specs = {f"w{b}": nested.uniform_blocks(blocks, b, b) for b in (2, 4)}
    assert specs["w2"].nests_in(specs["w4"])
    for name, spec in specs.items():
        export_onnx(extract(nested, spec, "nested", fashion_sample.images[:512], None), tmp_path / f"{name}.onnx")
    ladder = read_ladder([tmp_path / f"{name}.onnx" for name in specs])
    assert [level.name for level in ladder.levels] == ["w2", "w4"]
    free = [t for t in ladder.tensors if t.levels["w2"].bits < t.levels["w4"].bits]
    assert len(free) == 3 * sum(len(stage) for stage in blocks)
    manifest = write_bundle(ladder, [], tmp_path / "tree")
    assert {level.name for level in manifest.levels} == {"w2", "w4"}


def test_steps_of_their_own_make_no_ladder(net: BatchQuantNet, fashion_sample: Dataset, tmp_path: Path) -> None:
    assert net.supernet is not None
    for bits in (2, 4):
        spec = net.uniform_blocks(net.supernet.elastic.smallest, bits, bits)
        export_onnx(extract(net, spec, "lsq", fashion_sample.images[:256], None), tmp_path / f"w{bits}.onnx")
    with pytest.raises(BundleError, match="do not nest.*steps of their own"):
        read_ladder([tmp_path / "w2.onnx", tmp_path / "w4.onnx"])


def test_choices_of_the_command_line(net: BatchQuantNet, tmp_path: Path) -> None:
    assert choose_spec(net, 3, None, None, None, {}) == net.uniform(3)
    spec = net.space.sample(Random(0))
    write_atomic(tmp_path / "spec.json", canonical_json(spec.to_json()))
    assert choose_spec(net, None, None, tmp_path / "spec.json", None, {}) == spec
    with pytest.raises(RecipeError, match="no prefixes of high-bit"):
        choose_spec(net, None, 20.0, None, None, {})
