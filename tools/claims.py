"""Make the claims table: what the papers claim, measured here on thin networks (docs/claims.md).

    python tools/claims.py [--budget-min N] [--jobs 2] [--rows A,B] [--seed N] [--full] [--data-dir DIR] [--list]

The work is cut into independent cells, a row and a seed each, of at most 40 CPU-minutes. A finished cell is written at
once as claims/ROW/SEED.json (figures, command, versions, CPU seconds), which is meant to be committed, and is not run
again as long as its recipe is the row's; an unfinished one resumes at its last checkpoint. Every row comes once, then
the further seeds of the headline rows. A missing cell is printed as "not run".
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from claims_cells import Places, current_cells, float_path, read_cells, run_cell, state, store_cell
from claims_page import page
from claims_rows import IMAGES, MOBILE_IMAGES, SEEDS, WIDTHS, Row, rows
from claims_tables import Cells

from qdeploy.errors import DeviceError, QDeployError, RecipeError
from qdeploy.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 5.0  # a float phase that another cell waits for may have ended
Cell = tuple[Row, int]


# ---- order and cost --------------------------------------------------------------------------------------------------


def plan(chosen: Sequence[Row], seed: int | None) -> list[Cell]:
    """Cells in the order in which they are made: every row once, then further seeds of rows that have them."""
    if seed is not None:
        return [(row, seed) for row in chosen]
    return [(row, number) for number in range(SEEDS) for row in chosen if number < row.seeds]


def kind(recipe: dict[str, Any], post: dict[str, Any] | None) -> tuple[Any, ...]:
    """What a cell's cost depends on above all: the network, the method, and whether a step trains one subnet."""
    if post is not None:
        return recipe["network"]["name"], *sorted(post)
    choice = recipe["quantization"]
    method = choice.get("method", "vertical")
    widths = choice.get("widths" if method == "vertical" else "weight_bits", WIDTHS)
    return recipe["network"]["name"], method, len(widths) == 1 or "only" in choice


def estimate(row: Row, cells: Cells) -> float | None:
    """CPU seconds that a cell of `row` will take: as others of it, or of its kind, have; None if there are none."""
    own = kind(row.recipe(0, False).to_json(), row.post)
    same_row = [cell["cpu_seconds"] for (name, _), cell in cells.items() if name == row.name]
    same_kind = [cell["cpu_seconds"] for cell in cells.values() if kind(cell["recipe"], cell.get("post")) == own]
    known = same_row or same_kind
    return statistics.fmean(known) if known else None


def counted(number: int, noun: str) -> str:
    """For instance "1 cell", "2 cells"."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def left(todo: Sequence[Cell], cells: Cells) -> str:
    """What is still to be done, in words."""
    known = [cost for row, _ in todo if (cost := estimate(row, cells)) is not None]
    unknown = len(todo) - len(known)
    more = f" and {counted(unknown, 'cell')} of a kind that was not run yet" if unknown else ""
    return f"left: {counted(len(todo), 'cell')}, about {sum(known) / 60:.0f} CPU minutes{more}"


def pick(todo: Sequence[Cell], running: Sequence[Cell], places: Places) -> Cell | None:
    """The next cell: the first whose float phase is there already, or is not being trained by a running cell."""
    busy = {float_path(row, seed, places) for row, seed in running}
    for row, seed in todo:
        path = float_path(row, seed, places)
        if path.exists() or path not in busy:
            return row, seed
    return None


# ---- processes -------------------------------------------------------------------------------------------------------


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Stop at a checkpoint when the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def work_on(pipe: Connection, row: Row, seed: int, places: Places) -> None:
    """A process: makes and stores one cell. Sends None, or the error that ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it sends SIGTERM
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        cell = run_cell(row, seed, places, lambda text: click.echo(f"{row.name} {seed}: {text}"))
        store_cell(places.folder, cell)
        pipe.send(None)
    except QDeployError as e:
        pipe.send(e)
    except KeyboardInterrupt:
        sys.exit(130)


