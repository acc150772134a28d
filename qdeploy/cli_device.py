"""Commands of a device: `qdeploy pull`, `climb`, `drop`, `evict` and `run`. Each parses, makes one call and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdeploy.cli_options import PATH, LevelName, as_json, dry_run, examples, say, show
from qdeploy.progress import BYTES, Counter

if TYPE_CHECKING:
    from qdeploy.client.receive import Progress
    from qdeploy.client.report import PullReport

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

    show(report.as_json(), "\n".join(report.lines()), as_json)
    if url is not None:
        secret = None if token is None else read_bytes(token, "the token", DeviceError).decode(errors="replace").strip()
        if problem := tell(url, folder, report, secret):
            say.warn(f"the report was not taken: {problem}")


def _counting(task: str) -> Progress:
    """What a download calls with bytes done and in all."""
    counters: list[Counter] = []

    def progress(done: int, total: int) -> None:
        if not counters:
            counters.append(Counter(say, task, total, BYTES))
        counters[0].at(done)

    return progress


@click.command(
    epilog=examples(
        "qdeploy pull http://127.0.0.1:8000 -o device --root keys/1.root.json --level w2",
        "qdeploy pull http://127.0.0.1:8000 -o device --dry-run",
        "qdeploy pull http://127.0.0.1:8000 -o device --unsigned --rate 100000 --json",
    )
)
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
@dry_run
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
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fetch the release that the mirrors URL... publish for this device, verify it, put a level of it in force.

    With --dry-run only metadata is fetched and verified, and DIR is left as it is.
    """
    from qdeploy.client.pull import foresee_pull
    from qdeploy.client.pull import pull as run

    urls, folder = (sources, out) if out is not None else (sources[:-1], Path(sources[-1]))
    if not urls:
        raise click.UsageError("give at least one URL and the device folder: qdeploy pull URL DIR")
    if dry_run:
        found = foresee_pull(
            urls, folder, level, target, root=root, unsigned=unsigned, model=model, channel=channel, rate=rate
        )
        show(found.as_json(), found.text(), as_json)
        return
    report = run(
        urls, folder, level, target, say, _counting("pull"), root=root, unsigned=unsigned, model=model,
        channel=channel, quota=quota, rate=rate,
    )  # fmt: skip
    _end(report, as_json, folder, report_to, token_file)


@click.command(epilog=examples("qdeploy climb device --to w4", "qdeploy climb device --to w4 --dry-run --json"))
@click.argument("folder", type=PATH)
@click.option("--to", type=LevelName(), required=True, help="Level to climb to.")
@rate
@report_to
@token_file
@dry_run
@as_json
def climb(  # noqa: PLR0913, PLR0917
    folder: Path,
    to: str,
    rate: float | None,
    report_to: str | None,
    token_file: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fetch the planes that a higher level lacks and put it in force.

    With --dry-run nothing is fetched: the manifest that the device holds says what is missing.
    """
    from qdeploy.client.pull import climb as run
    from qdeploy.client.pull import foresee_climb

    if dry_run:
        found = foresee_climb(folder, to)
        show(found.as_json(), found.text(), as_json)
        return
    _end(run(folder, to, say, _counting("climb"), rate=rate), as_json, folder, report_to, token_file)


@click.command(epilog=examples("qdeploy drop device --to w2"))
@click.argument("folder", type=PATH)
@click.option("--to", type=LevelName(), required=True, help="Level to drop to.")
@report_to
@token_file
@as_json
def drop(folder: Path, to: str, report_to: str | None, token_file: Path | None, as_json: bool) -> None:
    """Go down to a level that is held: no bytes, no network."""
    from qdeploy.client.pull import drop as run

    _end(run(folder, to), as_json, folder, report_to, token_file)


@click.command(epilog=examples("qdeploy evict device --dry-run", "qdeploy evict device --json"))
@click.argument("folder", type=PATH)
@dry_run
@as_json
def evict(folder: Path, dry_run: bool, as_json: bool) -> None:
    """Free the disk of planes above the level in force and of other releases; climbing back fetches them again."""
    from qdeploy.client.evict import evict as run
    from qdeploy.client.evict import foresee

    found = foresee(folder) if dry_run else run(folder)
    done = "would be removed" if dry_run else "removed"
    text = f"{folder}: {found.files} files {done}, {found.bytes} bytes {'to free' if dry_run else 'freed'}"
    show({"files": found.files, "bytes": found.bytes, "dry_run": dry_run}, text, as_json)


@click.command(
    epilog=examples(
        "qdeploy run device --images images.npy",
        "qdeploy run device --images images.npy -o outputs.npy",
        "qdeploy run device --images images.npy --climb w4",
    )
)
@click.argument("folder", type=PATH)
@click.option("--images", type=PATH, required=True, help=".npy, IDX (.gz too), PGM, PPM or PNG.")
@click.option(
    "--runtime",
    type=click.Choice(["tvm", "ort"]),
    default="tvm",
    show_default=True,
    help="tvm: the compiled artifact; ort: ONNX Runtime.",
)
@click.option(
    "--climb",
    "to",
    type=LevelName(),
    metavar="LEVEL",
    help="Fetch this level while the images run again and again, then stop.",
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
        shape = list(outputs.shape)
        show({"out": str(out), "shape": shape}, f"{out}: float32 {shape}", as_json)
        return
    classes = outputs.argmax(1).tolist()
    show(classes, "\n".join(str(c) for c in classes), as_json)
