"""Power cuts, kills, and updates that stop halfway: counters never fall, and a device always recovers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tuf.api.metadata import MetaFile, Snapshot, Timestamp

from qdeploy.bundle.rollout import metadata_name
from qdeploy.client import disk as edge
from qdeploy.errors import TrustError
from qdeploy.trust.keys import expiry, rotate_keys
from tests.client.test_trust import lose_cache, tear_cache
from tests.trust.world import World


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


class Faulty(edge.Disk):
    """Notes what is asked of the disk, and is killed before call number `after`."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after
        self.calls: list[tuple[str, str]] = []

    def _note(self, call: str, where: str | Path) -> None:
        if self.left is not None:
            if not self.left:
                raise Killed
            self.left -= 1
        self.calls.append((call, Path(where).name))

    @staticmethod
    def _name(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}")

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._note("write", self._name(fd))
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._note("fsync", self._name(fd))
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._note("rename", target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._note("unlink", path)
        super().unlink(path)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, root="1/1", targets="1/1")


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[edge.Disk], None]]:
    """Use another disk."""
    yield lambda disk: monkeypatch.setattr(edge, "disk", disk)


def test_counters_are_durable_last(world: World, put: Callable[[edge.Disk], None]) -> None:
    """Every file of the cache is synced, then its folders, then the counters are renamed into place and synced."""
    device = world.device()
    world.publish()
    disk = Faulty()
    put(disk)
    world.hear(device)
    cache = {"1.root.json", "timestamp.json", "snapshot.json", "targets.json", "root_history", "metadata"}
    renamed = disk.calls.index(("rename", "state.json"))
    assert [call for call, _ in disk.calls[renamed - 2 :]] == ["write", "fsync", "rename", "fsync"]
    assert disk.calls[-1] == ("fsync", "trust")
    before = {name for call, name in disk.calls[: renamed - 2] if call == "fsync"}
    assert cache <= before


def test_killed_at_every_call_then_attacked(world: World, put: Callable[[edge.Disk], None]) -> None:
    """Killed anywhere on the way to release 2, its cache torn, then served the old tree: never below what it knew."""
    world.publish(0)
    old = world.tree()
    devices = [world.device(f"dev{steps}") for steps in range(40)]
    for device in devices[:20]:
        world.hear(device)
    world.publish(1)
    heard = set()
    for steps, device in enumerate(devices[:20]):
        disk = Faulty(steps)
        put(disk)
        try:
            world.hear(device)
            done = True
        except Killed:
            done = False
        put(edge.Disk())
        knew = b'"toy":[2,' in (device / "trust" / "state.json").read_bytes()
        assert knew or not done
        tear_cache(device)
        world.replay(old)
        if knew:
            with pytest.raises(TrustError, match="rollback"):
                world.hear(device)
        else:
            assert world.hear(device).release == 1
        world.served = {}
        assert world.hear(device).release == 2
        assert not list(device.rglob("*.tmp")) and not list((device / "trust").rglob("tmp*"))
        heard.add((knew, done))
    assert heard == {(False, False), (True, False), (True, True)}


def test_a_refused_update_does_not_wedge_a_device(world: World) -> None:
    """A stolen online key names targets that it cannot sign. Once it is stopped, the publisher's next release comes."""
    device = world.device()
    world.publish(0)
    world.hear(device)
    late = expiry(90)
    data = world.sign(Snapshot(50, None, late, {"targets.json": MetaFile(50)}))
    world.served[metadata_name("snapshot", 50)] = data
    world.served[metadata_name("timestamp")] = world.sign(Timestamp(50, None, late, MetaFile(50)))
    world.served[metadata_name("targets", 50)] = world.tree()[metadata_name("targets", 1)]
    with pytest.raises(TrustError):
        world.hear(device)
    world.served = {}
    world.publish(1)
    assert world.hear(device).release == 2


@pytest.mark.parametrize("failure", ["refused", "gone", "expired"])
def test_a_key_revoked_once_stays_revoked(world: World, failure: str) -> None:
    """The update that brought new root metadata failed later on, and the cache was lost: the root still counts."""
    device, thief = world.device(), world.keys
    world.publish(0)
    assert len(thief.history) == 1
    world.hear(device)
    rotate_keys(world.keys, "online", None, None)
    world.refresh(days=-1 if failure == "expired" else 7)
    name = metadata_name("timestamp")
    if failure == "refused":
        world.served[name] = b"{}"
    elif failure == "gone":
        world.served[name] = None
    if failure == "expired":
        assert world.hear(device).stale is not None
    else:
        with pytest.raises(Exception, match="malformed|not there"):
            world.hear(device)
    lose_cache(device)
    world.served = {}
    world.serve_state(timestamp=60, snapshot=60, keys=thief)
    world.served[metadata_name("root", 2)] = None
    with pytest.raises(TrustError, match="rollback: root version 1 is served, 2 was seen before"):
        world.hear(device)


def test_root_metadata_that_does_not_follow(world: World) -> None:
    device = world.device()
    world.publish(0)
    world.hear(device)
    before = world.keys.root
    rotate_keys(world.keys, "root", None, None)
    right = world.keys.history[-1]
    after = world.keys.root

    def signed_by(version: int, *holders: object) -> bytes:
        from tuf.api.metadata import Metadata

        after.version = version
        metadata = Metadata(after)
        for root in holders:
            for signer in world.keys.signers(root.roles["root"], "root"):  # type: ignore[attr-defined]
                metadata.sign(signer, append=True)
        return metadata.to_bytes()

    for bad in (signed_by(2, after), signed_by(2, before), signed_by(3, before, after), signed_by(1, before, after)):
        world.served[metadata_name("root", 2)] = bad
        with pytest.raises(TrustError, match="wrong signature|old or mixed"):
            world.hear(device)
    world.served[metadata_name("root", 2)] = right
    assert world.hear(device).release == 1
