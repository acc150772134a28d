"""For operators, on a port of its own: metrics, health, and what devices reported.

GET /metrics              Prometheus' text format
GET /healthz              200 while the tree holds a release
GET /devices?after=NAME   {"devices":[...]}: the next 1000 by name; an empty list is the end
GET /devices/NAME         {"devices":[...]}: the kept changes of one device, oldest first
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from qdeploy.errors import QDeployError
from qdeploy.files import canonical_json
from qdeploy.serve.database import PATH_OF_DEVICE, history, page, reading
from qdeploy.serve.metrics import Metrics
from qdeploy.serve.tree import is_published

_SILENT = logging.getLogger("qdeploy.serve.http")


class Admin:
    """Answers an operator's requests."""

    def __init__(self, root: Path, metrics: Metrics, devices: Path | None) -> None:
        self._root, self._metrics, self._devices = root, metrics, devices

    def server(self) -> web.Server:
        """An aiohttp server of this."""
        return web.Server(self.answer, access_log=None, logger=_SILENT, keepalive_timeout=30)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """The one handler."""
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="405\n", headers={"Allow": "GET, HEAD"})
        path = request.raw_path.partition("?")[0]
        if path == "/metrics":
            return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
        if path == "/healthz":
            status = 200 if is_published(self._root) else 503
            return web.Response(status=status, text=f"{status}\n")
        if path == "/devices":
            return await self._rows(page, request.query.get("after", ""))
        if match := PATH_OF_DEVICE.fullmatch(path):
            return await self._rows(history, match[1])
        return web.Response(status=404, text="404\n")

    async def _rows(self, query: Callable[[Any, str], list[dict[str, Any]]], argument: str) -> web.Response:
        if self._devices is None:
            return web.Response(status=404, text="start the server with --devices\n")
        path = self._devices

        def read() -> bytes:
            with reading(path) as db:
                return canonical_json({"devices": query(db, argument)})

        try:
            body = await asyncio.get_running_loop().run_in_executor(None, read)
        except QDeployError as e:
            return web.Response(status=503, text=f"{e}\n")
        return web.Response(body=body, headers={"Content-Type": "application/json"})
