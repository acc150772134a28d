from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import sha256
from qdeploy.serve.app import Options, serve, serving
from qdeploy.serve.byte_log import read_byte_log
from tests.serve.trees import CONTENT, NAME, RELEASE, ask, make_root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


@pytest.fixture
def url(root: Path, tmp_path: Path) -> Iterator[str]:
    with serving(root, log=tmp_path / "log") as url:
        yield url


def test_an_object_is_immutable_and_named_by_its_tag(url: str) -> None:
    status, headers, body = ask(url, f"/objects/{NAME}")
    assert (status, body) == (200, CONTENT)
    assert headers["etag"] == f'"{NAME}"'
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["accept-ranges"] == "bytes"
    assert "content-encoding" not in headers
    assert ask(url, f"/manifests/{NAME}.json")[0] == 200


def test_signed_metadata(url: str) -> None:
    status, headers, body = ask(url, "/metadata/timestamp.json")
    assert (status, body, headers["cache-control"]) == (200, b"timestamp", "no-cache")
    status, headers, body = ask(url, "/metadata/3.targets.json")
    assert (status, body, headers["etag"]) == (200, b"targets", f'"{sha256(b"targets")}"')
    assert "immutable" in headers["cache-control"]
    status, headers, body = ask(url, f"/rollout/{NAME}.json", {"Range": "bytes=-3"})
    assert (status, body, headers["etag"]) == (206, CONTENT[-3:], f'"{NAME}"')
    status, headers, _ = ask(url, "/metadata/4.root.json")
    assert (status, headers["cache-control"]) == (404, "no-cache")  # it may be there tomorrow


def test_the_release_is_revalidated_and_its_tag_follows_its_content(url: str, root: Path) -> None:
    status, headers, body = ask(url, "/release.json")
    assert (status, body, headers["cache-control"]) == (200, RELEASE, "no-cache")
    assert headers["etag"] == f'"{sha256(RELEASE)}"'
    same = {"If-None-Match": headers["etag"]}
    status, again, body = ask(url, "/release.json", same)
    assert (status, body, again["etag"], again["cache-control"]) == (304, b"", headers["etag"], "no-cache")
    (root / "release.json").write_bytes(b"{}\n")
    assert ask(url, "/release.json", same)[::2] == (200, b"{}\n")


def test_ranges(url: str) -> None:
    size = len(CONTENT)
    status, headers, body = ask(url, f"/objects/{NAME}", {"Range": "bytes=1000-299999"})
    assert (status, body) == (206, CONTENT[1000:300000])
    assert headers["content-range"] == f"bytes 1000-299999/{size}"
    status, headers, body = ask(url, f"/objects/{NAME}", {"Range": "bytes=-5"})
    assert (status, body) == (206, CONTENT[-5:])
    status, headers, _ = ask(url, f"/objects/{NAME}", {"Range": f"bytes={size}-"})
    assert (status, headers["content-range"]) == (416, f"bytes */{size}")
    assert ask(url, f"/objects/{NAME}", {"Range": "bytes=0-1,5-6"})[::2] == (200, CONTENT)


def test_if_range(url: str) -> None:
    asked = {"Range": "bytes=0-9"}
    assert ask(url, f"/objects/{NAME}", asked | {"If-Range": f'"{NAME}"'})[::2] == (206, CONTENT[:10])
    assert ask(url, f"/objects/{NAME}", asked | {"If-Range": '"other"'})[::2] == (200, CONTENT)


def test_head_says_what_get_would_send(url: str) -> None:
    status, headers, body = ask(url, f"/objects/{NAME}", method="HEAD")
    assert (status, headers["content-length"], body) == (200, str(len(CONTENT)), b"")
    status, headers, _ = ask(url, f"/objects/{NAME}", {"Range": "bytes=0-9"}, method="HEAD")
    assert (status, headers["content-length"]) == (200, str(len(CONTENT)))  # Range belongs to GET alone


