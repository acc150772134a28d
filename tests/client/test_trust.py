"""Every attack of the TUF specification against a device, with real metadata: nothing wrong is taken, and it heals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from qdeploy.bundle.rollout import METADATA_LIMITS, Channels, bucket, metadata_name
from qdeploy.bundle.store import manifest_name
from qdeploy.client.fetch import GoneError
from qdeploy.client.trust import has_root, install_root, refresh
from qdeploy.errors import BundleError, DeviceError, FetchError, TrustError
from qdeploy.trust.keys import KeyFolder, Quorum, init_keys, rotate_keys
from tests.trust.world import LONG_AGO, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def lose_cache(device: Path) -> None:
    """What a power cut may do to files that were never synced."""
    shutil.rmtree(device / "trust" / "metadata")


def truncate_cache(device: Path) -> None:
    for path in (device / "trust" / "metadata").rglob("*.json"):
        path.write_bytes(b"")


def tear_cache(device: Path) -> None:
    for path in (device / "trust" / "metadata").rglob("*.json"):
        path.write_bytes(path.read_bytes()[:50])


LOSSES: list[Callable[[Path], None]] = [lambda device: None, lose_cache, truncate_cache, tear_cache]
losses = pytest.mark.parametrize("lose", LOSSES, ids=["kept", "deleted", "truncated", "torn"])


# --- the good case ---------------------------------------------------------------------------------------------------


@losses
def test_a_device_hears_each_release(world: World, lose: Callable[[Path], None]) -> None:
    device = world.device()
    for number, seed in enumerate((0, 1, 0), 1):
        done = world.publish(seed, minimum="w3", levels={"board": "w4"})
        said = world.hear(device, hardware="board")
        assert (said.release, said.manifest, said.size) == (number, done.entry.sha256, done.entry.size)
        assert (said.model, said.channel, said.minimum, said.level) == ("toy", "stable", "w3", "w4")
        assert (said.hold, said.stale) == (False, None)
        lose(device)
    assert world.hear(device, hardware="another").level is None


def test_the_same_again_fetches_a_timestamp_only(world: World) -> None:
    device = world.device()
    world.publish()
    said = world.hear(device)
    before = (device / "trust" / "state.json").read_bytes()
    world.asked.clear()
    assert world.hear(device) == said
    assert world.asked == ["metadata/2.root.json", "metadata/timestamp.json"]
    assert (device / "trust" / "state.json").read_bytes() == before


def test_hold_is_passed_on(world: World) -> None:
    device = world.device()
    world.publish(hold=True)
    assert world.hear(device).hold
    world.rollout(hold=False)
    assert not world.hear(device).hold


# --- the pinned root -------------------------------------------------------------------------------------------------


def test_a_root_is_pinned_once(world: World, tmp_path: Path) -> None:
    device = world.device()
    assert has_root(device) and not has_root(tmp_path / "other")
    install_root(device, (world.home / "1.root.json").read_bytes())
    init_keys(tmp_path / "foreign", Quorum(1, 1), Quorum(1, 1), None)
    with pytest.raises(TrustError, match="trusts another root already"):
        install_root(device, (tmp_path / "foreign" / "1.root.json").read_bytes())


def test_only_root_metadata_is_pinned(world: World, tmp_path: Path) -> None:
    world.publish()
    root = (world.home / "1.root.json").read_bytes()
    torn = json.loads(root)
    torn["signatures"][0]["sig"] = torn["signatures"][1]["sig"] = "00" * 64
    for data in (b"", b"{}", b"\xff", root[:-9], json.dumps(torn).encode(), world.tree()["metadata/timestamp.json"]):
        with pytest.raises(TrustError, match="no root metadata"):
            install_root(tmp_path / "new", data)
        assert not has_root(tmp_path / "new")


def test_without_a_root_nothing_is_trusted(world: World, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="has no root metadata"):
        refresh(tmp_path / "new", world.fetch)


def test_an_unsigned_tree_is_refused(world: World) -> None:
    with pytest.raises(GoneError, match=r"timestamp\.json"):
        world.hear(world.device())


# --- wrong keys ------------------------------------------------------------------------------------------------------


def test_arbitrary_install_by_foreign_keys(world: World, tmp_path: Path) -> None:
    device = world.device()
    world.publish()
    init_keys(tmp_path / "foreign", Quorum(1, 1), Quorum(2, 2), None)
    world.serve_state(keys=KeyFolder([tmp_path / "foreign"]))
    with pytest.raises(TrustError, match="wrong signature"):
        world.hear(device)
    foreign = World(tmp_path / "theirs")
    foreign.publish()
    with pytest.raises(TrustError, match="wrong signature"):
        refresh(device, foreign.fetch)


def test_a_signature_too_few(world: World) -> None:
    device = world.device()
    world.publish()
    world.serve_state(snapshot=9, targets=9, most=1)
    with pytest.raises(TrustError, match="too few: targets was signed by 1/2 keys"):
        world.hear(device)


def test_one_key_does_not_count_twice(world: World) -> None:
    device = world.device()
    world.publish()

    def double(data: bytes) -> bytes:
        value = json.loads(data)
        value["signatures"] *= 2
        return json.dumps(value).encode()

    world.serve_state(snapshot=9, targets=9, most=1, mangle=double)
    with pytest.raises(TrustError, match="malformed"):
        world.hear(device)


def test_the_online_key_cannot_sign_targets(world: World) -> None:
    device = world.device()
    world.publish()

    def by_online(data: bytes) -> bytes:
        metadata: Any = Metadata.from_bytes(data)
        for signer in world.keys.signers(world.keys.root.roles["timestamp"], "timestamp"):
            metadata.sign(signer, append=True)
        return bytes(metadata.to_bytes())

    world.serve_state(snapshot=9, targets=9, most=0, mangle=by_online)
    with pytest.raises(TrustError, match="too few: targets was signed by 0/2 keys"):
        world.hear(device)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_every_changed_byte_is_refused(world: World, role: str) -> None:
    device = world.device()
    world.publish()
    name = metadata_name(role, None if role == "timestamp" else 1)
    data = world.tree()[name]
    for at in range(0, len(data), 41):
        changed = bytearray(data)
        changed[at] ^= 1
        world.served[name] = bytes(changed)
        try:
            said = world.hear(device)
        except (TrustError, FetchError):
            continue
        # a bit of white space, or of a name that nothing signed: the same content after all
        assert role == "timestamp" and said.release == 1
        lose_cache(device)


# --- old metadata ----------------------------------------------------------------------------------------------------


@losses
def test_replay_of_a_whole_older_tree(world: World, lose: Callable[[Path], None]) -> None:
    device = world.device()
    world.publish(0)
    old = world.tree()
    world.publish(1)
    assert world.hear(device).release == 2
    lose(device)
    world.replay(old)
    for _ in range(2):
        with pytest.raises(TrustError, match="rollback"):
            world.hear(device)
    world.served = {}
    assert world.hear(device).release == 2


@losses
def test_replay_of_one_role(world: World, lose: Callable[[Path], None]) -> None:
    """The online key is stolen: it signs a new timestamp and a snapshot that name old targets."""
    device = world.device()
    world.publish(0)
    world.publish(1)
    assert world.hear(device).release == 2
    lose(device)
    old = world.tree()[metadata_name("targets", 1)]
    world.serve_state(timestamp=8, snapshot=8)
    middle = Snapshot(
        9, None, datetime(2090, 1, 1, tzinfo=UTC), {"targets.json": MetaFile.from_data(1, old, ["sha256"])}
    )
    data = world.sign(middle)
    world.served[metadata_name("snapshot", 9)] = data
    top = Timestamp(9, None, datetime(2090, 1, 1, tzinfo=UTC), MetaFile.from_data(9, data, ["sha256"]))
    world.served[metadata_name("timestamp")] = world.sign(top)
    with pytest.raises(TrustError, match="rollback"):
        world.hear(device)


@losses
def test_a_signed_rollout_to_an_older_release(world: World, lose: Callable[[Path], None]) -> None:
    """New versions everywhere, signed by all, but the release goes back: the counter of releases refuses."""
    device = world.device()
    world.publish(0)
    first = world.hear(device)
    world.publish(1)
    assert world.hear(device).release == 2
    lose(device)
    world.serve_rollout(
        lambda rollout: {"toy": Channels(replace(rollout["toy"].stable, release=1, sha256=first.manifest))},
        (TargetFile(first.size, {"sha256": first.manifest}, manifest_name(first.manifest)),),
    )
    before = (device / "trust" / "state.json").read_bytes()
    with pytest.raises(TrustError, match="rollback: release 1 of toy is offered .stable., 2 was taken before"):
        world.hear(device)
    assert (device / "trust" / "state.json").read_bytes() == before
    world.served = {}
    assert world.publish(0).entry.release == 3
    assert world.hear(device).release == 3  # the old bundle under a new number is the way back


def test_the_counters_must_be_there(world: World) -> None:
    device = world.device()
    world.publish()
    world.hear(device)
    path = device / "trust" / "state.json"
    data = path.read_bytes()
    for bad in (None, b"", data[:40], data.replace(b'"toy":[1', b'"toy":[0'), b"[]\n", b'{"format":1}\n'):
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        else:
            path.with_name("other").write_bytes(b"")
        with pytest.raises(TrustError, match="counters|damaged|JSON"):
            world.hear(device)
        path.write_bytes(data)
    assert world.hear(device).release == 1


# --- out of date -----------------------------------------------------------------------------------------------------


@losses
def test_freeze_is_reported_and_the_device_runs_on(world: World, lose: Callable[[Path], None]) -> None:
    device = world.device()
    world.publish(0)
    world.hear(device)
    lose(device)
    later = datetime.now(UTC) + timedelta(days=8)
    said = world.hear(device, now=later)
    assert said.stale == "timestamp.json is expired" and said.release == 1
    world.refresh(days=30)
    assert world.hear(device, now=later).stale is None


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_expired_metadata_brings_nothing_new(world: World, role: str) -> None:
    device = world.device()
    world.publish(0)
    first = world.hear(device)
    world.publish(1)
    world.serve_state(timestamp=7, snapshot=7, targets=7, expires={role: LONG_AGO})
    said = world.hear(device)
    assert said.stale is not None and role in said.stale
    assert replace(said, stale=None) == first
    fresh = world.device("fresh")
    with pytest.raises(TrustError, match="is expired: nothing was taken"):
        world.hear(fresh)


def test_an_expired_root_is_followed_to_its_successor(world: World) -> None:
    device = world.device()
    rotate_keys(world.keys, "online", None, None, days=-1)
    world.publish(0, now=datetime.now(UTC) - timedelta(days=2))
    with pytest.raises(TrustError, match="expired"):
        world.hear(device)
    rotate_keys(world.keys, "root", None, None)
    world.refresh()
    assert world.hear(device).release == 1


# --- mix and match, sizes --------------------------------------------------------------------------------------------


def test_mix_and_match(world: World) -> None:
    device = world.device()
    world.publish(0)
    old = world.tree()
    world.publish(1)
    new = world.tree()
    for role in ("snapshot", "targets"):
        world.served = {metadata_name(role, 2): old[metadata_name(role, 1)]}
        with pytest.raises(TrustError, match="mix and match"):
            world.hear(device)
    (name,) = [n for n in new if n.startswith("rollout/") and n not in old]
    (other_name,) = [n for n in old if n.startswith("rollout/")]
    world.served = {name: old[other_name]}
    with pytest.raises(TrustError, match="not the one that was signed"):
        world.hear(device)
    world.served = {}
    assert world.hear(device).release == 2


def test_a_rollout_that_names_an_unsigned_manifest(world: World) -> None:
    device = world.device()
    world.publish()
    world.serve_rollout(lambda rollout: {"toy": Channels(replace(rollout["toy"].stable, sha256="0" * 64))})
    with pytest.raises(TrustError, match="no signed target"):
        world.hear(device)
    world.served = {}
    world.serve_rollout(lambda rollout: {"toy": Channels(replace(rollout["toy"].stable, size=5))})
    with pytest.raises(TrustError, match="no signed target"):
        world.hear(device)


def test_targets_without_a_rollout(world: World) -> None:
    device = world.device()
    world.publish()

    def drop(targets: Targets) -> None:
        del targets.targets["rollout.json"]

    world.serve_state(snapshot=5, targets=5, change=drop)
    with pytest.raises(TrustError, match=r"name no rollout\.json"):
        world.hear(device)

    def swell(targets: Targets) -> None:
        targets.targets["rollout.json"] = TargetFile(1 << 40, {"sha256": "0" * 64}, "rollout.json")

    world.serve_state(snapshot=6, targets=6, change=swell)
    with pytest.raises(TrustError, match=r"name no rollout\.json"):
        world.hear(device)


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_endless_data(world: World, role: str) -> None:
    """The limit is asked of the fetcher, and held against one that does not keep it."""
    device = world.device()
    world.publish()
    name = metadata_name(role, {"root": 2, "timestamp": None}.get(role, 1))
    asked: dict[str, int] = {}

    def endless(path: str, limit: int) -> bytes:
        asked[path] = limit
        return b" " * (limit + 1) if path == name else world.fetch(path, limit)

    with pytest.raises((FetchError, TrustError), match="bytes|mix"):
        world.hear(device, endless)
    assert asked[name] <= METADATA_LIMITS[role]


# --- channels, errors of the way -------------------------------------------------------------------------------------


def test_canaries_by_device_id(world: World) -> None:
    world.publish(0)
    world.publish(1, percent=30)
    fleet = {str(i): world.device(f"dev{i}") for i in range(8)}

    def releases() -> dict[str, int]:
        return {name: world.hear(device, device_id=name).release for name, device in fleet.items()}

    assert releases() == {name: 2 if bucket("toy", name) < 30 else 1 for name in fleet}
    world.rollout(percent=60)
    assert releases() == {name: 2 if bucket("toy", name) < 60 else 1 for name in fleet}
    assert {1, 2} == set(releases().values())
    world.rollout(promote=True)
    assert set(releases().values()) == {2}


def test_a_channel_of_ones_own(world: World) -> None:
    device = world.device()
    world.publish(0)
    world.publish(1, percent=1)
    assert world.hear(device, channel="stable").release == 1
    assert world.hear(device, channel="canary").release == 2
    with pytest.raises(TrustError, match="rollback: release 1 of toy is offered"):
        world.hear(device, channel="stable")
    with pytest.raises(BundleError, match="no channel 'beta'"):
        world.hear(device, channel="beta")


def test_a_model_that_is_not_published(world: World) -> None:
    device = world.device()
    world.publish(0)
    with pytest.raises(BundleError, match="no model 'other' is published: there are toy"):
        world.hear(device, model="other")


def test_a_lost_line_is_a_fetch_error_as_it_came(world: World) -> None:
    device = world.device()
    world.publish(0)
    world.publish(1)
    world.hear(device)
    world.refresh()
    names = ["metadata/2.root.json", "metadata/timestamp.json"]
    world.publish(0)
    names += [metadata_name("snapshot", 3), metadata_name("targets", 3), *(n for n in world.tree() if "rollout/" in n)]
    for name in names:

        def lost(path: str, limit: int, name: str = name) -> bytes:
            if path == name:
                raise FetchError(f"cannot download {name}")
            return world.fetch(path, limit)

        before = (device / "trust" / "state.json").read_bytes()
        try:
            world.hear(device, lost)
        except FetchError as e:
            assert str(e) == f"cannot download {name}"
            assert (device / "trust" / "state.json").read_bytes() == before
    assert world.hear(device).release == 3


def test_two_processes_do_not_refresh_one_folder(world: World) -> None:
    device = world.device()
    world.publish()

    def again(path: str, limit: int) -> bytes:
        with pytest.raises(DeviceError, match="another process refreshes"):
            world.hear(device)
        return world.fetch(path, limit)

    assert world.hear(device, again).release == 1


def test_a_full_disk_is_one_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    device = world.device()
    world.publish()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    with pytest.raises(DeviceError, match="disk is full"):
        world.hear(device)
    monkeypatch.undo()
    assert world.hear(device).release == 1
