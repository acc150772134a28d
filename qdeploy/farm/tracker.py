"""What an RPC tracker of TVM's says about its servers. Its protocol is spoken here with time limits, which TVM lacks.

After a magic number each way: JSON messages behind their length, little-endian int32 (tvm/rpc/tracker.py, base.py).
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass
from typing import Any

from qdeploy.errors import DeviceError, RecipeError

MAGIC, REQUEST, SUMMARY, SUCCESS = 0x2F271, 4, 6, 0
SECONDS = 5.0
MOST = 1 << 24  # bytes of an answer
DEFAULT_PORT = 9190


@dataclass(frozen=True)
class Tracker:
    """Where a tracker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Tracker:
        """HOST:PORT or HOST; RecipeError for anything else."""
        host, _, port = text.partition(":")
        if not host or (port and not (port.isdigit() and 0 < int(port) < 1 << 16)):
            raise RecipeError(f"{text!r} is no tracker: write HOST:PORT, such as 127.0.0.1:{DEFAULT_PORT}")
        return cls(host, int(port or DEFAULT_PORT))


@dataclass(frozen=True)
class Devices:
    """Servers of one key: their addresses, how many are free now, how many requests wait."""

    key: str
    addresses: tuple[str, ...]
    free: int
    pending: int


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 16))
        if not part:
            raise OSError("the connection was closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _ask(tracker: Tracker, request: list[Any], seconds: float = SECONDS) -> Any:
    """The answer to one request; raises DeviceError when there is no tracker or a hung one."""
    greeted = False
    try:
        with socket.create_connection((tracker.host, tracker.port), SECONDS) as connection:
            connection.sendall(struct.pack("<i", MAGIC))
            if struct.unpack("<i", _receive(connection, 4))[0] != MAGIC:
                raise DeviceError(f"what listens at {tracker} is no RPC tracker: check host and port")
            greeted = True
            connection.settimeout(seconds)
            data = json.dumps(request).encode()
            connection.sendall(struct.pack("<i", len(data)) + data)
            (size,) = struct.unpack("<i", _receive(connection, 4))
            if not 0 < size < MOST:
                raise DeviceError(f"the tracker at {tracker} sends {size} bytes: check host and port")
            return json.loads(_receive(connection, size))
    except TimeoutError as e:
        if greeted and request[0] == REQUEST:
            raise DeviceError(f"no device of key {request[1]} became free within {seconds:g} s at {tracker}") from e
        raise DeviceError(f"the tracker at {tracker} does not answer within {SECONDS:g} s: restart it") from e
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise DeviceError(
            f"no RPC tracker at {tracker} ({reason}): start one with python -m tvm.exec.rpc_tracker"
        ) from e


def devices(tracker: Tracker) -> list[Devices]:
    """All keys with a server or a waiting request, sorted; raises DeviceError."""
    answer = _ask(tracker, [SUMMARY])
    try:
        if answer[0] != SUCCESS:
            raise ValueError(answer)
        addresses: dict[str, list[str]] = {}
        for server in answer[1]["server_info"]:
            key = str(server["key"]).partition(":")[2]  # server:KEY
            addresses.setdefault(key, []).append(":".join(map(str, server["addr"])))
        waiting = answer[1]["queue_info"]
        found = []
        for key in sorted({*addresses, *(name for name, row in waiting.items() if row["pending"])}):
            row = waiting.get(key, {"free": 0, "pending": 0})
            found.append(Devices(key, tuple(sorted(addresses.get(key, []))), int(row["free"]), int(row["pending"])))
        return found
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise DeviceError(f"the tracker at {tracker} answers nonsense: is it of TVM 0.27?") from e


def of_key(tracker: Tracker, key: str) -> Devices:
    """The servers of `key`; DeviceError that names the keys there are when it has none."""
    known = devices(tracker)
    for found in known:
        if found.key == key and found.addresses:
            return found
    names = ", ".join(found.key for found in known if found.addresses) or "none"
    raise DeviceError(f"no device has key {key!r} at tracker {tracker}; keys there: {names}")


def request(tracker: Tracker, key: str, seconds: float) -> tuple[str, int, str]:
    """(host, port, the key that it expects) of a free server of `key`, waited for; raises DeviceError."""
    answer = _ask(tracker, [REQUEST, key, "", 1], seconds)
    try:
        status, (host, port, match) = answer
        if status != SUCCESS:
            raise ValueError(answer)
        return str(host), int(port), str(match)
    except (LookupError, TypeError, ValueError) as e:
        raise DeviceError(f"the tracker at {tracker} answers nonsense: is it of TVM 0.27?") from e
