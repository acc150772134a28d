"""What hostile or unlucky readers can do to a server: nothing that others would notice."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdeploy.errors import DeviceError
from qdeploy.serve.app import Options, serving, serving_both
from qdeploy.serve.byte_log import Sent, read_byte_log
from qdeploy.serve.limits import Limits, Pace, allow_files
from tests.serve.trees import CONTENT, NAME, RELEASE, ask, connect, make_root, read_all

BIG = "d" * 64
GET = f"GET /objects/{BIG} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = make_root(tmp_path)
    with open(root / "objects" / BIG, "wb") as file:
        file.truncate(64 << 20)
    return root


@contextlib.contextmanager
def limited(root: Path, log: Path | None = None, **limits: float) -> Iterator[tuple[str, str]]:
    """A server and its operators' URL."""
    options = Options(port=0, log=log, admin_port=0, limits=Limits(**{"stop_s": 1.0} | limits))  # type: ignore[arg-type]
    with serving_both(root, options) as (url, admin):
        assert admin is not None
        yield url, admin


def metric(admin: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", ask(admin, "/metrics")[2].decode(), re.M)
    assert found is not None, name
    return float(found[1])


def rows_of(path: Path) -> list[Sent]:
    """The byte log as soon as it has a row."""
    while not (rows := read_byte_log(path)):
        time.sleep(0.02)
    return rows


def reset(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


def test_connections_over_the_limit_are_told_so(root: Path) -> None:
    with limited(root, connections=3) as (url, admin), contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(url)) for _ in range(3)]
        for line in held:
            line.sendall(b"GET /release.json HTTP/1.1\r\nHost: x\r\n\r\n")
            assert line.recv(100).startswith(b"HTTP/1.1 200")
        with connect(url) as fourth:
            answer = read_all(fourth)
        assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After" in answer
        assert metric(admin, "qdeploy_http_refused_connections_total") == 1
        held[0].close()
        for _ in range(200):  # until the server has seen it go
            if ask(url, "/release.json")[0] == 200:
                break
        else:
            pytest.fail("no connection is taken again")


