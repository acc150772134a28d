"""Make the claims table: what the papers claim, measured here on thin networks (docs/claims.md).

    python tools/claims.py [--budget-min N] [--rows A,B] [--seeds 1] [--full] [--data-dir DIR] [--list]

The work is cut into independent cells, a row and a seed each, of at most 40 CPU-minutes. A finished cell is written at
once as claims/ROW/SEED.json (figures, command, versions, CPU seconds), which is meant to be committed, and is never run
again; an unfinished one resumes at its last checkpoint. A missing cell is printed as "not run".
"""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from qdeploy import __version__
from qdeploy.data import load
from qdeploy.errors import ModelError, QDeployError, RecipeError
from qdeploy.files import canonical_json, parse_json, read_bytes, write_atomic
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.recipe import Recipe, from_dict
from qdeploy.space import SubnetSpec
from qdeploy.train.run import accuracy, load_run, train, training_set

ROOT = Path(__file__).parents[1]
IMAGES = 20_000  # training images without --full
WIDTHS = (2, 3, 4)
KEYS = {"row", "seed", "figures", "float", "recipe", "command", "versions", "cpu_seconds", "full"}
GRANULARITIES, SYMMETRIES = ("tensor", "channel"), ("symmetric", "asymmetric")
Cells = dict[tuple[str, int], dict[str, Any]]


# ---- what is claimed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training: what is special in its recipe, and which figures it gives.

    `quantization` is the recipe's table, `quantized_phase` changes entries of that one; `widths` are measured, of an
    EQ-Net with every granularity and symmetry. A row without quantization stands in the table, but `needs` is missing
    for running it.
    """

    name: str
    quantization: dict[str, Any] | None
    widths: tuple[int, ...] = WIDTHS
    network: dict[str, Any] = field(default_factory=lambda: {"name": "resnet8", "width": 16, "stem_stride": 2})
    quantized_phase: dict[str, Any] = field(default_factory=dict)
    needs: str = ""


@dataclass(frozen=True)
class Table:
    """One claim: its title, the columns' names, and for each line its label and one (row, figure) a column."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def lsq_name(bits: int, granularity: str, symmetry: str) -> str:
    """Row of a network trained for one width, granularity and symmetry alone."""
    return f"lsq{bits}-{granularity}-{symmetry}"


def _eqnet(**changes: Any) -> dict[str, Any]:
    """EQ-Net of all widths from 2 to 4 (what the table compares) and 8."""
    return {"method": "eqnet", "weight_bits": [2, 3, 4, 8], "activation_bits": [2, 3, 4, 8]} | changes


def _alone(bits: int, granularity: str, symmetry: str) -> dict[str, Any]:
    """One choice alone, without what is there for the sake of many: LSQ."""
    choice = {"weight_bits": [bits], "activation_bits": [bits], "granularity": [granularity], "symmetry": [symmetry]}
    return _eqnet(**choice, kurtosis_weight=0.0, skewness_weight=0.0)


def _batchquant(**changes: Any) -> dict[str, Any]:
    mixed = {"epochs": 4, "learning_rate": 0.01, "weight_decay": 1e-4}
    return {"method": "batchquant", "mixed_phase": mixed} | changes


def rows() -> dict[str, Row]:
    """Every training of the tables, by name, headline rows first."""
    mobile = {"name": "mobilenetv3", "width": 8, "stem_stride": 1}
    kinds = list(itertools.product(GRANULARITIES, SYMMETRIES))
    found = [Row("vertical", {"widths": list(WIDTHS)}), Row("no-compensation", {"compensation": False})]
    found += [Row(f"lsq{bits}", {"widths": [bits]}, (bits,)) for bits in WIDTHS]
    found += [Row("eqnet", _eqnet())]
    found += [Row(f"eqnet-lambda-{part}", _eqnet(guidance=part)) for part in (0.1, 0.9)]
    found += [Row(lsq_name(b, *kind), _alone(b, *kind), (b,)) for b in WIDTHS for kind in kinds]
    one_stage = {"method": "batchquant"}
    mobiles: list[tuple[str, dict[str, Any] | None, str]] = [
        ("batchquant-eq8", _batchquant(), ""),
        ("batchquant-eq7", _batchquant(estimator="extremes"), ""),
        ("batchquant-one-stage", one_stage, ""),
        ("batchquant-nested", _batchquant(weights="vertical"), ""),
        ("batchquant-no-gamma-beta", None, "a recipe key that leaves out gamma and beta"),
        ("batchquant-ema", None, "a recipe key for running averages of the extreme values"),
        ("batchquant-learned-steps", None, "a recipe key for learned activation steps in the supernet"),
        ("batchquant-alone", None, "training one architecture of the supernet alone"),
    ]
    longer = {"epochs": 8}  # one stage has the epochs of both
    for name, quantization, needs in mobiles:
        phase = longer if quantization is one_stage else {"epochs": 4}
        found.append(Row(name, quantization, (2, 4), mobile, phase, needs))
    return {row.name: row for row in found}


