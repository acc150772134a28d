"""Make a shipped model and its card: every width against separately trained LSQ and against no compensation.

    python tools/model_card.py models/NAME.toml [--seeds 3] [--data-dir DIR] [--budget-min N] [--variants A,B]

The work is cut into cells (variant x seed). A finished cell is one small JSON file in models/NAME/cells/ and is never
run again; an unfinished one resumes at its last checkpoint. The card prints "not run" for a cell that is missing. The
checkpoint that ships is the vertical one of the recipe's own seed.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import time
from pathlib import Path

import click
import torch

from qdeploy.errors import QDeployError
from qdeploy.files import write_atomic
from qdeploy.recipe import Recipe, load_recipe
from qdeploy.train.run import train

MEASURED = "Accuracy in per cent on the {images} test images, simulation of the integer network, as trained."


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """Recipe of each variant by name; all start from one float network per seed."""
    alone = {f"lsq{w}": recipe.replace(quantization={"widths": (w,)}) for w in recipe.quantization.widths}
    without = recipe.replace(quantization={"compensation": False})
    ends = recipe.replace(quantization={"first_last": "float"})
    return {"vertical": recipe, "no-compensation": without, **alone, "float-ends": ends}


def run_cell(name: str, recipe: Recipe, seed: int, work: Path, data_dir: Path | None) -> dict[str, object]:
    """Train one cell to its end."""
    recipe = variants(recipe.replace(seed=seed))[name]
    start = time.process_time()
    base = work / f"vertical-s{seed}" / "float.checkpoint"
    report = train(recipe, work / f"{name}-s{seed}", data_dir, click.echo, None if name == "vertical" else base)
    cost = round(time.process_time() - start)
    return {"variant": name, "seed": seed, "cpu_seconds_of_last_run": cost, "recipe": recipe.to_json(), **report}


def table(recipe: Recipe, cells: dict[tuple[str, int], dict[str, object]], seeds: int) -> list[str]:
    """Markdown rows: one a variant, each seed's accuracy and the mean at every width."""
    widths = recipe.quantization.widths
    lines = ["| | " + " | ".join(f"{w} bits" for w in widths) + " |", "|---|" + "---|" * len(widths)]

    def cell(variant: str, width: int, seed: int) -> float | None:
        report = cells.get((variant, seed))
        return None if report is None else report["levels"][str(width)]  # type: ignore[index]

    def entry(names: list[str]) -> str:
        columns = []
        for width, name in zip(widths, names, strict=True):
            values = [cell(name, width, recipe.seed + s) for s in range(seeds)]
            known = [v for v in values if v is not None]
            mean = f"**{statistics.mean(known):.2f}**" if known else "not run"
            columns.append(f"{mean} ({', '.join('not run' if v is None else f'{v:.2f}' for v in values)})")
        return " | ".join(columns)

    lines.append(f"| one vertical network | {entry(['vertical'] * len(widths))} |")
    lines.append(f"| separately trained LSQ, one network a width | {entry([f'lsq{w}' for w in widths])} |")
    lines.append(f"| vertical without compensation | {entry(['no-compensation'] * len(widths))} |")
    lines.append(f"| vertical, first and last layer in float | {entry(['float-ends'] * len(widths))} |")
    return lines


def write_card(path: Path, recipe: Recipe, cells: dict[tuple[str, int], dict[str, object]], seeds: int) -> None:
    """The model card in markdown."""
    floats = [cells[key]["float"] for key in sorted(cells) if key[0] == "vertical"]
    text = [f"# {recipe.name}", ""]
    epochs = f"{recipe.float_phase.epochs} float and {recipe.quantized_phase.epochs} quantized epochs"
    network = f"`{recipe.network.name}`, width {recipe.network.width}, on {recipe.data.name}"
    text += [f"{network}; {epochs}. Mean of the seeds, then each seed.", ""]
    text += [MEASURED.format(images="10,000"), ""]
    text += table(recipe, cells, seeds)
    text += ["", f"Float network: {', '.join(f'{v:.2f}' for v in floats) or 'not run'}.", ""]
    command = f"python tools/model_card.py models/{recipe.name}.toml --seeds {seeds}"
    versions = f"torch {torch.__version__}, one thread, {platform.machine()}"
    text += [f"Made by `{command}` with {versions}. Cells: `models/{recipe.name}/cells/`.", ""]
    write_atomic(path, "\n".join(text).encode())


def read_cells(folder: Path) -> dict[tuple[str, int], dict[str, object]]:
    """Finished cells by (variant, seed)."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(cell["variant"], cell["seed"]): cell for cell in cells}


@click.command(help=__doc__)
@click.argument("recipe_path", type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/cards"), show_default=True)
@click.option("--budget-min", type=float, help="start no further cell after so many minutes")
@click.option("--variants", "only", help="comma-separated; all by default")
def main(
    recipe_path: Path, seeds: int, data_dir: Path | None, work: Path, budget_min: float | None, only: str | None
) -> None:
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        recipe = load_recipe(recipe_path)
        folder = recipe_path.parent / recipe.name
        names = [name for name in variants(recipe) if only is None or name in only.split(",")]
        for seed in range(recipe.seed, recipe.seed + seeds):
            for name in names:
                path = folder / "cells" / f"{name}-s{seed}.json"
                if path.exists():
                    continue
                if budget_min is not None and time.monotonic() - start > 60 * budget_min:
                    break
                click.echo(f"cell {name}, seed {seed}")
                cell = run_cell(name, recipe, seed, work / recipe.name, data_dir)
                write_atomic(path, (json.dumps(cell, sort_keys=True, indent=1) + "\n").encode())
        cells = read_cells(folder / "cells")
        write_card(folder / "CARD.md", recipe, cells, seeds)
        own = work / recipe.name / f"vertical-s{recipe.seed}"
        if ("vertical", recipe.seed) in cells and (own / "report.json").exists():
            for file in ("recipe.json", "quantized.checkpoint", "report.json"):
                shutil.copyfile(own / file, folder / file)
    except QDeployError as e:
        raise click.ClickException(str(e)) from e
    click.echo((folder / "CARD.md").read_text())


if __name__ == "__main__":
    main()
