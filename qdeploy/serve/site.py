"""What the built-in HTTP server answers: a published tree (tree.py), reports (reports.py), a page (pages.py), no more.

A convenience on top of a static tree: any web server, CDN or object store can take its place (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from qdeploy.serve.byte_log import ByteLog, Sent
from qdeploy.serve.limits import LimitedServer, Limits
from qdeploy.serve.logs import LineFile, common_line, complain
from qdeploy.serve.metrics import Metrics
from qdeploy.serve.pages import Pages
from qdeploy.serve.ranges import Span, UnsatisfiableRange, not_modified, parse_range, range_applies
from qdeploy.serve.reports import PATH as REPORT_PATH
from qdeploy.serve.reports import Reports
from qdeploy.serve.send import CutFile, Delivery, corked
from qdeploy.serve.tree import headers_of, is_published, open_beneath, split_path

HEALTH = "/healthz"
SMALL = 1 << 14  # an answer up to here goes out in one piece with its head; a slow reader costs no more memory
EMPTY = Span(0, 0)
Describe = Callable[[int, int], tuple[str, dict[str, str]]]  # (open file, its size) -> entity tag, headers

_SILENT = logging.getLogger("qdeploy.serve.http")  # requests that are no HTTP are counted, not described
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


@dataclass
class _Exchange:
    """One request and what became of it."""

    kind: str = "other"
    status: int = 0
    sent: int = 0
    logged: bool = False  # in the byte log


_EXCHANGE = web.RequestKey("exchange", _Exchange)


class Site:
    """Answers requests for the published tree `root`."""

    def __init__(
        self,
        root: Path,
        limits: Limits,
        metrics: Metrics,
        byte_log: ByteLog | None = None,
        access_log: LineFile | None = None,
        reports: Reports | None = None,
        pages: Pages | None = None,
    ) -> None:
        self._root, self._limits, self._metrics = root, limits, metrics
        self._byte_log, self._access_log, self._reports, self._pages = byte_log, access_log, reports, pages
        logs = [log for log in (byte_log, access_log) if log is not None]
        metrics.lost_lines.set_function(lambda: sum(log.lost for log in logs))

    def server(self) -> LimitedServer:
        """An aiohttp server of this site."""

        def refusals(*_: Any) -> AbstractAccessLogger:
            return _Refusals(self)

        return LimitedServer(
            self.answer, self._limits, self._metrics, access_log=_SILENT, access_log_class=refusals, logger=_SILENT
        )

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one handler."""
        exchange = _Exchange()
        request[_EXCHANGE] = exchange
        start = time.monotonic()
        try:
            return await self._route(request, exchange)
        except TimeoutError as e:
            raise self._break(request, "slow") from e
        except ConnectionError as e:
            raise self._break(request, "gone") from e
        except (CutFile, OSError) as e:  # also one that the disk cannot read
            raise self._break(request, "file") from e
        except asyncio.CancelledError:
            self._break(request, "stopped")
            raise
        except Exception as e:  # noqa: BLE001 - one request's bug is no other's
            complain(f"{request.method} {request.raw_path[:100]!r}: {type(e).__name__}: {e}")
            if request.writer.output_size:  # half an answer must not go on with another
                raise self._break(request, "stopped") from e
            return self._short(request, exchange, 500, {})
        finally:
            self._metrics.answered(exchange.kind, exchange.status, exchange.sent, time.monotonic() - start)
            self.access(request, exchange.status, exchange.sent)

    def access(self, request: web.BaseRequest, status: int, sent: int) -> None:
        """One line in the access log."""
        if self._access_log is not None:
            version = f"HTTP/{request.version.major}.{request.version.minor}"
            line = f"{request.method} {request.raw_path} {version}"
            self._access_log.write(common_line(request.remote or "-", line, status, sent))

    def refused(self, request: web.BaseRequest, status: int) -> None:
        """Count a request that aiohttp answered by itself: it was no HTTP, or over the limits."""
        self._metrics.requests.labels("other", status).inc()
        self.access(request, status, 0)

    def _break(self, request: web.BaseRequest, reason: str) -> ConnectionResetError:
        self._metrics.broken.labels(reason).inc()
        if request.transport is not None:
            request.transport.abort()  # what waits for a slow reader goes with it
        return ConnectionResetError(reason)

    async def _route(self, request: web.BaseRequest, exchange: _Exchange) -> web.StreamResponse:
        name = split_path(request.raw_path)
        if name is not None:
            exchange.kind = name.kind
            opened = partial(open_beneath, self._root, name.parts)
            return await self._file(request, exchange, opened, partial(headers_of, name))
        path = request.raw_path.partition("?")[0]
        if self._reports is not None and (match := REPORT_PATH.fullmatch(path)):
            exchange.kind = "report"
            response = await self._reports.take(request, match[1])
            exchange.status = response.status
            return response
        if path == HEALTH:
            exchange.kind = "health"
            return self._short(
                request, exchange, 200 if is_published(self._root) else 503, {"Cache-Control": "no-store"}
            )
        if self._pages is not None and path.startswith(self._pages.prefix[:-1]):
            exchange.kind = "page"
            return await self._page(request, exchange, self._pages)
        return self._short(request, exchange, 404, {})

    async def _page(self, request: web.BaseRequest, exchange: _Exchange, pages: Pages) -> web.StreamResponse:
        if pages.wants_slash(request.raw_path):
            return self._short(request, exchange, 308, {"Location": pages.prefix})
        page = pages.find(request.raw_path)
        if page is None:
            return self._short(request, exchange, 404, {})
        return await self._file(request, exchange, partial(pages.open, page), partial(pages.headers_of, page))

    def _record(self, request: web.BaseRequest, exchange: _Exchange, span: Span, sent: int) -> None:
        if self._byte_log is not None and not exchange.logged:
            exchange.logged = True
            asked = request.headers.get("Range")
            row = Sent(request.method, request.raw_path, asked, exchange.status, span.start, span.size, sent)
            self._byte_log.row(row)

    def _short(
        self, request: web.BaseRequest, exchange: _Exchange, status: int, headers: dict[str, str]
    ) -> web.Response:
        exchange.status = status
        body = b""
        if status != 304:
            body, headers = b"%d\n" % status, headers | {"Content-Type": "text/plain"}
        self._record(request, exchange, EMPTY, 0)
        return web.Response(status=status, body=body, headers=headers)

    async def _file(
        self, request: web.BaseRequest, exchange: _Exchange, opened: Callable[[], int], describe: Describe
    ) -> web.StreamResponse:
        if request.method not in ("GET", "HEAD"):
            return self._short(request, exchange, 405, {"Allow": "GET, HEAD"})
        try:
            fd = opened()
        except OSError:
            return self._short(request, exchange, 404, {"Cache-Control": "no-cache"})
        try:
            return await self._send(request, exchange, fd, describe)
        finally:
            os.close(fd)

    async def _send(
        self, request: web.BaseRequest, exchange: _Exchange, fd: int, describe: Describe
    ) -> web.StreamResponse:
        size = os.fstat(fd).st_size
        try:
            tag, headers = describe(fd, size)
        except OSError:
            return self._short(request, exchange, 404, {"Cache-Control": "no-cache"})
        if not_modified(request.headers.get("If-None-Match"), tag):
            return self._short(request, exchange, 304, headers)
        exchange.status, span = 200, Span(0, size)
        if request.method == "GET" and range_applies(request.headers.get("If-Range"), tag):
            try:
                asked = parse_range(request.headers.get("Range"), size)
            except UnsatisfiableRange:
                return self._short(request, exchange, 416, headers | {"Content-Range": f"bytes */{size}"})
            if asked is not None:
                exchange.status, span = 206, asked
                headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
        if request.method == "HEAD":
            self._record(request, exchange, span, 0)
            response = web.StreamResponse(status=exchange.status, headers=headers)
            response.content_length = span.size
            return response
        if span.size <= SMALL:
            body = os.pread(fd, span.size, span.start)
            if len(body) < span.size:
                raise CutFile
            exchange.sent = span.size
            self._record(request, exchange, span, span.size)
            return web.Response(status=exchange.status, body=body, headers=headers)
        return await self._stream(request, exchange, headers, fd, span)

    async def _stream(
        self, request: web.BaseRequest, exchange: _Exchange, headers: dict[str, str], fd: int, span: Span
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=exchange.status, headers=headers)
        response.content_length = span.size

        def before_end(sent: int) -> None:  # who has read the answer finds it in the log
            self._record(request, exchange, span, sent)

        delivery = Delivery(fd, span, None if self._byte_log is None else before_end)
        patience = self._limits.grace_s + span.size / self._limits.floor_bytes_per_s
        try:
            async with asyncio.timeout(patience):
                with corked(request):
                    await response.prepare(request)
                    await delivery.run(request, response)
                await response.write_eof()
        finally:
            exchange.sent = delivery.sent
            self._record(request, exchange, span, delivery.sent)
        return response


class _Refusals(AbstractAccessLogger):
    """Sees each answer after it was sent; those that never came to `Site.answer` are counted here."""

    def __init__(self, site: Site) -> None:
        self._site = site

    @property
    def enabled(self) -> bool:
        return True

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        if _EXCHANGE not in request:
            self._site.refused(request, response.status)
