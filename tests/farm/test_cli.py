"""`qdeploy devices` and the refusals of `qdeploy latency-table`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from tests.farm.children import free_port
from tests.farm.test_tracker import SUMMARY, listening, replying

HOST = str(Path(__file__).parents[2] / "targets" / "host.toml")


def test_devices_of_this_machine_and_of_a_tracker() -> None:
    found = CliRunner().invoke(main, ["devices"])
    assert found.exit_code == 0 and found.stdout.startswith("local: ")
    with listening(replying([0, SUMMARY])) as tracker:
        text = CliRunner().invoke(main, ["devices", "--tracker", str(tracker)]).stdout
        rows = json.loads(CliRunner().invoke(main, ["devices", "--tracker", str(tracker), "--json"]).stdout)
    assert "rpi5: 2 devices, 1 free, 0 requests wait (10.0.0.1:9090, 10.0.0.2:9090)" in text
    assert [row["key"] for row in rows["devices"]] == ["ghost", "orin", "rpi5"] and rows["local"]["cores"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["devices", "--tracker", f"127.0.0.1:{free_port()}"], "no RPC tracker at"),
        (["devices", "--tracker", "a:b:c"], "is no tracker"),
        (["latency-table", "run", "--target", HOST, "-o", "{out}", "--export", "table.txt"], ".json or a .csv"),
        (["latency-table", "run", "--target", HOST, "-o", "{out}", "--device", "locl"], "write local or HOST:PORT/KEY"),
        (["latency-table", "run", "--target", HOST, "-o", "{out}"], "the checkpoint of a trained run"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    where = [text.format(out=tmp_path / "latency.sqlite") for text in arguments]
    found = CliRunner().invoke(main, where)
    assert found.exit_code == 2 and message in found.stderr and found.stderr.strip().count("\n") == 0
    assert not (tmp_path / "latency.sqlite").exists()


def test_a_target_file_says_where_to_measure(tmp_path: Path) -> None:
    target = tmp_path / "board.toml"
    nowhere = f"127.0.0.1:{free_port()}"
    target.write_text(Path(HOST).read_text() + f'device = "{nowhere}/board"\n')
    command = ["latency-table", str(tmp_path), "--target", str(target), "-o", str(tmp_path / "latency.sqlite")]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 2 and f"no RPC tracker at {nowhere}" in found.stderr
    found = CliRunner().invoke(main, [*command, "--device", "local"])  # comes before it
    assert found.exit_code == 2 and "the checkpoint of a trained run" in found.stderr