def test_more_connections_than_files_are_refused_at_the_start() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))\n"
        "from qdeploy.serve.limits import allow_files\n"
        "allow_files(70); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]); allow_files(1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "274\n"
    assert "DeviceError" in done.stderr and "--connections 78" in done.stderr
    allow_files(1)
    with pytest.raises(DeviceError, match="open files"):
        allow_files(10**9)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 10_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET /\x00 HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_400_and_counted(root: Path, request_: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with limited(root) as (url, admin):
        with connect(url) as line:
            with contextlib.suppress(ConnectionError):
                line.sendall(request_)
            assert read_all(line)[:12] in (b"HTTP/1.0 400", b"HTTP/1.1 400", b"")
        assert metric(admin, 'qdeploy_http_requests_total{kind="other",status="400"}') == 1
        assert ask(url, "/release.json")[2] == RELEASE
    assert capfd.readouterr().err == ""


def test_a_head_that_does_not_come_ends_the_connection(root: Path) -> None:
    with limited(root, idle_s=0.2) as (url, _), connect(url) as line:
        line.sendall(b"GET /release.json HTTP/1.1\r\nX: ")
        assert read_all(line) == b""


def test_an_idle_connection_is_closed(root: Path) -> None:
    with limited(root, idle_s=0.2) as (url, _), connect(url) as line:
        line.sendall(b"GET /release.json HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(line).endswith(RELEASE)


def test_a_reader_below_the_floor_is_cut_off(root: Path, tmp_path: Path) -> None:
    with limited(root, tmp_path / "log", grace_s=0.1, floor_bytes_per_s=1e9) as (url, admin), connect(url) as line:
        line.sendall(GET)
        rows = rows_of(tmp_path / "log")
        assert metric(admin, 'qdeploy_http_broken_answers_total{reason="slow"}') == 1
        body = read_all(line).partition(b"\r\n\r\n")[2]
    assert (rows[0].status, rows[0].size) == (200, 64 << 20)
    assert len(body) <= rows[0].sent < 64 << 20
    assert len(rows) == 1


def test_a_stalled_reader_is_cut_off_by_the_kernel(root: Path, tmp_path: Path) -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no TCP_USER_TIMEOUT")
    with limited(root, tmp_path / "log", stall_s=0.5) as (url, admin), connect(url) as line:
        line.sendall(GET)
        rows = rows_of(tmp_path / "log")
        assert rows[0].sent < rows[0].size
        assert metric(admin, 'qdeploy_http_broken_answers_total{reason="slow"}') == 1


def test_a_reader_that_is_reset_harms_nobody(root: Path, tmp_path: Path) -> None:
    with limited(root, tmp_path / "log") as (url, admin):
        for _ in range(20):
            line = connect(url)
            line.sendall(GET)
            line.recv(100)
            reset(line)
        assert ask(url, f"/objects/{NAME}")[2] == CONTENT
    rows = read_byte_log(tmp_path / "log")
    assert len(rows) == 21 and all(row.sent < row.size for row in rows if row.path.endswith(BIG))


def test_a_reader_that_closes_its_side_gets_it_all(root: Path) -> None:
    with limited(root) as (url, _), connect(url) as line:
        line.sendall(GET)
        line.recv(1)
        line.shutdown(socket.SHUT_WR)
        assert len(read_all(line).partition(b"\r\n\r\n")[2]) == 64 << 20


def test_requests_in_one_go_are_answered_in_order(root: Path) -> None:
    asked = [(100_000 * i, 100_000 * i + 60_000) for i in range(10)] * 3
    with limited(root) as (url, _), connect(url) as line:
        for i, (start, stop) in enumerate(asked):
            end = "Connection: close\r\n\r\n" if i + 1 == len(asked) else "\r\n"
            text = f"GET /objects/{NAME} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{stop - 1}\r\n{end}"
            line.sendall(text.encode())
        data = read_all(line)
    bodies = re.split(rb"HTTP/1\.1 206.*?\r\n\r\n", data, flags=re.S)[1:]
    assert bodies == [CONTENT[start:stop] for start, stop in asked]


def test_a_file_cut_under_the_server_gives_a_short_body(root: Path, tmp_path: Path) -> None:
    with limited(root, tmp_path / "log") as (url, admin), connect(url) as line:
        line.sendall(GET)
        line.recv(100)
        os.truncate(root / "objects" / BIG, 32 << 20)
        assert len(read_all(line)) < 64 << 20
        assert metric(admin, 'qdeploy_http_broken_answers_total{reason="file"}') == 1
    (row,) = read_byte_log(tmp_path / "log")
    assert row.sent == 32 << 20


def test_a_disk_that_cannot_be_read_gives_a_short_body(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sendfile, calls = os.sendfile, []

    def failing(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        return sendfile(*arguments)

    monkeypatch.setattr(os, "sendfile", failing)
    with limited(root, tmp_path / "log") as (url, admin), connect(url) as line:
        line.sendall(GET)
        head, _, body = read_all(line).partition(b"\r\n\r\n")
        assert b"200 OK" in head and body == bytes(len(body)) and len(body) < 64 << 20
        assert metric(admin, 'qdeploy_http_broken_answers_total{reason="file"}') == 1
        assert ask(url, f"/objects/{NAME}")[2] == CONTENT


def test_a_bug_in_one_answer_is_500_or_a_short_body(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def bug(*_: object) -> None:
        raise AssertionError("bug")

    with limited(root) as (url, _):
        with monkeypatch.context() as patch:
            patch.setattr("qdeploy.serve.site.headers_of", bug)
            assert ask(url, "/release.json")[0] == 500
        with monkeypatch.context() as patch:
            patch.setattr(os, "sendfile", bug)
            with connect(url) as line:
                line.sendall(GET)
                data = read_all(line)
            assert data.count(b"HTTP/1.1") == 1 and data.endswith(b"\r\n\r\n")
        assert ask(url, f"/objects/{NAME}")[2] == CONTENT
    assert capfd.readouterr().err.count("AssertionError: bug") == 2


def test_a_log_on_a_full_disk_stops_nothing(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with limited(root, Path("/dev/full")) as (url, admin):
        for _ in range(3):
            assert ask(url, f"/objects/{NAME}")[::2] == (200, CONTENT)
        assert metric(admin, "qdeploy_lost_log_lines") == 3
    assert capfd.readouterr().err.count("serving goes on") == 1


def test_the_access_log_has_every_request(root: Path, tmp_path: Path) -> None:
    options = Options(port=0, access_log=tmp_path / "access")
    with serving(root, options=options) as url:
        ask(url, f"/objects/{NAME}", {"Range": "bytes=5-9"})
        ask(url, '/"\\x')
        with connect(url) as line:
            line.sendall(b"nonsense\r\n\r\n")
            read_all(line)
    lines = (tmp_path / "access").read_text().splitlines()
    assert lines[0].startswith("127.0.0.1 - - [") and lines[0].endswith(f'"GET /objects/{NAME} HTTP/1.1" 206 5')
    assert lines[1].endswith('"GET /\\"\\\\x HTTP/1.1" 404 0')
    assert lines[2].endswith(" 400 0")


def test_pace() -> None:
    pace = Pace(rate=2, burst=3, interval=10)
    assert [pace.allows(key, 100.0) for key in "aabcd"] == [True, False, True, True, False]
    assert pace.allows("d", 100.5) and not pace.allows("e", 100.9)
    assert not pace.allows("a", 109.0) and pace.allows("a", 110.0)
    fast = Pace(rate=1e9, burst=1e9, interval=1e9)
    assert all(fast.allows(str(i), 1.0) for i in range(Pace.KEYS + 1))
    assert fast.allows("0", 1.0) and not fast.allows(str(Pace.KEYS), 1.0)  # the first was forgotten
