"""POST /devices/<device>/state: what devices report, checked, paced, and stored in batches.

    204  stored, durably              401  the token is wrong or missing      429  too often: Retry-After
    400  not a device's state         413  more than 4096 bytes               503  no place, or the disk fails
    405  not a POST                   408  the body did not come in time

The reports that arrive while a transaction runs make up the next one, so the disk's pace bounds the rate, not the
event loop's.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web

from qdeploy.client.status import MAX_BYTES, NAME, DeviceState, parse_state
from qdeploy.errors import DataError, DeviceError
from qdeploy.files import read_bytes
from qdeploy.serve.database import StateDatabase
from qdeploy.serve.limits import Limits, Pace
from qdeploy.serve.logs import complain
from qdeploy.serve.metrics import Metrics

PATH = re.compile(rf"/devices/({NAME.pattern})/state", re.ASCII)
RATE = 500.0  # reports a second that are read at all
BURST = 2000.0
INTERVAL_S = 1.0  # between two reports of one device
WAITING = 1000  # reports that may wait for the disk
_TOKEN = re.compile(r"[!-~]{8,512}", re.ASCII)


def read_token(path: Path) -> str:
    """The token in a file: one line of 8 to 512 printable characters; raises DataError."""
    text = read_bytes(path, "the token", DataError).decode("latin-1").strip()
    if _TOKEN.fullmatch(text) is None:
        raise DataError(f"{path} holds no token: write one line of 8 to 512 letters, digits or signs, without spaces")
    return text


class Refused(Exception):
    """A report is answered with this status and one line."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Reports:
    """Takes reports into a database. Open it inside a running event loop; `close` waits for what is under way."""

    def __init__(self, database: StateDatabase, token: str | None, limits: Limits, metrics: Metrics) -> None:
        self._database, self._metrics, self._limits = database, metrics, limits
        self._authorization = None if token is None else f"Bearer {token}".encode()
        self._pace = Pace(RATE, BURST, INTERVAL_S)
        self._waiting: list[tuple[DeviceState, asyncio.Future[bool]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "qdeploy-states")
        self._failing = False
        metrics.devices.set(database.devices)

    async def take(self, request: web.BaseRequest, device: str) -> web.Response:
        """The answer to a report of `device`."""
        headers: dict[str, str] = {}
        try:
            await self._take(request, device)
            status, text = 204, ""
        except Refused as e:
            status, text = e.status, f"{e}\n"
        if status in (429, 503):
            headers["Retry-After"] = "5"
        if status == 405:
            headers["Allow"] = "POST"
        self._metrics.reports.labels(status).inc()
        return web.Response(status=status, text=text or None, headers=headers)

    async def _take(self, request: web.BaseRequest, device: str) -> None:
        if request.method != "POST":
            raise Refused(405, "report with POST")
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._authorization is not None and not hmac.compare_digest(given, self._authorization):
            raise Refused(401, "the token is wrong or missing")
        if (request.content_length or 0) > MAX_BYTES:
            raise Refused(413, f"a device's state has at most {MAX_BYTES} bytes")
        if not self._pace.allows(device, time.monotonic()):
            raise Refused(429, "too many reports")
        data = await self._body(request)
        try:
            state = parse_state(device, data)
        except DataError as e:
            raise Refused(400, str(e)) from e
        await self._store(state)

    async def _body(self, request: web.BaseRequest) -> bytes:
        data = b""
        try:
            async with asyncio.timeout(self._limits.body_s):
                while chunk := await request.content.read(MAX_BYTES + 1 - len(data)):
                    data += chunk
                    if len(data) > MAX_BYTES:
                        raise Refused(413, f"a device's state has at most {MAX_BYTES} bytes")
        except TimeoutError as e:
            raise Refused(408, "the body did not come in time") from e
        return data

    async def _store(self, state: DeviceState) -> None:
        if len(self._waiting) >= WAITING:
            raise Refused(503, "too many reports wait for the disk")
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((state, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        if not await done:
            raise Refused(503, "no more devices are taken")

    async def _write(self) -> None:
        """Store what waits, batch by batch, until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            states = [state for state, _ in batch]
            try:
                taken = await loop.run_in_executor(self._thread, self._database.write, states, time.time())
            except DeviceError as e:
                if not self._failing:
                    complain(f"{e}: reports are refused, serving goes on")
                self._failing = True
                answers: list[bool | Refused] = [Refused(503, "the state cannot be stored")] * len(batch)
            else:
                if self._failing:
                    complain(f"the state database {self._database.path} is written again")
                self._failing = False
                answers = list(taken)
            self._metrics.devices.set(self._database.devices)
            for (_, done), answer in zip(batch, answers, strict=True):
                if done.done():  # its reader went away
                    continue
                if isinstance(answer, Refused):
                    done.set_exception(answer)
                else:
                    done.set_result(answer)

    async def close(self) -> None:
        """Store what waits still, then end the thread."""
        if self._writer is not None:
            await self._writer
        self._thread.shutdown()