class Team:
    """Up to `jobs` processes, a cell each."""

    def __init__(self, jobs: int, places: Places) -> None:
        self.jobs, self.places = jobs, places
        self.running: dict[Connection, tuple[BaseProcess, Cell]] = {}

    def start(self, cell: Cell) -> None:
        """Begin a cell."""
        context = multiprocessing.get_context("spawn")  # torch does not survive a fork
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work_on, args=(theirs, *cell, self.places), daemon=True)
        process.start()
        theirs.close()
        self.running[ours] = process, cell

    def finished(self) -> list[Cell]:
        """Cells that ended since the last call, after at most POLL_SECONDS; raises the error that ended one."""
        found = []
        for pipe in (p for p in wait(list(self.running), POLL_SECONDS) if isinstance(p, Connection)):
            process, cell = self.running.pop(pipe)
            try:
                error = pipe.recv()
            except EOFError as e:
                process.join()
                text = f"the process of cell {cell[0].name}, seed {cell[1]}, ended ({process.exitcode})"
                raise DeviceError(f"{text}: out of memory? The same command resumes it") from e
            process.join()
            if error is not None:
                raise error
            found.append(cell)
        return found

    def stop(self) -> None:
        """End all at a checkpoint."""
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.join()


def work_through(
    todo: Sequence[Cell], places: Places, jobs: int, minutes: float, after: Callable[[Sequence[Cell]], None]
) -> None:
    """Run cells, `jobs` at once, until `minutes` have passed; no cell begins after that.

    `after` gets what is left when a cell is finished. Ctrl-C and SIGTERM raise KeyboardInterrupt when all stand at a
    checkpoint.
    """
    start, team, waiting = time.monotonic(), Team(jobs, places), list(todo)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while True:
            running = [cell for _, cell in team.running.values()]
            in_time = time.monotonic() - start < 60 * minutes
            following = pick(waiting, running, places) if in_time and len(running) < jobs else None
            if following is not None:
                click.echo(f"cell {following[0].name}, seed {following[1]}")
                waiting.remove(following)
                team.start(following)
            elif not running:
                return
            elif team.finished():
                after([*waiting, *(cell for _, cell in team.running.values())])
    finally:
        team.stop()
        signal.signal(signal.SIGTERM, before)


# ---- command ---------------------------------------------------------------------------------------------------------


def chosen_rows(only: str | None) -> list[Row]:
    """Rows by comma-separated names, all by default; RecipeError for an unknown name."""
    known = rows()
    names = list(known) if only is None else only.split(",")
    for name in names:
        if name not in known:
            raise RecipeError(f"unknown row {name!r}: choose from {', '.join(known)}")
    return [known[name] for name in names]


def listing(cells: Sequence[Cell], current: Cells, stale: Sequence[tuple[str, int]]) -> str:
    """A line for each cell: row, seed, state, minutes."""
    lines = []
    for row, seed in cells:
        done = current.get((row.name, seed))
        seconds = estimate(row, current) if done is None else done["cpu_seconds"]
        minutes = "" if seconds is None else f"{seconds / 60:6.1f} CPU min"
        lines.append(f"{row.name:<28} seed {seed}  {state(row, seed, current, stale):<10}  {minutes}".rstrip())
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--budget-min", type=click.FloatRange(0), default=0.0, show_default=True, help="Start cells so long.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Cells at once, one thread each.")
@click.option("--rows", "only", help="Comma-separated; all by default.")
@click.option("--seed", type=click.IntRange(0), help="This seed alone.")
@click.option("--full", is_flag=True, help=f"All 50,000 training images instead of {IMAGES} or {MOBILE_IMAGES}.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder that holds CIFAR-10.")
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "claims", help="Unfinished trainings.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "claims", help="Finished cells.")
@click.option("--page", "out", type=click.Path(path_type=Path), default=ROOT / "docs" / "claims.md", help="The table.")
@click.option("--list", "only_list", is_flag=True, help="Print every cell and how it stands; run nothing.")
def main(  # noqa: PLR0913, PLR0917
    budget_min: float,
    jobs: int,
    only: str | None,
    seed: int | None,
    full: bool,
    data_dir: Path | None,
    work: Path,
    folder: Path,
    out: Path,
    only_list: bool,
) -> None:
    places = Places(folder, work, data_dir, full)

    def known() -> tuple[Cells, list[tuple[str, int]]]:
        return current_cells(read_cells(folder, rows()), rows(), full)

    def after(waiting: Sequence[Cell]) -> None:
        write_atomic(out, page(*known()).encode())
        click.echo(left(waiting, known()[0]))

    try:
        cells, (current, stale) = plan(chosen_rows(only), seed), known()
        todo = [(row, s) for row, s in cells if state(row, s, current, stale) != "done"]
        if only_list:
            click.echo(listing(cells, current, stale))
            click.echo(left(todo, current))
            return
        work_through(todo, places, jobs, budget_min, after)
        write_atomic(out, page(*known()).encode())
    except QDeployError as e:
        raise click.ClickException(str(e)) from e
    except KeyboardInterrupt:
        click.echo("stopped: the same command resumes", err=True)
        sys.exit(130)
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
