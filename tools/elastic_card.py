"""Make the card of a trained elastic supernet, and put what ships into a folder.

    python tools/elastic_card.py RUN -o models/NAME [--data-dir DIR]

Copies recipe.json, quantized.checkpoint and report.json of RUN (`qdeploy train`), scores the largest, a middle and the smallest
architecture at every weight width, and random specs of the whole space, all without retraining, and writes CARD.md.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from random import Random

import click
import torch

from qdeploy.data import Dataset, load
from qdeploy.errors import ModelError, QDeployError
from qdeploy.files import write_atomic
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import Recipe
from qdeploy.space import SubnetSpec
from qdeploy.train.run import accuracy, load_run, training_set

SHIPPED = ("recipe.json", "quantized.checkpoint", "report.json")
RANDOM_SPECS = 8


def architectures(net: BatchQuantNet) -> dict[str, object]:
    """Blocks of the architectures in the table, by name."""
    assert net.supernet is not None
    elastic = net.supernet.elastic
    middle = [sorted(depths)[len(depths) // 2] for depths in elastic.depths]
    kernel, expand = elastic.kernels[0], sorted(elastic.expands)[len(elastic.expands) // 2]
    return {
        "largest": elastic.largest,
        f"middle (depth {'/'.join(map(str, middle))}, kernel {kernel}, expansion {expand})": elastic.uniform(
            middle, kernel, expand
        ),
        "smallest": elastic.smallest,
    }


def table(net: BatchQuantNet, score: Mapping[SubnetSpec, float]) -> list[str]:
    """Markdown: architectures by weight bits, at every activation width; then the random specs."""
    widths = net.choice.weight_bits
    lines = ["| architecture | activation bits | " + " | ".join(f"{w} bits" for w in widths) + " |"]
    lines += ["|---|" + "---|" * (len(widths) + 1)]
    for name, blocks in architectures(net).items():
        for bits in net.choice.activation_bits:
            row = [score[net.uniform_blocks(blocks, width, bits)] for width in widths]  # type: ignore[arg-type]
            lines.append(f"| {name} | {bits} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    return lines


def specs_of(net: BatchQuantNet) -> tuple[list[SubnetSpec], list[SubnetSpec]]:
    """The table's uniform specs, and random ones."""
    uniform = [
        net.uniform_blocks(blocks, width, bits)  # type: ignore[arg-type]
        for blocks in architectures(net).values()
        for bits in net.choice.activation_bits
        for width in net.choice.weight_bits
    ]
    random = Random("card")
    return uniform, [net.space.sample(random) for _ in range(RANDOM_SPECS)]


def card(recipe: Recipe, net: BatchQuantNet, run: Path, floats: float, test: Dataset, data_dir: Path | None) -> str:
    """CARD.md: every figure is measured on `test` here."""
    images = training_set(recipe, data_dir).images
    uniform, drawn = specs_of(net)
    score: dict[SubnetSpec, float] = {}
    for spec in (*uniform, *drawn):
        score[spec] = accuracy(calibrated(net, spec, images), spec, test)
        click.echo(f"{spec.id} {score[spec]:.2f}")
    assert net.choice.mixed_phase is not None
    epochs = f"{recipe.float_phase.epochs} float, {net.choice.mixed_phase.epochs} mixed, {recipe.quantized_phase.epochs}"
    network = f"Elastic `{recipe.network.name}`, width {recipe.network.width}, on {recipe.data.name}"
    text = [f"# {recipe.name}", "", f"{network}; {epochs} quantized epochs, seed {recipe.seed}."]
    text += [f"{net.space.size:.3e} subnets.", ""]
    text += [f"Top-1 accuracy in per cent on {len(test)} test images, simulation of the integer network, calibrated for"]
    text += ["each subnet, none of them retrained. A row's entries are levels of one bundle.", ""]
    text += table(net, score)
    text += ["", f"Largest float network: {floats:.2f}.", "", f"{RANDOM_SPECS} random specs of the whole space: "]
    text[-1] += ", ".join(f"{score[spec]:.2f}" for spec in drawn) + "."
    made = f"`qdeploy train models/{recipe.name}.toml -o RUN; python tools/elastic_card.py RUN -o models/{recipe.name}`"
    return "\n".join([*text, "", f"Made by {made} with torch {torch.__version__}, one thread, {platform.machine()}.", ""])


@click.command(help=__doc__)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the shipped model.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder with the dataset's files.")
def main(run: Path, out: Path, data_dir: Path | None) -> None:
    torch.set_num_threads(1)
    try:
        recipe, net = load_run(run)
        if not isinstance(net, BatchQuantNet) or net.supernet is None:
            raise ModelError(f"{run} is no elastic supernet: use tools/model_card.py for recipes of method vertical")
        import json

        report = json.loads((run / "report.json").read_bytes())
        text = card(recipe, net, run, report["float"], load(recipe.data.name, "test", data_dir), data_dir)
        out.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            shutil.copyfile(run / name, out / name)
        write_atomic(out / "CARD.md", text.encode())
    except QDeployError as e:
        raise click.ClickException(str(e)) from e
    click.echo(text)


if __name__ == "__main__":
    main()
