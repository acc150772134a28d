"""FORMAT.md is enough to decode a bundle: `independent_decoder.py`, written from it alone, agrees byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle import write
from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.write import write_bundle
from qdeploy.export.write import qdq_bytes
from qdeploy.ladder import read_ladder
from tests.bundle import independent_decoder
from tests.bundle.independent_decoder import Bundle
from tests.bundle.small import write_artifact, write_levels
from tests.client.tree import make_tree
from tests.nets_frozen import ladder_of


def same(folder: Path, paths: list[Path], artifacts: tuple[int, ...] = ()) -> Manifest:
    """Bundle the levels; the other decoder gives each file back, and the files of artifacts."""
    ladder = read_ladder(paths)
    folders = [write_artifact(folder / f"a{i}", ladder.graph, f"t{i}", bytes(n)) for i, n in enumerate(artifacts)]
    manifest = write_bundle(ladder, folders, folder / "tree")
    bundle = Bundle(folder / "tree")
    assert bundle.levels() == {path.stem: path.read_bytes() for path in paths}
    for i, artifact in enumerate(manifest.artifacts):
        for name, piece in artifact.files:
            assert bundle.piece(piece) == (folder / f"a{i}" / name).read_bytes()
    return manifest


def layouts(manifest: Manifest) -> set[str]:
    return {part.layout for tensor in manifest.tensors for part in tensor.parts}


def gaussian(spread: float, rows: int = 40, columns: int = 300) -> np.ndarray:
    real = np.random.default_rng(1).normal(-0.5, 8 / spread, (rows, columns))
    return np.clip(np.rint(real), -8, 7).astype(np.int64)


@pytest.mark.parametrize("spread", [1.0, 3.0, 30.0])  # raw planes; joint base and sorted planes; nearly empty planes
def test_the_page_is_enough_to_decode(tmp_path: Path, spread: float) -> None:
    manifest = same(tmp_path, write_levels(tmp_path, (2, 3, 4), gaussian(spread)))
    if spread == 3.0:
        assert layouts(manifest) == {"tight", "sorted"}


def test_spaced_planes(tmp_path: Path) -> None:
    assert "spaced" in layouts(same(tmp_path, write_levels(tmp_path, (3, 4), gaussian(4.0))))


@pytest.mark.parametrize("coarse", [4, 8])  # channels that end at 2 planes, and at 1
def test_caps(tmp_path: Path, coarse: int) -> None:
    top = gaussian(2.0)
    top[10:30] = top[10:30] // coarse * coarse
    manifest = same(tmp_path, write_levels(tmp_path, (2, 3, 4), top))
    assert set(manifest.tensors[0].caps or ()) == {4, 2 if coarse == 4 else 1}


def test_a_network_of_many_tensors_in_several_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "PACK_BYTES", 600)
    paths = []
    for bits, net in zip((2, 3, 4), ladder_of(7), strict=True):
        paths.append(tmp_path / f"w{bits}.onnx")
        paths[-1].write_bytes(qdq_bytes(net))
    manifest = same(tmp_path, paths)
    assert len(manifest.tensors) > 4 and len(manifest.objects) > len(manifest.levels) + 1


def test_leaves_and_artifacts(tmp_path: Path) -> None:
    manifest = same(tmp_path, write_levels(tmp_path), (100, 70_000))
    assert len(manifest.artifacts) == 2
    tree = make_tree(tmp_path / "leaves", weights=(300,), artifact_bytes=140_000)
    assert len(tree.manifest.objects[-1].leaves) == 3
    assert Bundle(tree.root).levels() == tree.files


def test_it_refuses_a_changed_byte_and_stands_alone(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", weights=(40,))
    command = [sys.executable, "-I", "-S", independent_decoder.__file__, str(tree.root)]
    assert subprocess.run(command, capture_output=True, check=True).stdout.startswith(b"w2: ")
    for path in (tree.object_path(0), tree.root / "manifests" / f"{tree.digest}.json", tree.root / "release.json"):
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(ValueError, match=r".+"):
            Bundle(tree.root).levels()
        path.write_bytes(data)
