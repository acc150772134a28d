"""Publishing: what a reader finds at every moment, numbers, channels, stores, and one publisher at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fsspec.implementations.memory import MemoryFileSystem

from qdeploy.bundle.manifest import parse_manifest, parse_release
from qdeploy.bundle.store import manifest_name, object_name, verify_tree
from qdeploy.client.trust import Trusted
from qdeploy.errors import BundleError, DeviceError, TrustError
from qdeploy.files import sha256
from qdeploy.trust.keys import rotate_keys
from qdeploy.trust.publish import Wish, change_rollout, publish, refresh
from qdeploy.trust.storage import Folder, Storage, Store, open_storage
from tests.client.device import damage
from tests.trust.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, root="1/1", targets="1/1")


@pytest.fixture
def memory() -> Iterator[Store]:
    MemoryFileSystem.store.clear()
    yield Store("memory://bucket/models")
    MemoryFileSystem.store.clear()


def assert_whole(storage: Storage, said: Trusted) -> None:
    """The release that a device was told is there, every byte of it."""
    data = storage.read(manifest_name(said.manifest))
    assert data is not None and (len(data), sha256(data)) == (said.size, said.manifest)
    manifest = parse_manifest(data)
    assert (manifest.release, manifest.model) == (said.release, said.model)
    for entry in manifest.objects:
        content = storage.read(object_name(entry.sha256))
        assert content is not None and sha256(content) == entry.sha256


# --- releases --------------------------------------------------------------------------------------------------------


def test_a_release_is_a_tree_that_verifies(world: World) -> None:
    done = world.publish()
    assert (done.model, done.channel, done.entry.release) == ("toy", "stable", 1)
    manifest = verify_tree(world.storage.root)
    assert replace(manifest, release=1) == world.bundle().manifest
    assert_whole(world.storage, world.hear(world.device()))


def test_numbers_go_up(world: World) -> None:
    assert [world.publish(seed).entry.release for seed in (0, 1, 0)] == [1, 2, 3]
    assert world.publish(release=10).entry.release == 10
    for number in (10, 3, 1):
        with pytest.raises(TrustError, match=f"release 10 of toy was published already, .* goes back to {number}:"):
            world.publish(release=number)
    assert world.publish().entry.release == 11


def test_objects_are_sent_once(world: World) -> None:
    first, second = world.publish(0), world.publish(0)
    assert first.sent == sum(entry.size for entry in world.bundle().manifest.objects) + first.entry.size
    assert second.sent == second.entry.size


def test_a_damaged_object_in_the_folder_is_sent_again(world: World) -> None:
    world.publish()
    name = object_name(world.bundle().manifest.objects[0].sha256)
    damage(world.storage.root / name, 3)
    world.publish()
    assert_whole(world.storage, world.hear(world.device()))


def test_a_damaged_bundle_is_not_published(world: World) -> None:
    world.publish(0)
    before = world.tree()
    damage(world.bundle(1).object_path(1), 7)
    with pytest.raises(BundleError, match="is damaged"):
        world.publish(1)
    assert world.tree() == before


def test_the_browser_signature(world: World) -> None:
    """release.json, FORMAT.md: an Ed25519 signature over the manifest's bytes and nothing else."""
    world.publish()
    release = parse_release(world.storage.read("release.json") or b"")
    manifest = world.storage.read(manifest_name(release.sha256)) or b""
    (entry,) = release.signatures
    key = world.keys.root.keys[entry["keyid"]]
    assert entry["keyid"] in world.keys.root.roles["targets"].keyids
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.keyval["public"]))
    public.verify(bytes.fromhex(entry["signature"]), manifest)
    with pytest.raises(InvalidSignature):
        public.verify(bytes.fromhex(entry["signature"]), manifest + b" ")


def test_two_models_in_one_tree(world: World, tmp_path: Path) -> None:
    from tests.client.tree import make_tree

    other = make_tree(tmp_path / "other", model="other", weights=(300,), gap=10)
    world.publish()
    publish(other.root, world.storage, world.keys, Wish())
    device, second = world.device(), world.device("second")
    assert world.hear(device, model="toy").model == "toy"
    assert world.hear(second, model="other").release == 1
    with pytest.raises(BundleError, match="several models are published: name one of other, toy"):
        world.hear(world.device("third"))
    with pytest.raises(BundleError, match="name the model: .* publishes other, toy"):
        world.rollout(hold=True)


# --- crashes, other publishers ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


