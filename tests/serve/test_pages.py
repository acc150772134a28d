"""Static pages of the package under a prefix: names, types, what a browser is told, and nothing beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdeploy.errors import DeviceError
from qdeploy.files import sha256
from qdeploy.serve import app
from qdeploy.serve.app import BROWSER_PREFIX, Options, serving
from qdeploy.serve.pages import TYPES, Pages, policy
from qdeploy.serve.tree import split_path
from tests.serve.trees import CONTENT, NAME, ask, make_root

HTML = b"<!doctype html><title>x</title>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "web"
    (folder / "vendor" / "deep").mkdir(parents=True)
    (folder / "index.html").write_bytes(HTML)
    (folder / "vendor" / "ort.mjs").write_bytes(b"export {};")
    (folder / "vendor" / "deep" / "ort-wasm-simd-threaded.wasm").write_bytes(b"\0asm" + bytes(100_000))
    (folder / "notes.txt").write_bytes(b"secret")
    (folder / ".hidden.js").write_bytes(b"secret")
    (tmp_path / "outside.js").write_bytes(b"secret")
    (folder / "link.js").symlink_to(tmp_path / "outside.js")
    (folder / "out").symlink_to(tmp_path)
    return folder


@pytest.fixture
def url(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(app, "packaged", lambda _, prefix, wasm, beside: Pages(folder, prefix, wasm, beside))
    with serving(make_root(tmp_path), options=Options(port=0, browser=True)) as url:
        yield url


def test_the_page_and_its_files(url: str) -> None:
    status, headers, body = ask(url, "/ui/device/")
    assert (status, body, headers["content-type"]) == (200, HTML, "text/html; charset=utf-8")
    assert headers["content-security-policy"] == policy(wasm=True)
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
    assert ask(url, "/ui/device/index.html?x=1")[::2] == (200, HTML)
    status, headers, body = ask(url, "/ui/device/vendor/ort.mjs")
    assert (status, body, headers["content-type"]) == (200, b"export {};", "text/javascript; charset=utf-8")
    path = "/ui/device/vendor/deep/ort-wasm-simd-threaded.wasm"
    status, headers, body = ask(url, path)
    assert (status, len(body), headers["content-type"]) == (200, 100_004, "application/wasm")
    assert ask(url, path, {"Range": "bytes=0-3"})[::2] == (206, b"\0asm")
    assert ask(url, f"/objects/{NAME}")[::2] == (200, CONTENT)


def test_a_page_is_revalidated(url: str, folder: Path) -> None:
    tag = ask(url, "/ui/device/")[1]["etag"]
    assert tag == f'"{sha256(HTML)}"'
    status, headers, body = ask(url, "/ui/device/", {"If-None-Match": tag})
    assert (status, body, headers["etag"]) == (304, b"", tag)
    (folder / "index.html").write_bytes(HTML + b"y")
    assert ask(url, "/ui/device/", {"If-None-Match": tag})[::2] == (200, HTML + b"y")


def test_without_its_last_slash(url: str) -> None:
    status, headers, _ = ask(url, "/ui/device")
    assert (status, headers["location"]) == (308, "/ui/device/")


@pytest.mark.parametrize(
    "path",
    [
        "vendor/", "vendor", "notes.txt", ".hidden.js", "link.js", "out/outside.js",
        "../outside.js", "%2e%2e/outside.js",
        "vendor/../../outside.js", "vendor//ort.mjs", "vendor/./ort.mjs", "/index.html", "index.html/", "nothing.js",
        "vendor/%6frt.mjs", "index.html%00", "index", "a/b/c/d/e.js", "..\\outside.js",
    ],
)  # fmt: skip
def test_nothing_else(url: str, path: str) -> None:
    status, _, body = ask(url, f"/ui/device/{path}")
    assert status == 404 and b"secret" not in body


@pytest.mark.parametrize("path", ["/ui/", "/ui", "/ui/devices/", "/ui/devicex", "/ui/fleet/"])
def test_nothing_beside_it(url: str, path: str) -> None:
    assert ask(url, path)[0] == 404


def test_only_reading(url: str) -> None:
    assert ask(url, "/ui/device/", method="POST", body=b"")[0] == 405
    assert ask(url, "/ui/device/", method="HEAD")[::2] == (200, b"")


def test_what_is_no_file_is_not_there(url: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe.js")
    (folder / "dir.js").mkdir()
    assert ask(url, "/ui/device/pipe.js")[0] == ask(url, "/ui/device/dir.js")[0] == 404


def test_there_is_no_page_unless_it_is_asked_for(tmp_path: Path) -> None:
    with serving(make_root(tmp_path)) as url:
        assert ask(url, "/ui/device/")[0] == ask(url, "/ui/device")[0] == 404


def test_policies() -> None:
    assert "wasm" not in policy(wasm=False) and "unsafe-inline" not in policy(True) + policy(False)
    for text in (policy(wasm=True), policy(wasm=False)):
        assert text.startswith("default-src 'none'; script-src 'self'") and "frame-ancestors 'none'" in text


def test_no_name_of_a_tree_is_a_pages() -> None:
    assert all(split_path(f"{BROWSER_PREFIX}{name}") is None for name in ["", *(f"x.{kind}" for kind in TYPES)])


def test_a_page_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="install qdeploy again"):
        Pages(tmp_path, "/ui/x/")


def test_an_operators_own_files_beside_the_page(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "packaged", lambda _, prefix, wasm, beside: Pages(folder, prefix, wasm, beside))
    own = tmp_path / "own"
    (own / "sample").mkdir(parents=True)
    options, root = Options(port=0, browser_files=own), make_root(tmp_path)
    with pytest.raises(DeviceError, match="copy 1.root.json"), serving(root, options=options):
        pass
    for name in ("root.json", "sample/images.npy", "index.html", "sample/secret.npy"):
        (own / name).write_bytes(name.encode())
    with serving(root, options=options) as url:
        assert ask(url, "/ui/device/root.json")[::2] == (200, b"root.json")
        assert ask(url, "/ui/device/sample/images.npy")[::2] == (200, b"sample/images.npy")
        assert ask(url, "/ui/device/")[2] == HTML
        for name in ("sample/labels.npy", "sample/secret.npy"):
            assert ask(url, f"/ui/device/{name}")[0] == 404
