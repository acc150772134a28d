"""What is published, read back from a tree that the publishing code wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdeploy.bundle.store import object_name, pieces_of
from qdeploy.client.plan import piece_kinds
from qdeploy.errors import BundleError
from qdeploy.serve.catalogue import Catalogue, read_signed, summary_of
from tests.client.tree import make_tree
from tests.trust.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, "1/1", "1/1")


def test_bytes_of_levels_are_those_that_devices_fetch(tmp_path: Path) -> None:
    manifest = make_tree(tmp_path / "b", artifact_bytes=900, target={"name": "board"}).manifest
    found = summary_of(manifest)
    sizes = [piece.size for piece in manifest.pieces]
    assert [row["bytes"] for row in found.levels] == [
        sum(sizes[piece] for piece in piece_kinds(manifest, name, None)) for name in ("w2", "w3", "w4")
    ]
    held = set(pieces_of(manifest, "w2"))
    step = set(pieces_of(manifest, "w3")) - held
    assert [row["step"] for row in found.levels][:2] == [sum(sizes[p] for p in held), sum(sizes[p] for p in step)]
    assert found.artifacts == [{"name": "board", "bytes": 900}]
    assert [row["of"] for row in found.objects] == [["w2"], ["w3"], ["w4"], ["program for board"]]


def test_channels_and_shared_objects(world: World) -> None:
    world.publish(0, minimum="w3", levels={"board": "w4"})
    world.publish(1)
    world.publish(1, percent=10, hold=True)
    found, rollout = Catalogue(world.storage.root).read()
    assert rollout == read_signed(world.storage.root).rollout
    stable, canary = found["releases"]
    assert (stable["channel"], stable["release"], stable["percent"], stable["hold"]) == ("stable", 2, None, False)
    assert (canary["channel"], canary["release"], canary["percent"], canary["hold"]) == ("canary", 3, 10, True)
    assert (canary["minimum"], canary["classes"]) == ("w3", {"board": "w4"})
    objects = found["objects"]
    assert objects["count"] == objects["shared"] == 3 and objects["stored"] == 6 and objects["missing"] == []
    assert all(row["releases"] == ["toy 2", "toy 3"] for row in objects["rows"])
    assert objects["bytes"] == objects["shared_bytes"] == sum(row["size"] for row in objects["rows"])
    assert found["signed"] and found["versions"]["timestamp"] == 3 and "T" in found["expires"]["timestamp"]
    json.dumps(found)


def test_it_follows_the_tree(world: World) -> None:
    world.publish(0)
    catalogue = Catalogue(world.storage.root)
    assert catalogue.read()[0]["releases"][0]["release"] == 1
    world.publish(1)
    found = catalogue.read()[0]
    assert found["releases"][0]["release"] == 2 and found["objects"]["stored"] == 6
    gone = found["objects"]["rows"][0]["sha256"]
    (world.storage.root / object_name(gone)).unlink()
    assert catalogue.read()[0]["objects"]["missing"] == [gone]


def test_a_tree_that_nobody_signed(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "b")
    found, rollout = Catalogue(tree.root).read()
    assert rollout is None and not found["signed"] and found["expires"] == {}
    (row,) = found["releases"]
    assert (row["model"], row["channel"], row["release"]) == ("toy", None, 1)


def test_what_is_damaged(world: World) -> None:
    world.publish(0)
    (manifest,) = (world.storage.root / "manifests").iterdir()
    manifest.write_bytes(manifest.read_bytes()[:-2] + b" \n")
    with pytest.raises(BundleError, match="damaged"):
        Catalogue(world.storage.root).read()
    manifest.unlink()
    with pytest.raises(BundleError, match="cannot read the manifest"):
        Catalogue(world.storage.root).read()
    with pytest.raises(BundleError, match="cannot read the release"):
        Catalogue(world.folder / "nowhere").read()
