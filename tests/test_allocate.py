"""Levels by budget inside a nested supernet: eq. 12 for one architecture of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from qdeploy.allocate import allocate, layer_options, level_bytes, side_bytes
from qdeploy.bundle.store import assemble, pieces_of, tree_reader, verify_tree
from qdeploy.bundle.write import write_bundle
from qdeploy.cli import main
from qdeploy.data import Dataset
from qdeploy.errors import RecipeError
from qdeploy.export import export_onnx
from qdeploy.extract import choose_spec
from qdeploy.files import canonical_json, write_atomic
from qdeploy.ladder import read_ladder
from qdeploy.nets import build, build_supernet
from qdeploy.quant.graph import read_graph
from qdeploy.quant.network import QuantNet
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import BatchQuantization, Quantization
from qdeploy.space import Architecture, SubnetSpec
from qdeploy.subnet import extract


def supernet(weights: str = "vertical") -> BatchQuantNet:
    torch.manual_seed(0)
    network = build_supernet("mobilenetv3-tiny", 1, 10, 8, 2, False, resolutions=(20, 28), widths=(4, 8))
    choice = BatchQuantization("batchquant", weights=weights)  # type: ignore[arg-type]
    return BatchQuantNet(network, read_graph(network.network, scoped=True), "mobilenetv3-tiny", choice)


@pytest.fixture(scope="module")
def net() -> BatchQuantNet:
    return supernet()


def ends(net: BatchQuantNet) -> tuple[SubnetSpec, SubnetSpec]:
    """The lowest and the highest level of an architecture that is neither the largest nor the smallest."""
    assert net.supernet is not None
    elastic = net.supernet.elastic
    architecture = net.space.sample(Random(11)).architecture
    assert architecture is not None and architecture not in (elastic.greatest, elastic.least)
    return net.uniform_of(architecture, 2, 3), net.uniform_of(architecture, 4, 4)


def test_three_levels_of_one_architecture_are_a_bundle(
    net: BatchQuantNet, fashion_sample: Dataset, tmp_path: Path
) -> None:
    low, high = ends(net)
    budget = (level_bytes(net, low) + level_bytes(net, high)) // 2
    mixed = allocate(net, budget, low)
    levels = {"w2": low, "mixed": mixed, "w4": high}
    assert low.nests_in(mixed) and mixed.nests_in(high) and level_bytes(net, mixed) <= budget
    assert [e.activation_bits for e in mixed.layers] == [e.activation_bits for e in low.layers]
    assert len({e.weight_bits for e in mixed.layers if e.layer not in net.fixed}) > 1
    for name, spec in levels.items():
        export_onnx(extract(net, spec, "m", fashion_sample.images[:256], None), tmp_path / f"{name}.onnx")
    write_bundle(read_ladder([tmp_path / f"{name}.onnx" for name in levels]), [], tmp_path / "tree")
    manifest = verify_tree(tmp_path / "tree")
    read, sides = tree_reader(tmp_path / "tree", manifest), {level.side for level in manifest.levels}
    for name, spec in levels.items():
        assert assemble(manifest, name, read) == (tmp_path / f"{name}.onnx").read_bytes()
        side = manifest.level(name).side
        assert side is not None
        planes = sum(
            manifest.pieces[piece].size for piece in set(pieces_of(manifest, name)) - sides - {manifest.skeleton}
        )
        promised = level_bytes(net, spec)
        # a tensor that no level holds in between has its planes coded together
        assert planes <= promised - side_bytes(net, spec) <= 1.01 * planes
        # untrained biases are all but zero and code well; of a trained network this is within 4%
        assert manifest.pieces[side].size <= side_bytes(net, spec) <= 1.2 * manifest.pieces[side].size


def test_errors_and_bytes_are_those_of_the_subnets_own_codes(net: BatchQuantNet) -> None:
    low, high = ends(net)
    small = net.subnet(high)
    codes = {b: net.subnet(spec) for b, spec in ((2, low), (4, high))}
    for step in small.graph.layers:
        options = layer_options(small, step)
        if step.name in net.fixed:
            assert [option.bits for option in options] == [8] and options[0].error == 0
            continue
        assert [option.bits for option in options] == [2, 3, 4]
        at2, at4 = (codes[b].layer_codes(codes[b].steps[step.name], spec) for b, spec in ((2, low), (4, high)))
        difference = (at2.codes.astype(float) - at4.codes) * at4.step
        assert options[0].error == pytest.approx(float((difference**2).sum())) and options[-1].error == 0
        assert options[0].bytes <= options[1].bytes <= options[2].bytes


def test_the_architecture_is_the_one_that_was_asked_for(net: BatchQuantNet, tmp_path: Path) -> None:
    low, high = ends(net)
    chosen = allocate(net, 1 << 20, architecture=high)
    assert chosen == high  # all that the budget could buy
    assert net.supernet is not None
    largest = allocate(net, 1 << 20)
    assert largest == net.uniform(4) and largest.architecture == net.supernet.elastic.greatest
    least = level_bytes(net, low)
    with pytest.raises(RecipeError, match=f"too small: the lowest widths need {least}"):
        allocate(net, least - 1, architecture=low)
    write_atomic(tmp_path / "low.json", canonical_json(low.to_json()))
    write_atomic(tmp_path / "high.json", canonical_json(high.to_json()))
    kib = 1.01 * level_bytes(net, high) / 1024  # bytes are rounded up
    assert choose_spec(net, None, kib, None, None, {}, tmp_path / "high.json") == high
    assert low.nests_in(choose_spec(net, None, kib, None, tmp_path / "low.json", {}))
    for arguments in ((4, None, None, None), (None, kib, None, tmp_path / "low.json")):
        with pytest.raises(RecipeError, match="--architecture goes with --budget-kib and a run of method batchquant"):
            choose_spec(net, *arguments, {}, tmp_path / "high.json")


def test_what_cannot_be_shared_out_is_refused(net: BatchQuantNet) -> None:
    low, high = ends(net)
    with pytest.raises(RecipeError, match='no prefixes of high-bit ones.*BatchQuant with weights = "lsq"'):
        allocate(supernet("lsq"), 1 << 20)
    with pytest.raises(RecipeError, match='weights = "lsq"'):
        level_bytes(supernet("lsq"), high)
    with pytest.raises(RecipeError, match="leave it out"):
        allocate(net, 1 << 20, low, high)
    torch.manual_seed(0)
    plain = build("tiny", 1, 10, 8)
    with pytest.raises(RecipeError, match="an architecture is chosen for a supernet"):
        vertical = QuantNet(plain, read_graph(plain), "tiny", Quantization())
        allocate(vertical, 1 << 20, architecture=vertical.uniform(2))
    assert low.architecture is not None
    wrong = dataclasses.replace(low, architecture=Architecture(low.architecture.stages, 24, 8))
    with pytest.raises(RecipeError, match=r"resolution is 24: choose from \[20, 28\]"):
        allocate(net, 1 << 20, wrong)


def test_goldens_have_the_size_of_the_subnets_images(
    net: BatchQuantNet, fashion_sample: Dataset, tmp_path: Path
) -> None:
    low, _ = ends(net)
    assert low.architecture is not None
    for resolution in (20, 28):
        spec = dataclasses.replace(low, architecture=dataclasses.replace(low.architecture, resolution=resolution))
        frozen = extract(net, spec, "m", fashion_sample.images[:256], fashion_sample.take(64))
        shape = (1, resolution, resolution)
        assert frozen.activations[frozen.input].shape == shape and frozen.golden[frozen.input].shape[1:] == shape
        assert frozen.golden[frozen.input].dtype == np.uint8 and frozen.report["test_images"] == 64
        parity = frozen.report["parity"]["simulation"]
        assert parity["differing"] <= 1e-3 * parity["codes"] and parity["largest_step"] <= 1
        pixels = frozen.golden[frozen.input]
        assert (resolution == 28) == np.array_equal(pixels, fashion_sample.images[: len(pixels)])


@pytest.mark.parametrize("choice", [{"affine": False}, {"estimator": "running"}, {"estimator": "learned"}])
def test_other_activation_quantizers_freeze_to_the_same_codes(
    choice: dict[str, object], fashion_sample: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = build_supernet("mobilenetv3-tiny", 1, 10, 8, 2, False)
    quantization = BatchQuantization("batchquant", **choice)  # type: ignore[arg-type]
    net = BatchQuantNet(network, read_graph(network.network, scoped=True), "mobilenetv3-tiny", quantization)
    spec = net.space.sample(Random(1))
    net.train()(torch.from_numpy(fashion_sample.images[:128]).float() / 255, spec)
    frozen = extract(net, spec, "m", fashion_sample.images[:256], None)
    parity = frozen.report["parity"]["simulation"]
    assert parity["differing"] <= 1e-3 * parity["codes"] and parity["largest_step"] <= 1
    sidecar = export_onnx(frozen, tmp_path / "m.onnx")  # held to ONNX Runtime, operator by operator
    assert sidecar["parity"]["differing"] == 0 and sidecar["spec_id"] == spec.id


def test_the_command_line_refuses_an_architecture_for_a_network_that_has_one(tmp_path: Path) -> None:
    run = Path(__file__).parents[1] / "models" / "fashion-resnet8"
    command = ["subnet", str(run), "--budget-kib", "30", "--architecture", "spec.json", "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(main, command)
    assert (
        found.exit_code == 2 and "--architecture goes with --budget-kib and a run of method batchquant" in found.output
    )
