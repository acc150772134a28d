"""Quotas, eviction, new releases that share bytes with old ones, and disks that fail."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.bundle.manifest import Manifest, Object, check
from qdeploy.bundle.store import assemble, leaf_digests, object_name
from qdeploy.client import disk as edge
from qdeploy.client.evict import evict, used
from qdeploy.client.pull import climb, drop
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import sha256, write_atomic
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import assert_nothing_twice, file_of, objects_asked, pull
from tests.client.tree import Tree, make_tree, publish
from tests.faults.faulty import Failing


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def test_a_quota_is_refused_before_a_byte_is_fetched(dev: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root", weights=(400_000,))
    log = tmp_path / "log"
    with serving(tree.root, log=log) as url:
        pull(url, dev, "w2")
        have = used(dev)
        pull(url, dev, "w2", quota=have + 10_000)
        before = len(objects_asked(read_byte_log(log)))
        with pytest.raises(DeviceError, match=rf"needs \d+ bytes more, .* may take {have + 10_000}: .*would free 0"):
            climb(dev, "w3")
        assert len(objects_asked(read_byte_log(log))) == before
        assert DeviceFolder(dev).chosen().level == "w2"
        pull(url, dev, "w4", quota=10_000_000)  # remembered from now on
        drop(dev, "w2")
        pull(url, dev, "w2", quota=have + 1000)  # nothing is missing, so nothing is refused
        publish(tree.root, make_tree(tmp_path / "other", weights=(400_000,), seed=3, release=2).manifest)
        with pytest.raises(DeviceError, match=r"release 2 needs \d+ bytes more, .* would free (\d+)") as refused:
            pull(url, dev, "w2")
        assert f"would free {evict(dev).bytes}," in str(refused.value)
        assert used(dev) < have + 4096


def test_eviction_keeps_the_level_in_force_and_what_is_below(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w4")
        drop(dev, "w3")
        size = tree.manifest.objects[2].size
        freed = evict(dev)
        assert (freed.files, freed.bytes) == (1, size)
        assert not (dev / "objects" / tree.manifest.objects[2].sha256).exists()
        assert DeviceFolder(dev).chosen().previous is None  # it was w4
        drop(dev, "w2")
        assert file_of(dev, "w2") == tree.files["w2"]
        assert evict(dev).files == 1
        assert evict(dev).files == 0
        report = climb(dev, "w4")
    assert report.fetched["planes"] > 0
    assert file_of(dev, "w4") == tree.files["w4"]


def test_the_old_release_stays_until_it_is_evicted(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w3")
        make_tree(tree.root, seed=5, release=2)
        pull(url, dev, "w3")
        device = DeviceFolder(dev)
        old = device.manifest(tree.digest)
        assert device.chosen().previous == (tree.digest, "w3")
        assert assemble(old, "w3", device.reader(old)) == tree.files["w3"]
        evict(dev)
    assert device.chosen().previous is None
    assert not (dev / "manifests" / f"{tree.digest}.json").exists()
    assert all((dev / "objects" / entry.sha256).exists() is False for entry in tree.manifest.objects)
    file_of(dev, "w3")


def test_an_eviction_that_is_killed_at_any_step_harms_nothing(dev: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root")
    with serving(tree.root) as url:
        pull(url, dev, "w4")
        drop(dev, "w2")
        step = 0
        while True:
            shutil.rmtree(tmp_path / "work", ignore_errors=True)
            shutil.copytree(dev, tmp_path / "work")
            step += 1
            with failing_at(step, errno.EIO) as disk:
                try:
                    evict(tmp_path / "work")
                except DeviceError as e:
                    assert "\n" not in str(e)
            assert file_of(tmp_path / "work", "w2") == tree.files["w2"]
            climb(tmp_path / "work", "w4")
            assert file_of(tmp_path / "work", "w4") == tree.files["w4"]
            if disk.calls < step:
                break
    assert step > 5


class failing_at:  # noqa: N801 - a context manager
    """The disk fails at one step; gives the layer, which counts them."""

    def __init__(self, at: int, code: int) -> None:
        self.disk = Failing(at, code, stays=False)

    def __enter__(self) -> Failing:
        edge.disk = self.disk
        return self.disk

    def __exit__(self, *_: object) -> None:
        edge.disk = edge.Disk()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_step_costs_one_line(tree: Tree, dev: Path, tmp_path: Path, code: int) -> None:
    """Every step of a climb fails once: one line, the level in force unharmed, and the next climb succeeds."""
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        step = 0
        while True:
            step += 1
            shutil.rmtree(tmp_path / "work", ignore_errors=True)
            shutil.copytree(dev, tmp_path / "work")
            with failing_at(step, code) as disk:
                try:
                    climb(tmp_path / "work", "w3")
                except DeviceError as e:
                    assert "\n" not in str(e) and "the level in use is untouched" in str(e)
                    assert "disk is full" in str(e) or code == errno.EIO
            level = DeviceFolder(tmp_path / "work").chosen().level
            assert file_of(tmp_path / "work", level) == tree.files[level]
            if disk.calls < step:
                break
            assert climb(tmp_path / "work", "w3").level == "w3"
    assert level == "w3" and step > 10


def test_a_new_release_takes_equal_pieces_from_disk(dev: Path, tmp_path: Path) -> None:
    """The same pieces in other objects: copied, not fetched."""
    one = make_tree(tmp_path / "root", weights=(200_000, 3_000), artifact_bytes=300_000)
    two = repacked(one, tmp_path / "root")
    log = tmp_path / "log"
    assert two.objects[0] not in one.manifest.objects
    publish(one.root, one.manifest)
    with serving(one.root, log=log) as url:
        pull(url, dev, "w3", target="toy")
        publish(one.root, two)
        before = len(read_byte_log(log))
        report = pull(url, dev, "w3", target="toy")
        assert report.release == 2 and report.reused > 300_000
        assert not objects_asked(read_byte_log(log)[before:])
        assert {kind for kind, size in report.fetched.items() if size} == {"manifest"}
        assert climb(dev, "w4").total_fetched == one.manifest.objects[2].size
    assert_nothing_twice(read_byte_log(log))
    assert file_of(dev, "w4") == one.files["w4"]


def repacked(tree: Tree, root: Path) -> Manifest:
    """Release 2 of a tree: the same pieces, all but the last level's in one object."""
    manifest = tree.manifest
    data = [tree.object_path(i).read_bytes() for i in range(len(manifest.objects))]
    order = [0, 1, 3, 2]  # the artifact before the last level
    joined = [data[0] + data[1] + data[3], data[2]]
    base = {0: (0, 0), 1: (0, len(data[0])), 3: (0, len(data[0]) + len(data[1])), 2: (1, 0)}
    rank = {old: k for k, old in enumerate(sorted(range(len(manifest.pieces)), key=lambda p: (
        order.index(manifest.pieces[p].object), manifest.pieces[p].offset)))}  # fmt: skip
    moved = {}
    for old, piece in enumerate(manifest.pieces):
        where, start = base[piece.object]
        moved[rank[old]] = replace(piece, object=where, offset=start + piece.offset)
    pieces = [moved[new] for new in sorted(moved)]
    objects = []
    for blob in joined:
        blob_name = sha256(blob)
        write_atomic(root / object_name(blob_name), blob)
        objects.append(Object(blob_name, len(blob), leaf_digests(blob)))
    tensors = tuple(replace(t, parts=tuple(replace(p, piece=rank[p.piece]) for p in t.parts)) for t in manifest.tensors)
    levels = tuple(replace(v, side=None if v.side is None else rank[v.side]) for v in manifest.levels)
    artifacts = tuple(replace(a, files=tuple((n, rank[p]) for n, p in a.files)) for a in manifest.artifacts)
    return check(
        replace(
            manifest, release=2, objects=tuple(objects), pieces=tuple(pieces), skeleton=rank[manifest.skeleton],
            tensors=tensors, levels=levels, artifacts=artifacts,
        )
    )  # fmt: skip


@pytest.fixture(autouse=True)
def real_disk() -> Iterator[None]:
    """Whatever a test does to the edge ends with it."""
    yield
    edge.disk = edge.Disk()


def test_nothing_is_evicted_from_a_folder_without_a_level(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    with pytest.raises(BundleError, match="holds no level yet"):
        evict(tmp_path / "dev")
