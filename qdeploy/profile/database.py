"""The latency database: SQLite, times of kernels and which kernels a network calls.

    kernels   (fingerprint, compiler, signature, network) -> milliseconds: median and quartiles of one call, and calls
    networks  (fingerprint, compiler, network) -> its calls in order: [[layer, signature], ...]

fingerprint: a target on a machine; compiler: versions (qdeploy/profile/signature.py). One kernel may have been timed in
several networks: its price is the median of these. What another compiler made has other keys, so it is never mixed in.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qdeploy.errors import DeviceError, ModelError

VERSION = 1
COLUMNS = ("fingerprint", "compiler", "signature", "network", "operator", "ms", "low", "high", "calls")
SCHEMA = """
CREATE TABLE kernels (
    fingerprint TEXT, compiler TEXT, signature TEXT, network TEXT, operator TEXT,
    ms REAL, low REAL, high REAL, calls INTEGER,
    PRIMARY KEY (fingerprint, compiler, signature, network)
);
CREATE TABLE networks (
    fingerprint TEXT, compiler TEXT, network TEXT, kernels TEXT, PRIMARY KEY (fingerprint, compiler, network)
);
"""


@dataclass(frozen=True)
class Timed:
    """One call of a network's run: median and quartiles in milliseconds."""

    layer: str
    operator: str
    signature: str
    ms: float
    low: float
    high: float


@dataclass(frozen=True)
class Key:
    """Whose figures: `signature.fingerprint` and `signature.compiler_version`."""

    fingerprint: str
    compiler: str


class LatencyDatabase:
    """One file. What `record` returned from is on disk; a process killed before leaves nothing of that network."""

    def __init__(self, path: Path) -> None:
        """Open or make `path`; ModelError for a file that is no latency database."""
        self.path = Path(path)
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=30)
            held = self._connection.execute("PRAGMA user_version").fetchone()[0]
            tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not tables:
                self._connection.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version = {VERSION};COMMIT;")
            elif held != VERSION:
                raise ModelError(f"{self.path} is no latency database of version {VERSION}: choose another file")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as e:
            raise DeviceError(f"cannot use the latency database {self.path}: {e}") from e
        except sqlite3.DatabaseError as e:
            raise ModelError(f"{self.path} is no latency database ({e}): choose another file") from e
        except OSError as e:
            raise DeviceError(f"cannot use the latency database {self.path}: {e.strerror or e}") from e

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def record(self, key: Key, network: str, calls: Sequence[Timed]) -> None:
        """Add the run of one network; what was recorded of it before is replaced."""
        by_signature: dict[str, list[Timed]] = {}
        for call in calls:
            by_signature.setdefault(call.signature, []).append(call)
        who = (key.fingerprint, key.compiler)
        rows = []
        for signature, same in by_signature.items():
            figures = [sum(getattr(call, name) for call in same) / len(same) for name in ("ms", "low", "high")]
            rows.append((*who, signature, network, same[0].operator, *figures, len(same)))
        listed = json.dumps([[call.layer, call.signature] for call in calls])
        with self._errors(), self._connection as connection:
            connection.execute(
                "DELETE FROM kernels WHERE (fingerprint, compiler, network) = (?, ?, ?)", (*who, network)
            )
            connection.executemany(f"INSERT INTO kernels VALUES ({','.join('?' * len(COLUMNS))})", rows)
            connection.execute("REPLACE INTO networks VALUES (?, ?, ?, ?)", (*who, network, listed))

    def note(self, key: Key, network: str, calls: Iterable[tuple[str, str]]) -> None:
        """Remember which (layer, signature) a network calls, where each of them was timed in others already."""
        listed = json.dumps([list(call) for call in calls])
        with self._errors(), self._connection as connection:
            connection.execute(
                "REPLACE INTO networks VALUES (?, ?, ?, ?)", (key.fingerprint, key.compiler, network, listed)
            )

    def prices(self, key: Key) -> dict[str, float]:
        """{signature: milliseconds of a call}."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT signature, ms FROM kernels WHERE fingerprint = ? AND compiler = ?",
                (key.fingerprint, key.compiler),
            ).fetchall()
        found: dict[str, list[float]] = {}
        for signature, ms in rows:
            found.setdefault(signature, []).append(ms)
        return {signature: median(times) for signature, times in found.items()}

    def networks(self, key: Key) -> dict[str, list[tuple[str, str]]]:
        """{network: its (layer, signature) in order}."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT network, kernels FROM networks WHERE fingerprint = ? AND compiler = ?",
                (key.fingerprint, key.compiler),
            ).fetchall()
        return {network: [(layer, signature) for layer, signature in json.loads(text)] for network, text in rows}

    def others(self, key: Key) -> int:
        """How many kernels of the same target on the same machine another compiler made: they are not used."""
        with self._errors():
            query = "SELECT count(*) FROM kernels WHERE fingerprint = ? AND compiler <> ?"
            return int(self._connection.execute(query, (key.fingerprint, key.compiler)).fetchone()[0])

    def rows(self) -> list[dict[str, Any]]:
        """Everything in `kernels`, sorted: for export."""
        with self._errors():
            found = self._connection.execute(f"SELECT {','.join(COLUMNS)} FROM kernels ORDER BY 1, 2, 3, 4").fetchall()
        return [dict(zip(COLUMNS, row, strict=True)) for row in found]
