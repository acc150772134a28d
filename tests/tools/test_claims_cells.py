"""Cells of the claims table, really trained: two layers, a few hundred of the shipped images."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from qdeploy import image_folder
from qdeploy.data import Dataset, load
from qdeploy.errors import DataError, DeviceError
from qdeploy.quant.calibrate import calibrated
from qdeploy.train.run import accuracy, load_run, training_set
from tests.tools.test_claims import ROOT, tool  # noqa: F401  # the fixture

PHASE = {"epochs": 1, "learning_rate": 0.05, "weight_decay": 1e-4, "batch": 64}
TINY: dict[str, Any] = {
    "network": {"name": "tiny", "width": 4, "stem_stride": 2},
    "data": {"name": "fashion-mnist", "split": "sample", "train_images": 256},
    "float_phase": PHASE,
    "quantized_phase": PHASE,
}


def rows(tool: SimpleNamespace, **changes: Any) -> dict[str, Any]:  # noqa: F811
    """A vertical row and one of LSQ, which share a float phase."""
    kept = TINY | changes
    found = [tool.rows.Row("a", {"widths": [2, 4]}, (2, 4), **kept), tool.rows.Row("b", {"widths": [2]}, (2,), **kept)]
    return {row.name: row for row in found}


@pytest.fixture
def few_test_images(tool: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Dataset:  # noqa: F811
    """This process measures on 500 of the test images, which these are."""

    def shortened(name: str, split: str, data_dir: Path | None = None) -> Dataset:
        return load(name, split, data_dir).take(500) if split == "test" else load(name, split, data_dir)

    for module in (tool.cells, image_folder):
        monkeypatch.setattr(module, "load", shortened)
    return shortened("fashion-mnist", "test")


def make(tool: SimpleNamespace, folder: Path, todo: list[tuple[Any, int]], jobs: int = 1) -> list[int]:  # noqa: F811
    """Make cells in folder/claims, trainings in folder/work; returns how many were left after each."""
    after: list[int] = []
    places = tool.cells.Places(folder / "claims", folder / "work", None)
    tool.claims.work_through(todo, places, jobs, 10.0, lambda waiting: after.append(len(waiting)))
    return after


def test_cells_are_trained_measured_and_kept(
    tool: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    known = rows(tool)
    monkeypatch.setattr(tool.claims, "rows", lambda: known)
    command = ["--folder", str(tmp_path / "claims"), "--work", str(tmp_path / "work"), "--seed", "3"]
    command += ["--page", str(tmp_path / "page.md"), "--budget-min", "10", "--jobs", "2"]
    result = CliRunner().invoke(tool.claims.main, command)
    assert result.exit_code == 0, result.output
    assert (
        "left: 0 cells" in result.output
        and "| a | 3 | tiny, width 4 | 1 float + 1 quantized epochs | 256 |" in (tmp_path / "page.md").read_text()
    )
    cells = tool.cells.read_cells(tmp_path / "claims", known)
    assert set(cells) == {("a", 3), ("b", 3)} and all(cell["cpu_seconds"] > 0 for cell in cells.values())
    assert set(cells["a", 3]["figures"]) == {"2", "4"} and cells["a", 3]["float"] == cells["b", 3]["float"]
    said = capfd.readouterr().out
    assert "a 3: float: step" in said and "b 3: float: step" not in said and "b 3: quantized: step" in said
    recipe, net = load_run(tmp_path / "work" / "part" / "b" / "3")
    assert recipe == known["b"].recipe(3, False)
    spec, test = net.uniform(2), load("fashion-mnist", "test")
    assert cells["b", 3]["figures"]["2"] == round(accuracy(net, spec, test), 2)
    assert "done" in CliRunner().invoke(tool.claims.main, [*command, "--list"]).output
    before = (tmp_path / "claims" / "a" / "3.json").read_bytes()
    again = CliRunner().invoke(tool.claims.main, command)
    assert "cell a" not in again.output and (tmp_path / "claims" / "a" / "3.json").read_bytes() == before


def test_a_row_that_measures_more_is_measured_again_and_a_changed_recipe_trained_again(
    tool: SimpleNamespace, tmp_path: Path, few_test_images: Dataset  # noqa: F811
) -> None:  # fmt: skip
    choice = {"method": "eqnet", "weight_bits": [2, 8], "activation_bits": [2, 8], "symmetry": ["symmetric"]}
    row = tool.rows.Row("e", choice, (2,), **TINY)
    places = tool.cells.Places(tmp_path, tmp_path / "work", None)
    said: list[str] = []
    first = tool.cells.run_cell(row, 0, places, said.append)
    assert set(first["figures"]) == {"2 tensor symmetric", "2 channel symmetric"}
    (spec,) = tool.rows.random_specs(tool.rows.Row("wide", choice, network={"name": "resnet8", "width": 8}), 1)
    assert spec.network == "resnet8" and len(spec.layers) > 3
    net = load_run(tmp_path / "work" / "part" / "e" / "0")[1]
    spec = net.uniform_pair(8, 2, "channel", "symmetric")
    more = tool.rows.Row("e", choice, (2,), specs=(spec,), **TINY)
    assert tool.cells.is_complete(row, first) and not tool.cells.is_complete(more, first)
    said.clear()
    second = tool.cells.run_cell(more, 0, places, said.append)
    assert not said and {key: second["figures"][key] for key in first["figures"]} == first["figures"]
    images = training_set(more.recipe(0, False), None).images
    assert second["figures"][spec.id] == round(accuracy(calibrated(net, spec, images), spec, few_test_images), 2)
    changed = tool.rows.Row("e", choice | {"guidance": 0.1}, (2,), **TINY)
    third = tool.cells.run_cell(changed, 0, places, said.append)
    assert "the recipe has changed: training anew" in said and third["recipe"]["quantization"]["guidance"] == 0.1
    assert third["float"] == first["float"] and not any(text.startswith("float: epoch") for text in said)


@pytest.mark.usefixtures("few_test_images")
def test_divergence_is_a_cell(tool: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    wild = PHASE | {"learning_rate": 1e30, "batch": 128}
    changes: dict[str, Any] = {
        "network": {"name": "mobilenetv3-tiny", "width": 8, "stem_stride": 2},
        "float_phase": PHASE | {"batch": 128},
    }
    quantization = {"method": "batchquant", "random_subnets": 0}
    for rate, finite in ((wild, 0), (PHASE | {"batch": 128}, 1)):
        row = tool.rows.Row("q", quantization, (2,), **(TINY | changes | {"quantized_phase": rate}))
        said: list[str] = []
        cell = tool.cells.run_cell(row, 0, tool.cells.Places(tmp_path, tmp_path / "work", None), said.append)
        tool.cells.store_cell(tmp_path, cell)
        assert tool.cells.read_cells(tmp_path, ["q"])["q", 0]["figures"]["finite"] == finite
        assert tool.cells.is_complete(row, cell) and any("diverged" in text for text in said) == (not finite)
    figures = cell["figures"]
    assert set(figures) == {"2", "gradient norm", "finite"} and figures["gradient norm"] > 0 and cell["float"] > 10
    steps = [json.loads(line) for line in (tmp_path / "work/part/q/0/metrics.jsonl").read_text().splitlines()]
    assert figures["gradient norm"] >= max(row["loss"].get("gradient", 0.0) for row in steps) - 1e-3


# ---- killed, stopped, refused ----------------------------------------------------------------------------------------

LONG = TINY | {"quantized_phase": PHASE | {"epochs": 40}}
SCRIPT = """
import sys
sys.path[:0] = [{tools!r}, {root!r}]
from pathlib import Path
import claims, claims_cells, claims_rows
if __name__ == "__main__":
    row = claims_rows.Row("a", {{"widths": [2]}}, (2,), **{fields!r})
    places = claims_cells.Places(Path({folder!r}, "claims"), Path({folder!r}, "work"), None)
    try:
        claims.work_through([(row, 0)], places, 1, 10.0, lambda waiting: print("left", len(waiting)))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def begin(folder: Path, fields: dict[str, Any]) -> subprocess.Popen[str]:
    """A process that makes the cell ("a", 0) of a long training."""
    script = folder / "script.py"
    values = {"tools": str(ROOT / "tools"), "root": str(ROOT), "folder": str(folder), "fields": fields}
    script.write_text(SCRIPT.format(**values))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)


