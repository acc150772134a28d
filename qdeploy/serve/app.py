"""The built-in HTTP server: a published tree (qdeploy/bundle/FORMAT.md) and nothing else.

A convenience on top of a static tree: any web server, CDN or object store can take its place. Three kinds of name
exist; a request for anything else is 404, so there is nothing to traverse, list or escape to.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import web

from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import sha256
from qdeploy.serve.byte_log import ByteLog, Sent
from qdeploy.serve.ranges import Span, UnsatisfiableRange, not_modified, parse_range, range_applies

RELEASE = "release.json"
_IMMUTABLE = re.compile(r"/(manifests|objects)/([0-9a-f]{64})(\.json)?", re.ASCII)
FOREVER = "public, max-age=31536000, immutable"
CHUNK = 1 << 18
RELEASE_LIMIT = 1 << 20  # a release.json is a few hundred bytes; it is hashed at each request
STOP_GRACE_S = 2.0  # how long running downloads may go on after a stop; clients resume


def split_path(raw_path: str) -> tuple[str, ...] | None:
    """File name parts for a request's raw path, or None when it is not one of the tree's names.

    The undecoded path is matched, so an encoded slash or dot never becomes one.
    """
    path = raw_path.partition("?")[0]
    if path == f"/{RELEASE}":
        return (RELEASE,)
    match = _IMMUTABLE.fullmatch(path)
    if match is None or (match[1] == "manifests") != (match[3] is not None):
        return None
    return match[1], match[2] + (match[3] or "")


def open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """Open a regular file below `root` for reading, following no symbolic link; raises OSError otherwise."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: opening a fifo must not hang the server; the check below refuses it
        fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _headers(parts: tuple[str, ...], fd: int) -> tuple[str, dict[str, str]]:
    """Entity tag and the headers that every answer for this file carries."""
    if parts == (RELEASE,):
        tag, cache, kind = sha256(os.pread(fd, RELEASE_LIMIT, 0)), "no-cache", "application/json"
    else:
        tag, cache = parts[-1].removesuffix(".json"), FOREVER
        kind = "application/json" if parts[0] == "manifests" else "application/octet-stream"
    return tag, {
        "ETag": f'"{tag}"',
        "Cache-Control": cache,
        "Content-Type": kind,
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
    }


