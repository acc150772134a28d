"""What one server takes on, and the aiohttp server that keeps to it."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from qdeploy.errors import DeviceError
from qdeploy.serve.metrics import Metrics

TLS_BUFFER = 1 << 16  # bytes that wait for a slow reader's TLS; asyncio would keep 512 KiB a connection
SPARE_FILES = 64  # file descriptors beside those of connections
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\nRetry-After: 5\r\nConnection: close\r\n\r\n503\n"


@dataclass(frozen=True)
class Limits:
    """Bounds on connections, headers and patience. Times in seconds."""

    connections: int = 4096  # more are answered 503
    line_bytes: int = 4096  # of the request line, and of each header
    headers: int = 64
    idle_s: float = 30.0  # between requests, and for a request's head to arrive
    body_s: float = 10.0  # for a report's body to arrive
    stall_s: float = 60.0  # a reader that takes nothing for so long is cut off (TCP_USER_TIMEOUT)
    grace_s: float = 30.0  # an answer may take this long and its bytes at the floor rate
    floor_bytes_per_s: float = 1024.0
    stop_s: float = 10.0  # how long running downloads may go on after a stop; clients resume


class _Busy(asyncio.Protocol):
    """A connection over the limit: one answer, and the end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(BUSY)
        transport.close()


class LimitedServer(web.Server):
    """aiohttp's low-level server under `Limits`; the count is exact but for connections accepted in one go."""

    def __init__(self, handler: Any, limits: Limits, metrics: Metrics, **options: Any) -> None:
        super().__init__(
            handler,
            keepalive_timeout=limits.idle_s,
            max_line_size=limits.line_bytes,
            max_field_size=limits.line_bytes,
            max_headers=limits.headers,
            lingering_time=1.0,
            **options,
        )
        self._limits, self._metrics, self._open = limits, metrics, 0

    def __call__(self) -> Any:
        if self._open >= self._limits.connections:
            self._metrics.refused.inc()
            return _Busy()
        return super().__call__()

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open += 1
        self._metrics.connections.set(self._open)
        line: socket.socket = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # elsewhere the floor rate alone ends a stalled answer
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.stall_s * 1000))
        if transport.get_extra_info("sslcontext") is not None:
            transport.set_write_buffer_limits(high=TLS_BUFFER)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._open -= 1
        self._metrics.connections.set(self._open)


def allow_files(connections: int) -> None:
    """Let this process open a file for each of so many connections; raises DeviceError where the system forbids it."""
    wanted = 3 * connections + SPARE_FILES  # its socket, the same while a file is sent, and the file
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        fit = max(1, (hard - SPARE_FILES) // 3)
        raise DeviceError(
            f"{connections} connections need {wanted} open files, the limit is {hard}: "
            f"raise it (ulimit -n, LimitNOFILE=) or use --connections {fit}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Pace:
    """How often something may happen: `rate` times a second over all keys, and once in `interval` seconds a key."""

    KEYS = 1 << 14  # keys that are remembered; the ones that came first are forgotten first

    def __init__(self, rate: float, burst: float, interval: float) -> None:
        self._rate, self._burst, self._interval = rate, burst, interval
        self._left, self._at = burst, 0.0
        self._last: OrderedDict[str, float] = OrderedDict()

    def allows(self, key: str, now: float) -> bool:
        """True, and counted, when `key` may at time `now` (seconds of a clock that never goes back)."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        last = self._last.get(key)
        if self._left < 1 or (last is not None and now - last < self._interval):
            return False
        self._left -= 1
        self._last[key] = now
        self._last.move_to_end(key)
        if len(self._last) > self.KEYS:
            self._last.popitem(last=False)
        return True
