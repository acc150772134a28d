import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qdeploy.errors import ModelError
from qdeploy.quant.network import levels
from qdeploy.recipe import Recipe
from qdeploy.train import loop
from qdeploy.train.checkpoint import load_checkpoint
from qdeploy.train.run import load_run, train
from tests.train.runs import tiny_recipe


def quiet(_: str) -> None:
    pass


def same_weights(first: Path, second: Path) -> bool:
    left, right = (load_checkpoint(run / "quantized.checkpoint")[1] for run in (first, second))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe, run = tiny_recipe(), tmp_path_factory.mktemp("run") / "whole"
    train(recipe, run, None, quiet)
    return recipe, run


def test_a_run_learns_and_loads(finished: tuple[Recipe, Path]) -> None:
    recipe, run = finished
    loaded, net = load_run(run)
    assert loaded == recipe
    assert list(levels(net)) == [2, 3, 4]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [(p, e) for p in ("float", "quantized") for e in (1, 2)]
    assert rows[-1]["loss"]["w4"] < rows[0]["loss"]["fp"] < math.log(10)  # chance is log 10
    report = train(recipe, run, None, quiet)  # finished phases are not run again
    assert set(report["levels"]) == {"2", "3", "4"}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(rows)


@pytest.mark.parametrize("stop", [3, 11, 21, 30])
def test_ctrl_c_resumes_to_the_same_weights_bitwise(
    finished: tuple[Recipe, Path], tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = finished
    steps = 0
    real = loop.train_step

    def interrupted(*args: object) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", None, quiet)
    with pytest.raises(ModelError, match=r"stopped at|cannot read"):
        load_run(tmp_path / "run")
    train(recipe, tmp_path / "run", None, quiet)
    assert same_weights(whole, tmp_path / "run")


CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from qdeploy.train import loop
from qdeploy.train.run import train
from tests.train.runs import tiny_recipe
loop.CHECKPOINT_SECONDS = 0.0
train(tiny_recipe(), Path(sys.argv[1]), None, lambda text: None)
"""


def test_kill_9_resumes_to_the_same_weights_bitwise(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (run / "quantized.checkpoint").exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    train(finished[0], run, None, quiet)
    assert same_weights(finished[1], run)


def test_another_recipe_in_the_same_folder_is_refused(finished: tuple[Recipe, Path]) -> None:
    with pytest.raises(ModelError, match="another recipe"):
        train(tiny_recipe(epochs=1), finished[1], None, quiet)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "swapped", "empty"])
def test_a_damaged_checkpoint_is_refused(finished: tuple[Recipe, Path], tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    data = bytearray((finished[1] / "quantized.checkpoint").read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-100] ^= 1
    elif damage == "swapped":
        data = bytearray((finished[1] / "float.checkpoint").read_bytes())
    else:
        data = bytearray()
    (run / "recipe.json").write_bytes((finished[1] / "recipe.json").read_bytes())
    (run / "quantized.checkpoint").write_bytes(bytes(data))
    with pytest.raises(ModelError):
        load_run(run)


def test_an_edited_state_is_refused(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    path = run / "quantized.checkpoint"
    data = path.read_bytes()
    assert data.count(b'"done":16') == 1
    path.write_bytes(data.replace(b'"done":16', b'"done":11'))
    for again in (lambda: train(finished[0], run, None, quiet), lambda: load_run(run)):
        with pytest.raises(ModelError, match="digest"):
            again()


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no batch of 64"):
        train(tiny_recipe(images=32), tmp_path / "run", None, quiet)
    assert not (tmp_path / "run").exists()


CHOICES: list[dict[str, object]] = [
    {"scalarization": "mgd"},
    {"first_last": "float"},
    {"widths": [8]},
    {"widths": [2, 8]},
    {"activation_bits": 8},
]


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_choices_train(tmp_path: Path, changes: dict[str, object]) -> None:
    recipe = tiny_recipe(images=256, epochs=3, **changes)
    train(recipe, tmp_path / "run", None, quiet)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(rows[-1]["loss"]) == [f"w{width}" for width in recipe.quantization.widths]
    first, last = rows[3]["loss"], rows[-1]["loss"]
    assert sum(last.values()) < sum(first.values())
