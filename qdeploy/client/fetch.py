"""HTTP reading for a device: bounded, resuming, suspicious. The only file of the client that touches a network.

`http.client` of the standard library is enough and adds nothing to a device: this loop has to resume bodies, to bound
them and to count them itself, redirects and compression are refused, and one connection is kept alive by hand.
What arrives here is not trusted: the caller checks digests.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from qdeploy.errors import FetchError

AGAIN = "run the same command again to resume"
CHUNK = 1 << 16
SOUND_BYTES = 4096  # fewer, and an exchange that then breaks off counts as a failure
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII)
_RETRIED = {408, 429, 500, 502, 503, 504}


class GoneError(FetchError):
    """The server answers, but does not have the file."""


class _Dropped(Exception):
    """The exchange broke off; the next attempt goes on where it ended."""


@dataclass(frozen=True)
class Patience:
    """How long a download may take. Failures count until `SOUND_BYTES` have come since, at the floor rate or faster."""

    timeout_s: float = 20.0  # to connect, and for each silence
    attempts: int = 4
    pause_s: float = 0.25  # before the second attempt; doubles
    grace_s: float = 30.0  # in each stretch of this length, bytes must come at the floor rate or faster
    floor_bytes_per_s: float = 1024.0


class Pace:
    """A cap on bytes a second, shared by all sources of a download."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        """Without a number there is no cap. Raises FetchError unless it is positive."""
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise FetchError(f"a rate of {bytes_per_s} bytes a second never ends: give a positive one")
        self.bytes_per_s = bytes_per_s
        self._free = 0.0  # when the line is free again

    @property
    def chunk(self) -> int:
        """Bytes to read at once: a tenth of a second's, so that the load is even."""
        return CHUNK if self.bytes_per_s is None else max(1, min(CHUNK, int(self.bytes_per_s / 10)))

    def spend(self, count: int) -> None:
        """Wait as long as `count` bytes take."""
        if self.bytes_per_s is not None:
            now = time.monotonic()
            self._free = max(self._free, now) + count / self.bytes_per_s
            time.sleep(self._free - now)


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` (exclusive) of an object."""

    start: int
    stop: int


def _plain(text: str) -> str:
    """What a server sent, fit for one line of an error."""
    return "".join(c if c.isprintable() else " " for c in text[:200]).strip()


def split_url(url: str) -> tuple[str, str, int | None, str]:
    """(scheme, host, port, path prefix without a slash at its end) of a release's URL; raises FetchError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise FetchError(f"{url!r} is not a URL: {e}") from e
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError(f"{url!r} is not a URL of the form http://HOST[:PORT][/PATH]")
    if parts.query or parts.fragment or parts.username is not None:
        raise FetchError(f"{url!r}: leave out query, fragment and user name")
    if not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise FetchError(f"{url!r} holds characters that a URL must encode")
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/")


class Source:
    """One published tree on a web server; a context manager. Not for several threads at once.

    `requests` counts exchanges, `received` body bytes, also those that were skipped (`skipped`) because the server
    knows no ranges.
    """

    def __init__(self, url: str, patience: Patience | None = None, pace: Pace | None = None) -> None:
        self.url = url
        self.patience = patience or Patience()
        self.pace = pace or Pace()
        self.requests = self.received = self.skipped = 0
        scheme, host, port, self._prefix = split_url(url)
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port, timeout=self.patience.timeout_s)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def small(self, path: str, limit: int) -> bytes:
        """The whole file `path`; raises FetchError when it has more than `limit` bytes or does not come."""
        failures = 0
        while True:
            try:
                return self._small(path, limit)
            except _Dropped as e:
                failures += 1
                self._pause(failures, path, e)

    def ranges(self, path: str, size: int, wanted: Sequence[Span]) -> Generator[tuple[int, bytes], None, None]:
        """Yield (offset, bytes) that cover `wanted` (ascending, disjoint, not empty) of the file, which has `size`.

        One Range request a span; a server that answers 200 instead is read through once, unwanted bytes skipped.
        A connection that drops is taken up again where it ended. Raises FetchError.
        """
        todo = list(wanted)
        failures = gained = 0
        began = time.monotonic()
        while todo:
            try:
                for offset, chunk in self._exchange(path, size, todo):
                    yield offset, chunk
                    gained += len(chunk)
                    if gained >= max(SOUND_BYTES, self._floor * (time.monotonic() - began)):
                        failures, gained, began = 0, 0, time.monotonic()
                    end = offset + len(chunk)
                    todo[0] = Span(end, todo[0].stop)
                    if end == todo[0].stop:
                        todo.pop(0)
            except _Dropped as e:
                failures += 1
                self._pause(failures, path, e)

    # --- one exchange ------------------------------------------------------------------------------------------------

    def _small(self, path: str, limit: int) -> bytes:
        with self._request(path, {}) as response:
            if response.status != 200:
                raise self._refusal(path, response)
            if response.length is not None and response.length > limit:
                raise FetchError(f"{self._name(path)} has {response.length} bytes, at most {limit} are allowed")
            parts, left = [], limit + 1
            while left and (chunk := self._read(response, path, left)):
                parts.append(chunk)
                left -= len(chunk)
            if not left:
                raise FetchError(f"{self._name(path)} has more than the {limit} bytes that are allowed")
            if response.length:
                raise _Dropped("it ended early")
            return b"".join(parts)

    def _exchange(self, path: str, size: int, todo: list[Span]) -> Iterator[tuple[int, bytes]]:
        first = todo[0]
        headers = {"Range": f"bytes={first.start}-{first.stop - 1}"}
        with self._request(path, headers) as response:
            if response.status == 206:
                self._check_content_range(path, response, first, size)
                at, spans = first.start, [first]
            elif response.status == 200:
                if response.length not in (None, size):
                    raise FetchError(f"{self._name(path)} has {response.length} bytes, the manifest says {size}")
                at, spans = 0, list(todo)
            else:
                raise self._refusal(path, response)
            for span in spans:
                while at < span.stop:
                    target = span.start if at < span.start else span.stop
                    chunk = self._read(response, path, min(target - at, CHUNK - at % CHUNK))  # of one leaf
                    if not chunk:
                        raise _Dropped(f"it ended {span.stop - at} bytes early")
                    if at < span.start:
                        self.skipped += len(chunk)
                    else:
                        yield at, chunk
                    at += len(chunk)
            if response.status == 206 and response.length is None and self._read(response, path, 1):
                raise FetchError(f"{self._name(path)}: the server sent more than was asked for")

    @property
    def _floor(self) -> float:
        """Bytes a second that are too few; a cap of our own counts for the server."""
        floor, cap = self.patience.floor_bytes_per_s, self.pace.bytes_per_s
        return floor if cap is None else min(floor, cap / 2)

    def _watch(self, line: socket.socket, over: threading.Event, slow: threading.Event) -> None:
        """Cut the line when too few bytes of body come in a stretch of `grace_s`; a thread of its own for a request."""
        seen = self.received
        while not over.wait(self.patience.grace_s):
            if self.received - seen < self._floor * self.patience.grace_s:
                slow.set()
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
                return
            seen = self.received

    @contextlib.contextmanager
    def _request(self, path: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        """One answered request. A watchdog cuts the line when header and body come slower than the floor rate."""
        connection = self._connection
        over, slow = threading.Event(), threading.Event()
        self.requests += 1
        response, sound = None, False
        try:
            if connection.sock is None:
                connection.connect()
            threading.Thread(target=self._watch, args=(connection.sock, over, slow), daemon=True).start()
            connection.request("GET", f"{self._prefix}/{path}", headers={"Accept-Encoding": "identity"} | headers)
            response = connection.getresponse()
            self._check_encoding(path, response)
            yield response
            sound = response.length == 0 or response.isclosed()  # read to its end: the connection serves again
        except ssl.SSLCertVerificationError as e:
            raise FetchError(f"{self.url}: the server's certificate is not trusted: {e.verify_message}") from e
        except (OSError, http.client.HTTPException, _Dropped) as e:
            if slow.is_set():
                rate = f"{self._floor:.0f} bytes a second"
                raise FetchError(f"{self._name(path)} came slower than {rate}: {AGAIN}, or use another server") from e
            raise _Dropped(_plain(str(e)) or type(e).__name__) from e
        finally:
            over.set()
            if response is not None:
                response.close()
            if not sound:  # what is left of the body must not be taken for the next answer
                connection.close()

    def _read(self, response: http.client.HTTPResponse, path: str, limit: int) -> bytes:
        try:
            chunk = response.read1(min(limit, self.pace.chunk))
        except ValueError as e:  # a chunk size that is no number
            raise FetchError(f"{self._name(path)}: the server's answer is not HTTP: {_plain(str(e))}") from e
        self.received += len(chunk)
        self.pace.spend(len(chunk))
        return chunk

    # --- judgements --------------------------------------------------------------------------------------------------

    def _name(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}"

    def _pause(self, failures: int, path: str, e: _Dropped) -> None:
        if failures >= self.patience.attempts:
            raise FetchError(f"cannot download {self._name(path)} ({e}): {AGAIN}") from e
        time.sleep(self.patience.pause_s * 2 ** (failures - 1))

    def _check_encoding(self, path: str, response: http.client.HTTPResponse) -> None:
        encoding = response.getheader("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            hint = "turn compression off for this tree"
            raise FetchError(f"{self._name(path)}: the server sent {encoding[:80]!r} though identity was asked: {hint}")

    def _check_content_range(self, path: str, response: http.client.HTTPResponse, asked: Span, size: int) -> None:
        header = response.getheader("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(header.strip())
        wanted = f"bytes {asked.start}-{asked.stop - 1}/{size}"
        if (
            match is None
            or (int(match[1]), int(match[2]) + 1) != (asked.start, asked.stop)
            or match[3] not in ("*", str(size))
        ):
            raise FetchError(f"{self._name(path)}: the server sent range {header[:80]!r}, not {wanted!r}")
        if response.length not in (None, asked.stop - asked.start):
            raise FetchError(f"{self._name(path)}: {response.length} bytes follow for {wanted!r}")

    def _refusal(self, path: str, response: http.client.HTTPResponse) -> Exception:
        status, name = response.status, self._name(path)
        if status in _RETRIED:
            return _Dropped(f"the server answered {status}")
        if status in (404, 410):
            return GoneError(f"{name} is not there ({status}): check the URL, or whether the release was replaced")
        if 300 <= status < 400:
            where = response.getheader("Location", "nowhere")[:200]
            return FetchError(f"{name}: redirects are not followed; use the address that it points to: {where!r}")
        if status == 416:
            return FetchError(f"{name}: the server's file is shorter than the manifest says (416): publish it again")
        return FetchError(f"{name}: the server answered {status}")
