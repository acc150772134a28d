"""The page of the claims table, docs/claims.md, from cells alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from claims_tables import Cells, Figure, Goal, Table, tables

HEAD = """# Claims

Top-1 accuracy in per cent on the 10,000 test images, simulation of the integer network; mean of the seeds, then each.
`make claims` writes this page from the files in `claims/`. Under each table stands whether its goals are met at this
scale: thin networks, few images and epochs (last table).
"""


def entry(figure: Figure, cells: Cells) -> str:
    """Over the seeds that are there, then each of them; or "not run"."""
    known = figure.values(cells)
    if not known:
        return "not run"
    each = f" ({', '.join(figure.text(value) for value in known)})" if len(known) > 1 else ""
    return figure.text(figure.over_seeds(known)) + each


def judgement(goal: Goal, cells: Cells) -> str:
    """Whether `goal` is met, and what says so."""
    known = [(figure, values) for figure in goal.figures if (values := figure.values(cells))]
    if len(known) < len(goal.figures):
        return f"not run ({len(known)} of {len(goal.figures)} figures are there)" if known else "not run"
    worst, figure = min(((figure.over_seeds(values), figure) for figure, values in known), key=lambda pair: pair[0])
    seeds = min(len(values) for _, values in known)
    bound = f", goal {figure.text(goal.least)} or more" if figure.minus is not None else ""
    least = "least difference " if len(known) > 1 else ""
    counted = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return f"{'met' if worst >= goal.least else 'not met'} ({least}{figure.text(worst)}{bound}; {counted})"


def table_lines(table: Table, cells: Cells) -> list[str]:
    """Markdown of one table, with its goals below."""
    text = [f"## {table.title}", "", "| | " + " | ".join(table.columns) + " |"]
    text += ["|---|" + "---|" * len(table.columns)]
    for label, line in table.lines:
        text += [f"| {label} | " + " | ".join(entry(figure, cells) for figure in line) + " |"]
    return [*text, "", *(f"- {goal.text}: **{judgement(goal, cells)}**" for goal in table.goals), ""]


def epochs(recipe: dict[str, Any], post: dict[str, Any] | None) -> str:
    """The epochs of a cell's phases in words."""
    if post is not None:
        return f"{recipe['float_phase']['epochs']} float epochs, then quantized"
    own = {key: recipe["quantization"].get(f"{key}_phase") for key in ("mixed", "uniform", "precision")}
    between = [f"{phase['epochs']} {key}" for key, phase in own.items() if phase]
    parts = [f"{recipe['float_phase']['epochs']} float", *between]
    return " + ".join([*parts, f"{recipe['quantized_phase']['epochs']} quantized epochs"])


def cell_line(name: str, seed: int, cell: dict[str, Any]) -> str:
    """One line of the table of cells."""
    recipe = cell["recipe"]
    network = f"{recipe['network']['name']}, width {recipe['network']['width']}"
    images = recipe["data"].get("train_images", "all")
    accuracy = "diverged" if cell["float"] is None else f"{cell['float']:.2f}"
    training = f"{epochs(recipe, cell.get('post'))} | {images} | {accuracy} | {cell['cpu_seconds']}"
    return f"| {name} | {seed} | {network} | {training} | `{cell['command']}` |"


def page(cells: Cells, stale: Iterable[tuple[str, int]]) -> str:
    """The whole page; `stale` cells are only named."""
    text = [HEAD]
    for table in tables():
        text += table_lines(table, cells)
    text += ["## Cells", "", "A float phase that several cells share counts in the first of them.", ""]
    text += ["| row | seed | network | training | images | float | CPU s | command |", "|" + "---|" * 8]
    text += [cell_line(name, seed, cell) for (name, seed), cell in sorted(cells.items())]
    old = [f"- {name}, seed {seed}" for name, seed in sorted(stale)]
    if old:
        text += [
            "",
            "Stale cells, whose recipe is not the row's any more; none of their figures stand above:",
            "",
            *old,
        ]
    return "\n".join([*text, ""])
