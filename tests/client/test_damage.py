"""Damaged and swapped files, on the server and on the device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qdeploy.bundle.manifest import manifest_bytes
from qdeploy.client.pull import climb, drop
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import BundleError, FetchError, QDeployError
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import QUICK, damage, file_of, objects_asked, pull
from tests.client.tree import Tree, make_tree

UNSIGNED = "nothing is signed: whoever controls the server or the line chooses what runs here"


def test_damage_on_disk_is_named_and_healed_by_a_pull(dev: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root", weights=(1_600_000, 500))
    said: list[str] = []
    with serving(tree.root, log=tmp_path / "log") as url:
        pull(url, dev, "w2")
        first = tree.manifest.objects[0].sha256
        damage(dev / "objects" / first, 200_000)
        with pytest.raises(BundleError, match=f"object {first} .*is damaged in .*run `qdeploy pull` again"):
            drop(dev, "w2")
        before = len(read_byte_log(tmp_path / "log"))
        pull(url, dev, echo=said.append)
        again = objects_asked(read_byte_log(tmp_path / "log")[before:])
    assert said == [UNSIGNED, "1 leaves are damaged on disk and are fetched again"]
    assert again == {first: [(196_608, 262_144)]}  # the one bad leaf
    assert file_of(dev, "w2") == tree.files["w2"]


def test_every_byte_of_a_small_bundle_counts(tree: Tree, dev: Path) -> None:
    """Flipped bytes, one by one, over each object: always refused, and nothing but the good bytes is held."""
    with serving(tree.root) as url:
        for index, entry in enumerate(tree.manifest.objects):
            for at in range(0, entry.size, max(1, entry.size // 5)):
                shutil.rmtree(dev, ignore_errors=True)
                damage(tree.object_path(index), at)
                with pytest.raises(BundleError, match=f"object {entry.sha256} from {url} is not what the manifest"):
                    pull(url, dev, "w4")
                assert DeviceFolder(dev).current() is None
                damage(tree.object_path(index), at)
                pull(url, dev, "w4")
                assert file_of(dev, "w4") == tree.files["w4"]


def test_a_truncated_object_is_refused(tree: Tree, dev: Path) -> None:
    path = tree.object_path(1)
    whole = path.read_bytes()
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        path.write_bytes(whole[:-9])
        with pytest.raises(FetchError, match="sent range|shorter"):
            climb(dev, "w3", patience=QUICK)
        path.write_bytes(b"")
        with pytest.raises(FetchError, match="shorter than the manifest says"):
            climb(dev, "w3", patience=QUICK)
        path.write_bytes(whole)
        climb(dev, "w3")


def test_swapped_objects_are_refused(tree: Tree, dev: Path) -> None:
    a, b = tree.object_path(1), tree.object_path(2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second.ljust(len(first), b"\0")[: len(first)])
    with serving(tree.root) as url:
        with pytest.raises(BundleError, match="damaged or swapped"):
            pull(url, dev, "w4")
    assert DeviceFolder(dev).current() is None


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda data: data[:-1], "is not the one that its release names"),
        (lambda data: data + b"\n", "has .* bytes, at most"),
        (lambda data: data.replace(b'"toy"', b'"tuy"'), "is not the one that its release names"),
    ],
)
def test_an_edited_manifest_is_refused(tree: Tree, dev: Path, edit: Callable[[bytes], bytes], match: str) -> None:
    path = tree.root / "manifests" / f"{tree.digest}.json"
    path.write_bytes(edit(path.read_bytes()))
    with serving(tree.root) as url:
        with pytest.raises(QDeployError, match=match):
            pull(url, dev, "w2", patience=QUICK)
    assert DeviceFolder(dev).current() is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"<html>welcome</html>", b"{" * 5000])
def test_what_is_no_release_is_refused(tree: Tree, dev: Path, data: bytes) -> None:
    (tree.root / "release.json").write_bytes(data)
    with serving(tree.root) as url:
        with pytest.raises(BundleError, match=r"release\.json"):
            pull(url, dev, "w2")


def test_a_url_without_a_release(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        with pytest.raises(FetchError, match=r"release\.json is not there \(404\): check the URL"):
            pull(url + "/elsewhere", dev, "w2")


def test_a_manifest_damaged_on_disk_is_fetched_again(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        damage(dev / "manifests" / f"{tree.digest}.json", 50)
        with pytest.raises(BundleError, match="is damaged: run `qdeploy pull` again"):
            climb(dev, "w3")
        assert pull(url, dev, "w2").fetched["manifest"] > len(manifest_bytes(tree.manifest))


def test_a_damaged_pointer_is_replaced(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        (dev / "current.json").write_bytes(b"{")
        with pytest.raises(BundleError, match=r"current\.json"):
            climb(dev, "w3")
        assert pull(url, dev, "w2").total_fetched < 1000


def test_a_lost_journal_costs_nothing(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        (dev / "journal").unlink()
        assert file_of(dev, "w2") == tree.files["w2"]
        again = pull(url, dev, "w2")
    assert {kind for kind, size in again.fetched.items() if size} == {"manifest"}
    assert DeviceFolder(dev).journal()
