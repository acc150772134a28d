"""Commands of training: train, subnet, evaluate, space. Each parses, makes one call and prints."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.cli_options import PATH, as_json, data_dir, examples, force, option_out, say, show
from qdeploy.cli_search import maybe_connected, workers_option


@click.command(
    epilog=examples(
        "qdeploy train models/fashion-resnet8.toml -o RUN",
        "qdeploy train mine.toml -o RUN --data-dir pictures --json",
        "qdeploy train models/fashion-mobilenetv3.toml --only best.json -o ALONE",
        "torchrun --nproc-per-node 2 --no-python qdeploy train models/fashion-resnet8.toml --out RUN",
    )
)
@click.argument("recipe", type=PATH)
@option_out("Run folder; an unfinished run in it is resumed.")
@data_dir
@click.option("--only", type=PATH, help="Train this one subnet alone (spec file; methods eqnet and batchquant).")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="torch threads; one is bitwise repeatable."
)
@as_json
def train(recipe: Path, out: Path, data_dir: Path | None, only: Path | None, threads: int, as_json: bool) -> None:
    """Train the network of RECIPE (models/NAME.toml): float phase, then all widths together.

    Ctrl-C, or a killed process, loses at most 20 seconds: the same command resumes. Several processes share each batch
    under torchrun. `qdeploy init` writes a recipe for images of your own.
    """
    import torch

    from qdeploy.extract import read_spec
    from qdeploy.recipe import load_recipe, with_only
    from qdeploy.train.run import joined, rank
    from qdeploy.train.run import train as run

    torch.set_num_threads(threads)
    chosen = load_recipe(recipe) if only is None else with_only(load_recipe(recipe), read_spec(only))
    with joined():
        report = run(chosen, out, data_dir, say)
        if rank() == 0:
            levels = [f"{name} {value:.2f}%" for name, value in report["levels"].items()]
            show(report | {"out": str(out)}, f"{out}: float {report['float']:.2f}%, {', '.join(levels)}", as_json)


@click.command(
    epilog=examples(
        "qdeploy subnet models/fashion-resnet8 --bits 4 -o s4",
        "qdeploy subnet models/fashion-resnet8 --budget-kib 26 --nested-with s2 -o smix",
        "qdeploy subnet RUN --spec best.json -o sub --json",
    )
)
@click.argument("run", type=PATH)
@click.option("--bits", type=int, help="A uniform level: this width in every layer but the first and the last.")
@click.option(
    "--budget-kib", type=float, help="A mixed level: least error within so many KiB of planes and side tensors."
)
@click.option("--spec", type=PATH, help="A level from a subnet spec file (JSON).")
@click.option("--granularity", type=click.Choice(["tensor", "channel"]), help="Of a uniform level of an EQ-Net run.")
@click.option("--symmetry", type=click.Choice(["symmetric", "asymmetric"]), help="Of a uniform level of an EQ-Net run.")
@click.option("--nested-with", type=PATH, help="Spec file or subnet folder that a --budget-kib level must extend.")
@click.option(
    "--architecture",
    type=PATH,
    help="Spec file or subnet folder whose architecture and activation widths a --budget-kib level of a supernet has.",
)
@data_dir
@option_out("Subnet folder (FrozenNet).")
@force
@as_json
def subnet(  # noqa: PLR0913, PLR0917
    run: Path,
    bits: int | None,
    budget_kib: float | None,
    spec: Path | None,
    granularity: str | None,
    symmetry: str | None,
    nested_with: Path | None,
    architecture: Path | None,
    data_dir: Path | None,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Freeze one choice of widths of a trained RUN: calibrate, fold, round to integers, evaluate."""
    from qdeploy.extract import choose_spec, extract_subnet
    from qdeploy.files import check_free
    from qdeploy.frozen import save_frozen
    from qdeploy.subnet import check_integer
    from qdeploy.train.run import load_run

    check_free(out, force)
    recipe, net = load_run(run)
    check_integer(net)
    options = {"granularity": granularity, "symmetry": symmetry}
    given = {name: value for name, value in options.items() if value is not None}
    chosen = choose_spec(net, bits, budget_kib, spec, nested_with, given, architecture)
    frozen = extract_subnet(recipe, net, chosen, data_dir)
    save_frozen(frozen, out, force)
    report = frozen.report
    exact, bias = report["parity"]["simulation"], report["parity"]["int32_bias"]
    counts = f"{exact['differing']} of {exact['codes']} codes differ, by {exact['largest_step']} at most"
    text = (
        f"{out}: spec {chosen.id}, {report['accuracy']:.2f}% of {report['test_images']} test images\n"
        f"integers against the simulation: {counts}; rounding the biases to int32 moved {bias['differing']} codes"
    )
    keys = ("accuracy", "test_images", "parity")
    show({"out": str(out), "spec_id": chosen.id} | {key: report[key] for key in keys}, text, as_json)


