"""The main job, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.demo import fetched_twice
from qdeploy.serve.byte_log import Sent


def test_the_demo_climbs_and_fetches_nothing_twice(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "qdeploy.cli", "demo", "-o", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["level"] for row in result["levels"]] == ["w2", "w3", "mixed", "w4"]
    assert result["fetched_twice"] == 0 and result["drop"]["bytes"] == 0
    bits = [row["bits_per_weight"] for row in result["levels"]]
    assert bits == sorted(bits) and len(set(bits)) == 4
    for row in result["levels"]:
        assert row["accuracy"] > 87
        assert row["parity"]["differing"] == 0
        assert 0 < row["bytes"] <= row["total_bytes"]
        assert set(row["fetched"]) <= {"planes", "side", "skeleton", "artifact", "manifest"}
    assert all("artifact" not in row["fetched"] for row in result["levels"][1:])  # code is fetched once
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 6 and len(page) < 3_000_000
    check_search(result["search"])


def check_search(search: dict[str, Any]) -> None:
    """The limits lie between the smallest and the largest subnet; every pick is judged by what was measured."""
    pick, limits, ends = search["pick"], search["limits"], search["ends"]
    for key, limit in limits.items():
        assert ends["smallest"][key] < limit < ends["largest"][key]
    for attempt in search["attempts"]:
        assert attempt["kept"] == all(attempt["measured"][key] <= limit for key, limit in limits.items())
        assert attempt["predicted"]["download_kib"] == pytest.approx(attempt["measured"]["download_kib"], rel=0.15)
    assert all(not attempt["kept"] for attempt in search["attempts"][:-1]) and search["attempts"][-1] == pick
    assert pick["measured"]["download_kib"] <= limits["download_kib"]
    assert pick["predicted"]["accuracy"] == pytest.approx(pick["measured"]["accuracy"], abs=2)
    assert len(search["front"]) > 5 and pick["measured"]["accuracy"] > 87
    assert Path(pick["folder"], "spec.json").exists()


def test_a_folder_with_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path)])
    assert done.exit_code == 2 and "not an output of qdeploy" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(("second", "again"), [((10, 5), 0), ((5, 5), 5), ((9, 2), 1)])
def test_bytes_sent_twice_are_counted(second: tuple[int, int], again: int) -> None:
    rows = [Sent("GET", "/objects/a", None, 206, start, size, size) for start, size in ((0, 10), second)]
    rows.append(Sent("GET", "/objects/b", None, 206, 0, 10, 10))
    assert fetched_twice(rows) == again
