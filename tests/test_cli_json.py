"""--json prints one document on standard output and nothing else; without it there is text; -q says nothing beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from qdeploy.cli import main
from qdeploy.frozen import save_frozen
from tests.nets_frozen import ladder_of
from tests.ptq.nets import inputs, residual, saved

SHIPPED = Path(__file__).parents[1] / "models" / "fashion-resnet8"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def document(*arguments: object) -> Any:
    """What `--json -q` prints, which is all that the command prints."""
    result = call(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == "" and result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder as subnets and as ONNX, a tree and an artifact of it, a float network and images."""
    folder = tmp_path_factory.mktemp("json")
    (folder / "data").mkdir()
    np.save(folder / "data" / "images.npy", inputs((1, 3, 16, 16)))
    saved(residual(), folder)
    for bits, net in zip((2, 4), ladder_of(0, levels=(2, 4)), strict=True):
        save_frozen(net, folder / f"s{bits}")
        found = document("export", folder / f"s{bits}", "-o", folder / f"w{bits}.onnx")
        assert set(found) == {"out", "graph", "spec_id"} and found["out"] == str(folder / f"w{bits}.onnx")
    found = document("compile", folder / "w2.onnx", "--target", "host", "-o", folder / "artifact")
    assert set(found) == {"out", "variants", "lint"} and found["variants"][0]["target"] == "host"
    assert set(found["variants"][0]) == {"target", "kernels", "arena_bytes"} and found["lint"]["operators"] > 0
    levels = [folder / "w2.onnx", folder / "w4.onnx"]
    found = document("bundle", *levels, "--artifact", folder / "artifact", "-o", folder / "tree")
    assert found == document("inspect", folder / "tree")
    return folder


def test_export_compile_and_bundle(folder: Path) -> None:
    done = call("compile", folder / "w2.onnx", "--target", "host", "-o", folder / "artifact", "--force")
    assert "kernels, arena" in done.stdout and "not integer on host: 2 of" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("bytes of arena")
    done = call("export", folder / "s2", "-o", folder / "w2.onnx", "--force")
    assert done.stdout.startswith(f"{folder / 'w2.onnx'}: graph ") and "comparing codes" in done.stderr
    assert call("export", folder / "s2", "-o", folder / "w2.onnx", "--force", "-q").stderr == ""


def test_profile_and_report(folder: Path) -> None:
    kept = folder / "artifact" / "profile.json"
    found = document("profile", folder / "artifact", "--model", folder / "w2.onnx", "--repeats", 2, "-o", kept)
    assert isinstance(found, dict) and json.loads(kept.read_text()) == found
    found = document("report", folder / "tree", folder / "artifact", "-o", folder / "page.html")
    assert isinstance(found, dict) and (folder / "page.html").is_file()
    assert "time" in found["folders"][1]["sections"]


@pytest.mark.parametrize("name", ["s2", "w4.onnx", "artifact", "tree"])
def test_inspect(folder: Path, name: str) -> None:
    assert document("inspect", folder / name)["kind"]


def test_lists() -> None:
    assert {"name", "lacks"} <= set(document("targets")[0])
    found = document("devices")
    assert found["devices"] == [] and found["tracker"] is None and found["local"]["cores"] > 0
    assert "cores, load" in call("devices").stdout


def test_space(tmp_path: Path) -> None:
    found = document("space", SHIPPED)
    assert found["network"] == "resnet8" and found["subnets"] > 100 and found["out"] is None
    found = document("space", SHIPPED, "--sample", 3, "-o", tmp_path / "specs")
    assert found["specs"] == 3 == len((tmp_path / "specs").read_text().splitlines())


def test_quantize_and_sensitivity(folder: Path, tmp_path: Path) -> None:
    found = document("quantize", folder / "net.onnx", "--data", folder / "data", "-o", tmp_path / "q.onnx")
    assert len(found) == 1 and found[0]["weight_bytes"] > 0
    common = (folder / "net.onnx", "--data", folder / "data", "--widths", "2,8")
    found = document("sensitivity", *common, "-o", tmp_path / "s")
    assert found == json.loads((tmp_path / "s" / "sensitivity.json").read_bytes()) and found["widths"] == [2, 8]
    done = call("sensitivity", *common, "-o", tmp_path / "s2")
    assert "output error" in done.stdout and "output error" in done.stderr


def test_a_run_on_a_device(folder: Path, tmp_path: Path) -> None:
    from qdeploy.serve.app import serving

    images = tmp_path / "images.npy"
    with serving(folder / "tree") as url:
        assert document("pull", url, tmp_path / "device", "--unsigned", "--level", "w2")["level"] == "w2"
        np.save(images, np.zeros((3, 3, 8, 8), np.uint8))
        climbing = document("run", tmp_path / "device", "--images", images, "--climb", "w4")
    assert climbing == document("run", tmp_path / "device", "--images", images) and len(climbing) == 3
    found = document("run", tmp_path / "device", "--images", images, "-o", tmp_path / "outputs.npy")
    assert found == {"out": str(tmp_path / "outputs.npy"), "shape": list(np.load(tmp_path / "outputs.npy").shape)}
    assert document("drop", tmp_path / "device", "--to", "w2")["level"] == "w2"
    assert document("evict", tmp_path / "device")["files"] > 0
