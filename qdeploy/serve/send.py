"""Bytes of an open file on their way to a reader, every one counted.

Plain connections get them from the page cache (sendfile): no copy through this process and no buffer for a slow reader.
asyncio's own `loop.sendfile` does not say how much went out when it is cancelled; this loop does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator

from aiohttp import web

from qdeploy.serve.ranges import Span

TURN = 1 << 20  # bytes in one go before others have their turn
TLS_CHUNK = 1 << 15


class CutFile(Exception):
    """The file became shorter while it was sent."""


class Delivery:
    """The bytes `span` of file `fd`. `sent` counts those handed to the network."""

    def __init__(self, fd: int, span: Span, before_end: Callable[[int], None] | None) -> None:
        """`before_end(bytes)` is called once, before the reader can have it all."""
        self._fd, self._span, self._before_end = fd, span, before_end
        self.sent = 0

    @property
    def left(self) -> int:
        """Bytes still to send."""
        return self._span.size - self.sent

    async def run(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Send all of it after `response`'s prepared head; raises OSError or CutFile when it ends early."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the reader went away")
        if transport.get_extra_info("sslcontext") is not None or transport.get_write_buffer_size():
            await self._write(response)
        elif not self._fill(transport.get_extra_info("socket").fileno()):
            await self._sendfile(transport)

    async def _write(self, response: web.StreamResponse) -> None:
        while self.left:
            chunk = os.pread(self._fd, min(TLS_CHUNK, self.left), self._span.start + self.sent)
            if not chunk:
                raise CutFile
            if len(chunk) == self.left and self._before_end is not None:
                self._before_end(self._span.size)
            await response.write(chunk)
            self.sent += len(chunk)

    def _fill(self, line: int) -> bool:
        """Send what the socket `line` takes now, at most TURN; True when that was all."""
        end = min(self._span.size, self.sent + TURN)
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while self.sent < end:
                count = end - self.sent
                if self._before_end is not None and end == self._span.size:
                    if count == 1:
                        self._before_end(self._span.size)
                    count = max(1, count - 1)  # the last byte goes by itself, behind `before_end`
                done = os.sendfile(line, self._fd, self._span.start + self.sent, count)
                if not done:
                    raise CutFile
                self.sent += done
        return not self.left

    async def _sendfile(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        # a descriptor of our own: the transport's may be closed meanwhile, and its number belong to another reader
        line = os.dup(transport.get_extra_info("socket").fileno())
        reading = transport.is_reading()
        transport.pause_reading()  # a reader that has closed its side may still read
        try:
            while True:
                await _writable(loop, line)
                if transport.is_closing():
                    raise ConnectionResetError("the reader went away")
                if self._fill(line):
                    break
        finally:
            os.close(line)
            if reading and not transport.is_closing():
                transport.resume_reading()


@contextlib.contextmanager
def corked(request: web.BaseRequest) -> Iterator[None]:
    """The head goes out with the first bytes of the body, not before them: the reader wakes up once (Linux)."""
    line = None if request.transport is None else request.transport.get_extra_info("socket")
    if line is None or not hasattr(socket, "TCP_CORK"):
        yield
        return
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it may be closed by now
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def _writable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    waiter = loop.create_future()
    loop.add_writer(fd, _wake, waiter)
    try:
        await waiter
    finally:
        loop.remove_writer(fd)
