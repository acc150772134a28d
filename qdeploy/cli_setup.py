"""Commands to begin with: init, fetch, demo, doctor. Each parses, makes one call and prints."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.cli_options import PATH, as_json, examples, option_out, say, show


@click.command(epilog=examples("qdeploy fetch fashion-mnist -o DATA"))
@click.argument("dataset", type=click.Choice(["fashion-mnist"]))
@option_out("Folder for the four IDX files.")
@as_json
def fetch(dataset: str, out: Path, as_json: bool) -> None:
    """Fetch a full dataset from its public home; every file is checked against its pinned SHA-256."""
    from qdeploy.data import fetch_fashion_mnist

    fetch_fashion_mnist(out, echo=say)
    show({"out": str(out), "dataset": dataset}, f"{out}: {dataset}, verified", as_json)


@click.command(epilog=examples("qdeploy demo", "qdeploy demo -o OUT --json"))
@click.option("-o", "--out", type=PATH, default=Path("demo-out"), show_default=True, help="Output folder, replaced.")
@as_json
def demo(out: Path, as_json: bool) -> None:
    """The whole pipe on the shipped model: subnets, export, bundle, compile, profile, serve, climb under inference."""
    from qdeploy.selftest import check_tvm

    check_tvm()
    from qdeploy.demo import demo as run
    from qdeploy.demo import render

    result = run(out, say)
    show(result, render(result), as_json)


@click.command(epilog=examples("qdeploy doctor", "qdeploy doctor --json"))
@click.pass_context
@as_json
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: packages against their pins, compilers, processor, GPU, disk; say what to do.

    Exits with 1 when something that every install needs is missing.
    """
    from qdeploy.doctor import examine, failed, rendered

    found = examine()
    show(found, rendered(found), as_json)
    ctx.exit(int(failed(found)))


@click.command(
    epilog=examples(
        "qdeploy init MINE --data pictures",
        "qdeploy init MINE --data pictures --network package.module:make_network --size 32,32",
        "qdeploy train MINE/recipe.toml -o RUN",
    )
)
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--data", type=PATH, required=True, help="Folder with a folder of PNG or JPEG files for each class, or "
              "with images.npy and labels.npy.")  # fmt: skip
@click.option("--network", default="resnet8", show_default=True, help="A network of qdeploy, or your function "
              "package.module:function(channels, classes), which returns a torch.nn.Module.")  # fmt: skip
@click.option("--classes", metavar="A,B,...", help="Only these classes, in this order (default: all, by name).")
@click.option("--size", metavar="H,W", help="Scale and crop pictures to this size (default: the one they all have).")
@as_json
def init(folder: Path, data: Path, network: str, classes: str | None, size: str | None, as_json: bool) -> None:
    """Look at images of your own and write DIR/recipe.toml for `qdeploy train`, with a comment for each choice."""
    from qdeploy.scaffold import write_recipe

    found = write_recipe(folder, data, network, classes, size)
    show(found.as_json(), found.text(), as_json)
