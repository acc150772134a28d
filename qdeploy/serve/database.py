"""The state of devices, as they report it: one SQLite file.

    devices  device -> when it was last heard of, and every field of its last report
    history  rows of devices at the times when something but the byte count changed; the latest HISTORY of each device

What `write` returned from is on disk (write-ahead log, synchronous FULL). Times are seconds since 1970.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from qdeploy.client.status import NAME, DeviceState
from qdeploy.errors import DataError, DeviceError

APPLICATION = 0x71646576  # "qdev": sets this file apart from other SQLite files
VERSION = 1
HISTORY = 16
FORGET_S = 30 * 86400.0  # a full table gives the place of a device that was silent for so long to a new one
PAGE = 1000
PATH_OF_DEVICE = re.compile(rf"/devices/({NAME.pattern})", re.ASCII)  # a device's history, over HTTP

COLUMNS = tuple(field.name for field in fields(DeviceState))
WATCHED = tuple(name for name in COLUMNS if name not in ("device", "fetched"))
_LIST = ", ".join(COLUMNS)
_TYPES = ", ".join(f"{name} {'INTEGER' if name in ('release', 'fetched', 'stale') else 'TEXT'}" for name in COLUMNS)
SCHEMA = f"""
CREATE TABLE devices (seen REAL, {_TYPES}, PRIMARY KEY (device));
CREATE TABLE history (seen REAL, {_TYPES});
CREATE INDEX history_device ON history (device, seen);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""

# what a table of devices can be sorted by, and narrowed to; `silent` is bound to the time before which a device is so
SORTS = ("device", "target", "release", "reached", "fetched", "seen")
TROUBLES = {
    "behind": "wanted <> reached",
    "stale": "stale",
    "errors": "error IS NOT NULL",
    "silent": "seen < :silent",
}
# with these a page of 100,000 devices, and counts of all, come without a scan of the rows
_RUNS = "model, channel, release, reached"
INDEXES = {
    "runs": f"({_RUNS})",
    **{name: f"({name}, device)" for name in SORTS if name != "device"},
    **{name: f"(device) WHERE {test}" for name, test in TROUBLES.items() if name != "silent"},
}
_INDEXES = "".join(f"CREATE INDEX IF NOT EXISTS devices_by_{n} ON devices {on};\n" for n, on in INDEXES.items())
_WILD, _TAME = re.compile(r"([\\%_])"), r"\\\1"  # in LIKE's patterns
_PUT = f"""
INSERT INTO devices (seen, {_LIST}) VALUES (?{", ?" * len(COLUMNS)})
ON CONFLICT (device) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in ("seen", *COLUMNS[1:]))}
"""


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as e:
        raise DeviceError(f"cannot use the state database {path}: {e}") from e


