"""Changes of the rollout as the fleet page asks for them: rehearsed, confirmed, signed, and seen by devices."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.bundle.rollout import metadata_name
from qdeploy.cli import main
from qdeploy.errors import BundleError, DataError, DeviceError, TrustError
from qdeploy.serve.catalogue import read_signed
from qdeploy.serve.controls import Change, Changed, Controls, parse_change
from qdeploy.trust.keys import rotate_keys
from qdeploy.trust.publish import Wish, refresh
from tests.trust.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, "1/1", "1/1")
    world.publish(0)
    return world


@pytest.fixture
def controls(world: World) -> Controls:
    return Controls(world.storage.root, [world.home], None)


def change(**more: object) -> Change:
    return parse_change({"model": "toy", **more})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_says_what_would_be_and_writes_nothing(world: World, controls: Controls) -> None:
    before = files(world.folder)
    plan = controls.plan(change(hold=True, minimum="w3", levels={"board": "w4"}))
    assert plan["before"] == {
        "channel": "stable", "release": 1, "percent": None, "hold": False, "minimum": None, "levels": {}
    }  # fmt: skip
    assert plan["after"] == plan["before"] | {"hold": True, "minimum": "w3", "levels": {"board": "w4"}}
    assert files(world.folder) == before


def test_what_was_planned_is_what_devices_see(world: World, controls: Controls) -> None:
    asked = change(minimum="w3", levels={"board": "w4"})
    plan = controls.plan(asked)
    done = controls.apply(asked, plan["confirm"])
    assert {name: done[name] for name in plan["after"]} == plan["after"]
    said = world.hear(world.device(), hardware="board")
    assert (said.release, said.level, said.minimum) == (1, "w4", "w3")


def test_the_command_does_the_same(world: World, controls: Controls, tmp_path: Path) -> None:
    asked = change(hold=True, levels={"a board": "w4", "other": ""}, minimum="w3")
    words = shlex.split(controls.plan(asked)["command"])
    assert words[0] == "qdeploy" and CliRunner().invoke(main, words[1:]).exit_code == 0
    entry = read_signed(world.storage.root).rollout["toy"].stable
    assert entry is not None
    assert (entry.hold, entry.minimum, dict(entry.levels)) == (True, "w3", {"a board": "w4"})


def test_canary_and_promotion(world: World, controls: Controls) -> None:
    world.publish(1, percent=10)
    for asked, share in ((change(percent=60), 60), (change(promote=True), None)):
        plan = controls.plan(asked)
        assert plan["before"]["channel"] == "canary" and plan["after"]["percent"] == share
        controls.apply(asked, plan["confirm"])
    assert world.hear(world.device()).release == 2
    with pytest.raises(BundleError, match="no canary"):
        controls.plan(change(promote=True))


def test_a_canary_does_not_shrink(world: World, controls: Controls) -> None:
    world.publish(1, percent=50)
    with pytest.raises(BundleError, match="50% of the devices"):
        controls.plan(change(percent=10))


def test_back_to_an_earlier_release(world: World, controls: Controls) -> None:
    device = world.device()
    old = world.hear(device)
    world.publish(1)
    new = world.hear(device)
    assert controls.earlier() == {"toy": [1]}
    asked = change(back=1)
    plan = controls.plan(asked)
    assert plan["after"]["release"] == 3
    controls.apply(asked, plan["confirm"])
    said = world.hear(device)
    assert said.release == 3 and new.release == 2 and old.release == 1
    shown = read_signed(world.storage.root).rollout["toy"].stable
    assert shown is not None and shown.release == 3
    assert controls.earlier() == {"toy": [2, 1]}
    with pytest.raises(TrustError, match="no earlier release 3"):
        controls.plan(change(back=3))


def test_nobody_goes_back_to_what_replaced_keys_signed(world: World, controls: Controls) -> None:
    """Who stole the old keys may have put anything there."""
    world.publish(1)
    rotate_keys(world.keys, "targets", None, None)
    refresh(world.storage, world.keys)
    assert controls.earlier() == {}
    world.publish(2)
    assert controls.earlier() == {"toy": [2]}  # signed again by the new ones


def test_a_planted_manifest_is_no_release(world: World, controls: Controls) -> None:
    world.publish(1)
    name = metadata_name("targets", 1)
    data = world.storage.read(name)
    assert data is not None and controls.earlier() == {"toy": [1]}
    forged = data.replace(b'"length": ', b'"length": 1').replace(b'"length":', b'"length":1')
    assert forged != data
    world.storage.write(name, forged)
    assert controls.earlier() == {}


def test_a_tree_that_changed_since_is_refused(world: World, controls: Controls) -> None:
    asked = change(hold=True)
    confirm = controls.plan(asked)["confirm"]
    world.rollout(minimum="w3")
    before = files(world.folder)
    with pytest.raises(Changed, match="review it again"):
        controls.apply(asked, confirm)
    assert files(world.folder) == before


def test_another_publisher_at_work(world: World, controls: Controls) -> None:
    asked = change(hold=True)
    confirm = controls.plan(asked)["confirm"]
    with world.storage.locked(), pytest.raises(DeviceError, match="another publisher"):
        controls.apply(asked, confirm)


def test_without_keys_there_are_only_commands(world: World) -> None:
    controls = Controls(world.storage.root, [], None)
    plan = controls.plan(change(percent=20))
    assert plan["command"].endswith("--keys KEYS --model toy --canary 20%") and plan["after"] is None
    assert controls.plan(change(back=1))["command"].startswith("qdeploy publish BUNDLE --to ")
    assert controls.earlier() == {} and not controls.signs
    with pytest.raises(TrustError, match="no keys"):
        controls.apply(change(hold=True), "")


def test_keys_that_cannot_sign(world: World, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="holds no 1.root.json"):
        Controls(world.storage.root, [tmp_path / "nowhere"], None)
    for path in world.home.glob("targets-*.pem"):
        path.unlink()
    with pytest.raises(TrustError, match="needs 1 signatures"):
        Controls(world.storage.root, [world.home], None).plan(change(hold=True))
    (tmp_path / "words").write_text("\n")
    with pytest.raises(TrustError, match="is empty"):
        Controls(world.storage.root, [world.home], tmp_path / "words")


@pytest.mark.parametrize(
    "value",
    [
        None, [], "toy", {}, {"hold": True}, {"model": "toy"}, {"model": ""}, {"model": 3, "hold": True},
        {"model": "toy", "hold": 1}, {"model": "toy", "hold": None}, {"model": "toy", "percent": 0},
        {"model": "toy", "percent": 101}, {"model": "toy", "percent": True}, {"model": "toy", "percent": "10"},
        {"model": "toy", "levels": ["w4"]}, {"model": "toy", "levels": {"a": 4}}, {"model": "toy", "promote": "yes"},
        {"model": "toy", "minimum": ""}, {"model": "toy", "back": 1, "hold": True}, {"model": "toy", "other": 1},
        {"model": "toy", "back": 1, "promote": True}, {"model": "toy", "promote": False},
        {"model": "toy", "levels": {}},
    ],
)  # fmt: skip
def test_what_is_no_change(value: object) -> None:
    with pytest.raises(DataError):
        parse_change(value)


def test_changes() -> None:
    assert change(percent=5, hold=False) == Change("toy", Wish(False, None, None, 5))
    assert change(levels={"a": ""}) == Change("toy", Wish(levels={"a": ""}))
    assert change(back=2) == Change("toy", Wish(), back=2)
