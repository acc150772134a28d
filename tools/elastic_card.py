"""Make the card of a trained elastic supernet, and put what ships into a folder.

    python tools/elastic_card.py RUN -o models/NAME [--data-dir DIR]

Scores the largest, a middle and the smallest architecture at every width, and random specs of the whole space, all
without retraining, and writes them to CARD.md. Copies recipe.json, quantized.checkpoint and report.json of RUN, and
writes base.json: the middle architecture at the lowest weight width, which `qdeploy demo` climbs from.
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
from qdeploy.files import canonical_json, parse_json, read_bytes, write_atomic
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import Recipe
from qdeploy.space import Block, SubnetSpec
from qdeploy.train.run import accuracy, load_run, training_set

SHIPPED = ("recipe.json", "quantized.checkpoint", "report.json")
RANDOM_SPECS = 8
Blocks = tuple[tuple[Block, ...], ...]


def middle(net: BatchQuantNet) -> Blocks:
    """Blocks of an architecture between the largest and the smallest."""
    assert net.supernet is not None
    elastic = net.supernet.elastic
    depths = [sorted(choices)[len(choices) // 2] for choices in elastic.depths]
    return elastic.uniform(depths, min(elastic.kernels), sorted(elastic.expands)[len(elastic.expands) // 2])


def architectures(net: BatchQuantNet) -> dict[str, Blocks]:
    """Blocks of the table's architectures, by name."""
    assert net.supernet is not None
    blocks = middle(net)
    shape = "/".join(str(len(stage)) for stage in blocks)
    name = f"middle (depth {shape}, kernel {blocks[0][0].kernel}, expansion {blocks[0][0].expand})"
    return {"largest": net.supernet.elastic.largest, name: blocks, "smallest": net.supernet.elastic.smallest}


def table(net: BatchQuantNet, score: Mapping[SubnetSpec, float]) -> list[str]:
    """Markdown rows: an architecture and an activation width each, a column for each weight width."""
    widths = net.choice.weight_bits
    lines = ["| architecture | activation bits | " + " | ".join(f"{w} bits" for w in widths) + " |"]
    lines += ["|---|" + "---|" * (len(widths) + 1)]
    for name, blocks in architectures(net).items():
        for bits in net.choice.activation_bits:
            row = [score[net.uniform_blocks(blocks, width, bits)] for width in widths]
            lines.append(f"| {name} | {bits} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    return lines


def scores(recipe: Recipe, net: BatchQuantNet, test: Dataset, data_dir: Path | None) -> dict[SubnetSpec, float]:
    """Top-1 accuracy in per cent of the table's specs and of RANDOM_SPECS others, which come last."""
    images, choice = training_set(recipe, data_dir).images, net.choice
    specs = [
        net.uniform_blocks(blocks, width, bits)
        for blocks in architectures(net).values()
        for bits in choice.activation_bits
        for width in choice.weight_bits
    ]
    random = Random("card")
    found = {}
    for spec in (*specs, *(net.space.sample(random) for _ in range(RANDOM_SPECS))):
        found[spec] = accuracy(calibrated(net, spec, images), spec, test)
        click.echo(f"{spec.id} {found[spec]:.2f}")
    return found


def card(recipe: Recipe, net: BatchQuantNet, score: dict[SubnetSpec, float], floats: float, images: int) -> str:
    """CARD.md."""
    mixed = net.choice.mixed_phase
    stages = f"{recipe.float_phase.epochs} float, {mixed.epochs if mixed else 0} mixed and"
    drawn = ", ".join(f"{value:.2f}" for value in list(score.values())[-RANDOM_SPECS:])
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            f"Elastic `{recipe.network.name}`, width {recipe.network.width}, on {recipe.data.name};",
            f"{stages} {recipe.quantized_phase.epochs} quantized epochs, seed {recipe.seed}. "
            f"{net.space.size:.3e} subnets.",
            "",
            f"Top-1 accuracy in per cent on {images:,} test images, simulation of the integer network, calibrated",
            "for each subnet, none of them retrained. The entries of a row are levels of one bundle.",
            "",
            *table(net, score),
            "",
            f"{RANDOM_SPECS} random specs of the whole space: {drawn}. Largest float network: {floats:.2f}.",
            "",
            f"Made by `qdeploy train models/{recipe.name}.toml -o RUN` and `python tools/elastic_card.py RUN -o "
            f"models/{recipe.name}`",
            f"with torch {torch.__version__}, one thread, {platform.machine()}.",
            "",
        ]
    )


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
        report = parse_json(read_bytes(run / "report.json", "the report", ModelError), "report.json", ModelError)
        test = load(recipe.data.name, "test", data_dir)
        text = card(recipe, net, scores(recipe, net, test, data_dir), report["float"], len(test))
        base = net.uniform_blocks(middle(net), net.choice.weight_bits[0], net.choice.activation_bits[-1])
        out.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            if run != out:
                shutil.copyfile(run / name, out / name)
        write_atomic(out / "base.json", canonical_json(base.to_json()))
        write_atomic(out / "CARD.md", text.encode())
    except QDeployError as e:
        raise click.ClickException(str(e)) from e
    click.echo(text)


if __name__ == "__main__":
    main()
