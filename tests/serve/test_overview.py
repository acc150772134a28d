"""Pages of devices, counts and the document of the fleet page, against the same said in Python."""

from __future__ import annotations

import json
import random
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qdeploy.client.status import DeviceState
from qdeploy.errors import DataError, DeviceError
from qdeploy.serve.database import SORTS, TROUBLES, StateDatabase, View, reading, table, totals
from qdeploy.serve.metrics import Metrics
from qdeploy.serve.overview import SILENT_S, TOTALS_S, Overview, view_of
from tests.client.tree import make_tree
from tests.trust.world import World

NOW = 1_000_000.0
OLD = NOW - 500_000  # silent since
NAMES = [f"cam-{i:03}" for i in range(60)] + ["a_b", "axb", "a%b", "A.B", "Zz"]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "states.sqlite"
    rng = random.Random(5)
    with closing(StateDatabase(path)) as database:
        for name in rng.sample(NAMES[:-2], len(NAMES) - 2) + NAMES[-2:]:
            safe = name.replace("%", "-")
            state = DeviceState(
                safe, "net", rng.choice(["rpi5", "host"]), rng.randrange(1, 4), "w4", rng.choice(["w2", "w3", "w4"]),
                rng.random() < 0.2, rng.randrange(5) * 1000, rng.choice([None, "canary"]),
                "no space" if rng.random() < 0.1 else None,
            )  # fmt: skip
            database.write([state], OLD if rng.random() < 0.2 else NOW - rng.randrange(3))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM devices")]


def in_trouble(row: dict[str, Any], name: str | None) -> bool:
    return {
        None: True,
        "behind": row["wanted"] != row["reached"],
        "stale": bool(row["stale"]),
        "errors": row["error"] is not None,
        "silent": row["seen"] < NOW - SILENT_S,
    }[name]


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("only", [None, *TROUBLES])
def test_pages_are_those_of_a_sorted_list(states: Path, sort: str, only: str | None) -> None:
    with reading(states) as db:
        for find in ("", "cam-0", "7", "B", "_", "%", "\\", "zz", "nothing"):
            rows = [r for r in rows_of(states) if in_trouble(r, only) and find.lower() in r["device"].lower()]
            for descending in (False, True):
                rows.sort(key=lambda row: (row[sort], row["device"]), reverse=descending)
                for start in (0, 7, 14, 10_000):
                    view = View(sort, descending, only, find, start, 7)
                    count, begin, page = table(db, view, NOW - SILENT_S)
                    assert count == len(rows) and begin == min(start, max(0, count - 1) // 7 * 7)
                    assert [row["device"] for row in page] == [row["device"] for row in rows[begin : begin + 7]]


def test_totals(states: Path) -> None:
    rows = rows_of(states)
    with reading(states) as db:
        found = totals(db, NOW - SILENT_S)
    assert found["devices"] == len(rows) and found["fetched_bytes"] == sum(row["fetched"] for row in rows)
    assert found["troubles"] == {name: sum(in_trouble(row, name) for row in rows) for name in TROUBLES}
    runs = Counter((row["model"], row["channel"], row["release"], row["reached"]) for row in rows)
    assert {(r["model"], r["channel"], r["release"], r["level"]): r["devices"] for r in found["runs"]} == runs


def test_no_page_sorts_all_devices(states: Path) -> None:
    """Each sort has an index in its order: a page of many devices is read, not sorted."""
    with reading(states) as db:
        for sort in SORTS:
            query = f"SELECT rowid FROM devices ORDER BY {sort} DESC, device DESC LIMIT 7"
            if sort == "device":
                query = "SELECT rowid FROM devices ORDER BY device LIMIT 7"
            plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}"))
            assert "INDEX" in plan and "TEMP B-TREE" not in plan, (sort, plan)


def test_a_database_without_indexes_gets_them(states: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    with closing(StateDatabase(path)) as database:
        database.write([DeviceState("a", "net", "x", 1, "w2", "w2")], NOW)
    with closing(sqlite3.connect(path)) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'devices_by_%'")]
        for name in names:
            db.execute(f"DROP INDEX {name}")
        db.execute("CREATE INDEX devices_seen ON devices (seen)")
    with closing(StateDatabase(path)) as database:
        assert database.devices == 1
    with closing(sqlite3.connect(path)) as db:
        found = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'devices_%'")]
    assert sorted(found) == sorted(names) and names


@pytest.mark.parametrize(
    "query",
    [
        {"sort": "error"}, {"sort": "seen; DROP TABLE devices"}, {"order": "up"}, {"only": "all"}, {"start": "-1"},
        {"start": "1e3"}, {"start": "٣"}, {"start": "9" * 10}, {"find": "x" * 101}, {"sort": ""},
    ],
)  # fmt: skip
def test_what_is_no_view(query: dict[str, str]) -> None:
    with pytest.raises(DataError):
        view_of(query)


def test_views() -> None:
    assert view_of({}) == View()
    assert view_of({"sort": "seen", "order": "desc", "only": "", "find": "<x>", "start": "50"}) == View(
        "seen", True, None, "<x>", 50
    )


def test_the_document(tmp_path: Path) -> None:
    world = World(tmp_path, "1/1", "1/1")
    world.publish(0, levels={"board": "w4"})
    path = tmp_path / "states.sqlite"
    metrics = Metrics()
    metrics.answered("object", 200, 1000, 0.1)
    metrics.answered("timestamp", 304, 0, 0.1)
    with closing(StateDatabase(path)) as database:
        database.write([DeviceState("a", "toy", "board", 1, "w4", "w2")], NOW - SILENT_S - 1)
        database.write(
            [DeviceState("b", "toy", "x", 1, "w2", "w2"), DeviceState("c", "other", "x", 1, "w2", "w2")], NOW
        )
        clock = [NOW]
        overview = Overview(world.storage.root, metrics, path, lambda: clock[0])
        found = json.loads(overview.json(View(), controls=True))
        assert (found["time"], found["controls"], found["problem"]) == (NOW, True, None)
        assert (found["server"]["sent"], found["server"]["requests"]) == (1000, 2)
        rows = found["devices"]["rows"]
        assert [row["trouble"] for row in rows] == [["behind", "silent"], [], []]
        assert [row["otherwise"] for row in rows][:2] == ["release 1, w4", None] and "no model" in rows[2]["otherwise"]
        database.write([DeviceState("d", "toy", "x", 1, "w2", "w2")], NOW)
        found = json.loads(overview.json(View(start=400), controls=True))
        assert (found["fleet"]["devices"], found["devices"]["count"], found["devices"]["start"]) == (3, 4, 0)
        clock[0] += TOTALS_S
        assert json.loads(overview.json(View(), controls=True))["fleet"]["devices"] == 4


def test_without_reports_or_a_sound_tree(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "b")
    found = json.loads(Overview(tree.root, Metrics(), None).json(View(), controls=False))
    assert (found["fleet"], found["devices"], found["problem"]) == (None, None, None)
    tree.object_path(0).parent.joinpath("../release.json").write_bytes(b"{}")
    found = json.loads(Overview(tree.root, Metrics(), None).json(View(), controls=False))
    assert found["tree"] is None and found["problem"]
    (tmp_path / "text").write_text("x" * 5000)
    with pytest.raises(DeviceError):
        Overview(tree.root, Metrics(), tmp_path / "text").json(View(), controls=False)
