"""Hostile servers: with an honest mirror a pull ends well; without one it ends in one line, bounded, state intact."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.client.fetch import Patience
from qdeploy.client.pull import climb, pull
from qdeploy.client.settings import read_settings, write_settings
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import BundleError, FetchError, QDeployError, TrustError
from tests.client.device import file_of
from tests.client.scripted import scripted
from tests.client.tree import Tree, make_tree
from tests.faults.conftest import SHARE, Record
from tests.faults.hostile_http import ATTACKS, SLOW, Attack, serving_files
from tests.trust.world import World

QUICK = Patience(timeout_s=20, attempts=2, pause_s=0.001)
IMPATIENT = Patience(timeout_s=20, attempts=1, pause_s=0.001, grace_s=1.5, floor_bytes_per_s=4)
ALL = {**dict.fromkeys(ATTACKS, QUICK), **dict.fromkeys(SLOW, IMPATIENT)}
LEAF = 65536
TRICKS = {"a byte late", "another request's range", "an answer too many"}  # may come right when asked for again


def attack_of(name: str) -> Attack:
    return (ATTACKS | SLOW)[name]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return make_tree(tmp_path_factory.mktemp("net") / "root", weights=(3000,))


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("signed"))
    world.publish()
    return world


def check_line(error: QDeployError) -> None:
    """One clear line."""
    text = str(error)
    assert text and text.isprintable() and len(text) < 2000, text


def base_of(tree: Tree, folder: Path) -> None:
    """A device that holds w2."""
    with scripted(serving_files(tree.root)) as (url, _):
        pull(url, folder, "w2", unsigned=True)


@pytest.mark.parametrize("name", ALL)
def test_objects_through_the_honest_mirror(name: str, tree: Tree, work: Path, record: Record) -> None:
    evil = serving_files(tree.root, attack_of(name), lambda path: "/objects/" in path)
    with scripted(evil) as (bad, asked), scripted(serving_files(tree.root)) as (good, _):
        report = pull([bad, good], work, "w4", unsigned=True, patience=ALL[name])
    assert file_of(work, "w4") == tree.files["w4"]
    need = sum(entry.size for entry in tree.manifest.objects)
    wasted = report.received - report.total_fetched
    assert wasted <= need + LEAF and len(asked) <= 2 + 2 * QUICK.attempts * len(tree.manifest.objects)
    record("hostile HTTP, objects, an honest mirror behind", trials=1, wrong=0)


@pytest.mark.parametrize("name", ALL)
def test_objects_without_an_honest_mirror(name: str, tree: Tree, work: Path, record: Record) -> None:
    base_of(tree, work)
    before, settings = DeviceFolder(work).chosen(), read_settings(work)
    assert settings is not None
    with scripted(serving_files(tree.root, attack_of(name), lambda path: "/objects/" in path)) as (bad, asked):
        write_settings(work, replace(settings, mirrors=(bad,)))
        try:
            climb(work, "w4", patience=ALL[name])
        except (FetchError, BundleError) as e:
            check_line(e)
        else:
            assert name in TRICKS and file_of(work, "w4") == tree.files["w4"]
            return
    assert len(asked) <= QUICK.attempts * 2
    assert DeviceFolder(work).chosen() == before and file_of(work, "w2") == tree.files["w2"]
    with scripted(serving_files(tree.root)) as (good, _):
        report = pull(good, work, "w4", unsigned=True)
    assert report.total_fetched <= sum(entry.size for entry in tree.manifest.objects[1:]) + LEAF
    assert file_of(work, "w4") == tree.files["w4"]
    record("hostile HTTP, objects, nobody honest", trials=1, wrong=0)


SMALL = sorted(set(ALL) - TRICKS)[:: 1 if SHARE else 3]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("files", ["release.json", "manifests/"])
def test_small_files(name: str, files: str, tree: Tree, work: Path, record: Record) -> None:
    base_of(tree, work)
    before = DeviceFolder(work).chosen()
    (work / "manifests" / f"{tree.digest}.json").unlink()
    evil = serving_files(tree.root, attack_of(name), lambda path: files in path)
    with scripted(evil) as (bad, asked):
        try:
            pull(bad, work, "w4", unsigned=True, patience=ALL[name])
        except (FetchError, BundleError) as e:
            check_line(e)
            assert DeviceFolder(work).chosen() == before and len(asked) <= 2 * QUICK.attempts
        else:  # all right, only said otherwise than usual
            assert name in {"range of another file", "length beyond all"} and file_of(work, "w4") == tree.files["w4"]
        with scripted(serving_files(tree.root)) as (good, _):
            pull([bad, good], work, "w4", unsigned=True, patience=ALL[name])
    assert file_of(work, "w4") == tree.files["w4"]
    record("hostile HTTP, release pointer and manifest", trials=2, wrong=0)


def metadata(path: str) -> bool:
    return "/metadata/" in path or "/rollout/" in path


@pytest.mark.parametrize("name", SMALL)
def test_signed_metadata(name: str, signed: World, work: Path, record: Record) -> None:
    evil = serving_files(signed.storage.root, attack_of(name), metadata)
    root = signed.home / "1.root.json"
    with scripted(evil) as (bad, asked), scripted(serving_files(signed.storage.root)) as (good, _):
        try:
            pull(bad, work, "w2", root=root, patience=ALL[name])
        except (FetchError, TrustError) as e:
            check_line(e)
            assert len(asked) <= 3 * QUICK.attempts
            assert DeviceFolder(work).current() is None
        else:
            assert name in {"range of another file", "length beyond all"}
        report = pull([bad, good], work, "w4", patience=ALL[name])
    assert report.signed and file_of(work, "w4") == signed.bundle().files["w4"]
    record("hostile HTTP, signed metadata", trials=2, wrong=0)


def test_a_crowd_of_liars_and_one_honest_mirror(tree: Tree, work: Path) -> None:
    """Many mirrors that each do something else; the last one is right."""
    names = list(ATTACKS)[9::4]
    with ExitStack() as stack:

        def start(attack: Attack | None, hits: Callable[[str], bool]) -> str:
            answer = serving_files(tree.root) if attack is None else serving_files(tree.root, attack, hits)
            return stack.enter_context(scripted(answer))[0]

        urls = [start(attack_of(name), lambda path: "/objects/" in path) for name in names] + [start(None, bool)]
        report = pull(urls, work, "w4", unsigned=True, patience=QUICK)
        assert len(names) > 9 and file_of(work, "w4") == tree.files["w4"]
        assert urls[-1] not in report.set_aside
        with pytest.raises(QDeployError) as error:
            pull(urls[:-1], work.with_name("other"), "w4", unsigned=True, patience=QUICK)
    assert all(url in str(error.value) for url in urls[:-1])