class Dying(Folder):
    """A folder whose publisher dies before write number `after`."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self.left = after

    def _step(self) -> None:
        if not self.left:
            raise Killed
        self.left -= 1

    def write(self, path: str, data: bytes) -> None:
        self._step()
        super().write(path, data)

    def create(self, path: str, data: bytes) -> None:
        self._step()
        super().create(path, data)


def test_killed_at_every_write(world: World, tmp_path: Path) -> None:
    world.publish(0)
    old = world.hear(world.device("first"))
    steps = 0
    while True:
        here = World.__new__(World)
        here.__dict__ |= world.__dict__ | {"storage": Dying(tmp_path / f"root{steps}", steps), "served": {}}
        shutil.copytree(world.storage.root, here.storage.root)
        try:
            here.publish(1)
            break
        except Killed:
            pass
        said = here.hear(here.device(f"dev{steps}"))
        assert said == old
        assert_whole(here.storage, said)
        assert verify_tree(here.storage.root).release in (1, 2)  # release.json changes just before the timestamp
        here.storage = Folder(here.storage.root)
        assert here.publish(1).entry.release == 2
        said = here.hear(here.folder / f"dev{steps}")
        assert said.release == 2
        assert_whole(here.storage, said)
        steps += 1
    assert steps == 3 + 1 + 1 + 2 + 2  # objects, manifest, rollout, targets and snapshot, release.json and timestamp


def test_the_first_publication_killed_at_every_write(world: World) -> None:
    for steps in range(3 + 1 + 1 + 2 + 2 + 1):
        with pytest.raises(Killed):
            publish(world.bundle().root, Dying(world.folder / f"root{steps}", steps), world.keys, Wish())
        world.storage = Folder(world.folder / f"root{steps}")
        assert world.publish().entry.release == (2 if steps == 9 else 1)  # the last write is after the timestamp
        assert_whole(world.storage, world.hear(world.device(f"dev{steps}")))


def test_one_publisher_at_a_time(world: World) -> None:
    with world.storage.locked(), pytest.raises(DeviceError, match="another publisher is at work"):
        world.publish()
    assert world.publish().entry.release == 1


def test_another_publisher_in_a_store(world: World, memory: Store) -> None:
    """Stores have no lock: what changed meanwhile, or a name that was taken, stops the second one."""
    publish(world.bundle().root, memory, world.keys, Wish())

    class Raced(Store):
        def create(self, path: str, data: bytes) -> None:
            publish(world.bundle(1).root, memory, world.keys, Wish())
            self.create = super().create  # type: ignore[method-assign]
            super().create(path, data)

    with pytest.raises(DeviceError, match="another publisher is at work"):
        publish(world.bundle().root, Raced("memory://bucket/models"), world.keys, Wish())
    device = world.device()
    said = world.hear(device, lambda path, limit: memory.read(path) or world.fetch("missing", limit))
    assert (said.release, said.manifest) == (2, sha256(memory.read(manifest_name(said.manifest)) or b""))


# --- stores ----------------------------------------------------------------------------------------------------------


def test_a_store_holds_what_a_folder_holds(world: World, memory: Store) -> None:
    for seed in (0, 1):
        sent = publish(world.bundle(seed).root, memory, world.keys, Wish(percent=None)).sent
        assert sent == world.publish(seed).sent
    assert publish(world.bundle(0).root, memory, world.keys, Wish()).sent < sent
    refresh(memory, world.keys)
    device = world.device()
    said = world.hear(device, lambda path, limit: memory.read(path) or world.fetch("missing", limit))
    assert said.release == 3
    assert_whole(memory, said)


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "memory:///"])
def test_urls_of_stores(url: str) -> None:
    if url.startswith("memory"):
        assert open_storage(url).read("release.json") is None
    else:
        with pytest.raises(DeviceError, match="cannot publish to nosuch"):
            open_storage(url)


def test_a_store_that_fails_is_one_line(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError, FileNotFoundError, PermissionError):

        def broken(*_: object, error: type[Exception] = error, **__: object) -> None:
            raise error("no such bucket")

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", broken)
        for put in (memory.write, memory.create):
            with pytest.raises(DeviceError, match=r"cannot publish to memory.*no such bucket"):
                put("release.json", b"")


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    storage = open_storage(f"file://{tmp_path}/root")
    assert isinstance(storage, Folder) and storage.root == tmp_path / "root"
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="cannot publish to"), Folder(tmp_path / "file").locked():
        pass


# --- rollout ---------------------------------------------------------------------------------------------------------


def test_minimum_and_levels_are_kept_by_later_releases(world: World) -> None:
    world.publish(0, minimum="w3", levels={"a": "w3", "b": "w4"})
    entry = world.publish(1, levels={"a": "", "c": "w4"}).entry
    assert (entry.minimum, entry.levels) == ("w3", {"b": "w4", "c": "w4"})
    entry = world.publish(0, percent=5).entry
    assert (entry.minimum, entry.percent) == ("w3", 5)


@pytest.mark.parametrize("wish", [{"minimum": "w9"}, {"levels": {"a": "w9"}}, {"minimum": "w3", "levels": {"a": "w2"}}])
def test_levels_that_cannot_be(world: World, wish: dict[str, object]) -> None:
    with pytest.raises(BundleError, match="no level 'w9'|level w2 for a is not at or above the minimum w3"):
        world.publish(**wish)
    assert world.storage.read("metadata/timestamp.json") is None
    world.publish()
    with pytest.raises(BundleError, match="no level 'w9'|not at or above"):
        world.rollout(**wish)


def test_a_canary_only_grows(world: World) -> None:
    with pytest.raises(BundleError, match="publishes none"):
        world.rollout(percent=5)
    world.publish(0)
    with pytest.raises(BundleError, match="no canary release"):
        world.rollout(percent=5)
    with pytest.raises(BundleError, match="no canary release"):
        world.rollout(promote=True)
    world.publish(1, percent=20)
    assert parse_release(world.storage.read("release.json") or b"").release == 1
    assert world.rollout(percent=50).entry.percent == 50
    for change in (lambda: world.rollout(percent=20), lambda: world.publish(0, percent=49)):
        with pytest.raises(BundleError, match="50% of the devices run release 2 already"):
            change()
    done = world.rollout(promote=True, hold=True)
    assert (done.channel, done.entry.percent, done.entry.release, done.entry.hold) == ("stable", None, 2, True)
    assert parse_release(world.storage.read("release.json") or b"").release == 2


def test_a_release_for_all_ends_the_canary(world: World) -> None:
    world.publish(0)
    world.publish(1, percent=20)
    world.publish(0)
    device = world.device()
    assert world.hear(device, channel="canary").channel == "stable"


# --- refresh, keys ---------------------------------------------------------------------------------------------------


def test_refresh_needs_the_online_key_alone(world: World) -> None:
    now = datetime.now(UTC)
    world.publish()
    for path in [*world.home.glob("root-*.pem"), *world.home.glob("targets-*.pem")]:
        path.unlink()
    found = refresh(world.storage, world.keys, days=3)
    assert now + timedelta(days=2.9) < found.timestamp < now + timedelta(days=3.1)
    assert min(found.targets, found.root) > now + timedelta(days=360)
    assert world.hear(world.device()).release == 1
    with pytest.raises(TrustError, match="targets metadata needs 1 signatures"):
        world.publish(1)


def test_refresh_signs_again_what_expires_soon(world: World) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=350)
    world.publish(now=long_ago)
    device = world.device()
    assert world.signed("targets").expires < datetime.now(UTC) + timedelta(days=30)
    world.refresh()
    assert {world.signed(role).version for role in ("timestamp", "snapshot", "targets")} == {2}
    assert world.hear(device, now=datetime.now(UTC) + timedelta(days=6)).stale is None


def test_nothing_to_refresh(world: World) -> None:
    with pytest.raises(TrustError, match="publishes nothing yet"):
        world.refresh()


def test_an_expired_root_signs_nothing(world: World) -> None:
    world.publish()
    before = world.tree()
    rotate_keys(world.keys, "online", None, None, days=-1)
    for command in (world.publish, world.refresh):
        with pytest.raises(TrustError, match="expired .* run `qdeploy keys rotate --role root`"):
            command()
    assert world.tree() == before


def test_new_targets_keys_sign_the_pointer_too(world: World) -> None:
    world.publish()
    before = parse_release(world.storage.read("release.json") or b"")
    rotate_keys(world.keys, "targets", None, None)
    world.refresh()
    after = parse_release(world.storage.read("release.json") or b"")
    assert replace(after, signatures=before.signatures) == before
    assert [entry["keyid"] for entry in after.signatures] == world.keys.root.roles["targets"].keyids


def test_a_thief_is_not_signed_for(world: World) -> None:
    """Targets that stolen keys signed do not get the signature of the new ones."""
    world.publish()
    thief = world.folder / "stolen"
    shutil.copytree(world.home, thief)
    rotate_keys(world.keys, "targets", None, None)
    from qdeploy.trust.keys import KeyFolder

    publish(world.bundle(1).root, world.storage, KeyFolder([thief]), Wish())
    with pytest.raises(TrustError, match="is not what .* signed last"):
        world.refresh()


def test_a_pointer_that_names_another_manifest_is_not_signed(world: World) -> None:
    world.publish(0)
    data = world.storage.read("release.json") or b""
    digest = parse_release(data).sha256
    world.storage.write("release.json", data.replace(digest.encode(), b"0" * 64))
    rotate_keys(world.keys, "targets", None, None)
    with pytest.raises(TrustError, match="names no stable release"):
        world.refresh()


@pytest.mark.parametrize("name", ["metadata/timestamp.json", "metadata/1.snapshot.json", "metadata/1.targets.json"])
def test_a_publisher_checks_what_it_builds_on(world: World, name: str) -> None:
    world.publish()
    path = world.storage.root / name
    data = path.read_bytes()
    for bad in (data.replace(b'"version":1', b'"version":7'), data[:-20], b""):
        path.write_bytes(bad)
        with pytest.raises(TrustError, match="damaged|was not signed by"):
            change_rollout(world.storage, world.keys, Wish(hold=True))
    path.unlink()
    with pytest.raises(TrustError, match=r"lacks|but metadata/timestamp\.json is gone"):
        world.publish()


def test_a_tree_of_other_keys(world: World, tmp_path: Path) -> None:
    world.publish()
    other = World(tmp_path / "other")
    with pytest.raises(TrustError, match="was not signed by the keys of"):
        publish(other.bundle().root, world.storage, other.keys, Wish())
