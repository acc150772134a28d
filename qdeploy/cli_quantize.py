"""Commands of post-training quantization: `qdeploy quantize` and `qdeploy sensitivity`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from qdeploy.cli_options import PATH, as_json, data_dir, examples, force, option_out, say, show


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what the images are and how they become inputs."""
    options = (
        click.option("--data", required=True, help="Folder with .npy/.npz arrays or pictures, or a dataset's name."),
        data_dir,
        click.option(
            "--images", "count", type=click.IntRange(1), default=256, show_default=True, help="At most so many."
        ),
        click.option(
            "--layout",
            type=click.Choice(["nchw", "nhwc"]),
            default="nchw",
            show_default=True,
            help="Axes of the arrays.",
        ),
        click.option("--mean", metavar="M,M,M", help="Taken from each channel; of pixels divided by 255."),
        click.option("--std", metavar="S,S,S", help="Each channel is divided by it then."),
        click.option("--resize", is_flag=True, help="Scale pictures by the shorter side and cut out the centre."),
        click.option("--shape", metavar="NAME=1,3,224,224", help="Sizes of the input where the file leaves some open."),
        click.option("--weights", type=PATH, help="Of a torch MODEL: a state_dict as .safetensors, .pt or .pth."),
        click.option("--settings", type=PATH, help="TOML file with settings, and [[layer]] rules by name."),
        click.option(
            "--calibration",
            type=click.Choice(["auto", "minmax", "margin", "percentile", "mse", "entropy"]),
            help="How ranges of activations are found (docs/quantize.md).",
        ),
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


@contextmanager
def _source(model: Path, options: dict[str, Any], shape: tuple[str, tuple[int, ...]] | None) -> Iterator[Path]:
    """The ONNX file of MODEL, which names a torch network or is that file."""
    if ":" not in str(model) or model.exists():
        if options["weights"] is not None:
            raise click.UsageError("--weights belongs to a torch network, package.module:function")
        yield model
        return
    from qdeploy.nets.own import FUNCTION
    from qdeploy.ptq.torch_source import exported

    if FUNCTION.fullmatch(str(model)) is None:
        raise click.UsageError(f"{model} is no file and no package.module:function")
    with exported(str(model), options["weights"], shape) as path:
        yield path


def _learning(iterations: int) -> Any:
    """Block reconstruction; loads torch."""
    from qdeploy.ptq.command import Learning
    from qdeploy.ptq.reconstruct import reconstruct, reconstruct_ladder

    return Learning(reconstruct, reconstruct_ladder, iterations)


@click.command(
    epilog=examples(
        "qdeploy quantize model.onnx --data images -o int8.onnx",
        "qdeploy quantize model.onnx --data images --ladder 2,4,8 -o levels",
        "qdeploy quantize model.onnx --data images --bits 4 --reconstruct 200 -o w4.onnx",
        "qdeploy quantize package.module:factory --weights net.safetensors --shape x=1,3,32,32 --data images -o q.onnx",
    )
)
@click.argument("model", type=PATH)
@reading_options
@click.option("--bits", type=click.IntRange(2, 8), help="Weight width of every layer but the first and the last.")
@click.option("--mixquant", "qem", type=float, metavar="QEM", help="A width for each layer: QE(b) <= QEM * QE(8).")
@click.option("--max-kib", type=float, help="MixQuant with the least QEM whose weights take at most so many KiB.")
@click.option("--min-accuracy", type=float, help="MixQuant with a QEM that keeps so many percent right (labels.npy), "
              "or in the float network's class.")  # fmt: skip
@click.option("--criterion", type=click.Choice(["mse", "relative"]), default="mse", show_default=True,
              help="What MixQuant's errors are.")  # fmt: skip
@click.option("--reconstruct", "iterations", type=click.IntRange(1), metavar="N",
              help="Learn the rounding block by block, N steps each; resumes.")  # fmt: skip
@click.option("--ladder", metavar="2,q68,8", help="Nested levels, a width or q and a QEM each; --out is a folder then.")
@click.option("--nesting", type=click.Choice(["joint", "truncate"]), default="joint", show_default=True,
              help="Codes chosen for all levels together, or for the top alone.")  # fmt: skip
@option_out("ONNX file, or folder for the levels of a ladder.")
@force
@as_json
def quantize(  # noqa: PLR0913, PLR0917
    model: Path, bits: int | None, qem: float | None, max_kib: float | None, min_accuracy: float | None, criterion: str,
    iterations: int | None, ladder: str | None, nesting: str, out: Path, force: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Quantize a trained float32 MODEL with some images: one QDQ file, or levels that `qdeploy bundle` takes.

    MODEL is an ONNX file, or package.module:function, which returns a torch network.
    """
    from qdeploy.ptq.command import Search, float_lines, lines, parse_ladder, quantize_file, quantize_ladder

    reading, settings, shape = _parts(options, bits)
    search = Search(qem, max_kib, min_accuracy, criterion)
    if ladder is not None and (search.wanted or bits is not None):
        raise click.UsageError("--ladder gives the widths itself: leave --bits, --mixquant and the bounds out")
    if iterations is not None and nesting != "joint":
        raise click.UsageError("--reconstruct chooses codes for all levels together: leave --nesting out")
    learning = None if iterations is None else _learning(iterations)
    with _source(model, options, shape) as path:
        if ladder is None:
            row = quantize_file(path, options["data"], out, reading, settings, search, shape, force, say, learning)
            found = [(out, row)]
        else:
            rows = quantize_ladder(path, options["data"], out, reading, settings, parse_ladder(ladder), nesting,
                                   criterion, shape, force, say, learning)  # fmt: skip
            found = [(out / f"{name}.onnx", row) for name, row in rows.items()]
    text = [line for path, row in found for line in lines(row, path)]
    show([row for _, row in found], "\n".join([*text, *float_lines(found[0][1])]), as_json)


@click.command(
    epilog=examples(
        "qdeploy sensitivity model.onnx --data images -o report",
        "qdeploy sensitivity model.onnx --data images --widths 2,4 -o report --json",
    )
)
@click.argument("model", type=PATH)
@reading_options
@click.option("--widths", metavar="2,4,8", default="2,3,4,6,8", show_default=True, help="Weight widths to try.")
@option_out("Folder for sensitivity.html and sensitivity.json.")
@force
@as_json
def sensitivity(model: Path, widths: str, out: Path, force: bool, as_json: bool, **options: Any) -> None:
    """How much each layer of a float32 ONNX MODEL suffers from few bits: by layer, and by type of layer."""
    from qdeploy.errors import ModelError
    from qdeploy.files import parse_json
    from qdeploy.ptq.command import parse_widths, sensitivity_folder

    reading, settings, shape = _parts(options, None)
    with _source(model, options, shape) as path:
        report = sensitivity_folder(
            path, options["data"], out, reading, settings, parse_widths(widths), shape, force, say
        )  # fmt: skip
    found = parse_json((out / "sensitivity.json").read_bytes(), "sensitivity.json", ModelError) if as_json else None
    show(found, "\n".join(report), as_json)