class _Tree:
    """Answers requests for the files below `root`."""

    def __init__(self, root: Path, log: ByteLog | None) -> None:
        self.root = root
        self.log = log

    def _record(self, request: web.Request, status: int, span: Span, sent: int) -> None:
        if self.log is not None:
            asked = request.headers.get("Range")
            self.log.write(Sent(request.method, request.raw_path, asked, status, span.start, span.size, sent))

    def _short(self, request: web.Request, status: int, headers: dict[str, str]) -> web.Response:
        body = b""
        if status != 304:
            body, headers = b"%d\n" % status, headers | {"Content-Type": "text/plain"}
        self._record(request, status, Span(0, 0), 0)
        return web.Response(status=status, body=body, headers=headers)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The one handler."""
        parts = split_path(request.raw_path)
        if parts is None:
            return self._short(request, 404, {})
        if request.method not in ("GET", "HEAD"):
            return self._short(request, 405, {"Allow": "GET, HEAD"})
        try:
            fd = open_beneath(self.root, parts)
        except OSError:
            return self._short(request, 404, {})
        try:
            return await self._send(request, parts, fd)
        finally:
            os.close(fd)

    async def _send(self, request: web.Request, parts: tuple[str, ...], fd: int) -> web.StreamResponse:
        size = os.fstat(fd).st_size
        tag, headers = _headers(parts, fd)
        if not_modified(request.headers.get("If-None-Match"), tag):
            return self._short(request, 304, headers)
        status, span = 200, Span(0, size)
        if request.method == "GET" and range_applies(request.headers.get("If-Range"), tag):
            try:
                asked = parse_range(request.headers.get("Range"), size)
            except UnsatisfiableRange:
                return self._short(request, 416, headers | {"Content-Range": f"bytes */{size}"})
            if asked is not None:
                status, span = 206, asked
                headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
        return await self._stream(request, status, headers, fd, span)

    async def _stream(
        self, request: web.Request, status: int, headers: dict[str, str], fd: int, span: Span
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = span.size
        size = span.size if request.method == "GET" else 0
        sent = 0
        if not size:
            self._record(request, status, span, 0)
        try:
            await response.prepare(request)
            while sent < size:
                chunk = os.pread(fd, min(CHUNK, size - sent), span.start + sent)
                if not chunk:  # the file was cut under us: break off, so that the reader sees a short body
                    raise ConnectionResetError("file became shorter")
                sent += len(chunk)
                if sent == size:  # before the reader has it all: who has read the answer finds it in the log
                    self._record(request, status, span, sent)
                await response.write(chunk)
            await response.write_eof()
        finally:
            if sent < size:
                self._record(request, status, span, sent)
        return response


def make_app(root: Path, log: ByteLog | None = None) -> web.Application:
    """An aiohttp application that serves the published tree `root`.

    `release.json` is revalidated at each use; manifests and objects are immutable. Raises BundleError when `root`
    holds no release.
    """
    root = Path(root).absolute()
    try:
        os.close(open_beneath(root, (RELEASE,)))
    except OSError as e:
        raise BundleError(f"{root} holds no {RELEASE}: make a published tree with `qdeploy bundle`") from e
    app = web.Application()
    app.router.add_route("*", "/{name:.*}", _Tree(root, log).answer)
    return app


async def _run(app: web.Application, host: str, port: int, ready: Callable[[str], None], stop: asyncio.Event) -> None:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_GRACE_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                hint = "stop the program that holds it or choose another with --port (0 picks a free one)"
                raise DeviceError(f"port {port} on {host} is in use: {hint}") from e
            raise DeviceError(f"cannot listen on {host} port {port}: {e.strerror or e}") from e
        bound_host, bound_port = runner.addresses[0][:2]
        ready(f"http://[{bound_host}]:{bound_port}" if ":" in bound_host else f"http://{bound_host}:{bound_port}")
        await stop.wait()
    finally:
        await runner.cleanup()


def serve(
    root: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    log: Path | None = None,
    echo: Callable[[str], None] | None = None,
) -> None:
    """Serve the published tree `root` until SIGINT or SIGTERM, then stop gracefully.

    `port` 0 picks a free one; `echo` gets one line with the URL once the server listens. `log` is a file that gets
    one JSON line a request (`byte_log.Sent`). Raises BundleError when `root` is not a published tree, DeviceError
    when the port is in use or the log cannot be written.
    """

    async def main(app: web.Application) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)

        def ready(url: str) -> None:
            if echo is not None:
                echo(f"serving {root} at {url} (Ctrl-C stops)")

        await _run(app, host, port, ready, stop)

    with contextlib.ExitStack() as stack:
        byte_log = stack.enter_context(ByteLog(log)) if log is not None else None
        asyncio.run(main(make_app(root, byte_log)))


@contextlib.contextmanager
def serving(root: Path, host: str = "127.0.0.1", port: int = 0, log: Path | None = None) -> Iterator[str]:
    """Serve `root` from a thread of this process while the block runs; yields the URL. Errors as `serve`."""
    started = threading.Event()
    url: list[str] = []
    failure: list[BaseException] = []
    control: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def ready(address: str) -> None:
        url.append(address)
        started.set()

    async def main(app: web.Application) -> None:
        stop = asyncio.Event()
        control.append((asyncio.get_running_loop(), stop))
        await _run(app, host, port, ready, stop)

    def work(app: web.Application) -> None:
        try:
            asyncio.run(main(app))
        except BaseException as e:  # noqa: BLE001 - carried over to the caller's thread
            failure.append(e)
        finally:
            started.set()

    with contextlib.ExitStack() as stack:
        byte_log = stack.enter_context(ByteLog(log)) if log is not None else None
        thread = threading.Thread(target=work, args=(make_app(root, byte_log),), daemon=True)
        thread.start()
        started.wait()
        try:
            if failure:
                raise failure[0]
            yield url[0]
        finally:
            if url:
                loop, stop = control[0]
                loop.call_soon_threadsafe(stop.set)
            thread.join()
