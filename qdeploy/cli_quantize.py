"""Commands of post-training quantization: `qdeploy quantize` and `qdeploy sensitivity`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


def say(text: str) -> None:
    """Progress goes to standard error, results to standard output."""
    click.echo(text, err=True)


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what the images are and how they become inputs."""
    options = (
        click.option("--data", required=True, help="Folder with .npy/.npz arrays or pictures, or a dataset's name."),
        click.option("--data-dir", type=PATH, help="Folder with the dataset's files."),
        click.option(
            "--images", "count", type=click.IntRange(1), default=256, show_default=True, help="At most so many."
        ),
        click.option("--layout", type=click.Choice(["nchw", "nhwc"]), default="nchw", help="Axes of the arrays."),
        click.option("--mean", metavar="M,M,M", help="Taken from each channel; of pixels divided by 255."),
        click.option("--std", metavar="S,S,S", help="Each channel is divided by it then."),
        click.option("--resize", is_flag=True, help="Scale pictures by the shorter side and cut out the centre."),
        click.option("--shape", metavar="NAME=1,3,224,224", help="Sizes of the input where the file leaves some open."),
        click.option("--settings", type=PATH, help="TOML file with settings, and [[layer]] rules by name."),
        click.option("--calibration", type=click.Choice(["minmax", "percentile", "mse", "entropy"])),
        click.option("--granularity", type=click.Choice(["channel", "tensor"]), help="Of weight scales."),
        click.option("--symmetry", type=click.Choice(["symmetric", "asymmetric"]), help="Of weights."),
        click.option("--rounding", type=click.Choice(["least-squares", "nearest"]), help="Of weights."),
        click.option("--first-last", type=click.Choice(["8", "same", "float"]), help="First and last layer."),
        click.option("--activation-bits", type=click.IntRange(2, 8), help="Of the inputs of layers."),
        click.option("--equalize/--no-equalize", default=None, help="Even ranges out by exact rescaling (on)."),
    )
    for option in reversed(options):
        command = option(command)
    return command


FIELDS = ("calibration", "granularity", "symmetry", "rounding", "first_last", "activation_bits", "equalize")


def _parts(options: dict[str, Any], weight_bits: int | None) -> tuple[Any, Any, Any]:
    """(Reading, Settings, shape) from the options of `reading_options`."""
    from qdeploy.ptq.command import settings_of
    from qdeploy.ptq.images import Reading, parse_numbers
    from qdeploy.ptq.prepare import parse_shape

    mean, std = parse_numbers(options["mean"]), parse_numbers(options["std"])
    reading = Reading(options["layout"], mean, std, options["resize"], options["count"], options["data_dir"])
    given = {name: options[name] for name in FIELDS} | {"weight_bits": weight_bits}
    shape = None if options["shape"] is None else parse_shape(options["shape"])
    return reading, settings_of(options["settings"], given), shape


def _learning(iterations: int) -> Any:
    """Block reconstruction; loads torch."""
    from qdeploy.ptq.command import Learning
    from qdeploy.ptq.reconstruct import reconstruct

    return Learning(reconstruct, iterations)


@click.command()
@click.argument("model", type=PATH)
@reading_options
@click.option("--bits", type=click.IntRange(2, 8), help="Weight width of every layer but the first and the last.")
@click.option("--mixquant", "qem", type=float, metavar="QEM", help="A width for each layer: QE(b) <= QEM * QE(8).")
@click.option("--max-kib", type=float, help="MixQuant with the least QEM whose weights take at most so many KiB.")
@click.option("--min-accuracy", type=float, help="MixQuant with a QEM that keeps so many percent right (labels.npy), "
              "or in the float network's class.")  # fmt: skip
@click.option("--criterion", type=click.Choice(["mse", "relative"]), default="mse", show_default=True)
@click.option("--reconstruct", "iterations", type=click.IntRange(1), metavar="N",
              help="Learn the rounding block by block, N steps each; resumes.")  # fmt: skip
@click.option("--ladder", metavar="2,4,8", help="Nested levels of these weight widths; --out is a folder then.")
@click.option("--nesting", type=click.Choice(["joint", "truncate"]), default="joint", show_default=True,
              help="Codes chosen for all levels together, or for the top alone.")  # fmt: skip
@click.option("-o", "--out", type=PATH, required=True, help="ONNX file, or folder for the levels of a ladder.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def quantize(  # noqa: PLR0913, PLR0917
    model: Path, bits: int | None, qem: float | None, max_kib: float | None, min_accuracy: float | None, criterion: str,
    iterations: int | None, ladder: str | None, nesting: str, out: Path, force: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Quantize a trained float32 ONNX MODEL with some images: one QDQ file, or levels that `qdeploy bundle` takes."""
    from qdeploy.ptq.command import Search, float_lines, lines, parse_widths, quantize_file, quantize_ladder

    reading, settings, shape = _parts(options, bits)
    search = Search(qem, max_kib, min_accuracy, criterion)
    if ladder is not None and (search.wanted or bits is not None):
        raise click.UsageError("--ladder gives the widths itself: leave --bits, --mixquant and the bounds out")
    if ladder is not None and iterations is not None:
        raise click.UsageError("--reconstruct learns one width: use it without --ladder")
    if ladder is None:
        learning = None if iterations is None else _learning(iterations)
        row = quantize_file(model, options["data"], out, reading, settings, search, shape, force, say, learning)
        found = [(out, row)]
    else:
        widths = parse_widths(ladder)
        rows = quantize_ladder(
            model, options["data"], out, reading, settings, widths, nesting, shape, force, say
        )  # fmt: skip
        found = [(out / f"w{width}.onnx", row) for width, row in zip(widths, rows, strict=True)]
    if as_json:
        click.echo(json.dumps([row for _, row in found]))
        return
    for path, row in found:
        click.echo("\n".join(lines(row, path)))
    if left := float_lines(found[0][1]):
        click.echo("\n".join(left))


@click.command()
@click.argument("model", type=PATH)
@reading_options
@click.option("--widths", metavar="2,4,8", default="2,3,4,6,8", show_default=True, help="Weight widths to try.")
@click.option("-o", "--out", type=PATH, required=True, help="Folder for sensitivity.html and sensitivity.json.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def sensitivity(model: Path, widths: str, out: Path, force: bool, **options: Any) -> None:
    """How much each layer of a float32 ONNX MODEL suffers from few bits: by layer, and by type of layer."""
    from qdeploy.ptq.command import parse_widths, sensitivity_folder

    reading, settings, shape = _parts(options, None)
    report = sensitivity_folder(
        model, options["data"], out, reading, settings, parse_widths(widths), shape, force, say
    )  # fmt: skip
    click.echo("\n".join(report))