@click.command(
    epilog=examples(
        "qdeploy evaluate RUN --specs specs.jsonl -o scores.jsonl",
        "qdeploy evaluate RUN --specs specs.jsonl -o scores.jsonl --workers 2 --mirror",
    )
)
@click.argument("run", type=PATH)
@click.option("--specs", type=PATH, required=True, help="Subnet specs, one JSON object a line.")
@option_out("Results, one JSON line a spec; an unfinished file is continued.")
@workers_option
@click.option("--mirror", is_flag=True, help="Score each image's mirror image too: less left to chance.")
@data_dir
@as_json
def evaluate(  # noqa: PLR0913, PLR0917
    run: Path,
    specs: Path,
    out: Path,
    workers: str | None,
    mirror: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Score many specs of a trained RUN on images held out of its training set, each calibrated for itself.

    A killed evaluation loses what was being scored and nothing else: the same command goes on.
    """
    import torch

    from qdeploy.evaluate import evaluate as score

    torch.set_num_threads(1)
    with maybe_connected(workers) as pool:
        rows = score(run, specs, out, data_dir, say, pool, mirror)
    best = max(rows, key=lambda row: row["accuracy"])
    text = f"{out}: {len(rows)} specs on {best['images']} images, the best {best['spec_id']} {best['accuracy']:.2f}%"
    row = {"out": str(out), "specs": len(rows), "images": best["images"]}
    show(row | {"best": {key: best[key] for key in ("spec_id", "accuracy")}}, text, as_json)


@click.command(
    epilog=examples("qdeploy space models/fashion-mobilenetv3", "qdeploy space RUN --sample 100 -o specs.jsonl")
)
@click.argument("run", type=PATH)
@click.option("--sample", type=click.IntRange(1), help="Write so many specs, each gene drawn uniformly.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of --sample.")
@click.option("-o", "--out", type=PATH, help="File for the sampled specs, one JSON object a line.")
@force
@as_json
def space(run: Path, sample: int | None, seed: int, out: Path | None, force: bool, as_json: bool) -> None:
    """Print what may vary in a trained RUN and how many subnets that makes; write a sample of them."""
    from decimal import Decimal
    from random import Random

    from qdeploy.errors import RecipeError
    from qdeploy.evaluate import spec_lines
    from qdeploy.files import write_atomic
    from qdeploy.train.run import load_run

    if (sample is None) != (out is None):
        raise RecipeError("--sample and --out go together: how many specs, and where to")
    if out is not None and out.exists() and not force:
        raise RecipeError(f"{out} exists: choose another name or add --force")
    found = load_run(run)[1].space
    text = f"{found.network}: {len(found.variables)} choices, {found.size} subnets ({Decimal(found.size):.3e})"
    if sample is not None and out is not None:
        random = Random(seed)
        write_atomic(out, spec_lines([found.sample(random) for _ in range(sample)]))
        text += f"\n{out}: {sample} specs"
    row = {"network": found.network, "choices": len(found.variables), "subnets": found.size}
    show(row | {"out": None if out is None else str(out), "specs": sample or 0}, text, as_json)