def tables() -> list[Table]:
    """The claims, in the order of docs/claims.md."""
    bits = tuple(f"{width}/{width}" for width in WIDTHS)

    def line(label: str, names: Sequence[str], suffix: str = "") -> tuple[str, tuple[tuple[str, str], ...]]:
        return label, tuple((name, f"{width}{suffix}") for name, width in zip(names, WIDTHS, strict=True))

    vertical = (
        line("one vertical network", ["vertical"] * 3),
        line("separately trained LSQ, a network a width", [f"lsq{width}" for width in WIDTHS]),
        line("vertical without compensation", ["no-compensation"] * 3),
    )
    kinds: list[tuple[str, tuple[tuple[str, str], ...]]] = []
    for granularity, symmetry in itertools.product(GRANULARITIES, SYMMETRIES):
        label, suffix = f"per {granularity}, {symmetry}", f" {granularity} {symmetry}"
        kinds.append(line(f"EQ-Net, {label}", ["eqnet"] * 3, suffix))
        kinds.append(line(f"LSQ alone, {label}", [lsq_name(w, granularity, symmetry) for w in WIDTHS], suffix))
    parts = tuple(
        line(f"lambda {part}", [name] * 3, " channel symmetric")
        for part, name in (("0.1", "eqnet-lambda-0.1"), ("0.5", "eqnet"), ("0.9", "eqnet-lambda-0.9"))
    )
    labels = {
        "eq8": "BatchQuant, eq. 8, two stages",
        "eq7": "eq. 7: extremes of the whole batch",
        "no-gamma-beta": "without gamma and beta",
        "ema": "running averages of minimum and maximum",
        "learned-steps": "learned steps",
        "one-stage": "one stage of as many epochs",
        "alone": "the same architecture trained alone",
        "nested": "nested weights (vertical) instead of a step a width",
    }
    mobile = tuple((text, tuple((f"batchquant-{key}", f"{w}") for w in (2, 4))) for key, text in labels.items())
    return [
        Table("Vertical layering", bits, vertical),
        Table("EQ-Net beside separately trained LSQ", bits, tuple(kinds)),
        Table("EQ-Net: lambda of group progressive guidance", bits, parts),
        Table("BatchQuant on an elastic MobileNetV3, its largest subnet", ("2/2", "4/4"), mobile),
    ]


def recipe_of(row: Row, seed: int, full: bool) -> Recipe:
    """The whole recipe of a cell; RecipeError where this version cannot run the row."""
    if row.quantization is None:
        raise RecipeError(f"row {row.name} cannot be run: it needs {row.needs}")
    phase = {"epochs": 5, "weight_decay": 1e-4, "learning_rate": 0.01}
    images = {} if full else {"train_images": IMAGES}
    return from_dict(
        {
            "name": f"claims-{row.name}",
            "network": dict(row.network),
            "data": {"name": "cifar-10"} | images,
            "quantization": row.quantization,
            "float_phase": phase | {"epochs": 8, "learning_rate": 0.1, "weight_decay": 5e-4, "nesterov": True},
            "quantized_phase": phase | row.quantized_phase,
            "seed": seed,
        }
    )


# ---- cells -----------------------------------------------------------------------------------------------------------


def cell_path(folder: Path, name: str, seed: int) -> Path:
    """Where a cell's JSON lies."""
    return folder / name / f"{seed}.json"


