from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdeploy.cli import main
from tests.report.material import run_folder, sensitivity, write_json


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    run_folder(tmp_path / "run")
    write_json(tmp_path / "sens" / "sensitivity.json", sensitivity())
    return tmp_path / "run", tmp_path / "sens"


def test_the_command_says_what_it_recognized_and_what_is_not_there(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    done = call(*folders, "-o", out)
    assert done.exit_code == 0, done.output
    assert f"{folders[0]}: training run\n{folders[1]}: sensitivity\n" in done.stdout
    assert "not in it: What a climb costs: `qdeploy bundle" in done.stdout
    assert out.read_text().startswith("<!doctype html>")


def test_json_is_one_document(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = call(*folders, "-o", tmp_path / "r.html", "--plots", tmp_path / "plots", "--json")
    found = json.loads(done.stdout)
    assert found["report"] == str(tmp_path / "r.html") and found["figures"] == ["training", "sensitivity"]
    assert [row["kinds"] for row in found["folders"]] == [["training run"], ["sensitivity"]]
    assert sorted(found["plots"]) == sorted(map(str, (tmp_path / "plots").iterdir()))


def test_bad_input_is_one_line_and_leaves_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    (folders[0] / "metrics.jsonl").write_text('{"phase": 1}\n')
    for arguments, said in (
        ((folders[0], "-o", out), "run `qdeploy train`"),
        ((tmp_path / "absent", "-o", out), "is no folder"),
        ((tmp_path, "-o", out), "no folder that a report knows"),
        ((folders[1], folders[0], "-o", out), "metrics.jsonl"),
        (("-o", out), "DIR"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.output
        assert not out.exists()


def test_a_page_is_replaced_with_force_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    out.write_text("mine")
    done = call(folders[1], "-o", out)
    assert done.exit_code == 2 and "--force" in done.stderr and out.read_text() == "mine"
    assert call(folders[1], "-o", out, "--force").exit_code == 0 and out.read_text() != "mine"