def test_304_of_an_object(url: str) -> None:
    status, headers, body = ask(url, f"/objects/{NAME}", {"If-None-Match": f'"{NAME}"', "Range": "bytes=0-9"})
    assert (status, body) == (304, b"")
    assert "immutable" in headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "/", "", "/objects", "/objects/", "/objects/.hidden", "/other.txt", "/../outside", "/objects/../release.json",
        "/objects/..%2frelease.json", "/%2e%2e/outside", "/objects/%2e%2e/%2e%2e/outside", "//release.json",
        "/release.json/", "/RELEASE.JSON", "/release%2ejson", f"/objects/{NAME.upper()}", f"/objects/{NAME}.json",
        f"/manifests/{NAME}", f"/objects/{NAME}%00", f"/objects//{NAME}", f"/objects/./{NAME}", f"/objects/{NAME[:-1]}",
        "/objects/" + "0" * 64, "/objects\\..\\release.json", "/..;/release.json",
        "/metadata/keys.json", "/metadata/", "/metadata/0.root.json",
        "/metadata/3.mirrors.json", "/metadata/3.targets.json/", "/metadata/../release.json", "/rollout/rollout.json",
        "/devices/x/state", "/metrics",
    ],
)  # fmt: skip
def test_everything_else_is_not_there(url: str, path: str) -> None:
    status, _, body = ask(url, path or "/?")
    assert status == 404
    assert b"secret" not in body and b"qdeploy-release" not in body


def test_symbolic_links_are_not_followed(url: str, root: Path, tmp_path: Path) -> None:
    digest = "a" * 64
    (root / "objects" / digest).symlink_to(tmp_path / "outside")
    assert ask(url, f"/objects/{digest}")[0] == 404
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{digest}.json").write_bytes(b"secret")
    (root / "manifests").rename(root / "old")
    (root / "manifests").symlink_to(tmp_path / "elsewhere")
    assert ask(url, f"/manifests/{digest}.json")[0] == 404


def test_what_is_no_file_is_not_there(url: str, root: Path) -> None:
    os.mkfifo(root / "objects" / ("b" * 64))
    (root / "objects" / ("c" * 64)).mkdir()
    assert ask(url, "/objects/" + "b" * 64)[0] == 404
    assert ask(url, "/objects/" + "c" * 64)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_only_get_and_head(url: str, root: Path, method: str) -> None:
    status, headers, _ = ask(url, "/release.json", {"Content-Length": "0"}, method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert (root / "release.json").read_bytes() == RELEASE


def test_the_log_counts_what_was_sent(url: str, tmp_path: Path) -> None:
    ask(url, f"/objects/{NAME}", {"Range": "bytes=10-19"})
    ask(url, "/nothing")
    ask(url, f"/objects/{NAME}", method="HEAD")
    rows = read_byte_log(tmp_path / "log")
    assert [(r.method, r.status, r.range, r.start, r.size, r.sent) for r in rows] == [
        ("GET", 206, "bytes=10-19", 10, 10, 10),
        ("GET", 404, None, 0, 0, 0),
        ("HEAD", 200, None, 0, len(CONTENT), 0),
    ]
    assert rows[0].path == f"/objects/{NAME}"


def test_a_reader_that_goes_away_is_logged_with_less(root: Path, tmp_path: Path) -> None:
    big = b"x" * (64 << 20)
    (root / "objects" / ("d" * 64)).write_bytes(big)
    with serving(root, log=tmp_path / "log") as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as line:
            line.sendall(f"GET /objects/{'d' * 64} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert len(line.recv(100_000, socket.MSG_WAITALL)) == 100_000
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    (row,) = read_byte_log(tmp_path / "log")
    assert 0 < row.sent < row.size == len(big)


def test_a_folder_without_a_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no release\.json"):
        serve(tmp_path)
    with pytest.raises(BundleError, match="qdeploy bundle"):
        serve(tmp_path / "nowhere")


def test_a_port_in_use(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeviceError, match=f"port {port} on 127.0.0.1 is in use.*choose another"):
            serve(root, Options(port=port))
        with pytest.raises(DeviceError, match="in use"):
            with serving(root, port=port):
                raise AssertionError


def test_a_log_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="byte log"):
        with serving(root, log=tmp_path / "no" / "log"):
            raise AssertionError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_gracefully(root: Path, number: signal.Signals) -> None:
    code = "import sys; from qdeploy.serve.app import Options, serve; serve(sys.argv[1], Options(port=0), print)"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().decode().split(" at ")[1].split()[0]
        assert ask(url, "/release.json")[0] == 200
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr.read() == b""
