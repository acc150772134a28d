"""A dry run says to the byte what pull, climb and evict would do, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.bundle.store import object_name
from qdeploy.cli import main
from qdeploy.client.evict import evict, foresee
from qdeploy.client.plan import KINDS
from qdeploy.client.pull import climb, drop, foresee_climb, foresee_pull
from qdeploy.client.pull import pull as signed_pull
from qdeploy.errors import BundleError, FetchError, TrustError
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import QUICK, objects_asked, pull
from tests.client.test_evict import repacked
from tests.client.tree import Tree, make_tree, publish
from tests.trust.world import World


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    found: dict = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("level", [None, "w3", "w4"])
def test_a_first_pull(tree: Tree, dev: Path, tmp_path: Path, level: str | None) -> None:
    log = tmp_path / "log"
    with serving(tree.root, log=log) as url:
        found = foresee_pull(url, dev, level, unsigned=True)
        assert not dev.exists() and not objects_asked(read_byte_log(log))
        report = pull(url, dev, level)
    assert found.level == report.level and not found.signed and found.metadata > 0
    assert dict(found.missing) == {kind: report.fetched[kind] for kind in KINDS}
    assert found.fetch == report.total_fetched - report.fetched["manifest"]


def test_a_climb_and_what_is_held_already(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        before = content(dev)
        found = foresee_climb(dev, "w4")
        assert foresee_pull(url, dev, "w4", unsigned=True).missing == found.missing
        assert content(dev) == before
        report = climb(dev, "w4")
        assert dict(found.missing) == {kind: report.fetched[kind] for kind in KINDS} and found.metadata == 0
        drop(dev, "w2")
        assert foresee_climb(dev, "w4").fetch == 0 and "nothing is missing" in foresee_climb(dev, "w4").text()


def test_bytes_that_another_release_has(dev: Path, tmp_path: Path) -> None:
    one = make_tree(tmp_path / "root", weights=(20_000, 3_000), artifact_bytes=5000)
    two = repacked(one, tmp_path / "root")
    publish(one.root, one.manifest)
    with serving(one.root) as url:
        pull(url, dev, "w2", target="toy")
        publish(one.root, two)
        before = content(dev)
        found = foresee_pull(url, dev, "w4", target="toy", unsigned=True)
        assert content(dev) == before and found.release == 2
        report = pull(url, dev, "w4", target="toy")
    assert report.reused == found.reused > 5000
    assert sum(report.fetched[kind] for kind in KINDS) == found.fetch > 0


def test_signed_releases_leave_the_metadata_as_it_was(dev: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    root = world.home / "1.root.json"
    world.publish()
    with serving(world.storage.root) as url:
        with pytest.raises(TrustError, match="no root of trust yet"):
            foresee_pull(url, dev)
        assert foresee_pull(url, dev, root=root).signed and not dev.exists()
        signed_pull(url, dev, root=root)
        world.publish(seed=1)
        before = content(dev)
        assert foresee_pull(url, dev).release == 2
        assert content(dev) == before
        with pytest.raises(TrustError, match="leave out --unsigned"):
            foresee_pull(url, dev, unsigned=True)
        assert signed_pull(url, dev).release == 2


def test_what_pull_and_climb_refuse(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        calls: list[Callable[[], object]] = [
            lambda: foresee_pull(url, dev, "w9", unsigned=True),
            lambda: foresee_pull(url, dev, target="nothing", unsigned=True),
            lambda: foresee_climb(dev, "w4"),
        ]
        for call in calls:
            with pytest.raises(BundleError):
                call()
        assert not dev.exists()
        pull(url, dev, "w4")
        with pytest.raises(BundleError, match="use drop"):
            foresee_climb(dev, "w2")
    with pytest.raises(FetchError):
        foresee_pull(url, dev, unsigned=True, patience=QUICK)


def test_eviction(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w4")
        drop(dev, "w2")
    before = content(dev)
    found = foresee(dev)
    assert content(dev) == before and found.files > 0
    assert run("evict", dev, "--dry-run", "--json") == {"files": found.files, "bytes": found.bytes, "dry_run": True}
    assert evict(dev) == found
    assert foresee(dev).files == 0


def test_the_commands(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        found = run("pull", url, dev, "--unsigned", "--level", "w3", "--dry-run", "--json")
        assert found["dry_run"] and found["fetch"] > 0 and found["level"] == "w3" and not dev.exists()
        report = run("pull", url, dev, "--unsigned", "--level", "w3", "--json")
        assert sum(report["fetched"].values()) - report["fetched"]["manifest"] == found["fetch"]
        assert run("climb", dev, "--to", "w4", "--dry-run", "--json")["fetch"] == tree.manifest.objects[2].size
        assert not (dev / object_name(tree.manifest.objects[2].sha256)).exists()
        text = CliRunner().invoke(main, ["climb", str(dev), "--to", "w4", "--dry-run"]).stdout
        assert "level w4 (UNSIGNED)\ndry run: " in text and "bytes would be fetched: planes " in text
        assert run("climb", dev, "--to", "w4", "--json")["level"] == "w4"
        assert run("drop", dev, "--to", "w2", "--json")["level"] == "w2"
