"""What a device reports of itself, opt-in: its state as small JSON, and one bounded attempt to send it.

    POST URL/devices/<device>/state      Content-Type: application/json

The body is one object with exactly the fields of `DeviceState` but `device`, and `"format": "qdeploy-state/1"`; at most
`MAX_BYTES`. A report is a courtesy: a device never waits long for it, and never fails because of it.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from qdeploy.client.fetch import split_url
from qdeploy.errors import DataError
from qdeploy.files import canonical_json, parse_json

FORMAT = "qdeploy-state/1"
MAX_BYTES = 4096
MAX_ERROR = 300  # characters
MAX_INTEGER = 2**53 - 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)

_sending = threading.Lock()  # one report at a time; another one meanwhile is not sent


@dataclass(frozen=True)
class DeviceState:
    """Which level a device runs. Raises DataError when a field is not what FORMAT allows.

    device     the operator's name of the device
    model      name of the model, as in the manifest
    target     hardware class, as in targets/NAME.toml
    channel    rollout channel that it follows, or None
    release    number of the release in force
    wanted     level that it was told to run
    reached    level in force
    stale      True when what it knows of releases has expired (it keeps running)
    fetched    body bytes received since the device was set up
    error      one line, or None
    """

    device: str
    model: str
    target: str
    release: int
    wanted: str
    reached: str
    stale: bool = False
    fetched: int = 0
    channel: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        for name in ("device", "model", "target", "wanted", "reached"):
            _check_name(name, getattr(self, name))
        if self.channel is not None:
            _check_name("channel", self.channel)
        for name in ("release", "fetched"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= MAX_INTEGER:
                raise DataError(f"{name} of a device's state must be an integer from 0 to 2^53 - 1")
        if type(self.stale) is not bool:
            raise DataError("stale of a device's state must be true or false")
        if self.error is not None and not (
            isinstance(self.error, str) and len(self.error) <= MAX_ERROR and self.error.isprintable()
        ):
            raise DataError(f"error of a device's state must be null or one line of at most {MAX_ERROR} characters")


def _check_name(field: str, value: object) -> None:
    if not isinstance(value, str) or NAME.fullmatch(value) is None:
        raise DataError(
            f"{field} of a device's state must be 1 to 100 letters, digits, dots, dashes and underscores, and begin "
            "with a letter or digit"
        )


def state_bytes(state: DeviceState) -> bytes:
    """The body of a report: canonical JSON."""
    body = asdict(state)
    del body["device"]
    return canonical_json(body | {"format": FORMAT})


def parse_state(device: str, data: bytes) -> DeviceState:
    """Read the body of a report from `device`; raises DataError with one line that says what is wrong."""
    if len(data) > MAX_BYTES:
        raise DataError(f"a device's state has at most {MAX_BYTES} bytes")
    found = parse_json(data, "a device's state", DataError)
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise DataError(f"a device's state is an object with format {FORMAT!r}")
    names = {field.name for field in fields(DeviceState)} - {"device"}
    if found.keys() != names:
        raise DataError(f"a device's state has exactly the keys format, {', '.join(sorted(names))}")
    return DeviceState(device, **found)


class _Post:
    """One POST of a state; `cut` ends it from another thread."""

    def __init__(self, url: str, state: DeviceState, token: str | None, timeout: float) -> None:
        scheme, host, port, prefix = split_url(url)
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port, timeout=timeout)
        self._path = f"{prefix}/devices/{state.device}/state"
        self._body = state_bytes(state)
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def send(self) -> str | None:
        """None, or why the server did not take it; raises what the network raises."""
        try:
            self._connection.request("POST", self._path, self._body, self._headers)
            response = self._connection.getresponse()
            if response.status == 204:
                return None
            text = response.read(MAX_ERROR).decode("ascii", "replace")
            return f"the server answered {response.status}: {' '.join(text.split())}"
        finally:
            self._connection.close()

    def cut(self) -> None:
        """Shut the line down: the thread that waits on it goes on at once."""
        line = self._connection.sock
        if line is not None:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


def report(
    url: str, state: DeviceState | Mapping[str, Any], timeout: float = 5.0, token: str | None = None
) -> str | None:
    """Send `state` to the server at `url` (the tree's URL); None when it was taken, else one line that says why not.

    Returns within `timeout` seconds, name look-up included, and raises nothing: what a device runs does not hang on
    who watches it. While an earlier report is still under way, no other is sent.
    """
    if not _sending.acquire(blocking=False):
        return "an earlier report is still under way"
    outcome: list[str | None] = [f"no answer within {timeout:g} s"]
    posts: list[_Post] = []

    def send() -> None:
        try:
            chosen = state if isinstance(state, DeviceState) else DeviceState(**state)
            posts.append(_Post(url, chosen, token, timeout))
            outcome[0] = posts[0].send()
        except Exception as e:  # noqa: BLE001 - whatever it is, the device goes on
            outcome[0] = " ".join(str(e).split()) or type(e).__name__
        finally:
            _sending.release()

    thread = threading.Thread(target=send, name="qdeploy-report", daemon=True)
    try:
        thread.start()
    except RuntimeError as e:  # no more threads
        _sending.release()
        return str(e)
    thread.join(timeout)
    found = outcome[0]
    if thread.is_alive() and posts:
        posts[0].cut()
    return found
