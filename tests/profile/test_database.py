"""The latency database: what is recorded comes back, of this compiler alone, whatever happens in between."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from qdeploy.errors import DeviceError, ModelError
from qdeploy.profile.database import Key, LatencyDatabase, Timed

KEY = Key("f", "compiler 1")


def call(layer: str, signature: str, ms: float) -> Timed:
    return Timed(layer, "conv", signature, ms, ms * 0.9, ms * 1.1)


def test_prices_are_medians_over_networks(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "latency.sqlite"
    database = LatencyDatabase(path)
    database.record(KEY, "one", [call("a", "x", 1.0), call("b", "x", 3.0), call("c", "y", 5.0)])
    database.record(KEY, "two", [call("a", "x", 7.0)])
    database.record(KEY, "three", [call("a", "x", 4.0)])
    database.record(KEY, "two", [call("a", "x", 9.0)])  # again: replaced
    database.note(KEY, "four", [("a", "y"), ("b", "x")])
    database.close()
    again = LatencyDatabase(path)
    assert again.prices(KEY) == {"x": 4.0, "y": 5.0}  # x: of 2, 9 and 4
    assert again.networks(KEY)["one"] == [("a", "x"), ("b", "x"), ("c", "y")]
    assert again.networks(KEY)["four"] == [("a", "y"), ("b", "x")]
    row = next(row for row in again.rows() if row["network"] == "one" and row["signature"] == "x")
    assert (row["ms"], row["calls"], row["compiler"]) == (2.0, 2, "compiler 1")
    again.close()


def test_other_compilers_and_machines_stay_apart(tmp_path: Path) -> None:
    database = LatencyDatabase(tmp_path / "latency.sqlite")
    database.record(KEY, "one", [call("a", "x", 1.0), call("a", "y", 1.0)])
    newer, elsewhere = Key("f", "compiler 2"), Key("g", "compiler 1")
    assert database.prices(newer) == {} and database.networks(newer) == {} and database.others(newer) == 2
    assert database.prices(elsewhere) == {} and database.others(elsewhere) == 0 == database.others(KEY)
    database.record(newer, "one", [call("a", "x", 8.0)])
    assert database.prices(newer) == {"x": 8.0} and database.prices(KEY)["x"] == 1.0
    database.close()


def test_a_record_is_whole_or_absent(tmp_path: Path) -> None:
    database = LatencyDatabase(tmp_path / "latency.sqlite")
    bad = Timed("a", "conv", "x", object(), 1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises((TypeError, sqlite3.Error, DeviceError, ModelError)):
        database.record(KEY, "one", [call("a", "y", 1.0), bad])
    assert database.rows() == [] and database.networks(KEY) == {}
    database.close()


def test_files_that_are_no_database(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is no database at all" * 10)
    with pytest.raises(ModelError, match="no latency database"):
        LatencyDatabase(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()
    with pytest.raises(ModelError, match="no latency database of version 1"):
        LatencyDatabase(tmp_path / "other")
    with pytest.raises(DeviceError, match="cannot use the latency database"):
        LatencyDatabase(tmp_path)
