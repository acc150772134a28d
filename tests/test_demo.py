"""The main job, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    assert page.count("<figure>") == 5 and len(page) < 3_000_000


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
