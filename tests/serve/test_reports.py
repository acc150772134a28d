"""Reports of devices: from a device's process to the database, and what hostile ones cost."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.client.status import MAX_BYTES, DeviceState, parse_state, report, state_bytes
from qdeploy.errors import DataError, DeviceError
from qdeploy.serve.app import Options, serving_both
from qdeploy.serve.database import FORGET_S, HISTORY, StateDatabase, history, page, reading, state_of
from qdeploy.serve.fleet import read_fleet
from qdeploy.serve.limits import Limits
from qdeploy.serve.reports import read_token
from tests.serve.trees import CONTENT, NAME, ask, connect, make_root, read_all

STATE = DeviceState(
    "cam-1", "resnet8", "rpi5", 3, "w4", "w2", stale=True, fetched=12345, channel="canary", error="no net"
)
OTHER = DeviceState("cam-2", "resnet8", "rpi5", 3, "w4", "w4")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


@pytest.fixture
def states(tmp_path: Path) -> Path:
    return tmp_path / "states.sqlite"


@pytest.fixture
def urls(root: Path, states: Path) -> Iterator[tuple[str, str]]:
    options = Options(port=0, devices=states, admin_port=0, limits=Limits(stop_s=1, body_s=0.3))
    with serving_both(root, options) as (url, admin):
        assert admin is not None
        yield url, admin


def post(url: str, body: bytes, device: str = "cam-1", **headers: str) -> tuple[int, str]:
    status, _, text = ask(url, f"/devices/{device}/state", headers, "POST", body)
    return status, text.decode()


def test_a_report_is_stored_and_read_from_file_and_url(urls: tuple[str, str], states: Path) -> None:
    url, admin = urls
    assert report(url, STATE) is None
    assert report(url + "/", {**OTHER.__dict__}) is None
    for source in (str(states), admin):
        assert [state for _, state in read_fleet(source)] == [STATE, OTHER]
    assert ask(url, "/devices")[0] == 404  # the fleet is for operators alone
    assert ask(url, f"/objects/{NAME}")[2] == CONTENT


def hostile(body: object) -> bytes:
    return json.dumps(body).encode()


GOOD = json.loads(state_bytes(STATE))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"null", 400), (b"{}", 400), (b"\xff", 400), (b"[" * 4000, 400), (b"1e999", 400),
        (hostile(GOOD | {"more": 1}), 400), (hostile(GOOD | {"release": "3"}), 400),
        (hostile(GOOD | {"release": True}), 400), (hostile(GOOD | {"release": -1}), 400),
        (hostile(GOOD | {"release": 2**63}), 400), (hostile(GOOD | {"fetched": 1.0}), 400),
        (hostile(GOOD | {"stale": 1}), 400), (hostile(GOOD | {"model": None}), 400),
        (hostile(GOOD | {"model": "../x"}), 400), (hostile(GOOD | {"error": "a\nb"}), 400),
        (hostile(GOOD | {"error": "x" * 301}), 400), (hostile(GOOD | {"format": "qdeploy-state/2"}), 400),
        (hostile(GOOD).replace(b"{", b'{"release":1,', 1), 400), (hostile(GOOD) + b"x", 400),
        (hostile(GOOD | {"release": float("nan")}), 400), (b" " * (MAX_BYTES + 1), 413), (b"x" * 10_000_000, 413),
    ],
)  # fmt: skip
def test_hostile_bodies_are_refused_in_one_line(urls: tuple[str, str], states: Path, body: bytes, status: int) -> None:
    try:
        found, text = post(urls[0], body)
    except ConnectionError:  # the server hung up on the rest of a body that it had refused
        assert status == 413
    else:
        assert found == status and len(text.splitlines()) == 1 and len(text) < 400
    assert read_fleet(str(states)) == []
    assert report(urls[0], OTHER) is None


@pytest.mark.parametrize("device", ["", ".", "-x", "a%2e", "a/b", "x" * 101])
def test_names_of_devices(urls: tuple[str, str], device: str) -> None:
    status, text = post(urls[0], state_bytes(STATE), device)
    assert (status, text) == (404, "404\n")


def test_other_ways_to_be_refused(urls: tuple[str, str], states: Path) -> None:
    url = urls[0]
    status, headers, _ = ask(url, "/devices/a/state")
    assert (status, headers["allow"]) == (405, "POST")
    with connect(url) as line:  # a body that does not come
        line.sendall(b"POST /devices/a/state HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        assert read_all(line).startswith(b"HTTP/1.1 408")
    with connect(url) as line:  # one without an end
        chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
        line.sendall(b"POST /devices/b/state HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 3)
        assert line.recv(100).startswith(b"HTTP/1.1 413")
    assert report(url, OTHER) is None
    assert post(url, state_bytes(OTHER), "cam-2") == (429, "too many reports\n")
    assert len(read_fleet(str(states))) == 1


def test_a_token(root: Path, states: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct-horse\n")
    options = Options(port=0, devices=states, token=read_token(tmp_path / "token"))
    with serving_both(root, options) as (url, _):
        assert report(url, STATE) == "the server answered 401: the token is wrong or missing"
        assert report(url, STATE, token="wrong-horse") == "the server answered 401: the token is wrong or missing"
        assert read_fleet(str(states)) == []
        assert report(url, STATE, token="correct-horse") is None
    for text in ("", "short", "two words here", "a\nb", "x" * 600):
        (tmp_path / "token").write_text(text)
        with pytest.raises(DataError, match="holds no token"):
            read_token(tmp_path / "token")


def test_without_the_option_nothing_is_taken(root: Path) -> None:
    with serving_both(root, Options(port=0, admin_port=0)) as (url, admin):
        assert report(url, STATE) == "the server answered 404: 404"
        assert admin is not None and ask(admin, "/devices")[0] == 404


SERVER = """
import sys
from pathlib import Path
from qdeploy.serve.app import Options, serve
serve(Path(sys.argv[1]), Options(port=0, devices=Path(sys.argv[2])), print)
"""


def test_what_was_acknowledged_survives_kill_9(root: Path, states: Path) -> None:
    seen = []
    for turn in range(2):
        command = [sys.executable, "-u", "-c", SERVER, str(root), str(states)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = process.stdout.readline().split(" at ")[1].split()[0]
            for i in range(20):
                state = DeviceState(f"d{turn}-{i:02}", "m", "t", i, "w4", "w2")
                assert report(url, state) is None
                seen.append(state)
            process.send_signal(signal.SIGKILL)
    assert [state for _, state in read_fleet(str(states))] == seen


def test_a_database_that_fails_refuses_reports_and_serving_goes_on(
    urls: tuple[str, str], states: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, _ = urls
    assert report(url, STATE) is None
    with closing(sqlite3.connect(states)) as db:
        db.execute("ALTER TABLE history RENAME TO away")
    for name in ("a", "b"):
        assert post(url, state_bytes(OTHER), name) == (503, "the state cannot be stored\n")
    assert ask(url, f"/objects/{NAME}")[2] == CONTENT
    with closing(sqlite3.connect(states)) as db:
        db.execute("ALTER TABLE away RENAME TO history")
    assert post(url, state_bytes(OTHER), "c") == (204, "")
    failed, again = capfd.readouterr().err.splitlines()
    assert "no such table" in failed and "serving goes on" in failed and "written again" in again
    assert [state.device for _, state in read_fleet(str(states))] == ["c", "cam-1"]


def test_a_hundred_thousand_names_are_bounded(states: Path) -> None:
    with closing(StateDatabase(states, max_devices=500)) as database:
        taken = 0
        for start in range(0, 100_000, 10_000):
            batch = [DeviceState(f"n{i}", "m", "t", 1, "w4", "w2") for i in range(start, start + 10_000)]
            taken += sum(database.write(batch, 1000.0))
        assert (taken, database.devices) == (500, 500)
        assert database.write([DeviceState("n7", "m", "t", 2, "w4", "w4")], 1001.0) == [True]
        # the place of one that was silent for long goes to a new one, and its history with it
        assert database.write([DeviceState("new", "m", "t", 2, "w4", "w4")], 1000.5 + FORGET_S) == [True]
        assert database.devices == 500
        database.write([DeviceState("n7", "m", "t", 3, "w4", "w4")], 1002.0)
    with reading(states) as db:
        assert len(page(db, "")) == 500
        assert db.execute("SELECT count(*) FROM history").fetchone()[0] == 502
        assert [row["release"] for row in history(db, "n7")] == [1, 2, 3]
    assert states.stat().st_size < 2_000_000


def test_the_history_keeps_the_latest_changes(states: Path) -> None:
    with closing(StateDatabase(states)) as database:
        for i in range(3 * HISTORY):
            database.write([DeviceState("a", "m", "t", i // 2, "w4", "w2", fetched=i)], float(i))
    with reading(states) as db:
        rows = history(db, "a")
        assert [row["release"] for row in rows] == [i for i in range(3 * HISTORY // 2)][-HISTORY:]
        assert page(db, "")[0]["fetched"] == 3 * HISTORY - 1


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 5000)
    with closing(sqlite3.connect(tmp_path / "db")) as db:
        db.execute("CREATE TABLE devices (x)")
    before = (tmp_path / "db").read_bytes()
    for name in ("text", "db", "no/such"):
        with pytest.raises(DeviceError, match=r"state database"):
            StateDatabase(tmp_path / name)
    assert (tmp_path / "text").read_text() == "x" * 5000
    with closing(sqlite3.connect(tmp_path / "db")) as db:
        assert db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 1
    assert len(before) > 0
    with pytest.raises(DataError, match="qdeploy serve --devices"):
        read_fleet(str(tmp_path / "nothing"))


def test_a_row_that_is_no_state_is_refused(states: Path) -> None:
    with closing(StateDatabase(states)) as database:
        database.write([STATE], 5.0)
    with reading(states) as db:
        (row,) = page(db, "")
    assert state_of(row) == (5.0, STATE)
    for bad in ({}, row | {"seen": "x"}, row | {"model": 3}, row | {"stale": 1}):
        with pytest.raises(DataError):
            state_of(bad)


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
integers = st.integers(0, 2**53 - 1)
some_states = st.builds(
    DeviceState, names, names, names, integers, names, names, st.booleans(), integers, st.none() | names,
    st.none() | st.text(max_size=300).filter(str.isprintable),
)  # fmt: skip


@given(some_states)
@settings(max_examples=50)
def test_bytes_of_a_state_come_back(state: DeviceState) -> None:
    assert parse_state(state.device, state_bytes(state)) == state
    assert len(state_bytes(state)) <= MAX_BYTES


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(hostile))
@settings(max_examples=50)
def test_any_bytes_are_a_state_or_an_error(data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        parse_state("cam", data)
    assert "\n" not in str(caught.value)
