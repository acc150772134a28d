"""Commands of a device: `qdeploy pull`, `climb`, `drop`, `evict` and `run`. Each parses, makes one call and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdeploy.cli_search import say

if TYPE_CHECKING:
    from qdeploy.client.report import PullReport

PATH = click.Path(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
rate = click.option(
    "--rate", type=click.FloatRange(0, min_open=True), metavar="BYTES", help="At most so many bytes a second."
)


report_to = click.option("--report", "report_to", metavar="URL", help="Tell this server what the device runs now.")
token_file = click.option("--token", "token_file", type=PATH, help="File with the token that --report needs.")


def _end(report: PullReport, as_json: bool, folder: Path, url: str | None, token: Path | None) -> None:
    """Print what was done, and tell the server if that was asked for; its failure is a line and no error."""
    from qdeploy.client.report import tell
    from qdeploy.errors import DeviceError
    from qdeploy.files import read_bytes

    click.echo(json.dumps(report.as_json()) if as_json else "\n".join(report.lines()))
    if url is not None:
        secret = None if token is None else read_bytes(token, "the token", DeviceError).decode(errors="replace").strip()
        if problem := tell(url, folder, report, secret):
            say(f"the report was not taken: {problem}")


@click.command()
@click.argument("sources", metavar="URL... [DIR]", nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, help="Device folder, in place of DIR; an interrupted pull in it resumes.")
@click.option("--root", type=PATH, help="The publisher's root.json, pinned in the folder: at the first pull only.")
@click.option("--unsigned", is_flag=True, help="Take a tree that nobody signed; to be said each time.")
@click.option("--level", help="Level to bring the device to (default: what the rollout wants, else the one in force).")
@click.option("--target", help="Hardware class of the compiled artifact (default: the one that suits this machine).")
@click.option("--model", help="Which model, where several are published; remembered.")
@click.option(
    "--channel", type=click.Choice(["stable", "canary"]), help="Default: the device's id decides; remembered."
)
@click.option("--quota", type=click.IntRange(1), metavar="BYTES", help="The most that DIR may take; remembered.")
@rate
@report_to
@token_file
@as_json
def pull(  # noqa: PLR0913, PLR0917
    sources: tuple[str, ...],
    out: Path | None,
    root: Path | None,
    unsigned: bool,
    level: str | None,
    target: str | None,
    model: str | None,
    channel: str | None,
    quota: int | None,
    rate: float | None,
    report_to: str | None,
    token_file: Path | None,
    as_json: bool,
) -> None:
    """Fetch the release that the mirrors URL... publish for this device, verify it, put a level of it in force."""
    from qdeploy.client.pull import pull as run

    urls, folder = (sources, out) if out is not None else (sources[:-1], Path(sources[-1]))
    if not urls:
        raise click.UsageError("give at least one URL and the device folder: qdeploy pull URL DIR")
    report = run(
        urls, folder, level, target, say, root=root, unsigned=unsigned, model=model, channel=channel, quota=quota,
        rate=rate,
    )  # fmt: skip
    _end(report, as_json, folder, report_to, token_file)


@click.command()
@click.argument("folder", type=PATH)
@click.option("--to", required=True, help="Level to climb to.")
@rate
@report_to
@token_file
@as_json
def climb(  # noqa: PLR0913, PLR0917
    folder: Path, to: str, rate: float | None, report_to: str | None, token_file: Path | None, as_json: bool
) -> None:
    """Fetch the planes that a higher level lacks and put it in force."""
    from qdeploy.client.pull import climb as run

    _end(run(folder, to, say, rate=rate), as_json, folder, report_to, token_file)


@click.command()
@click.argument("folder", type=PATH)
@click.option("--to", required=True, help="Level to drop to.")
@report_to
@token_file
@as_json
def drop(folder: Path, to: str, report_to: str | None, token_file: Path | None, as_json: bool) -> None:
    """Go down to a level that is held: no bytes, no network."""
    from qdeploy.client.pull import drop as run

    _end(run(folder, to), as_json, folder, report_to, token_file)


@click.command()
@click.argument("folder", type=PATH)
@as_json
def evict(folder: Path, as_json: bool) -> None:
    """Free the disk of planes above the level in force and of other releases; climbing back fetches them again."""
    from qdeploy.client.evict import evict as run

    freed = run(folder)
    row = {"files": freed.files, "bytes": freed.bytes}
    click.echo(json.dumps(row) if as_json else f"{folder}: {freed.files} files removed, {freed.bytes} bytes freed")


@click.command()
@click.argument("folder", type=PATH)
@click.option("--images", type=PATH, required=True, help=".npy, IDX (.gz too), PGM, PPM or PNG.")
@click.option("--runtime", type=click.Choice(["tvm", "ort"]), default="tvm", show_default=True)
@click.option(
    "--climb", "to", metavar="LEVEL", help="Fetch this level while the images run again and again, then stop."
)
@click.option("--mode", type=click.Choice(["swap", "in-place"]), default="swap", show_default=True, help="Of --climb.")
@rate
@click.option("-o", "--out", type=PATH, help="Write the outputs as .npy instead of printing classes.")
@as_json
def run(  # noqa: PLR0913, PLR0917
    folder: Path,
    images: Path,
    runtime: str,
    to: str | None,
    mode: str,
    rate: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run the level in force on images and print each one's class."""
    from qdeploy.client.runtime import run as classify
    from qdeploy.client.runtime import run_and_climb

    if to is None:
        outputs = classify(folder, images, runtime)
    else:
        outputs, passes = run_and_climb(folder, images, to, runtime, mode, rate)
        for level, count in passes.items():
            say(f"{level}: {count} passes over the images")
    if out is not None:
        import io

        import numpy as np

        from qdeploy.files import write_atomic

        buffer = io.BytesIO()
        np.save(buffer, outputs)
        write_atomic(out, buffer.getvalue())
        click.echo(f"{out}: float32 {list(outputs.shape)}")
        return
    classes = outputs.argmax(1).tolist()
    click.echo(json.dumps(classes) if as_json else "\n".join(str(c) for c in classes))
