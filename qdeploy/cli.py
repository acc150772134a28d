"""The command line: one command a stage. Each parses, makes one call and prints; heavy imports stand inside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qdeploy import __version__
from qdeploy.cli_device import climb, drop, evict, pull, run
from qdeploy.cli_devices import devices, latency_table
from qdeploy.cli_publish import keys, publish, refresh, rollout
from qdeploy.cli_quantize import quantize, sensitivity
from qdeploy.cli_search import maybe_connected, pick, search, workers_option
from qdeploy.cli_serve import fleet, serve
from qdeploy.errors import QDeployError

PATH = click.Path(path_type=Path)
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def fail(ctx: click.Context, text: str) -> None:
    """One line on standard error, exit code 2."""
    click.echo(f"qdeploy: {' '.join(text.split())}", err=True)
    ctx.exit(EXIT_BAD_INPUT)


class Group(click.Group):
    """Prints our errors as one line and exits with 2, Ctrl-C with 130; anything else is a bug and shows itself."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QDeployError as e:
            fail(ctx, str(e))
        except click.UsageError as e:
            name = e.ctx.command_path if e.ctx is not None else "qdeploy"
            fail(ctx, f"{e.format_message()} (see `{name} --help`)")
        except OSError as e:  # a path that cannot be looked at: too long, forbidden
            fail(ctx, f"{e.filename or 'a file'}: {e.strerror or e}")
        except KeyboardInterrupt:
            click.echo(
                "qdeploy: interrupted; train, evaluate, search and pull resume, any other command begins again",
                err=True,
            )
            ctx.exit(EXIT_INTERRUPTED)


def option_out(text: str) -> Callable[[Any], Any]:
    """-o, where every command writes."""
    return click.option("-o", "--out", type=PATH, required=True, help=text)


