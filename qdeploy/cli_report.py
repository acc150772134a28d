"""`qdeploy report`: one HTML page about what other commands wrote."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.cli_options import PATH, as_json, examples, force, show


@click.command(
    epilog=examples(
        "qdeploy report front -o report.html",
        "qdeploy report RUN front tree artifact -o report.html --plots plots",
        "qdeploy profile artifact --model w2.onnx --layers -o artifact/profile.json",
    )
)
@click.argument("folders", metavar="DIR...", type=PATH, nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, default=Path("report.html"), show_default=True, help="The page.")
@click.option("--plots", type=PATH, help="Folder for each plot as PNG and SVG.")
@force
@as_json
def report(folders: tuple[Path, ...], out: Path, plots: Path | None, force: bool, as_json: bool) -> None:
    """Draw what was found and measured in each DIR on one page that needs no network (docs/report.md).

    DIR: what search, bundle, publish, compile (with profile.json), quantize, sensitivity, train, subnet or demo wrote.
    """
    from qdeploy.errors import DeviceError
    from qdeploy.report.folders import report as write

    if out.exists() and not force:
        raise DeviceError(f"{out} exists: choose another name or add --force")
    found = write(folders, out, plots)
    lines = [f"{row['folder']}: {', '.join(row['kinds'])}" for row in found["folders"]]
    lines += [f"not in it: {what}: {why}" for what, why in found["missing"].items()]
    if plots is not None:
        lines.append(f"{plots}: {len(found['plots'])} files")
    show(found, "\n".join([*lines, f"{out}: {len(found['figures'])} plots"]), as_json)
