"""Commands of a model: export, bundle, inspect, targets, compile, profile, package. Each makes one call and prints."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.cli_options import PATH, TARGET, as_json, examples, force, option_out, say, show

target_help = "Target file, or the name of one that ships: `qdeploy targets`."


@click.command(epilog=examples("qdeploy export s4 -o w4.onnx", "qdeploy export s4 -o w4.onnx --force --json"))
@click.argument("subnet_dir", type=PATH)
@option_out("ONNX file; a sidecar FILE.json is written beside it.")
@force
@as_json
def export(subnet_dir: Path, out: Path, force: bool, as_json: bool) -> None:
    """Write a subnet folder as QDQ ONNX, checked against the contract and against ONNX Runtime code by code."""
    from qdeploy.export import export_onnx
    from qdeploy.frozen import load_frozen

    sidecar = export_onnx(load_frozen(subnet_dir), out, force, say)
    row = {"out": str(out), "graph": sidecar["graph"], "spec_id": sidecar["spec_id"]}
    show(row, f"{out}: graph {sidecar['graph'][:12]}, spec {sidecar['spec_id']}", as_json)


@click.command(
    epilog=examples(
        "qdeploy bundle w2.onnx w4.onnx -o tree", "qdeploy bundle w2.onnx w4.onnx --artifact artifact -o tree --force"
    )
)
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
@as_json
def bundle(  # noqa: PLR0913, PLR0917
    levels: tuple[Path, ...], artifacts: tuple[Path, ...], release: int, out: Path, force: bool, as_json: bool
) -> None:
    """Put QDQ ONNX LEVELS of one graph, whose weight codes nest, into one bundle of bit planes.

    A level is named after its file. The bundle is the tree that `qdeploy serve`, or any static web server, publishes.
    """
    from qdeploy.bundle.write import write_bundle
    from qdeploy.inspect import describe, render
    from qdeploy.ladder import read_ladder

    write_bundle(read_ladder(levels, say), artifacts, out, force, release, say)
    found = describe(out)
    show(found, render(found), as_json)


@click.command(epilog=examples("qdeploy inspect tree", "qdeploy inspect w4.onnx --json"))
@click.argument("path", type=PATH)
@as_json
def inspect(path: Path, as_json: bool) -> None:
    """Print what PATH is: a bundle, an ONNX model, a subnet, an artifact, a spec, a run."""
    from qdeploy.inspect import describe, render

    found = describe(path)
    show(found, render(found), as_json)


@click.command(epilog=examples("qdeploy targets", "qdeploy targets --json"))
@as_json
def targets(as_json: bool) -> None:
    """List the targets that ship, and whether this machine can build for each (docs/targets.md)."""
    from qdeploy.compile.targets import listed, rendered

    rows = listed()
    show(rows, rendered(rows), as_json)


@click.command(
    name="compile",
    epilog=examples(
        "qdeploy compile w2.onnx --target targets/host.toml -o artifact",
        "qdeploy compile any.onnx --isa auto -o artifact --shape input=1,3,224,224",
        "qdeploy compile w2.onnx --target raspberry-pi-5 -o arm",
        "qdeploy compile w2.onnx --target host -o artifact --tune 60 --force",
    ),
)
@click.argument("model", type=PATH)
@click.option("--target", type=TARGET, help=target_help)
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
@as_json
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
    as_json: bool,
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
    found, lines, rows = lint(out, model, info), [], []
    for variant in info["variants"]:
        name, kernels, arena = variant["target"]["name"], len(variant["kernels"]), variant["arena_bytes"]
        lines.append(f"{out}: {name}, {kernels} kernels, arena {arena} bytes")
        rows.append({"target": name, "kernels": kernels, "arena_bytes": arena})
    show({"out": str(out), "variants": rows, "lint": found}, "\n".join([*lines, *lint_lines(found)]), as_json)


@click.command(
    epilog=examples(
        "qdeploy profile artifact --model w2.onnx",
        "qdeploy profile artifact --model w2.onnx --layers -o artifact/profile.json",
    )
)
@click.argument("artifact", type=PATH)
@click.option("--model", type=PATH, required=True, help="The QDQ ONNX level to run in it and in ONNX Runtime.")
@click.option("--repeats", type=click.IntRange(1), default=30, show_default=True, help="Interleaved rounds.")
@click.option("--layers", is_flag=True, help="Also time every kernel, and say why int8 is or is not faster here.")
@click.option("-o", "--out", type=PATH, help="Also write it as JSON, for `qdeploy report` to ARTIFACT/profile.json.")
@as_json
def profile(artifact: Path, model: Path, repeats: int, layers: bool, out: Path | None, as_json: bool) -> None:
    """Latency of ARTIFACT and of ONNX Runtime side by side, BitOPs, weight bytes, planned peak memory."""
    from qdeploy.selftest import check_tvm

    check_tvm()
    from qdeploy.files import canonical_json, write_atomic
    from qdeploy.profile.report import profile as measure
    from qdeploy.profile.report import render

    found = measure(artifact, model, repeats, layers)
    if out is not None:
        write_atomic(out, canonical_json(found))
    show(found, render(found), as_json)


@click.command(
    epilog=examples(
        "qdeploy package arm --target raspberry-pi-5 --model w2.onnx -o net.tar.gz",
        "qdeploy package arm --target targets/raspberry-pi-5.toml --device device -o net.tar.gz",
    )
)
@click.argument("artifact", type=PATH)
@click.option("--target", type=TARGET, required=True, help=target_help)
@option_out("The archive, .tar.gz.")
@click.option("--device", type=PATH, help="A pulled folder: the levels that it holds come too.")
@click.option("--model", type=PATH, help="The QDQ ONNX file that was compiled, as the only level.")
@as_json
def package(  # noqa: PLR0913, PLR0917
    artifact: Path, target: Path, out: Path, device: Path | None, model: Path | None, as_json: bool
) -> None:
    """Put ARTIFACT, the C++ runner and a self-test in one archive that a device unpacks and runs (docs/runner.md)."""
    from qdeploy.package import package as write
    from qdeploy.target import load_target

    size = write(artifact, load_target(target), out, device, model, say)
    text = f"{out}: {size} bytes; on the device: tar xzf {out.name} && sh qdeploy/install.sh"
    show({"out": str(out), "bytes": size}, text, as_json)
