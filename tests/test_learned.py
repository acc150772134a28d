"""Widths learned for each channel travel: frozen net, QDQ ONNX, capped planes, compiled program, rebuilt level."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qdeploy import integer
from qdeploy.bundle.store import assemble, level_tensors, load_tree, tree_reader
from qdeploy.bundle.write import write_bundle
from qdeploy.cli import main
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.export import export_onnx
from qdeploy.export.parity import stock_session
from qdeploy.frozen import FrozenNet, load_frozen, save_frozen
from qdeploy.inspect import describe
from qdeploy.ladder import read_ladder
from qdeploy.subnet import extract
from qdeploy.target import Target
from tests.quant.test_differentiable import learned, scatter


@pytest.fixture(scope="module")
def frozen() -> FrozenNet:
    """A small residual network with random weights and random widths of 2 to 8 bits, rounded to integers."""
    images = np.random.default_rng(0).integers(0, 256, (256, 1, 28, 28), np.uint8)
    net = learned()
    scatter(net)
    for tensor in net.low_tensors():
        net.activation(tensor).set_width(2 + len(tensor) % 6)  # the first images that come decide the range
    sizes = net.size_kib()
    object.__setattr__(net.choice, "weight_kib", sizes["weights"])
    object.__setattr__(net.choice, "activation_kib", sizes["activations"])
    net.settle()
    return extract(net, net.only, "learned", images, None)


def test_a_learned_network_travels_bit_by_bit(frozen: FrozenNet, tmp_path: Path) -> None:
    ties = frozen.report["parity"]["simulation"]
    assert ties["differing"] <= 4 and ties["largest_step"] <= 1
    widths = {name: bits.channels for name, bits in frozen.weights.items() if bits.channels}
    assert len(widths) == 8 and all(len(set(channels)) > 2 for channels in widths.values())
    sidecar = export_onnx(frozen, tmp_path / "m.onnx")
    assert sidecar["parity"]["output"][0] == 0
    name = "stages.2.0.first.conv"
    assert tuple(sidecar["weights"][name]["channels"]) == widths[name]

    compile_model(tmp_path / "m.onnx", Target("here", platform.machine(), "llvm", "host"), tmp_path / "artifact")
    manifest = write_bundle(read_ladder([tmp_path / "m.onnx"]), [tmp_path / "artifact"], tmp_path / "tree")
    read = tree_reader(tmp_path / "tree", manifest)
    assert load_tree(tmp_path / "tree") == manifest
    assert assemble(manifest, "m", read) == (tmp_path / "m.onnx").read_bytes()
    caps = {tensor.name.removesuffix(".weight"): tensor.caps for tensor in manifest.tensors}
    for layer in (layer for layer in widths if caps[layer] is not None):
        used = zip(caps[layer] or (), widths[layer] or (), strict=True)
        assert all(cap <= width for cap, width in used) and max(caps[layer] or ()) == max(widths[layer] or ())
    assert caps["stages.2.0.second.conv"] is not None  # the largest; in a small one a list of caps can cost more

    artifact, session = load_artifact(tmp_path / "artifact"), stock_session((tmp_path / "m.onnx").read_bytes())
    packed = artifact.prepare(level_tensors(manifest, "m", read, artifact.join))
    codes = np.random.default_rng(1).integers(0, 256, (4, 1, 28, 28), np.uint8)
    images = integer.dequantize(codes, frozen.activations[frozen.input].quantizer)
    expected = integer.logits(frozen, codes)
    for image, row in zip(images, expected, strict=True):
        assert np.array_equal(artifact.run(image[None], packed)[0], row)
        assert np.array_equal(session({"input": image[None]})[0][0], row)


def test_inspect_counts_the_bits_that_are_there(frozen: FrozenNet, tmp_path: Path) -> None:
    export_onnx(frozen, tmp_path / "m.onnx")
    manifest = write_bundle(read_ladder([tmp_path / "m.onnx"]), [], tmp_path / "tree")
    found = describe(tmp_path / "tree")
    held = total = 0.0
    for tensor, area, row in zip(manifest.tensors, manifest.of_kind("planes"), found["tensors"], strict=True):
        planes = sum(tensor.caps) / len(tensor.caps) if tensor.caps else tensor.bits
        assert row["m"] == pytest.approx(planes, abs=1e-3)
        held, total = held + planes * area.count, total + area.count
        parts = [part for part in found["parts"] if part["tensor"] == tensor.name]
        for first, part in enumerate(parts if tensor.caps else []):
            assert part["weights"] == sum(cap > first for cap in tensor.caps or ()) * area.count // area.shape[0]
    assert found["levels"][0]["bits a weight"] == pytest.approx(held / total, abs=1e-3)
    save_frozen(frozen, tmp_path / "frozen")
    assert load_frozen(tmp_path / "frozen").weights == frozen.weights
    rows = {row["layer"]: row for row in describe(tmp_path / "frozen")["layers"]}
    for name, bits in frozen.weights.items():
        mean = None if bits.channels is None else round(sum(bits.channels) / len(bits.channels), 3)
        assert rows[name].get("mean bits") == mean


def test_the_command_line_takes_the_learned_widths(tmp_path: Path, fashion_test: object) -> None:
    phase = "{epochs = 1, learning_rate = 0.02, weight_decay = 1e-4, batch = 64}"
    (tmp_path / "r.toml").write_text(
        '[network]\nname = "tiny"\nwidth = 8\n[data]\nname = "fashion-mnist"\nsplit = "sample"\ntrain_images = 256\n'
        f'[quantization]\nmethod = "differentiable"\nweight_kib = 0.7\nactivation_kib = 2.9\nupdate_steps = 1\n'
        f"uniform_phase = {phase}\nprecision_phase = {phase}\n"
        f"[float_phase]\nepochs = 1\nlearning_rate = 0.1\nweight_decay = 1e-4\nbatch = 64\n"
        f"[quantized_phase]\nepochs = 1\nlearning_rate = 0.02\nweight_decay = 1e-4\nbatch = 64\n"
    )

    def qdeploy(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    code, text = qdeploy("train", tmp_path / "r.toml", "-o", tmp_path / "run", "--json")
    assert code == 0, text
    size = json.loads(text.splitlines()[-1])["size_kib"]
    assert size["weights"] <= 0.7 and size["activations"] <= 2.9
    code, text = qdeploy("subnet", tmp_path / "run", "-o", tmp_path / "s")
    assert code == 0 and "integers against the simulation: 0 of" in text, text
    assert load_frozen(tmp_path / "s").weights["second.conv"].channels is not None
    for arguments in (["--bits", 4], ["--budget-kib", 2]):
        code, text = qdeploy("subnet", tmp_path / "run", *arguments, "-o", tmp_path / "t")
        assert code == 2 and "the run learned its widths: leave --bits, --budget-kib" in text
    found = describe(tmp_path / "run")
    assert [row["phase"] for row in found["checkpoints"]] == ["float", "uniform", "precision", "quantized"]
    assert found["size KiB"] == size
