"""The tracker's protocol against what may listen at its port: nothing, another server, a mute one, a lying one."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from qdeploy.errors import DeviceError, RecipeError
from qdeploy.farm import tracker as module
from qdeploy.farm.device import RpcDevice, parse_device, parse_devices
from qdeploy.farm.tracker import MAGIC, Tracker, devices, of_key, request
from qdeploy.target import Target

MAGIC_BYTES = struct.pack("<i", MAGIC)


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[Tracker]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    with suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Tracker("127.0.0.1", server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)


def framed(value: object) -> bytes:
    data = json.dumps(value).encode()
    return struct.pack("<i", len(data)) + data


def saying(data: bytes) -> Callable[[socket.socket], None]:
    """Sends `data`, and reads until the other side closes: closing before that could overtake what was sent."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(data)
        while connection.recv(1 << 16):
            pass

    return answer


def replying(value: object) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(MAGIC_BYTES)
        connection.recv(4)
        connection.recv(1 << 16)
        connection.sendall(framed(value))

    return answer


SUMMARY = {
    "server_info": [
        {"addr": ["10.0.0.2", 9090], "key": "server:rpi5"},
        {"addr": ["10.0.0.1", 9090], "key": "server:rpi5"},
        {"addr": ["10.0.0.3", 9090], "key": "server:orin"},
    ],
    "queue_info": {
        "rpi5": {"free": 1, "pending": 0},
        "ghost": {"free": 0, "pending": 2},
        "old": {"free": 0, "pending": 0},
    },
}


def test_what_a_tracker_lists() -> None:
    with listening(replying([0, SUMMARY])) as tracker:
        rows = devices(tracker)
        assert [(d.key, len(d.addresses), d.free, d.pending) for d in rows] == [
            ("ghost", 0, 0, 2), ("orin", 1, 0, 0), ("rpi5", 2, 1, 0),
        ]  # fmt: skip
        assert of_key(tracker, "rpi5").addresses == ("10.0.0.1:9090", "10.0.0.2:9090")
        for key in ("rpi4", "ghost", ""):
            with pytest.raises(DeviceError, match=f"no device has key '{key}'.* keys there: orin, rpi5"):
                of_key(tracker, key)


@pytest.mark.parametrize("value", [[0], [1, SUMMARY], {}, [0, {"server_info": []}], [0, {"server_info": [1]}], None])
def test_nonsense_is_an_error(value: object) -> None:
    with listening(replying(value)) as tracker:
        with pytest.raises(DeviceError, match="nonsense"):
            devices(tracker)
        with pytest.raises(DeviceError, match="nonsense"):
            request(tracker, "rpi5", 1.0)


def test_what_is_no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)
    hung = threading.Event()
    cases: list[tuple[Callable[[socket.socket], None], str]] = [
        (saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "is no RPC tracker"),
        (lambda c: c.close(), "no RPC tracker at"),
        (saying(MAGIC_BYTES + struct.pack("<i", -5)), "sends -5 bytes"),
        (saying(MAGIC_BYTES + struct.pack("<i", 3) + b"{{{"), "no RPC tracker at"),
        (lambda c: bool(hung.wait(1.0)) or None, "does not answer within 0.3 s"),
    ]
    for answer, message in cases:
        with listening(answer) as tracker, pytest.raises(DeviceError, match=message):
            devices(tracker)
    with pytest.raises(DeviceError, match="no RPC tracker at .*refused.*start one"):
        devices(tracker)


def test_waiting_for_a_free_device_ends() -> None:
    with (
        listening(saying(MAGIC_BYTES)) as tracker,
        pytest.raises(DeviceError, match="no device of key rpi5 became free within 0.2 s"),
    ):
        request(tracker, "rpi5", 0.2)
    with listening(replying([0, ["10.0.0.1", 9090, "rpi5:abc"]])) as tracker:
        assert request(tracker, "rpi5", 1.0) == ("10.0.0.1", 9090, "rpi5:abc")


def test_names_of_devices() -> None:
    assert Tracker.parse("farm:9191") == Tracker("farm", 9191) and Tracker.parse("farm").port == 9190
    for text in ("", ":9190", "farm:x", "farm:0", "farm:70000"):
        with pytest.raises(RecipeError, match="is no tracker"):
            Tracker.parse(text)
    for text in ("lokal", "farm:9190", "farm:9190/"):
        with pytest.raises(RecipeError, match="write local or HOST:PORT/KEY"):
            parse_device(text)


def target_of(name: str, device: str = "") -> Target:
    return Target(name, "x86_64", "llvm", "haswell", device=device)


def test_devices_of_targets() -> None:
    """`--device` before the target file, the target file before this machine; one object for each device."""
    targets = [target_of("a"), target_of("b", "local"), target_of("c", "farm.invalid:1/rpi5")]
    assert set(parse_devices([], targets[:2])) == {"", "b"} and set(parse_devices(["c=local"], targets)) == {
        "",
        "b",
        "c",
    }
    assert set(parse_devices(["local"], targets)) == {""}  # no tracker is asked
    both = parse_devices(["a=local", "b=local"], targets[:2])
    assert set(both) == {"", "a", "b"} and both["a"] is both["b"]
    with listening(replying([0, SUMMARY])) as tracker:
        found = parse_devices([], [target_of("c", f"{tracker}/rpi5")])["c"]
    assert isinstance(found, RpcDevice) and found.slots == 2 and found.key == "rpi5"
    with pytest.raises(DeviceError, match="no RPC tracker at .*farm.invalid"):
        parse_devices([], targets)
    for texts, message in [(["d=local"], "no --target has the name 'd'"), (["local", "local"], "has a device already")]:
        with pytest.raises(RecipeError, match=message):
            parse_devices(texts, targets[:2])
