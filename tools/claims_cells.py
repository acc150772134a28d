"""Cells of the claims table: one row and seed each, trained, measured, kept as claims/ROW/SEED.json."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import claims_post
import torch
from claims_post import ACCURACY, WEIGHT_KIB
from claims_rows import Row
from claims_tables import ACTIVATION_KIB, FINITE, GRADIENT, Cells

from qdeploy import __version__
from qdeploy.data import load
from qdeploy.errors import DeviceError, DivergenceError, ModelError
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256, write_atomic
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.differentiable import DifferentiableNet
from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.recipe import (
    BatchQuantization,
    DifferentiableQuantization,
    EQNetQuantization,
    Quantization,
    Recipe,
    same_recipe,
)
from qdeploy.space import SubnetSpec
from qdeploy.train.checkpoint import load_checkpoint, load_module
from qdeploy.train.loop import run_phase
from qdeploy.train.run import accuracy, float_phase, load_run, new_network, top1, train, training_set

KEYS = {"row", "seed", "figures", "float", "recipe", "command", "versions", "cpu_seconds", "full"}
SIZES = {WEIGHT_KIB: "weights", ACTIVATION_KIB: "activations"}  # figures, and their names in DifferentiableNet
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Places:
    """Where cells are made: finished ones in `folder`, trainings in `work`, images in `data_dir`.

    `full`: with all training images instead of the rows' numbers.
    """

    folder: Path
    work: Path
    data_dir: Path | None
    full: bool = False

    @property
    def trainings(self) -> Path:
        """Folder of all trainings with as many images."""
        return self.work / ("full" if self.full else "part")


# ---- finished cells --------------------------------------------------------------------------------------------------


def cell_path(folder: Path, name: str, seed: int) -> Path:
    """Where a cell's JSON lies."""
    return folder / name / f"{seed}.json"


def is_cell(value: Any) -> bool:
    """True for what `store_cell` writes, as far as the page needs it."""
    if not isinstance(value, dict) or set(value) - {"post"} != KEYS or not isinstance(value["figures"], dict):
        return False
    numbers = [*value["figures"].values(), value["cpu_seconds"], *([value["float"]] if value["float"] else [])]
    return isinstance(value["recipe"], dict) and all(type(number) in (int, float) for number in numbers)


def read_cells(folder: Path, names: Iterable[str]) -> Cells:
    """Finished cells of the rows `names`; ModelError for a file that is none."""
    found: Cells = {}
    for name in names:
        for path in sorted((folder / name).glob("*.json")):
            cell = parse_json(read_bytes(path, "the cell", ModelError), str(path), ModelError)
            if not is_cell(cell) or cell["row"] != name or str(cell["seed"]) != path.stem:
                raise ModelError(f"{path} is not a cell of the claims table: remove it, and run the cell again")
            found[name, cell["seed"]] = cell
    return found


def current_cells(cells: Cells, rows: dict[str, Row], full: bool) -> tuple[Cells, list[tuple[str, int]]]:
    """The cells that were made by the rows' recipes of today, and those that were not: the stale ones."""
    good = {
        key: cell
        for key, cell in cells.items()
        if same_recipe(cell["recipe"], rows[key[0]].recipe(key[1], full)) and cell.get("post") == rows[key[0]].post
    }
    return good, sorted(set(cells) - set(good))


def wanted_figures(row: Row) -> list[str]:
    """Names of what a cell of `row` measures."""
    if row.post is not None:
        return list(claims_post.FIGURES)
    choice = row.recipe(0, False).quantization
    if isinstance(choice, DifferentiableQuantization):
        return [ACCURACY, *SIZES]
    names = [str(width) for width in row.widths]
    if isinstance(choice, EQNetQuantization):
        kinds = itertools.product(choice.granularity, choice.symmetry)
        names = [f"{width} {g} {s}" for g, s in kinds for width in row.widths]
    own = [GRADIENT, FINITE] if isinstance(choice, BatchQuantization) else []
    return [*names, *(spec.id for spec in row.specs), *own]


