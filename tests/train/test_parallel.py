"""Two gloo processes over loopback train as one does."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qdeploy.errors import RecipeError
from qdeploy.recipe import Recipe
from qdeploy.train import run as runs
from qdeploy.train.checkpoint import load_checkpoint
from qdeploy.train.run import train
from tests.train.runs import elastic_recipe, supernet_recipe, tiny_recipe

ROOT = Path(__file__).parents[2]
STOP = 7  # in the third of four quantized steps
LONGER = {"longer": tiny_recipe(images=256, epochs=1), "supernet": supernet_recipe(images=256, stages=1)}
SUPERNET_STOP = 4  # before the last of two steps in each of two phases


def one_step(recipe: Recipe, batch: int) -> Recipe:
    """One step a phase: after more, single codes that fell on the other side of a tie tell the runs apart."""
    phases = {key: replace(getattr(recipe, key), batch=batch) for key in ("float_phase", "quantized_phase")}
    return recipe.replace(**phases)


# a supernet's widest range hangs on single codes, so its quantized phase is compared from one float network, STARTED
STARTED = "batchquant from the float network of two processes"
RECIPES = {
    "vertical": one_step(tiny_recipe(images=128, epochs=1), 128),
    "mgd": one_step(tiny_recipe(images=128, epochs=1, scalarization="mgd"), 128),
    "batchquant": one_step(supernet_recipe(images=256, stages=1), 256),
    "eqnet": one_step(elastic_recipe(images=256, epochs=1, weight_bits=[2, 8], granularity=["tensor"]), 256),
}
RECIPES[STARTED] = RECIPES["batchquant"]
PHASES = {"batchquant": ("float",), STARTED: ("quantized",)}
CHILD = f"""
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qdeploy.quant.parallel import joined, rank
from qdeploy.recipe import from_dict
from qdeploy.train import loop, run as runs
from qdeploy.train.run import train

runs.top1 = runs.level_accuracy = lambda *args: 0.0  # accuracy is not what is tested
folder, recipes, real = Path(sys.argv[1]), json.loads(sys.argv[2]), loop.train_step

def until(stop):
    steps = 0
    def interrupted(*args):
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt
        return real(*args)
    return interrupted

def run(name, recipe):
    start = folder / "batchquant" / "float.checkpoint" if name == {STARTED!r} else None
    train(from_dict(recipe), folder / name, None, lambda text: print("said", text, flush=True), start)

with joined():
    for name, recipe in recipes.items():
        run(name, recipe)
    for name, stop in (("longer", {STOP}), ("supernet", {SUPERNET_STOP})):
        loop.train_step = until(stop)
        try:
            run("parts of " + name, recipes[name])
        except KeyboardInterrupt:
            print("stopped", rank(), flush=True)
        loop.train_step = real
        run("parts of " + name, recipes[name])
"""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "quantized.checkpoint")[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Runs of two processes, and what each printed."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    text = json.dumps({name: recipe.to_json() for name, recipe in (RECIPES | LONGER).items()})
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), text]
    children = [
        subprocess.Popen(command, env=os.environ | own | {"RANK": str(i)}, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [child.communicate(timeout=500)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    return folder, said


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(
    name: str, together: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in ("top1", "level_accuracy"):
        monkeypatch.setattr(runs, function, lambda *args: 0.0)
    recipe: Recipe = RECIPES[name]
    start = together[0] / "batchquant" / "float.checkpoint" if name == STARTED else None
    train(recipe, tmp_path, None, lambda text: None, start)
    # codes at a tie may differ, and among 40 candidates for an elastic step, 2.5% of a range apart, the best one
    quantized = (6e-2, 1e-2) if name == "eqnet" else (1e-2, 2e-3)
    tolerances = {"float": (1e-3, 2e-4), "quantized": quantized}
    for phase in PHASES.get(name, tuple(tolerances)):
        relative, absolute = tolerances[phase]
        one, two = (load_checkpoint(run / f"{phase}.checkpoint")[1] for run in (tmp_path, together[0] / name))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            assert torch.allclose(two[key], tensor, relative, absolute), f"{phase} {key}: {two[key]} is not {tensor}"


def test_the_first_process_alone_writes_and_prints(together: tuple[Path, list[str]]) -> None:
    folder, (first, second) = together
    assert "said float" in first and second == "stopped 1\n" * len(LONGER)
    rows = [json.loads(line) for line in (folder / "vertical" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [("float", 1), ("quantized", 1)]


@pytest.mark.parametrize("name", LONGER)
def test_two_processes_resume_bitwise(name: str, together: tuple[Path, list[str]]) -> None:
    whole, parts = weights(together[0] / name), weights(together[0] / f"parts of {name}")
    assert together[1][0].count("stopped 0") == len(LONGER)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "processes", lambda: 3)
    with pytest.raises(RecipeError, match="a batch of 64 cannot be divided among 3 processes"):
        runs.check_parallel(tiny_recipe())
