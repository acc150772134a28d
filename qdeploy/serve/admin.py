"""For operators, on a port of its own: metrics, health, the fleet page, and changes of the rollout.

GET /metrics              Prometheus' text format
GET /healthz              200 while the tree holds a release
GET /devices?after=NAME   {"devices":[...]}: the next 1000 by name; an empty list is the end
GET /devices/NAME         {"devices":[...]}: the kept changes of one device, oldest first
GET /ui/fleet/            the page (qdeploy/web/fleet); / leads there
GET /fleet.json?VIEW      what it shows (overview.py)

With a token (gate.py), which none of these need:

GET  /control             {"signs", "earlier"}: whether changes are made here, and releases to go back to
POST /control/plan        a change (controls.py) -> what it would do
POST /control/apply       {"change", "confirm"} -> what is in force now
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from qdeploy.errors import DataError, QDeployError
from qdeploy.files import canonical_json, parse_json
from qdeploy.serve.database import PATH_OF_DEVICE, history, page, reading
from qdeploy.serve.gate import Gate, host_allowed, same_origin
from qdeploy.serve.logs import complain
from qdeploy.serve.metrics import Metrics
from qdeploy.serve.overview import Overview, view_of
from qdeploy.serve.pages import packaged
from qdeploy.serve.tree import is_published

if TYPE_CHECKING:
    from qdeploy.serve.controls import Controls

PREFIX = "/ui/fleet/"
CHANGE_LIMIT = 1 << 16  # bytes of a change
BODY_S = 10.0
JSON = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_SILENT = logging.getLogger("qdeploy.serve.http")


class Admin:
    """Answers an operator's requests. `controls` needs `token`; `names` are other names of this host."""

    def __init__(
        self,
        root: Path,
        metrics: Metrics,
        devices: Path | None,
        token: str | None = None,
        controls: Controls | None = None,
        names: Collection[str] = (),
    ) -> None:
        self._root, self._metrics, self._devices, self._names = root, metrics, devices, names
        self._overview = Overview(root, metrics, devices)
        self._pages = packaged("fleet", PREFIX)
        self._gate = None if token is None else Gate(token)
        self._controls = controls
        self._changing = asyncio.Lock()

    def server(self) -> web.Server:
        """An aiohttp server of this."""
        return web.Server(self.answer, access_log=None, logger=_SILENT, keepalive_timeout=30)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        """The one handler."""
        path = request.raw_path.partition("?")[0]
        control = path == "/control" or path.startswith("/control/")
        if path not in ("/metrics", "/healthz") and not host_allowed(request.headers.get("Host"), self._names):
            return web.Response(status=421, text="not a name of this server: start it with --admin-name NAME\n")
        if control and self._gate is not None and self._controls is not None:
            return await self._control(request, path, self._gate, self._controls)
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="405\n", headers={"Allow": "GET, HEAD"})
        return await self._read(request, path)

    async def _read(self, request: web.BaseRequest, path: str) -> web.Response:
        if path == "/metrics":
            return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
        if path == "/healthz":
            status = 200 if is_published(self._root) else 503
            return web.Response(status=status, text=f"{status}\n")
        if path == "/":
            return web.Response(status=302, headers={"Location": PREFIX})
        if path == "/fleet.json":
            return await self._answered(lambda: self._document(request))
        if path == "/devices":
            return await self._rows(page, request.query.get("after", ""))
        if match := PATH_OF_DEVICE.fullmatch(path):
            return await self._rows(history, match[1])
        return self._pages.answer(request) or web.Response(status=404, text="404\n")

    def _document(self, request: web.BaseRequest) -> bytes:
        return self._overview.json(view_of(request.query), controls=self._controls is not None)

    async def _rows(self, query: Callable[[Any, str], list[dict[str, Any]]], argument: str) -> web.Response:
        if self._devices is None:
            return web.Response(status=404, text="start the server with --devices\n")
        path = self._devices

        def read() -> bytes:
            with reading(path) as db:
                return canonical_json({"devices": query(db, argument)})

        return await self._answered(read)

    async def _answered(self, make: Callable[[], bytes], failure: int = 503) -> web.Response:
        """What `make` returns, in a thread; its errors are one line and a status."""
        try:
            body = await asyncio.get_running_loop().run_in_executor(None, make)
        except DataError as e:
            return web.Response(status=400, text=f"{e}\n")
        except QDeployError as e:
            return web.Response(status=failure, text=f"{e}\n")
        return web.Response(body=body, headers=JSON)

    # --- changes -----------------------------------------------------------------------------------------------------

    async def _control(self, request: web.BaseRequest, path: str, gate: Gate, controls: Controls) -> web.Response:
        if not same_origin(request):
            return web.Response(status=403, text="another site's page may not ask this\n")
        refusal = gate.refusal(request)
        if refusal is not None:
            return refusal
        wanted = {"/control": "GET", "/control/plan": "POST", "/control/apply": "POST"}.get(path)
        if wanted is None:
            return web.Response(status=404, text="404\n")
        if request.method != wanted:
            return web.Response(status=405, text="405\n", headers={"Allow": wanted})
        if wanted == "POST" and request.content_type != "application/json":
            return web.Response(status=415, text="a change is application/json\n")
        data = await _body(request) if wanted == "POST" else b""
        if data is None:
            return web.Response(status=413, text=f"a change has at most {CHANGE_LIMIT} bytes, and comes at once\n")
        async with self._changing:  # one after the other, as the tree's lock would have it
            return await self._answered(lambda: _change(controls, path, data, str(request.remote)), failure=409)


async def _body(request: web.BaseRequest) -> bytes | None:
    data = b""
    try:
        async with asyncio.timeout(BODY_S):
            while chunk := await request.content.read(CHANGE_LIMIT + 1 - len(data)):
                data += chunk
                if len(data) > CHANGE_LIMIT:
                    return None
    except TimeoutError:
        return None
    return data


def _change(controls: Controls, path: str, data: bytes, remote: str) -> bytes:
    """What a request for changes comes to; blocks. Raises QDeployError."""
    from qdeploy.serve.controls import parse_change

    if path == "/control":
        return canonical_json({"signs": controls.signs, "earlier": controls.earlier()})
    value = parse_json(data, "the change", DataError)
    if path == "/control/plan":
        return canonical_json(controls.plan(parse_change(value)))
    if not isinstance(value, dict) or set(value) != {"change", "confirm"} or not isinstance(value["confirm"], str):
        raise DataError("what is applied is a change with the `confirm` of its plan")
    change = parse_change(value["change"])
    done = controls.apply(change, value["confirm"])
    complain(f"the rollout was changed from {remote}: {json.dumps(value['change'])} -> {json.dumps(done)}")
    return canonical_json(done)
