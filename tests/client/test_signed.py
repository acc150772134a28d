"""Pulls, climbs and drops under signed metadata, over loopback servers."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from qdeploy.client.pull import climb, drop, pull
from qdeploy.client.settings import read_settings
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import BundleError, FetchError, TrustError
from qdeploy.serve.app import serving
from tests.client.device import QUICK, damage, file_of
from tests.client.tree import make_tree
from tests.trust.world import LONG_AGO, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def root(world: World) -> Path:
    return world.home / "1.root.json"


def test_a_root_is_given_once(world: World, root: Path, dev: Path) -> None:
    world.publish()
    with serving(world.storage.root) as url:
        with pytest.raises(TrustError, match="no root of trust yet: give --root FILE .* or --unsigned"):
            pull(url, dev)
        assert not dev.exists()
        first = pull(url, dev, root=root)
        assert (first.signed, first.level, first.wanted, first.release) == (True, "w2", "w2", 1)
        assert climb(dev, "w4").signed
        world.publish(seed=1)
        second = pull(url, dev)
        assert (second.release, second.level) == (2, "w4")
        with pytest.raises(TrustError, match="takes only what is signed: leave out --unsigned"):
            pull(url, dev, unsigned=True)
        with pytest.raises(TrustError, match="exclude each other"):
            pull(url, dev, root=root, unsigned=True)
    assert file_of(dev, "w4") == world.bundle(1).files["w4"]


def test_unsigned_says_so_each_time(world: World, dev: Path) -> None:
    world.publish()
    said: list[str] = []
    with serving(world.storage.root) as url:
        for _ in range(2):
            report = pull(url, dev, unsigned=True, echo=said.append)
            assert not report.signed and "(UNSIGNED)" in report.lines()[0]
    assert len(said) == 2 and all("nothing is signed" in text for text in said)
    assert "(UNSIGNED)" in climb(dev, "w2").lines()[0]


def test_the_device_id_is_made_once_and_random(world: World, root: Path, tmp_path: Path) -> None:
    world.publish()
    ids = set()
    with serving(world.storage.root) as url:
        for name in ("a", "b"):
            for _ in range(2):
                pull(url, tmp_path / name, root=root)
                settings = read_settings(tmp_path / name)
                assert settings is not None
                ids.add((name, settings.id))
    assert len(ids) == 2 and all(len(found) == 32 for _, found in ids)


def test_wanted_levels_and_the_minimum(root: Path, world: World, dev: Path) -> None:
    """The hardware class is that of the artifact which suits this machine."""
    here = {"name": "here", "arch": platform.machine(), "features": []}
    world._bundles[0] = make_tree(world.folder / "b", artifact_bytes=900, target=here)
    world.publish(minimum="w3", levels={"here": "w4"})
    with serving(world.storage.root) as url:
        with pytest.raises(TrustError, match="level w2 is below the minimum w3"):
            pull(url, dev, "w2", root=root)
        report = pull(url, dev)
        assert (report.level, report.wanted, report.minimum) == ("w4", "w4", "w3")
        report = drop(dev, "w3")
        assert (report.level, report.wanted) == ("w3", "w4")
        assert "wanted: release 1, level w4" in report.lines()
        with pytest.raises(TrustError, match="level w2 is below the minimum w3"):
            drop(dev, "w2")
        world.rollout(levels={"here": "w3"})
        assert pull(url, dev).level == "w3"
    assert DeviceFolder(dev).chosen().level == "w3"


def test_the_lowest_level_that_may_run_without_a_wish(world: World, root: Path, dev: Path) -> None:
    world.publish()
    with serving(world.storage.root) as url:
        assert pull(url, dev, root=root).level == "w2"
        world.rollout(minimum="w3")
        assert pull(url, dev).level == "w3"


def test_on_hold_the_release_in_force_stays_and_is_mended(world: World, root: Path, dev: Path, tmp_path: Path) -> None:
    world.publish()
    with serving(world.storage.root) as url:
        pull(url, dev, root=root)
        world.publish(seed=1)
        world.rollout(hold=True)
        with pytest.raises(TrustError, match="release 2 of toy is on hold"):
            pull(url, tmp_path / "new", root=root)
        assert DeviceFolder(tmp_path / "new").current() is None
        damage(dev / "objects" / world.bundle(0).manifest.objects[0].sha256, 7)
        report = pull(url, dev)
        assert (report.release, report.wanted_release, report.hold) == (1, 2, True)
        assert "the rollout is on hold: no other release is taken" in report.lines()
        assert climb(dev, "w3").release == 1
        world.rollout(hold=False)
        assert pull(url, dev).release == 2


def test_stale_metadata_is_reported_and_nothing_new_taken(world: World, root: Path, dev: Path) -> None:
    world.publish()
    with serving(world.storage.root) as url:
        pull(url, dev, "w3", root=root)
        world.publish(seed=1, now=LONG_AGO)
        report = pull(url, dev)
        assert report.release == 1 and report.stale is not None and "expired" in report.stale
        world.refresh()
        assert (pull(url, dev).release, pull(url, dev).stale) == (2, None)


def test_a_canary_is_asked_for_by_name_and_remembered(world: World, root: Path, dev: Path) -> None:
    world.publish()
    world.publish(seed=1, percent=1)
    with serving(world.storage.root) as url:
        assert pull(url, dev, root=root, channel="canary").release == 2
        assert pull(url, dev).release == 2
        with pytest.raises(TrustError, match="rollback: release 1"):
            pull(url, dev, channel="stable")


def test_a_mirror_with_foreign_metadata_is_set_aside(world: World, root: Path, dev: Path, tmp_path: Path) -> None:
    foreign = World(tmp_path / "foreign")
    foreign.publish(seed=1)
    world.publish()
    with serving(foreign.storage.root) as bad, serving(world.storage.root) as good:
        report = pull([bad, good], dev, "w4", root=root)
        assert list(report.set_aside) == [bad] and report.release == 1
        with pytest.raises(TrustError):
            pull(bad, dev, patience=QUICK)
    assert file_of(dev, "w4") == world.bundle(0).files["w4"]


def test_of_two_mirrors_the_fresh_one_is_followed(world: World, root: Path, dev: Path, tmp_path: Path) -> None:
    world.publish(now=LONG_AGO)
    world.refresh()
    with serving(world.storage.root) as good:
        pull(good, dev, root=root)
        world.refresh(now=LONG_AGO)
        shutil.copytree(world.storage.root, tmp_path / "late")
        world.refresh()
        world.publish(seed=1)
        with serving(tmp_path / "late") as late:
            report = pull([late, good], dev)
            assert (report.release, report.stale) == (2, None)


def test_a_signed_manifest_that_is_swapped_is_not_taken(world: World, root: Path, dev: Path) -> None:
    done = world.publish()
    path = world.storage.root / "manifests" / f"{done.entry.sha256}.json"
    path.write_bytes(path.read_bytes().replace(b'"toy"', b'"tuy"'))
    with serving(world.storage.root) as url, pytest.raises(BundleError, match="not the one that its release names"):
        pull(url, dev, root=root)
    assert DeviceFolder(dev).current() is None


def test_without_a_server_the_level_stays(world: World, root: Path, dev: Path) -> None:
    world.publish()
    with serving(world.storage.root) as url:
        pull(url, dev, root=root)
    with pytest.raises(FetchError):
        pull(url, dev, patience=QUICK)
    assert file_of(dev, "w2") == world.bundle(0).files["w2"]
