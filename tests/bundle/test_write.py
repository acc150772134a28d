import json
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.manifest import levels_below, manifest_bytes
from qdeploy.bundle.store import assemble, load_tree, object_name, pieces_of, tree_reader, verify_tree
from qdeploy.bundle.write import write_bundle
from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import canonical_json, sha256
from qdeploy.ladder import read_ladder
from tests.bundle.small import TOP, container, model_bytes, small_tree, write_artifact, write_levels


def test_every_level_comes_back_byte_for_byte(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    assert load_tree(tmp_path / "tree") == manifest == verify_tree(tmp_path / "tree")
    read = tree_reader(tmp_path / "tree", manifest)
    for name in ("w2", "w3", "w4"):
        assert assemble(manifest, name, read) == (tmp_path / f"{name}.onnx").read_bytes()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    ladder = read_ladder(write_levels(tmp_path))
    for name in ("a", "b"):
        write_bundle(ladder, [], tmp_path / name)
    trees = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("a", "b")]
    assert trees[0] == trees[1]


def test_tree_holds_nothing_else_and_is_named_by_content(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    files = {str(p.relative_to(tmp_path / "tree")) for p in (tmp_path / "tree").rglob("*") if p.is_file()}
    digest = sha256(manifest_bytes(manifest))
    objects = {object_name(entry.sha256) for entry in manifest.objects}
    assert files == {"release.json", f"manifests/{digest}.json"} | objects
    for entry in manifest.objects:
        assert sha256((tmp_path / "tree" / object_name(entry.sha256)).read_bytes()) == entry.sha256


def test_objects_are_split_and_levels_never_share_one(tmp_path: Path) -> None:
    top = np.random.default_rng(0).integers(-8, 8, (1024, 6000))
    manifest = write_bundle(read_ladder(write_levels(tmp_path, (2, 3, 4), top)), [], tmp_path / "tree")
    sizes = [entry.size for entry in manifest.objects]
    assert sizes[1:] == [768004, 768004]  # uniform codes: nothing to save, so the base is twice a plane
    assert 1_536_000 < sizes[0] < 1_537_000
    assert all(len(entry.leaves) == -(-entry.size // 65536) for entry in manifest.objects)
    level_of = {}  # object -> level
    for level, bits in (("w2", 2), ("w3", 3), ("w4", 4)):
        first = 0
        for part in manifest.tensors[0].parts:
            first += part.bits
            if first == bits:
                level_of[manifest.pieces[part.piece].object] = level
    assert list(level_of.values()) == ["w2", "w3", "w4"]


def test_artifacts_are_objects_of_the_release(tmp_path: Path) -> None:
    ladder = read_ladder(write_levels(tmp_path))
    folders = [write_artifact(tmp_path / "a", ladder.graph), write_artifact(tmp_path / "b", ladder.graph, "arm")]
    manifest = write_bundle(ladder, folders, tmp_path / "tree", release=7)
    assert manifest.release == 7
    read = tree_reader(tmp_path / "tree", manifest)
    for folder, artifact in zip(folders, manifest.artifacts, strict=True):
        assert [name for name, _ in artifact.files] == ["artifact.json", "lib.so"]
        for name, piece in artifact.files:
            assert read(piece) == (folder / name).read_bytes()
    assert [artifact.target["name"] for artifact in manifest.artifacts] == ["host", "arm"]
    used = [{manifest.pieces[piece].object for _, piece in artifact.files} for artifact in manifest.artifacts]
    assert not used[0] & used[1]


def edit(folder: Path, **changes: object) -> None:
    path = folder / "artifact.json"
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "0" * 64}, "another graph"),
        ({"format": "other"}, "not an artifact folder"),
        ({"files": {}}, "names no files"),
        ({"files": {"../lib.so": "0" * 64}}, "only plain file names"),
        ({"files": {"lib.so": "0" * 64}}, "not the file that artifact.json names"),
        ({"files": {"gone.so": "0" * 64}}, "cannot read"),
        ({"target": {"name": "x", "nested": {"a": 1}}}, "target is not"),
    ],
)
def test_bad_artifacts(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    ladder = read_ladder(write_levels(tmp_path))
    folder = write_artifact(tmp_path / "artifact", ladder.graph)
    edit(folder, **changes)
    with pytest.raises(BundleError, match=message):
        write_bundle(ladder, [folder], tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_two_artifacts_for_one_target(tmp_path: Path) -> None:
    ladder = read_ladder(write_levels(tmp_path))
    folders = [write_artifact(tmp_path / name, ladder.graph) for name in ("a", "b")]
    with pytest.raises(BundleError, match="same target"):
        write_bundle(ladder, folders, tmp_path / "tree")


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    ladder = read_ladder(write_levels(tmp_path))
    write_bundle(ladder, [], tmp_path / "tree")
    with pytest.raises(DeviceError, match="--force"):
        write_bundle(ladder, [], tmp_path / "tree")
    assert write_bundle(ladder, [], tmp_path / "tree", force=True, release=2).release == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_release_below_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="release number 0"):
        write_bundle(read_ladder(write_levels(tmp_path)), [], tmp_path / "tree", release=0)


def test_partial_order(tmp_path: Path) -> None:
    paths = []
    for name, first, second in (("top", 4, 4), ("a", 4, 2), ("b", 2, 4), ("low", 2, 2)):
        paths.append(tmp_path / f"{name}.onnx")
        scale = 0.1 * first + 0.01 * second
        paths[-1].write_bytes(model_bytes(container(first), scale, second=container(second, TOP.T)))
    manifest = write_bundle(read_ladder(paths), [], tmp_path / "tree")
    assert [level.name for level in manifest.levels] == ["low", "a", "b", "top"]
    assert [level.name for level in levels_below(manifest, "b")] == ["low", "b"]
    held = {name: set(pieces_of(manifest, name)) for name in ("low", "a", "b", "top")}
    assert held["low"] == held["a"] & held["b"]
    assert held["a"] | held["b"] < held["top"]  # top has a side piece of its own
    for name, pieces in held.items():  # no object mixes pieces that a level needs with others
        objects = {manifest.pieces[piece].object for piece in pieces}
        assert {i for i, piece in enumerate(manifest.pieces) if piece.object in objects} == pieces, name
