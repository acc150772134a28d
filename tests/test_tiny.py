"""The whole flow on a two-layer network, through the command line, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log

RECIPE = """
[network]
name = "tiny"
width = 8
[data]
name = "fashion-mnist"
split = "sample"
train_images = 512
[quantization]
widths = [2, 4]
[float_phase]
epochs = 1
learning_rate = 0.1
weight_decay = 1e-4
batch = 64
[quantized_phase]
epochs = 1
learning_rate = 0.02
weight_decay = 1e-4
batch = 64
"""
TARGET = Path(__file__).parents[1] / "targets" / "host.toml"


def qdeploy(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_train_to_climb(tmp_path: Path, fashion_test: object) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    assert "float" in qdeploy("train", recipe, "-o", tmp_path / "run")
    for bits in (2, 4):
        qdeploy("subnet", tmp_path / "run", "--bits", bits, "-o", tmp_path / f"s{bits}")
        qdeploy("export", tmp_path / f"s{bits}", "-o", tmp_path / f"w{bits}.onnx")
    qdeploy("compile", tmp_path / "w2.onnx", "--target", TARGET, "-o", tmp_path / "artifact")
    models = [tmp_path / f"w{bits}.onnx" for bits in (2, 4)]
    qdeploy("bundle", *models, "--artifact", tmp_path / "artifact", "-o", tmp_path / "tree")
    found = json.loads(qdeploy("inspect", tmp_path / "tree", "--json"))
    assert [level["level"] for level in found["levels"]] == ["w2", "w4"]
    measured = json.loads(qdeploy("profile", tmp_path / "artifact", "--model", models[0], "--repeats", 2, "--json"))
    assert measured["artifact"]["median"] > 0 and measured["onnxruntime"]["median"] > 0

    images = tmp_path / "images.npy"
    np.save(images, fashion_test.images[:20])  # type: ignore[attr-defined]
    device = tmp_path / "device"
    with serving(tmp_path / "tree", log=tmp_path / "log") as url:
        qdeploy("pull", url, "-o", device, "--level", "w2", "--unsigned")
        low = qdeploy("run", device, "--images", images)
        qdeploy("climb", device, "--to", "w4")
        high = qdeploy("run", device, "--images", images)
        assert high == qdeploy("run", device, "--images", images, "--runtime", "ort")
        sent = len(read_byte_log(tmp_path / "log"))
        qdeploy("drop", device, "--to", "w2")
        assert qdeploy("run", device, "--images", images) == low
        qdeploy("climb", device, "--to", "w4")
        assert len(read_byte_log(tmp_path / "log")) == sent  # a drop and the way back fetch nothing