def read_cells(folder: Path, names: Iterable[str]) -> Cells:
    """Finished cells of the rows `names`; ModelError for a file that is none."""
    found: Cells = {}
    for name in names:
        for path in sorted((folder / name).glob("*.json")):
            cell = parse_json(read_bytes(path, "the cell", ModelError), str(path), ModelError)
            if not isinstance(cell, dict) or set(cell) != KEYS or cell["row"] != name or str(cell["seed"]) != path.stem:
                raise ModelError(f"{path} is not a cell of the claims table: remove it, and run the cell again")
            found[name, cell["seed"]] = cell
    return found


def specs_of(net: SimulatedNet, widths: Iterable[int]) -> dict[str, SubnetSpec]:
    """What is measured of a trained network, by the figure's name."""
    if not isinstance(net, EQNet):
        return {f"{width}": net.uniform(width) for width in widths}
    pairs = itertools.product(net.choice.granularity, net.choice.symmetry)
    return {f"{w} {g} {s}": net.uniform(w, g, s) for g, s in pairs for w in widths}


def figures(run: Path, widths: Iterable[int], data_dir: Path | None) -> dict[str, float]:
    """Top-1 accuracy in per cent on the test images of every spec that a row measures, calibrated for it."""
    recipe, net = load_run(run)
    images, test = training_set(recipe, data_dir).images, load(recipe.data.name, "test", data_dir)
    found: dict[str, float] = {}
    for name, spec in specs_of(net, widths).items():
        found[name] = accuracy(net if spec in net.learned_in else calibrated(net, spec, images), spec, test)
    return found


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


def run_cell(row: Row, seed: int, work: Path, data_dir: Path | None, full: bool) -> dict[str, Any]:
    """Train one cell to its end and measure it. Cells of one network and seed share their float phase."""
    recipe = recipe_of(row, seed, full)
    kind = "full" if full else "part"
    run = work / kind / row.name / str(seed)
    network = "-".join(str(value) for value in row.network.values())
    elastic = "-elastic" if row.name.startswith("batchquant") else ""
    shared = work / kind / f"float-{network}{elastic}-s{seed}.checkpoint"
    clock = Clock(run)
    own = run / "float.checkpoint"
    try:
        report = train(recipe, run, data_dir, click.echo, shared if shared.exists() and not own.exists() else None)
        found = figures(run, row.widths, data_dir)
    finally:
        seconds = clock.store()
    if own.exists() and not shared.exists():
        shutil.copyfile(own, shared)
    command = f"python tools/claims.py --rows {row.name} --seed {seed} --budget-min 1{' --full' if full else ''}"
    versions = {"qdeploy": __version__, "torch": torch.__version__, "python": platform.python_version()}
    versions["machine"] = platform.machine()
    return {
        "row": row.name,
        "seed": seed,
        "figures": {key: round(value, 2) for key, value in found.items()},
        "float": round(report["float"], 2),
        "recipe": recipe.to_json(),
        "command": command,
        "versions": versions,
        "cpu_seconds": round(seconds),
        "full": full,
    }


# ---- the page --------------------------------------------------------------------------------------------------------


def entry(cells: Cells, row: str, figure: str, seeds: Sequence[int]) -> str:
    """Mean over the seeds that are there and each of them, or "not run"."""
    known = [cells[row, seed]["figures"][figure] for seed in seeds if (row, seed) in cells]
    if not known:
        return "not run"
    each = f" ({', '.join(f'{value:.2f}' for value in known)})" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{each}"


def epochs(recipe: dict[str, Any]) -> str:
    """The epochs of a cell's phases in words."""
    mixed = recipe["quantization"].get("mixed_phase")
    parts = [f"{recipe['float_phase']['epochs']} float", *([f"{mixed['epochs']} mixed"] if mixed else [])]
    return " + ".join([*parts, f"{recipe['quantized_phase']['epochs']} quantized epochs"])