def is_complete(row: Row, cell: dict[str, Any]) -> bool:
    """False where the row has come to measure more; a training that diverged has nothing more to measure."""
    return cell["figures"].get(FINITE) == 0 or set(wanted_figures(row)) <= set(cell["figures"])


def state(row: Row, seed: int, cells: Cells, stale: Iterable[tuple[str, int]]) -> str:
    """done, incomplete, stale or not run; `cells` are the current ones."""
    if (row.name, seed) in cells:
        return "done" if is_complete(row, cells[row.name, seed]) else "incomplete"
    return "stale" if (row.name, seed) in stale else "not run"


def store_cell(folder: Path, cell: dict[str, Any]) -> None:
    """Write a finished cell."""
    content = json.dumps(cell, sort_keys=True, indent=1, allow_nan=False) + "\n"
    write_atomic(cell_path(folder, cell["row"], cell["seed"]), content.encode())


# ---- making one ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, blocking: bool) -> Iterator[None]:
    """`path` for this process alone; where another has it, wait or raise DeviceError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if blocking else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DeviceError(f"another process works on {path.with_suffix('')}: wait for it or end it") from e
        yield


class Clock:
    """CPU seconds of a cell over all processes that worked on it; kept in its run folder."""

    def __init__(self, run: Path) -> None:
        self.path, self.start = run / "cpu_seconds.json", time.process_time()
        self.before = float(json.loads(self.path.read_text())) if self.path.exists() else 0.0

    def store(self) -> float:
        """Write the seconds so far, and return them."""
        seconds = self.before + time.process_time() - self.start
        write_atomic(self.path, canonical_json(seconds))
        return seconds


def float_recipe(recipe: Recipe) -> Recipe:
    """What decides the float phase of `recipe`: cells for which this is equal share that phase."""
    choice = recipe.quantization
    plain: Quantization | BatchQuantization = Quantization()
    if isinstance(choice, BatchQuantization):  # its float phase trains subnets too
        plain = replace(choice, estimator="channel-mean", affine=True, weights="lsq", mixed_phase=None)
    return replace(recipe, name="float", quantization=plain, quantized_phase=recipe.float_phase)


def float_path(row: Row, seed: int, places: Places) -> Path:
    """Where the trained float network lies from which a cell starts."""
    recipe = float_recipe(row.recipe(seed, places.full))
    return places.trainings / f"float-{sha256(canonical_json(recipe.to_json()))[:12]}.checkpoint"


def float_checkpoint(row: Row, seed: int, places: Places, echo: Echo) -> Path:
    """`float_path`, trained if need be."""
    path = float_path(row, seed, places)
    run = path.with_suffix("")
    with locked(path.with_suffix(".lock"), blocking=True):
        if not path.exists():
            recipe = float_recipe(row.recipe(seed, places.full))
            data = training_set(recipe, places.data_dir)
            network = new_network(recipe, data.images.shape[1], data.classes)
            run.mkdir(exist_ok=True)
            run_phase(float_phase(recipe, network), recipe, data, run, echo)
            os.replace(run / "float.checkpoint", path)
        shutil.rmtree(run, ignore_errors=True)
    return path


def named_specs(net: SimulatedNet, row: Row) -> dict[str, SubnetSpec]:
    """What is measured of a trained network, by the figure's name."""
    if isinstance(net, DifferentiableNet):
        return {ACCURACY: net.only}
    found = {spec.id: spec for spec in row.specs}
    if not isinstance(net, EQNet):
        return {f"{width}": net.uniform(width) for width in row.widths} | found
    kinds = list(itertools.product(net.choice.granularity, net.choice.symmetry))
    return {f"{w} {g} {s}": net.uniform(w, g, s) for g, s in kinds for w in row.widths} | found


