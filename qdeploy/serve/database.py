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
from dataclasses import astuple, fields
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
CREATE INDEX devices_seen ON devices (seen);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
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
        self._db.execute(f"INSERT OR REPLACE INTO devices (seen, {_LIST}) VALUES ({marks})", row)
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
    return _rows(db, f"SELECT seen, {_LIST} FROM devices WHERE device > ? ORDER BY device LIMIT {PAGE}", after)


def history(db: sqlite3.Connection, device: str) -> list[dict[str, Any]]:
    """The kept changes of one device, oldest first."""
    return _rows(db, f"SELECT seen, {_LIST} FROM history WHERE device = ? ORDER BY seen, rowid", device)


def _rows(db: sqlite3.Connection, query: str, argument: str) -> list[dict[str, Any]]:
    rows = [dict(zip(("seen", *COLUMNS), row, strict=True)) for row in db.execute(query, (argument,))]
    return [row | {"stale": bool(row["stale"])} for row in rows]


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
