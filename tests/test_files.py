from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import canonical_json, new_folder, parse_json, write_atomic

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_canonical_json_round_trip(value: object) -> None:
    data = canonical_json(value)
    assert canonical_json(parse_json(data, "it", BundleError)) == data
    assert parse_json(data, "it", BundleError) == value


@pytest.mark.parametrize("data", [b"", b"{", b'{"a":1,"a":2}', b"NaN", b"[Infinity]", b"\xff", b"1 2", b"[" * 100_000])
def test_json_that_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="it is not valid JSON"):
        parse_json(data, "it", BundleError)


def test_write_atomic_leaves_pipes_and_folders_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path):
        with pytest.raises(DeviceError, match="not a regular file"):
            write_atomic(path, b"new")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink() and sorted(tmp_path.iterdir()) == [link, pipe]


def test_write_atomic_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / "link"
    link.symlink_to(tmp_path / "there")
    write_atomic(link, b"new")
    assert link.is_symlink() and (tmp_path / "there").read_bytes() == b"new"


def test_write_atomic_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeviceError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="stop"), new_folder(out) as folder:
        (folder / "half").write_text("x")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "recipe.json").write_text("{}")
    with pytest.raises(DeviceError, match="not empty"), new_folder(out):
        pass
    with new_folder(out, force=True) as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in out.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [out]
    with pytest.raises(DeviceError, match="not an output of qdeploy"), new_folder(out, force=True):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DeviceError, match="is a file"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(DeviceError, match="cannot write"), new_folder(tmp_path / "file" / "below"):
        pass
