"""A report never raises into the device's run and never holds it up (with a real server: tests/serve)."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from qdeploy.client.status import DeviceState, report
from qdeploy.errors import DataError
from tests.client.scripted import Line, head, scripted

STATE = DeviceState("cam-1", "resnet8", "rpi5", 3, "w4", "w2")


def wait_until_sent() -> None:
    """Until no report is under way."""
    while (found := report("nonsense", STATE)) == "an earlier report is still under way":
        time.sleep(0.01)
    assert found is not None and "not a URL" in found


def test_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert report(url, STATE, timeout=0.1) in ("no answer within 0.1 s", "timed out")
    wait_until_sent()


def test_a_server_that_trickles_does_not_hold_the_next_report() -> None:
    over = threading.Event()

    def answer(line: Line, asked: object) -> None:
        while not over.is_set():
            line.send("H")
            time.sleep(0.02)

    with scripted(answer) as (url, _):
        assert report(url, STATE, timeout=0.2) is not None
        wait_until_sent()
        over.set()


@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_what_is_not_204_was_not_taken(status: int) -> None:
    def answer(line: Line, asked: object) -> None:
        line.send(head(status, 5), "a\r\nbc")

    with scripted(answer) as (url, _):
        assert report(url, STATE) == f"the server answered {status}: a bc"


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "http://", "http://a b", "http://127.0.0.1:1", "http://[::1", "http://x/?q"]
)
def test_urls_of_no_use(url: str) -> None:
    found = report(url, STATE)
    assert found and "\n" not in found


def test_states_of_no_use() -> None:
    for state in ({}, {"device": "x"}, {**STATE.__dict__, "more": 1}, {**STATE.__dict__, "release": -1}, {1: 2}):
        assert report("http://127.0.0.1:1", state)  # type: ignore[arg-type]
    for field, value in (("device", "a/b"), ("device", ""), ("model", "a\n"), ("error", "x" * 301), ("error", "\x1b"),
                         ("release", 2**53), ("stale", "yes"), ("channel", ""), ("fetched", True)):  # fmt: skip
        with pytest.raises(DataError, match=field):
            DeviceState(**{**STATE.__dict__, field: value})
