"""Keys: who can sign, what lies on disk, and how a role gets new ones."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root

from qdeploy.errors import DeviceError, TrustError
from qdeploy.trust.keys import KeyFolder, Quorum, init_keys, rotate_keys, tuf_roles

PASSPHRASE = b"correct horse"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    init_keys(tmp_path / "keys", Quorum(2, 3), Quorum(1, 2), None)
    return tmp_path / "keys"


def test_fresh_keys(home: Path) -> None:
    root = KeyFolder([home]).root
    counts = {name: (role.threshold, len(role.keyids)) for name, role in root.roles.items()}
    assert counts == {"root": (2, 3), "targets": (1, 2), "snapshot": (1, 1), "timestamp": (1, 1)}
    assert root.roles["snapshot"].keyids == root.roles["timestamp"].keyids
    assert len({keyid for role in root.roles.values() for keyid in role.keyids}) == 6
    assert root.version == 1 and root.consistent_snapshot
    assert all(key.scheme == "ed25519" for key in root.keys.values())


def test_private_keys_are_for_their_owner_alone(home: Path) -> None:
    files = list(home.glob("*.pem"))
    assert len(files) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert not any(b"PRIVATE" in path.read_bytes() for path in home.glob("*.json"))


def test_a_passphrase_encrypts_all_but_the_online_key(tmp_path: Path) -> None:
    init_keys(tmp_path / "keys", Quorum(1, 1), Quorum(1, 1), PASSPHRASE)
    encrypted = {path.name.split("-")[0]: b"ENCRYPTED" in path.read_bytes() for path in tmp_path.glob("keys/*.pem")}
    assert encrypted == {"root": True, "targets": True, "online": False}
    for words, problem in ((None, "is encrypted: give its passphrase"), (b"wrong", "wrong passphrase")):
        keys = KeyFolder([tmp_path / "keys"], words)
        with pytest.raises(TrustError, match=problem):
            keys.signers(keys.root.roles["targets"], "targets")
        assert len(keys.signers(keys.root.roles["timestamp"], "timestamp")) == 1
    keys = KeyFolder([tmp_path / "keys"], PASSPHRASE)
    assert len(keys.signers(keys.root.roles["targets"], "targets")) == 1


@pytest.mark.parametrize("text", ["", "1", "0/1", "3/2", "2/17", "a/b", "1/-1", "1/1/1", "²/3"])
def test_quorums_that_are_none(text: str) -> None:
    with pytest.raises(TrustError, match="is no quorum"):
        Quorum.parse(text)
    assert Quorum.parse("2/3") == Quorum(2, 3)


def test_an_occupied_folder_is_left_alone(home: Path) -> None:
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    with pytest.raises(DeviceError, match="is not empty"):
        init_keys(home, Quorum(1, 1), Quorum(1, 1), None)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


def test_keys_on_several_media(home: Path, tmp_path: Path) -> None:
    role = KeyFolder([home]).root.roles["root"]
    media = []
    for number, path in enumerate(sorted(home.glob("root-*.pem"))):
        media.append(tmp_path / f"stick{number}")
        media[-1].mkdir()
        shutil.move(path, media[-1])
    with pytest.raises(TrustError, match="needs 2 signatures, .* hold 0 of its keys: add the folders"):
        KeyFolder([home]).signers(role, "root")
    with pytest.raises(TrustError, match="hold 1 of its keys"):
        KeyFolder([home, media[0]]).signers(role, "root")
    assert len(KeyFolder([home, *media[:2]]).signers(role, "root")) == 2


@pytest.mark.parametrize("role", ["root", "targets", "online"])
def test_rotation(home: Path, role: str) -> None:
    keys = KeyFolder([home])
    before = keys.root
    assert rotate_keys(keys, role, None, None) == home / "2.root.json"
    after = KeyFolder([home]).root
    assert after.version == 2 == keys.root.version
    for name in ("root", "targets", "snapshot", "timestamp"):
        old, new = before.roles[name], after.roles[name]
        assert (new.threshold, len(new.keyids)) == (old.threshold, len(old.keyids))
        assert set(old.keyids).isdisjoint(new.keyids) == (name in tuf_roles(role))
        assert set(after.roles[name].keyids) <= set(after.keys)
    first, second = (Metadata[Root].from_bytes((home / f"{n}.root.json").read_bytes()) for n in (1, 2))
    first.verify_delegate("root", second)
    second.verify_delegate("root", second)


def test_rotation_changes_the_quorum(home: Path) -> None:
    rotate_keys(KeyFolder([home]), "targets", Quorum(3, 4), None)
    role = KeyFolder([home]).root.roles["targets"]
    assert (role.threshold, len(role.keyids)) == (3, 4)


def test_rotation_without_root_keys_makes_nothing(home: Path) -> None:
    for path in list(home.glob("root-*.pem"))[:2]:
        path.unlink()
    before = sorted(home.iterdir())
    with pytest.raises(TrustError, match="root version 2 needs 2 signatures"):
        rotate_keys(KeyFolder([home]), "online", None, None)
    assert sorted(home.iterdir()) == before


def test_a_folder_without_root_metadata(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"holds no 1\.root\.json: make keys"):
        _ = KeyFolder([tmp_path]).root


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data.replace(b'"threshold":2', b'"threshold":1')]
)
def test_damaged_root_metadata(home: Path, damage: object) -> None:
    rotate_keys(KeyFolder([home]), "root", None, None)
    path = home / "2.root.json"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(TrustError, match=r"2\.root\.json is damaged"):
        _ = KeyFolder([home]).root


def test_a_foreign_key_under_our_name(home: Path, tmp_path: Path) -> None:
    init_keys(tmp_path / "other", Quorum(1, 1), Quorum(1, 1), None)
    (ours,), (theirs,) = home.glob("online-*.pem"), (tmp_path / "other").glob("online-*.pem")
    ours.write_bytes(theirs.read_bytes())
    keys = KeyFolder([home])
    with pytest.raises(TrustError, match="hold 0 of its keys"):
        keys.signers(keys.root.roles["timestamp"], "timestamp")
    ours.write_bytes(b"no key")
    with pytest.raises(TrustError, match="cannot read the private key"):
        keys.signers(keys.root.roles["timestamp"], "timestamp")