class StateDatabase:
    """One file, written by one server. Raises DeviceError when it cannot be opened or is another program's."""

    def __init__(self, path: Path, max_devices: int = 100_000) -> None:
        self.path, self._max = Path(path), max_devices
        with _named(self.path):
            # used by one thread at a time, not always the one that opens it
            self._db = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA journal_size_limit = 4194304")
                if not self._db.execute("PRAGMA schema_version").fetchone()[0]:
                    self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
                check_ours(self._db, self.path)
                self._db.executescript(f"BEGIN IMMEDIATE; DROP INDEX IF EXISTS devices_seen; {_INDEXES} COMMIT;")
                self.devices = self._count()
            except BaseException:
                self._db.close()
                raise

    def _count(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM devices").fetchone()[0])

    def write(self, states: Sequence[DeviceState], now: float) -> list[bool]:
        """Store reports in one transaction; False for each new device that found no place. Raises DeviceError."""
        with _named(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                taken = [self._put(state, now) for state in states]
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self.devices = self._count()
                raise
        return taken

    def _put(self, state: DeviceState, now: float) -> bool:
        query = f"SELECT {', '.join(WATCHED)} FROM devices WHERE device = ?"
        before = self._db.execute(query, (state.device,)).fetchone()
        if before is None and not self._make_place(now):
            return False
        marks = ", ".join("?" * (len(COLUMNS) + 1))
        row = (now, *astuple(state))
        self._db.execute(_PUT, row)
        if before != tuple(getattr(state, name) for name in WATCHED):
            self._db.execute(f"INSERT INTO history (seen, {_LIST}) VALUES ({marks})", row)
            old = "SELECT rowid FROM history WHERE device = ? ORDER BY seen DESC, rowid DESC LIMIT -1 OFFSET ?"
            self._db.execute(f"DELETE FROM history WHERE rowid IN ({old})", (state.device, HISTORY))
        return True

    def _make_place(self, now: float) -> bool:
        if self.devices >= self._max:
            query = "SELECT device FROM devices WHERE seen < ? ORDER BY seen LIMIT 1"
            silent = self._db.execute(query, (now - FORGET_S,)).fetchone()
            if silent is None:
                return False
            self._db.execute("DELETE FROM devices WHERE device = ?", silent)
            self._db.execute("DELETE FROM history WHERE device = ?", silent)
            self.devices -= 1
        self.devices += 1
        return True

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def check_ours(db: sqlite3.Connection, path: Path) -> None:
    """Raise DeviceError unless the open file is a state database of this version."""
    found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    if found != [APPLICATION, VERSION]:
        raise DeviceError(f"{path} is not a state database of this version of qdeploy: name another file")


def page(db: sqlite3.Connection, after: str) -> list[dict[str, Any]]:
    """The next PAGE rows of `devices` behind the name `after`; `stale` is a bool."""
    return _rows(db, f"SELECT seen, {_LIST} FROM devices WHERE device > ? ORDER BY device LIMIT {PAGE}", (after,))


def history(db: sqlite3.Connection, device: str) -> list[dict[str, Any]]:
    """The kept changes of one device, oldest first."""
    return _rows(db, f"SELECT seen, {_LIST} FROM history WHERE device = ? ORDER BY seen, rowid", (device,))


def _rows(db: sqlite3.Connection, query: str, values: Sequence[str] | dict[str, Any]) -> list[dict[str, Any]]:
    rows = [dict(zip(("seen", *COLUMNS), row, strict=True)) for row in db.execute(query, values)]
    return [row | {"stale": bool(row["stale"])} for row in rows]


@dataclass(frozen=True)
class View:
    """A page of the table of devices: `size` rows from row `start` on, of those whose name contains `find` and that
    have the trouble `only` (one of TROUBLES), sorted by a column of SORTS. Raises DataError."""

    sort: str = "device"
    descending: bool = False
    only: str | None = None
    find: str = ""
    start: int = 0
    size: int = 25

    def __post_init__(self) -> None:
        sound = self.sort in SORTS and (self.only is None or self.only in TROUBLES)
        if not sound or len(self.find) > 100 or not 0 <= self.start < 1 << 31 or not 1 <= self.size <= PAGE:
            raise DataError("there is no such view of the devices")


def table(db: sqlite3.Connection, view: View, silent: float) -> tuple[int, int, list[dict[str, Any]]]:
    """(how many devices the view has in all, the row that its page begins with, the page). Behind the end that is the
    last page. Who was last heard of before `silent` is silent."""
    tests = [] if view.only is None else [TROUBLES[view.only]]
    tests += [r"device LIKE :find ESCAPE '\'"] * bool(view.find)
    where = f" WHERE {' AND '.join(tests)}" if tests else ""
    values = {"silent": silent, "find": f"%{re.sub(_WILD, _TAME, view.find)}%", "size": view.size}
    count = int(db.execute(f"SELECT count(*) FROM devices{where}", values).fetchone()[0])
    start = min(view.start, max(0, count - 1) // view.size * view.size)
    way = "DESC" if view.descending else "ASC"
    # a plus keeps SQLite from walking all devices in order to find the few that have the trouble
    plus = "+" * (view.only is not None and view.sort != "device")
    order = ", ".join(f"{plus}{name} {way}" for name in dict.fromkeys((view.sort, "device")))
    keys = f"SELECT rowid FROM devices{where} ORDER BY {order} LIMIT :size OFFSET :start"
    query = f"SELECT seen, {_LIST} FROM devices WHERE rowid IN ({keys}) ORDER BY {order}"
    return count, start, _rows(db, query, values | {"start": start})


def totals(db: sqlite3.Connection, silent: float) -> dict[str, Any]:
    """Counts of the whole fleet: devices, each of TROUBLES, bytes fetched, and of (model, channel, release, level)."""

    def one(query: str) -> int:
        return int(db.execute(query, {"silent": silent}).fetchone()[0] or 0)

    counts = {name: one(f"SELECT count(*) FROM devices WHERE {test}") for name, test in TROUBLES.items()}
    runs = db.execute(f"SELECT {_RUNS}, count(*) FROM devices GROUP BY {_RUNS} LIMIT {PAGE}")
    names = ("model", "channel", "release", "level", "devices")
    return {
        "devices": one("SELECT count(*) FROM devices"),
        "fetched_bytes": one("SELECT sum(fetched) FROM devices"),
        "troubles": counts,
        "runs": [dict(zip(names, row, strict=True)) for row in runs],
    }


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A state database, also one that a running server writes; raises DataError or DeviceError."""
    if not Path(path).is_file():
        raise DataError(f"{path} is not there: `qdeploy serve --devices {path}` makes it")
    with _named(path), closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as db:
        check_ours(db, path)
        yield db


def state_of(row: dict[str, Any]) -> tuple[float, DeviceState]:
    """(when it was last heard of, state); raises DataError when `row` is not one of `page`."""
    try:
        return float(row["seen"]), DeviceState(**{name: row[name] for name in COLUMNS})
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"a row of the fleet is not a device's state: {e!r}") from e