def accuracies(run: Path, row: Row, data_dir: Path | None) -> dict[str, float]:
    """Top-1 accuracy in per cent on the test images of every spec that a row measures, calibrated for it.

    Of learned widths also their sizes in KiB.
    """
    recipe, net = load_run(run)
    images, test = training_set(recipe, data_dir).images, load(recipe.data.name, "test", data_dir)
    found: dict[str, float] = {}
    for name, spec in named_specs(net, row).items():
        found[name] = accuracy(net if spec in net.learned_in else calibrated(net, spec, images), spec, test)
    if isinstance(net, DifferentiableNet):
        found |= {name: net.size_kib()[part] for name, part in SIZES.items()}
    return {name: round(value, 2) for name, value in found.items()}


def greatest_gradient(run: Path) -> dict[str, float]:
    """The greatest finite gradient norm of a run before it was bounded; nothing where the method bounds none."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    norms = [row["loss"]["greatest gradient"] for row in rows if "greatest gradient" in row["loss"]]
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {GRADIENT: round(max(finite), 3)} if finite else {}


def train_and_measure(row: Row, seed: int, run: Path, places: Places, echo: Echo) -> dict[str, Any]:
    """Figures of a cell, and its float network's accuracy (None where the training diverged)."""
    recipe, report = row.recipe(seed, places.full), run / "report.json"
    try:
        if report.exists():  # trained to the end already
            trained = parse_json(read_bytes(report, "the run's report", ModelError), str(report), ModelError)
        else:
            trained = train(recipe, run, places.data_dir, echo, float_checkpoint(row, seed, places, echo))
        found = accuracies(run, row, places.data_dir)
    except DivergenceError as e:
        echo(f"diverged: {e}")
        return {"figures": greatest_gradient(run) | {FINITE: 0}, "float": None}
    if isinstance(recipe.quantization, BatchQuantization):
        found |= greatest_gradient(run) | {FINITE: 1}
    return {"figures": found, "float": round(trained["float"], 2)}


def quantize_and_measure(row: Row, seed: int, places: Places, echo: Echo) -> dict[str, Any]:
    """Figures of a row with `post`, and its float network's accuracy."""
    recipe, path = row.recipe(seed, places.full), float_checkpoint(row, seed, places, echo)
    data, test = training_set(recipe, places.data_dir), load(recipe.data.name, "test", places.data_dir)
    network = new_network(recipe, data.images.shape[1], data.classes)
    load_module(network, load_checkpoint(path)[1], "model/", str(path))
    assert row.post is not None
    figures = claims_post.measure(network.eval(), row.post, data, test, echo)
    own = {name: round(value, 2) for name, value in figures.items()}
    return {"figures": own, "float": round(top1(network, test), 2), "post": row.post}


def run_cell(row: Row, seed: int, places: Places, echo: Echo) -> dict[str, Any]:
    """Train one cell to its end, from its last checkpoint on, and measure it."""
    recipe, run = row.recipe(seed, places.full), places.trainings / row.name / str(seed)
    with locked(run.with_suffix(".lock"), blocking=False):
        kept = run / "recipe.json"
        if kept.exists() and not same_recipe(json.loads(kept.read_text()), recipe):
            echo("the recipe has changed: training anew")
            shutil.rmtree(run)
        clock = Clock(run)

        def say(text: str) -> None:
            echo(text)
            clock.store()

        try:
            if row.post is None:
                found = train_and_measure(row, seed, run, places, say)
            else:
                found = quantize_and_measure(row, seed, places, say)
        finally:
            seconds = clock.store()
    versions = {"qdeploy": __version__, "torch": torch.__version__, "python": platform.python_version()}
    full = " --full" if places.full else ""
    return found | {
        "row": row.name,
        "seed": seed,
        "recipe": recipe.to_json(),
        "command": f"python tools/claims.py --rows {row.name} --seed {seed} --budget-min 1{full}",
        "versions": versions | {"machine": platform.machine()},
        "cpu_seconds": round(seconds),
        "full": places.full,
    }
