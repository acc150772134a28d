"""Keys that were replaced: old ones count no more, and what a thief counted up is forgotten with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.bundle.rollout import Channels, metadata_name
from qdeploy.errors import TrustError
from qdeploy.trust.keys import rotate_keys
from tests.client.test_trust import lose_cache, losses
from tests.trust.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@losses
@pytest.mark.parametrize("role", ["root", "targets", "online"])
def test_rotation_is_followed_and_old_keys_count_no_more(world: World, lose: Callable[[Path], None], role: str) -> None:
    device, thief = world.device(), world.keys
    world.publish(0)
    world.hear(device)
    assert len(thief.history) == 1  # what the thief knows
    rotate_keys(world.keys, role, None, None)
    world.refresh()
    assert world.hear(device).release == 1
    lose(device)
    if role == "root":
        forged = thief.root
        forged.version = 3
        world.served[metadata_name("root", 3)] = world.sign(forged, thief)
    else:
        world.serve_state(timestamp=50, snapshot=50, targets=50, keys=thief)
    with pytest.raises(TrustError, match="wrong signature"):
        world.hear(device)
    world.served = {}
    world.publish(1)
    assert world.hear(device).release == 2


def test_old_root_metadata_after_a_rotation(world: World) -> None:
    """The newest root is withheld, the cache is lost, and the old online key signs: the root's counter refuses."""
    device, thief = world.device(), world.keys
    world.publish(0)
    assert len(thief.history) == 1
    world.hear(device)
    rotate_keys(world.keys, "online", None, None)
    world.refresh()
    world.hear(device)
    lose_cache(device)
    world.serve_state(timestamp=50, snapshot=50, keys=thief)
    world.served[metadata_name("root", 2)] = None
    with pytest.raises(TrustError, match="rollback: root version 1 is served, 2 was seen before"):
        world.hear(device)


@losses
def test_recovery_from_fast_forward(world: World, lose: Callable[[Path], None]) -> None:
    """A thief of the online key counts to the limit; with new keys versions start anew from the restored tree."""
    device = world.device()
    world.publish(0)
    restored = world.tree()
    top = (1 << 53) - 1
    world.serve_state(timestamp=top, snapshot=top)
    assert world.hear(device).release == 1
    lose(device)
    world.served = {}
    world.publish(1)
    with pytest.raises(TrustError, match="rollback"):
        world.hear(device)
    rotate_keys(world.keys, "online", None, None)
    world.refresh()
    assert world.hear(device).release == 2
    world.replay(restored)
    with pytest.raises(TrustError):
        world.hear(device)


@losses
def test_recovery_from_stolen_targets_keys(world: World, lose: Callable[[Path], None]) -> None:
    """The thief publishes the highest release number there is; new targets keys and the counter starts anew."""
    device = world.device()
    world.publish(0)
    top = (1 << 53) - 1
    world.serve_rollout(lambda rollout: {"toy": Channels(replace(rollout["toy"].stable, release=top))})
    assert world.hear(device).release == top
    lose(device)
    world.served = {}
    world.publish(1)
    world.publish(0)
    with pytest.raises(TrustError, match="rollback"):
        world.hear(device)
    rotate_keys(world.keys, "targets", None, None)
    rotate_keys(world.keys, "online", None, None)
    world.refresh()
    assert world.hear(device).release == 3


def test_one_replaced_key_of_several_keeps_the_counters(tmp_path: Path) -> None:
    """Old signatures still reach the threshold, so the counters still bind."""
    world = World(tmp_path, targets="1/2")
    device = world.device()
    world.publish(0)
    old = world.tree()
    world.publish(1)
    world.hear(device)
    keys, root = world.keys, world.keys.root
    root.revoke_key(root.roles["targets"].keyids[0], "targets")
    root.version = 2
    (world.home / "2.root.json").write_bytes(world.sign(root, keys))
    world.refresh()
    assert world.hear(device).release == 2
    lose_cache(device)
    world.replay({name: data for name, data in world.tree().items() if name.endswith("root.json")} | old)
    with pytest.raises(TrustError, match="rollback"):
        world.hear(device)