force = click.option("--force", is_flag=True, help="Replace the output if it exists.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
data_dir = click.option("--data-dir", type=PATH, help="Folder with the dataset's files.")


def say(text: str) -> None:
    """Progress goes to standard error, results to standard output."""
    click.echo(text, err=True)


@click.group(cls=Group)
@click.version_option(__version__, prog_name="qdeploy")
def main() -> None:
    """Take a trained, elastic, mixed-precision network to edge devices.

    \b
    train -> subnet -> export -> bundle -> serve      on the host
                           compile -> profile         per target
    pull -> run -> climb / drop                       on the device

    Exit codes: 0 done, 2 bad input (one line says what to do), 130 interrupted.
    """


main.add_command(quantize)
main.add_command(sensitivity)
for publishing in (keys, publish, rollout, refresh):
    main.add_command(publishing)


@main.command()
@click.argument("recipe", type=PATH)
@option_out("Run folder; an unfinished run in it is resumed.")
@data_dir
@click.option("--only", type=PATH, help="Train this one subnet alone (spec file; methods eqnet and batchquant).")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="torch threads; one is bitwise repeatable."
)
def train(recipe: Path, out: Path, data_dir: Path | None, only: Path | None, threads: int) -> None:
    """Train the network of RECIPE (models/NAME.toml): float phase, then all widths together.

    Ctrl-C, or a killed process, loses at most 20 seconds: the same command resumes. Several processes share each batch
    under torchrun: torchrun --nproc-per-node 2 --no-python qdeploy train RECIPE --out RUN
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
            click.echo(json.dumps(report))


@main.command()
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
    click.echo(f"{out}: spec {chosen.id}, {report['accuracy']:.2f}% of {report['test_images']} test images")
    exact, bias = report["parity"]["simulation"], report["parity"]["int32_bias"]
    counts = f"{exact['differing']} of {exact['codes']} codes differ, by {exact['largest_step']} at most"
    click.echo(
        f"integers against the simulation: {counts}; rounding the biases to int32 moved {bias['differing']} codes"
    )


@main.command()
@click.argument("run", type=PATH)
@click.option("--specs", type=PATH, required=True, help="Subnet specs, one JSON object a line.")
@option_out("Results, one JSON line a spec; an unfinished file is continued.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True)
@workers_option
@click.option("--mirror", is_flag=True, help="Score each image's mirror image too: less left to chance.")
@data_dir
def evaluate(
    run: Path, specs: Path, out: Path, processes: int, workers: str | None, mirror: bool, data_dir: Path | None
) -> None:
    """Score many specs of a trained RUN on images held out of its training set, each calibrated for itself.

    A killed evaluation loses what was being scored and nothing else: the same command goes on.
    """
    import torch

    from qdeploy.evaluate import evaluate as score

    torch.set_num_threads(1)
    with maybe_connected(workers) as pool:
        rows = score(run, specs, out, processes, data_dir, say, pool, mirror)
    best = max(rows, key=lambda row: row["accuracy"])
    click.echo(
        f"{out}: {len(rows)} specs on {best['images']} images, the best {best['spec_id']} {best['accuracy']:.2f}%"
    )


@main.command()
@click.argument("run", type=PATH)
@click.option("--sample", type=click.IntRange(1), help="Write so many specs, each gene drawn uniformly.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--out", type=PATH, help="File for the sampled specs, one JSON object a line.")
@force
def space(run: Path, sample: int | None, seed: int, out: Path | None, force: bool) -> None:
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
    click.echo(f"{found.network}: {len(found.variables)} choices, {found.size} subnets ({Decimal(found.size):.3e})")
    if sample is not None and out is not None:
        random = Random(seed)
        write_atomic(out, spec_lines([found.sample(random) for _ in range(sample)]))
        click.echo(f"{out}: {sample} specs")


@main.command()
@click.argument("subnet_dir", type=PATH)
@option_out("ONNX file; a sidecar FILE.json is written beside it.")
@force
def export(subnet_dir: Path, out: Path, force: bool) -> None:
    """Write a subnet folder as QDQ ONNX, checked against the contract and against ONNX Runtime code by code."""
    from qdeploy.export import export_onnx
    from qdeploy.frozen import load_frozen

    sidecar = export_onnx(load_frozen(subnet_dir), out, force, say)
    click.echo(f"{out}: graph {sidecar['graph'][:12]}, spec {sidecar['spec_id']}")


@main.command()
@click.argument("levels", type=PATH, nargs=-1, required=True)
@click.option(
    "--artifact", "artifacts", type=PATH, multiple=True, help="Compiled artifact folder to ship (repeatable)."
)
@click.option(
    "--release",
    type=click.IntRange(1, 2**53 - 1),
    default=1,
    show_default=True,
    help="Release number; devices refuse to go back.",
)
@option_out("Published tree.")
@force
def bundle(levels: tuple[Path, ...], artifacts: tuple[Path, ...], release: int, out: Path, force: bool) -> None:
    """Put QDQ ONNX LEVELS of one graph, whose weight codes nest, into one bundle of bit planes.

    A level is named after its file. The bundle is the tree that `qdeploy serve`, or any static web server, publishes.
    """
    from qdeploy.bundle.write import write_bundle
    from qdeploy.inspect import describe, render
    from qdeploy.ladder import read_ladder

    write_bundle(read_ladder(levels, say), artifacts, out, force, release, say)
    click.echo(render(describe(out)))


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--target", type=PATH, required=True, help="targets/NAME.toml: the device.")
@option_out("The archive, .tar.gz.")
@click.option("--device", type=PATH, help="A pulled folder: the levels that it holds come too.")
@click.option("--model", type=PATH, help="The QDQ ONNX file that was compiled, as the only level.")
def package(artifact: Path, target: Path, out: Path, device: Path | None, model: Path | None) -> None:
    """Put ARTIFACT, the C++ runner and a self-test in one archive that a device unpacks and runs (docs/runner.md)."""
    from qdeploy.package import package as write
    from qdeploy.target import load_target

    size = write(artifact, load_target(target), out, device, model, say)
    click.echo(f"{out}: {size} bytes; on the device: tar xzf {out.name} && sh qdeploy/install.sh")


@main.command()
@click.argument("path", type=PATH)
@as_json
def inspect(path: Path, as_json: bool) -> None:
    """Print what PATH is: a bundle, an ONNX model, a subnet, an artifact, a spec, a run."""
    from qdeploy.inspect import describe, render

    found = describe(path)
    click.echo(json.dumps(found) if as_json else render(found))


@main.command()
@as_json
def targets(as_json: bool) -> None:
    """List the targets that ship, and whether this machine can build for each (docs/targets.md)."""
    from qdeploy.compile.targets import listed, rendered

    rows = listed()
    click.echo(json.dumps(rows) if as_json else rendered(rows))


@main.command(name="compile")
@click.argument("model", type=PATH)
@click.option("--target", type=PATH, help="targets/NAME.toml")
@click.option("--isa", type=click.Choice(["auto"]), help="In place of --target: one artifact for all x86 machines.")
@option_out("Artifact folder.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that large layers are spread over."
)
@click.option("--constant", is_flag=True, help="Pack the parameters of MODEL into the artifact, which then needs none.")
@click.option("--shape", metavar="NAME=1,3,224,224", help="Sizes of the input where the file leaves some open.")
@click.option(
    "--weights",
    type=click.Choice(["int8", "packed"]),
    default="int8",
    show_default=True,
    help="packed: weights with at most 16 different codes take 4 bits each in memory.",
)
@click.option(
    "--tune",
    metavar="SECONDS",
    type=click.FloatRange(0, min_open=True),
    help="Measure ways to compute convolutions on this machine for so long, and take the fastest.",
)
@click.option(
    "--tune-cache",
    metavar="FILE",
    type=PATH,
    help="Of what was measured (default with --tune: qdeploy/tune.json in the user's cache folder).",
)
@click.option("--dump", type=PATH, help="Write each phase of the pipeline here.")
@force
def compile_(  # noqa: PLR0913, PLR0917
    model: Path,
    target: Path | None,
    isa: str | None,
    out: Path,
    threads: int,
    constant: bool,
    shape: str | None,
    weights: str,
    tune: float | None,
    tune_cache: Path | None,
    dump: Path | None,
    force: bool,
) -> None:
    """Compile a QDQ ONNX MODEL through TVM to integer kernels; one artifact runs every level of its ladder."""
    from qdeploy.selftest import check_tvm

    if (target is None) == (isa is None):
        raise click.UsageError("give --target FILE, or --isa auto")
    check_tvm()
    from qdeploy.compile.pipeline import Options, compile_model
    from qdeploy.compile.read.normalize import parse_shape
    from qdeploy.profile.lint import lint, lint_lines
    from qdeploy.target import auto_targets, load_target

    targets = auto_targets() if target is None else load_target(target)
    sizes = None if shape is None else parse_shape(shape)
    options = Options(threads, constant, sizes, weights == "packed", tune or 0.0, tune_cache)
    info = compile_model(model, targets, out, force, dump, say, options)
    for variant in info["variants"]:
        text = f"{len(variant['kernels'])} kernels, arena {variant['arena_bytes']} bytes"
        click.echo(f"{out}: {variant['target']['name']}, {text}")
    click.echo("\n".join(lint_lines(lint(out, model, info))))


@main.command()
@click.argument("artifact", type=PATH)
@click.option("--model", type=PATH, required=True, help="The QDQ ONNX level to run in it and in ONNX Runtime.")
@click.option("--repeats", type=click.IntRange(1), default=30, show_default=True, help="Interleaved rounds.")
@click.option("--layers", is_flag=True, help="Also time every kernel, and say why int8 is or is not faster here.")
@as_json
def profile(artifact: Path, model: Path, repeats: int, layers: bool, as_json: bool) -> None:
    """Latency of ARTIFACT and of ONNX Runtime side by side, BitOPs, weight bytes, planned peak memory."""
    from qdeploy.selftest import check_tvm

    check_tvm()
    from qdeploy.profile.report import profile as measure
    from qdeploy.profile.report import render

    found = measure(artifact, model, repeats, layers)
    click.echo(json.dumps(found) if as_json else render(found))


@main.command()
@click.argument("dataset", type=click.Choice(["fashion-mnist"]))
@option_out("Folder for the four IDX files.")
def fetch(dataset: str, out: Path) -> None:
    """Fetch a full dataset from its public home; every file is checked against its pinned SHA-256."""
    from qdeploy.data import fetch_fashion_mnist

    fetch_fashion_mnist(out, echo=say)
    click.echo(f"{out}: {dataset}, verified")


@main.command()
@click.option("-o", "--out", type=PATH, default=Path("demo-out"), show_default=True, help="Output folder, replaced.")
@as_json
def demo(out: Path, as_json: bool) -> None:
    """The whole pipe on the shipped model: subnets, export, bundle, compile, profile, serve, climb under inference."""
    from qdeploy.selftest import check_tvm

    check_tvm()
    from qdeploy.demo import demo as run
    from qdeploy.demo import render

    result = run(out, say)
    click.echo(json.dumps(result) if as_json else render(result))


for command in (pull, climb, drop, evict, run):
    main.add_command(command)
main.add_command(devices)
main.add_command(latency_table)
main.add_command(search)
main.add_command(serve)
main.add_command(fleet)
main.add_command(pick)


if __name__ == "__main__":
    sys.exit(main())
