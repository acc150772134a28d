"""Bytes that a device reads, by the server's log: never more than the signed size of what it lacks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qdeploy.bundle.store import artifact_pieces, pieces_of
from qdeploy.client.pull import climb, drop, pull
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import Sent, read_byte_log
from tests.client.device import assert_nothing_twice, file_of
from tests.client.tree import Tree, make_tree
from tests.faults.conftest import Amount, Record
from tests.trust.world import World

LEVELS = ("w2", "w3", "w4")


def sizes(tree: Tree, level: str) -> int:
    """Coded bytes of a level and of the levels below it."""
    wanted = {piece for name in LEVELS[: LEVELS.index(level) + 1] for piece in pieces_of(tree.manifest, name)}
    return sum(tree.manifest.pieces[piece].size for piece in wanted)


def objects(rows: list[Sent]) -> int:
    return sum(row.sent for row in rows if row.path.startswith("/objects/"))


def no_file_twice(rows: list[Sent], root: Path) -> None:
    """No request was answered with more than the file holds, and no byte of an object came twice."""
    assert_nothing_twice(rows)
    assert all(row.sent <= (root / row.path.lstrip("/")).stat().st_size for row in rows if row.status in (200, 206))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pull_climb_and_update(seed: int, work: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publish(seed)
    tree, root = world.bundle(seed), world.storage.root
    log = tmp_path / "log"
    seen = 0

    def new(rows: list[Sent]) -> list[Sent]:
        nonlocal seen
        fresh, seen = rows[seen:], len(rows)
        no_file_twice(fresh, root)
        return fresh

    with serving(root, log=log) as url:
        report = pull(url, work, "w2", root=world.home / "1.root.json")
        rows = new(read_byte_log(log))
        assert objects(rows) == sizes(tree, "w2") and report.received == sum(row.sent for row in rows)
        pull(url, work, "w2")
        assert objects(new(read_byte_log(log))) == 0
        climb(work, "w3")
        rows = new(read_byte_log(log))
        assert sum(row.sent for row in rows) == objects(rows) == sizes(tree, "w3") - sizes(tree, "w2")
        drop(work, "w2")
        climb(work, "w3")
        assert not new(read_byte_log(log))
        climb(work, "w4")
        assert objects(new(read_byte_log(log))) == sizes(tree, "w4") - sizes(tree, "w3")
        world.publish(seed + 1)
        report = pull(url, work, "w3")
        rows = new(read_byte_log(log))
        assert report.received == sum(row.sent for row in rows)
        assert objects(rows) <= sizes(world.bundle(seed + 1), "w3")
        world.publish(seed)  # the old bundle again: its objects are here
        pull(url, work, "w4")
        assert objects(new(read_byte_log(log))) == 0
    assert file_of(work, "w4") == tree.files["w4"]


def test_random_walks(tmp_path: Path, amount: Amount, record: Record) -> None:
    """Pulls, climbs and drops in any order fetch each byte of the top level once at most."""
    tree = make_tree(tmp_path / "root", weights=(900, 70), artifact_bytes=300)
    whole = sizes(tree, "w4") + sum(tree.manifest.pieces[piece].size for piece in artifact_pieces(tree.manifest, 0))
    log, before, walks = tmp_path / "log", 0, amount(4, 1000)
    with serving(tree.root, log=log) as url:
        for walk in range(walks):
            rng, folder = random.Random(walk), tmp_path / f"dev{walk}"
            level = rng.choice(LEVELS)
            received = pull(url, folder, level, unsigned=True).received
            for _ in range(6):
                wanted = rng.choice(LEVELS)
                if rng.random() < 0.3:
                    received += pull(url, folder, wanted, unsigned=True).received
                elif wanted > level:
                    received += climb(folder, wanted).received
                elif wanted < level:
                    drop(folder, wanted)
                level = wanted
                assert file_of(folder, level) == tree.files[level]
            rows = read_byte_log(log)[before:]
            before += len(rows)
            assert_nothing_twice(rows)
            assert objects(rows) <= whole and received == sum(row.sent for row in rows)
    record("walks over levels, bytes by the server's log", trials=walks, wrong=0)