def await_quantized(process: subprocess.Popen[str]) -> None:
    """Until the cell's process says that the quantized phase goes on."""
    assert process.stdout is not None
    for line in process.stdout:
        if "a 0: quantized: step" in line:
            return
    raise AssertionError("the cell ended before it was stopped")


def await_free(path: Path) -> None:
    """Until no process works on a cell."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
    raise AssertionError(f"{path} is still held")


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9"])
def test_a_stopped_cell_resumes_to_the_same_figures(
    tool: SimpleNamespace, tmp_path: Path, how: str  # noqa: F811
) -> None:  # fmt: skip
    run = tmp_path / "work" / "part" / "a" / "0"
    with begin(tmp_path, LONG) as process:
        await_quantized(process)
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(120) == 130
        else:
            process.kill()  # the parent alone: its child notices, and stops at a checkpoint
        await_free(run.with_suffix(".lock"))  # what the child may still say has a reader until then
    assert not (tmp_path / "claims").exists() and (run / "quantized.checkpoint").exists()
    assert not (run / "report.json").exists()
    seconds = json.loads((run / "cpu_seconds.json").read_text())
    row, said = tool.rows.Row("a", {"widths": [2]}, (2,), **LONG), list[str]()
    resumed = tool.cells.run_cell(row, 0, tool.cells.Places(tmp_path, tmp_path / "work", None), said.append)
    assert not any(text.startswith("float: epoch") for text in said) and resumed["cpu_seconds"] >= int(seconds) > 0
    whole = tool.cells.run_cell(row, 0, tool.cells.Places(tmp_path, tmp_path / "whole", None), said.append)
    assert resumed["figures"] == whole["figures"] and resumed["float"] == whole["float"]


def test_a_cell_has_one_process_and_its_errors_come_back(tool: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    row = rows(tool)["b"]
    lock = tmp_path / "work" / "part" / "b" / "0.lock"
    with tool.cells.locked(lock, blocking=False), pytest.raises(DeviceError, match="another process works on .*b/0"):
        make(tool, tmp_path, [(row, 0)])
    cifar = rows(tool, data={"name": "cifar-10", "train_images": 512})["b"]
    with pytest.raises(DataError, match="cifar-10 is not here"):
        make(tool, tmp_path, [(cifar, 0), (row, 0)])
    assert not (tmp_path / "claims").exists()


def test_learned_widths_are_measured_with_their_size(
    tool: SimpleNamespace, tmp_path: Path, few_test_images: Dataset  # noqa: F811
) -> None:  # fmt: skip
    choice = {"method": "differentiable", "weight_kib": 0.3, "activation_kib": 1.0, "update_steps": 2}
    row = tool.rows.Row("d", choice | {"uniform_phase": PHASE, "precision_phase": PHASE}, (), **TINY)
    places = tool.cells.Places(tmp_path / "claims", tmp_path / "work", None)
    cell = tool.cells.run_cell(row, 0, places, lambda _: None)
    assert set(cell["figures"]) == set(tool.cells.wanted_figures(row)) == {"accuracy", "weight KiB", "activation KiB"}
    assert cell["figures"]["weight KiB"] <= 0.3 and cell["figures"]["activation KiB"] <= 1.0
    _, net = load_run(tmp_path / "work" / "part" / "d" / "0")
    assert cell["figures"]["accuracy"] == pytest.approx(accuracy(net, net.only, few_test_images), abs=0.01)
    line = tool.page.cell_line("d", 0, cell)
    assert "1 float + 1 uniform + 1 precision + 1 quantized epochs" in line
