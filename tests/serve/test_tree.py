from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qdeploy.serve.tree import DOCUMENT_LIMIT, KINDS, Name, headers_of, is_published, open_beneath, split_path

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("path", "kind", "parts", "digest"),
    [
        (f"/objects/{DIGEST}?cache=1", "object", ("objects", DIGEST), DIGEST),
        ("/release.json", "release", ("release.json",), None),
        (f"/manifests/{DIGEST}.json", "manifest", ("manifests", f"{DIGEST}.json"), DIGEST),
        ("/metadata/timestamp.json", "timestamp", ("metadata", "timestamp.json"), None),
        ("/metadata/12.snapshot.json", "metadata", ("metadata", "12.snapshot.json"), None),
        (f"/rollout/{DIGEST}.json", "rollout", ("rollout", f"{DIGEST}.json"), DIGEST),
    ],
)
def test_names(path: str, kind: str, parts: tuple[str, ...], digest: str | None) -> None:
    found = split_path(path)
    assert found is not None
    assert (found.kind, found.parts, found.digest) == (kind, parts, digest)


@given(
    st.lists(
        st.sampled_from(
            ["/", "..", ".", "objects", "metadata", "rollout", "release.json", DIGEST, ".json", "%2e", "1.root"]
        ),
        max_size=8,
    ).map("".join)
    | st.text(max_size=40)
)
@example(f"/objects/{DIGEST}\n")
@example("/metadata/1.root.json\n")
def test_no_name_leads_elsewhere(path: str) -> None:
    found = split_path(path)
    if found is not None:
        assert "/" + "/".join(found.parts) == path.partition("?")[0]
        assert found.kind in KINDS
        assert all(part and part[0] != "." and set(part).isdisjoint("/\\\0\n%") for part in found.parts)


def test_a_document_that_is_too_long_is_not_hashed(tmp_path: Path) -> None:
    path = tmp_path / "release.json"
    path.write_bytes(b"")
    os.truncate(path, DOCUMENT_LIMIT + 1)
    fd = open_beneath(tmp_path, ("release.json",))
    try:
        with pytest.raises(OSError, match="too long"):
            headers_of(Name("release", ("release.json",), "no-cache", None), fd, DOCUMENT_LIMIT + 1)
    finally:
        os.close(fd)


def test_either_kind_of_release_is_one(tmp_path: Path) -> None:
    assert not is_published(tmp_path)
    (tmp_path / "metadata").mkdir()
    assert not is_published(tmp_path)
    (tmp_path / "metadata" / "timestamp.json").write_bytes(b"{}")
    assert is_published(tmp_path)


def test_no_file_stays_open(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    os.mkfifo(tmp_path / "objects" / DIGEST)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for parts in (("objects", DIGEST), ("objects", "x"), ("nothing", "x"), ("objects",)):
        with pytest.raises(OSError):
            open_beneath(tmp_path, parts)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
