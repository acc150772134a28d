from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdeploy.client.journal import format_record
from qdeploy.client.plan import Extent
from qdeploy.client.state import Current, DeviceFolder, current_bytes, parse_current, write_folder
from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import canonical_json, sha256

A = "a" * 64
DATA = b"some bytes"
HERE = Extent(A, 5, 5 + len(DATA), sha256(DATA))


def keep(folder: Path) -> None:
    with write_folder(folder, create=True) as writer:
        writer.put(A, 5, DATA)
        writer.note(HERE)
        writer.commit()


def test_bytes_are_held_once_committed(tmp_path: Path) -> None:
    with write_folder(tmp_path / "dev", create=True) as writer:
        writer.put(A, 5, DATA)
        writer.note(HERE)
        assert writer.journal() == set()
        writer.commit()
        assert writer.journal() == writer.held == {HERE}
    assert (tmp_path / "dev" / "objects" / A).read_bytes() == b"\0" * 5 + DATA
    assert DeviceFolder(tmp_path / "dev").intact(HERE)


def test_the_journal_is_never_ahead_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of what makes bytes durable: object, folder of objects, journal, its folder."""
    synced = []
    real = os.fsync

    def spy(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    monkeypatch.setattr(os, "fsync", spy)
    keep(tmp_path / "dev")
    folders = [tmp_path.name, "dev"]  # the names of DIR and DIR/objects
    assert synced == [*folders, A, "objects", "journal", "dev"]


def test_a_torn_journal_is_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "journal").write_bytes(format_record(Extent(A, 0, 1, A))[:-20])
    keep(folder)
    assert DeviceFolder(folder).journal() == {HERE}


def test_damage_on_disk_is_seen(tmp_path: Path) -> None:
    keep(tmp_path)
    path = tmp_path / "objects" / A
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert not DeviceFolder(tmp_path).intact(HERE)
    path.write_bytes(path.read_bytes()[:-1])
    assert not DeviceFolder(tmp_path).intact(HERE)
    path.unlink()
    assert not DeviceFolder(tmp_path).intact(HERE)


def test_one_process_writes(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from qdeploy.client.state import write_folder
with write_folder(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DeviceError, match="another process is writing"):
            with write_folder(tmp_path):
                raise AssertionError
        other.kill()  # the lock goes with its process
        other.wait()
        with write_folder(tmp_path):
            pass


def test_the_pointer_remembers_the_choice_before(tmp_path: Path) -> None:
    with write_folder(tmp_path / "dev", create=True) as writer:
        writer.activate(Current("http://h", A, "w2"))
        writer.activate(Current("http://h", A, "w3", 0, "board"))
        assert writer.chosen() == Current("http://h", A, "w3", 0, "board", (A, "w2"))
        writer.activate(Current("http://other", A, "w3", 0, "board"))
        assert writer.chosen() == Current("http://other", A, "w3", 0, "board", (A, "w2"))


def test_the_bytes_of_the_pointer() -> None:
    data = current_bytes(Current("u", "m", "l", 1, "t", ("m0", "l0")))
    assert data == (
        b'{"artifact":1,"format":"qdeploy-device/1","level":"l","manifest":"m","previous":["m0","l0"],'
        b'"target":"t","url":"u"}\n'
    )
    assert parse_current(data) == Current("u", "m", "l", 1, "t", ("m0", "l0"))


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"level": 3}, {"artifact": True}, {"artifact": "x"}, {"previous": [1]}, {"previous": [1, 2]},
     {"extra": 1}, {"url": None}, {"target": 5}],
)  # fmt: skip
def test_a_damaged_pointer_is_refused(change: dict[str, object]) -> None:
    good = {"artifact": 1, "format": "qdeploy-device/1", "level": "l", "manifest": "m", "previous": None, "url": "u"}
    with pytest.raises(BundleError, match="run `qdeploy pull` again"):
        parse_current(canonical_json(good | {"target": None} | change))
    with pytest.raises(BundleError):
        parse_current(b"[]")


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeviceError, match="is a file"), write_folder(tmp_path / "file", create=True):
        raise AssertionError
    with pytest.raises(BundleError, match="no device folder: run `qdeploy pull"), write_folder(tmp_path / "none"):
        raise AssertionError
    with pytest.raises(BundleError, match="holds no level yet"):
        DeviceFolder(tmp_path).chosen()
    with pytest.raises(DeviceError, match="cannot write"), write_folder(tmp_path / "file" / "dev", create=True):
        raise AssertionError


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    for name in (".current.json.abc.tmp", "manifests/.x.json.abc.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with write_folder(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["lock", "manifests"]
