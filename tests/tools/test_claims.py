"""The claims table is made from its cells' files."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from qdeploy.errors import ModelError, RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import claims

    yield claims
    sys.modules.pop("claims")


def cell(claims: ModuleType, name: str, seed: int, **figures: float) -> dict[str, Any]:
    recipe = claims.recipe_of(claims.rows()[name], seed, False).to_json()
    rest = {"float": 80.0, "recipe": recipe, "command": "python ...", "versions": {}, "cpu_seconds": 60, "full": False}
    return {"row": name, "seed": seed, "figures": figures} | rest


def store(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / content["row"] / f"{content['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_the_committed_page_is_made_from_the_committed_cells(claims: ModuleType) -> None:
    cells = claims.read_cells(ROOT / "claims", claims.rows())
    assert cells
    assert (ROOT / "docs" / "claims.md").read_text() == claims.page(cells), "run make claims"


def test_every_line_names_a_row_and_every_row_stands_in_a_line(claims: ModuleType) -> None:
    named = {row for table in claims.tables() for _, entries in table.lines for row, _ in entries}
    assert named == set(claims.rows())
    for row in claims.rows().values():
        if row.quantization is None:
            assert row.needs
            with pytest.raises(RecipeError, match="cannot be run: it needs"):
                claims.recipe_of(row, 0, False)
        else:
            assert claims.recipe_of(row, 0, False).data.train_images == claims.IMAGES
            assert claims.recipe_of(row, 0, True).data.train_images is None


def test_figures_come_from_the_files_and_nothing_else(claims: ModuleType, tmp_path: Path) -> None:
    store(tmp_path, cell(claims, "lsq3", 0, **{"3": 71.25}))
    store(tmp_path, cell(claims, "lsq3", 1, **{"3": 72.25}))
    store(tmp_path, cell(claims, "eqnet", 0, **{f"{w} {g} {s}": 10.0 * w for w in claims.WIDTHS for g in
          claims.GRANULARITIES for s in claims.SYMMETRIES}))  # fmt: skip
    out = tmp_path / "page.md"
    result = CliRunner().invoke(claims.main, ["--folder", str(tmp_path), "--page", str(out)])
    assert result.exit_code == 0, result.output
    lines = out.read_text().splitlines()
    assert "| separately trained LSQ, a network a width | not run | 71.75 (71.25, 72.25) | not run |" in lines
    assert "| EQ-Net, per channel, asymmetric | 20.00 | 30.00 | 40.00 |" in lines
    assert "| lambda 0.5 | 20.00 | 30.00 | 40.00 |" in lines and "| lambda 0.9 | not run | not run | not run |" in lines
    assert "| BatchQuant, eq. 8, two stages | not run | not run |" in lines
    listed = CliRunner().invoke(claims.main, ["--folder", str(tmp_path), "--page", str(out), "--list"]).output
    states = {line.split()[0]: line.split("  ")[-1].strip() for line in listed.splitlines()}
    assert (states["lsq3"], states["vertical"]) == ("done", "not run")
    assert states["batchquant-ema"].startswith("needs ")


def test_a_budget_runs_missing_cells_alone(claims: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, cell(claims, "lsq2", 0, **{"2": 60.0}))
    ran = []

    def run_cell(row: Any, seed: int, *args: object) -> dict[str, Any]:
        ran.append((row.name, seed))
        return cell(claims, row.name, seed, **{"3": 61.0})

    monkeypatch.setattr(claims, "run_cell", run_cell)
    options = ["--folder", str(tmp_path), "--page", str(tmp_path / "page.md"), "--rows", "lsq2,lsq3,batchquant-ema"]
    assert CliRunner().invoke(claims.main, options).exit_code == 0 and not ran
    assert CliRunner().invoke(claims.main, [*options, "--budget-min", "1"]).exit_code == 0
    assert ran == [("lsq3", 0)] and (tmp_path / "lsq3" / "0.json").exists()


@pytest.mark.parametrize("damage", [{"row": "lsq4"}, {"seed": 7}, {"extra": 1}])
def test_a_file_that_is_no_cell_is_refused(claims: ModuleType, tmp_path: Path, damage: dict[str, Any]) -> None:
    path = store(tmp_path, cell(claims, "lsq2", 0, **{"2": 60.0}))
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ModelError, match="not a cell of the claims table"):
        claims.read_cells(tmp_path, claims.rows())
