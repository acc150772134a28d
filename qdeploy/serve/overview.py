"""/fleet.json: everything that the fleet page shows, in one document.

    {"time", "controls": whether there are any, "server": counters since the start, "tree":
     catalogue.Catalogue.read or null, "problem": why it is null,
     "fleet": database.totals or null without --devices, "devices": {"count", "start", "size", "rows"} or null}

A row is a device's last report with "trouble", a list of names of database.TROUBLES, and "otherwise": what the rollout
wants of it ("release 7, w4"; or why it wants nothing), null where that is what it runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qdeploy.bundle.rollout import Channels
from qdeploy.errors import BundleError, DataError
from qdeploy.files import canonical_json
from qdeploy.serve.catalogue import Catalogue
from qdeploy.serve.database import View, reading, state_of, table, totals
from qdeploy.serve.fleet import wish_of
from qdeploy.serve.metrics import Metrics

SILENT_S = 86400.0  # not heard of for a day, as `qdeploy fleet` has it
TOTALS_S = 2.0  # counts of the whole fleet are this old at most: many pages may be open


def view_of(query: Mapping[str, str]) -> View:
    """The view that a URL's query asks for: sort, order (asc, desc), only, find, start; raises DataError."""
    start, order = query.get("start", "0"), query.get("order", "asc")
    if not (start.isascii() and start.isdecimal() and len(start) < 10) or order not in ("asc", "desc"):
        raise DataError("start is a row's number, order is asc or desc")
    only, find = query.get("only") or None, query.get("find", "")
    return View(query.get("sort", "device"), order == "desc", only, find, int(start))


class Overview:
    """Makes the document; methods block and may be called from several threads."""

    def __init__(
        self, root: Path, metrics: Metrics, devices: Path | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._metrics, self._devices, self._clock = metrics, devices, clock
        self._catalogue = Catalogue(root)
        self._lock = threading.Lock()
        self._totals: tuple[float, dict[str, Any]] = (float("-inf"), {})

    def json(self, view: View, controls: bool) -> bytes:
        """The document; raises DataError and DeviceError for the database of devices."""
        now = self._clock()
        found: dict[str, Any] = {"time": now, "controls": controls, "server": self._metrics.figures()}
        found |= {"tree": None, "problem": None}
        rollout: dict[str, Channels] | None = None
        with self._lock:
            try:
                found["tree"], rollout = self._catalogue.read()
            except BundleError as e:
                found["problem"] = str(e)
            fleet, devices = self._fleet(view, rollout, now)
        return canonical_json(found | {"fleet": fleet, "devices": devices})

    def _fleet(self, view: View, rollout: dict[str, Channels] | None, now: float) -> tuple[Any, Any]:
        if self._devices is None:
            return None, None
        with reading(self._devices) as db:
            if not 0 <= now - self._totals[0] < TOTALS_S:
                self._totals = (now, totals(db, now - SILENT_S))
            count, start, rows = table(db, view, now - SILENT_S)
        for row in rows:
            row |= {"trouble": _troubles(row, now), "otherwise": _otherwise(rollout, row)}
        return self._totals[1], {"count": count, "start": start, "size": view.size, "rows": rows}


def _troubles(row: Mapping[str, Any], now: float) -> list[str]:
    found = {
        "behind": row["wanted"] != row["reached"],
        "stale": row["stale"],
        "errors": row["error"] is not None,
        "silent": row["seen"] < now - SILENT_S,
    }
    return [name for name, is_so in found.items() if is_so]


def _otherwise(rollout: dict[str, Channels] | None, row: dict[str, Any]) -> str | None:
    try:
        wish = None if rollout is None else wish_of(rollout, state_of(row)[1])
    except DataError as e:  # a row that no report made: the others are shown all the same
        return str(e)
    if wish is None:
        return None
    if "problem" in wish:
        return str(wish["problem"])
    return f"release {wish['wanted_release']}" + (f", {wish['wanted_level']}" if wish["wanted_level"] else "")