def page(cells: Cells) -> str:
    """docs/claims.md, from the cells alone."""
    seeds = sorted({seed for _, seed in cells})
    text = ["# Claims", ""]
    text += [
        "Top-1 accuracy in per cent on the 10,000 test images of CIFAR-10, simulation of the integer network; mean"
    ]
    text += ["of the seeds, then each. `make claims` writes this page from the files in `claims/`.", ""]
    for table in tables():
        text += [f"## {table.title}", "", "| | " + " | ".join(table.columns) + " |"]
        text += ["|---|" + "---|" * len(table.columns)]
        for label, entries in table.lines:
            text += [f"| {label} | " + " | ".join(entry(cells, *pair, seeds) for pair in entries) + " |"]
        text += [""]
    text += ["## Cells", "", "| row | seed | network | training | images | float | CPU s | command |", "|" + "---|" * 8]
    for (name, seed), cell in sorted(cells.items()):
        recipe = cell["recipe"]
        network = f"{recipe['network']['name']}, width {recipe['network']['width']}"
        images = recipe["data"].get("train_images", "all")
        where = f"{epochs(recipe)} | {images} | {cell['float']:.2f} | {cell['cpu_seconds']}"
        text += [f"| {name} | {seed} | {network} | {where} | `{cell['command']}` |"]
    missing = {row.name: row.needs for row in rows().values() if row.needs}
    text += ["", "Rows that this version cannot run, and what they need:", ""]
    text += [f"- {name}: {needs}" for name, needs in missing.items()]
    return "\n".join([*text, ""])


# ---- command ---------------------------------------------------------------------------------------------------------


def chosen_rows(only: str | None) -> list[Row]:
    """Rows by comma-separated names, all by default; RecipeError for an unknown name."""
    known = rows()
    names = list(known) if only is None else only.split(",")
    for name in names:
        if name not in known:
            raise RecipeError(f"unknown row {name!r}: choose from {', '.join(known)}")
    return [known[name] for name in names]


def work_through(
    todo: Sequence[tuple[Row, int]], folder: Path, work: Path, data_dir: Path | None, full: bool, minutes: float
) -> None:
    """Run missing cells one after the other until `minutes` have passed; no cell begins after that."""
    start = time.monotonic()
    for row, seed in todo:
        if time.monotonic() - start >= 60 * minutes:
            return
        click.echo(f"cell {row.name}, seed {seed}")
        cell = run_cell(row, seed, work, data_dir, full)
        path = cell_path(folder, row.name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(cell, sort_keys=True, indent=1) + "\n").encode())


@click.command(help=__doc__)
@click.option("--budget-min", type=click.FloatRange(0), default=0.0, show_default=True, help="Start cells so long.")
@click.option("--rows", "only", help="Comma-separated; all by default.")
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, help="Seeds 0 to N-1, each after all rows."
)
@click.option("--seed", type=click.IntRange(0), help="This seed alone.")
@click.option("--full", is_flag=True, help=f"All 50,000 training images instead of {IMAGES}.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder that holds CIFAR-10.")
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "claims", help="Unfinished trainings.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "claims", help="Finished cells.")
@click.option("--page", "out", type=click.Path(path_type=Path), default=ROOT / "docs" / "claims.md", help="The table.")
@click.option("--list", "listing", is_flag=True, help="Print every cell and whether it is there; run nothing.")
def main(  # noqa: PLR0913, PLR0917
    budget_min: float,
    only: str | None,
    seeds: int,
    seed: int | None,
    full: bool,
    data_dir: Path | None,
    work: Path,
    folder: Path,
    out: Path,
    listing: bool,
) -> None:
    torch.set_num_threads(1)
    try:
        wanted = [(row, s) for s in (range(seeds) if seed is None else [seed]) for row in chosen_rows(only)]
        cells = read_cells(folder, rows())
        if listing:
            for row, number in wanted:
                state = "done" if (row.name, number) in cells else f"needs {row.needs}" if row.needs else "not run"
                click.echo(f"{row.name:<28} seed {number}  {state}")
            return
        todo = [(row, s) for row, s in wanted if (row.name, s) not in cells and row.quantization is not None]
        work_through(todo, folder, work, data_dir, full, budget_min)
        write_atomic(out, page(read_cells(folder, rows())).encode())
    except QDeployError as e:
        raise click.ClickException(str(e)) from e
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
