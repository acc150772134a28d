"""Commands of the search: `qdeploy search` and `qdeploy pick`. Each parses, makes one call and prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdeploy.cli_options import PATH, TARGET, as_json, data_dir, examples, force, option_out, say, show

if TYPE_CHECKING:
    from qdeploy.workers import Workers

limit = click.option(
    "--max",
    "limits",
    multiple=True,
    metavar="NAME_UNIT=NUMBER",
    help="An upper limit, such as latency_ms=5 (repeatable).",
)

floor = click.option(
    "--min", "floors", multiple=True, metavar="NAME=NUMBER", help="A lower limit: accuracy=88 (repeatable)."
)

noise = click.option(
    "--noise",
    type=click.FloatRange(0, 1000, min_open=True),
    default=20,
    show_default=True,
    help="Per cent by which medians of one measurement may differ; a noisier one is refused.",
)

workers_option = click.option(
    "--workers",
    metavar="NUMBER|ADDRESS",
    help="Spread the work by Dask: so many processes here, or a scheduler's tcp://HOST:PORT (extra: scale).",
)


@contextmanager
def maybe_connected(workers: str | None) -> Iterator[Workers | None]:
    """Workers as --workers names them; None without."""
    if workers is None:
        yield None
        return
    from qdeploy.workers import connected

    with connected(workers, say) as found:
        yield found


def one_thread() -> None:
    """Hold numpy's BLAS to one thread, before it is loaded: its small products take three times as long in two."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@click.command(
    epilog=examples(
        "qdeploy search RUN --target host --objective accuracy --objective latency --max download_kib=400 -o front",
        "qdeploy search RUN --objective accuracy --objective bitops --rounds 3 --workers 4 -o front",
        "qdeploy search RUN --target raspberry-pi-5 --device 127.0.0.1:9190/pi --objective latency -o front",
    )
)
@click.argument("run", type=PATH)
@click.option(
    "--target",
    "targets",
    type=TARGET,
    multiple=True,
    help="Target file, or the name of one that ships; several serve a fleet.",
)
@click.option("--objective", "objectives", multiple=True, help="accuracy, latency, bitops, ... (repeatable).")
@limit
@floor
@click.option(
    "--strategy", default="nsga2", show_default=True, help="nsga2, random, genetic (EQ-Net) or allocation (eq. 12)."
)
@click.option("--population", type=click.IntRange(4), default=800, show_default=True, help="Of a generation.")
@click.option("--generations", type=click.IntRange(1), default=500, show_default=True, help="Of a round.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Search, measure, learn, again.")
@click.option("--samples", type=click.IntRange(10), default=200, show_default=True, help="Specs scored first.")
@click.option(
    "--measure", type=click.IntRange(0), default=8, show_default=True, help="Subnets measured after each round."
)
@click.option("--specs", type=PATH, help="Known specs to start from, one JSON object a line.")
@click.option("--scored", type=PATH, help="samples.json of the run: its specs count among --samples.")
@click.option("--mirror", is_flag=True, help="Score on the held-out images and their mirror images.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn at random.")
@workers_option
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="[TARGET=]DEVICE",
    help="Where to measure: local (default), or HOST:PORT/KEY of an RPC tracker (repeatable).",
)
@noise
@data_dir
@option_out("Search folder; an unfinished search in it is continued.")
@as_json
def search(  # noqa: PLR0913, PLR0917
    run: Path,
    targets: tuple[Path, ...],
    objectives: tuple[str, ...],
    limits: tuple[str, ...],
    floors: tuple[str, ...],
    strategy: str,
    population: int,
    generations: int,
    rounds: int,
    samples: int,
    measure: int,
    specs: Path | None,
    scored: Path | None,
    mirror: bool,
    seed: int,
    workers: str | None,
    devices: tuple[str, ...],
    noise: float,
    data_dir: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Find the best subnets of a trained RUN under limits, by predictors that measured subnets correct.

    Objectives and limits: accuracy, bitops, complexity, weights_kib, activations_kib; of a device, for each --target:
    latency_ms, download_kib, peak_memory_kib, or of one as latency_ms@NAME. Measured and scored for real: specs before
    the first round, and a part of the front after each.
    """
    one_thread()
    import torch

    from qdeploy.evaluate import read_specs
    from qdeploy.farm.device import parse_devices
    from qdeploy.report.front import write_report
    from qdeploy.search.run import Request, Search
    from qdeploy.target import load_target

    torch.set_num_threads(1)
    found = tuple(load_target(path) for path in targets)
    request = Request(
        objectives, limits, found, strategy, population, generations, rounds, samples, measure, seed, floors, mirror
    )
    known = [] if specs is None else read_specs(specs)
    where = parse_devices(devices, found, noise / 100)
    with maybe_connected(workers) as pool:
        session = Search(run, request, known, out, data_dir, say, where, pool, scored)
        front = session.run()
    write_report(out, f"Search of {session.recipe.name}", session.summary(front))
    measured = sum(1 for member in front.members if member.measured)
    text = f"{out}: {len(front.members)} subnets on the front, {measured} of them measured; qdeploy pick {out} --knee"
    show({"out": str(out), "subnets": len(front.members), "measured": measured}, text, as_json)


@click.command(
    epilog=examples(
        "qdeploy pick front --knee -o best.json",
        "qdeploy pick front --max latency_ms=0.2 --min accuracy=88 -o best.json --json",
    )
)
@click.argument("folder", type=PATH)
@limit
@floor
@click.option("--knee", is_flag=True, help="The subnet where the front bends, instead of the first objective's best.")
@as_json
@option_out("Spec file for `qdeploy subnet --spec`.")
@force
def pick(  # noqa: PLR0913, PLR0917
    folder: Path, limits: tuple[str, ...], floors: tuple[str, ...], knee: bool, as_json: bool, out: Path, force: bool
) -> None:
    """Write the spec of one subnet of a search FOLDER: within the limits, the best in the first objective."""
    from qdeploy.errors import RecipeError
    from qdeploy.files import canonical_json, write_atomic
    from qdeploy.search.front import pick as choose
    from qdeploy.search.front import read_front

    if out.exists() and not force:
        raise RecipeError(f"{out} exists: choose another name or add --force")
    member = choose(read_front(folder), limits, knee, floors)
    write_atomic(out, canonical_json(member.spec.to_json()))
    source = "measured" if member.measured else "predicted"
    values = dict(member.measured or member.predicted)
    text = f"{out}: spec {member.spec.id}, {source}: " + ", ".join(f"{k} {v:.6g}" for k, v in values.items())
    show({"spec_id": member.spec.id, "source": source, "values": values}, text, as_json)
