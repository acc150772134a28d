"""Commands of devices: `qdeploy devices` and `qdeploy latency-table`. Each parses, makes one call and prints."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import click

from qdeploy.cli_options import PATH, TARGET, as_json, data_dir, examples, option_out, say, show
from qdeploy.cli_search import noise, one_thread


@click.command(epilog=examples("qdeploy devices", "qdeploy devices --tracker 127.0.0.1:9190 --json"))
@click.option("--tracker", metavar="HOST:PORT", help="Of an RPC tracker, to list its devices too.")
@as_json
def devices(tracker: str | None, as_json: bool) -> None:
    """List what can be measured on: this machine, and the devices of an RPC tracker."""
    from qdeploy.farm.tracker import Tracker
    from qdeploy.farm.tracker import devices as listed
    from qdeploy.profile.latency import machine

    here = machine()
    found = [] if tracker is None else listed(Tracker.parse(tracker))
    rows = [{"key": d.key, "addresses": list(d.addresses), "free": d.free, "pending": d.pending} for d in found]
    lines = [f"local: {here['cpu']}, {here['cores']} cores, load {here['load']}"]
    for one in found:
        counts = f"{len(one.addresses)} devices, {one.free} free, {one.pending} requests wait"
        lines.append(f"{tracker}/{one.key}: {counts} ({', '.join(one.addresses)})")
    if tracker is not None and not found:
        lines.append(f"{tracker}: no devices")
    show({"local": here, "tracker": tracker, "devices": rows}, "\n".join(lines), as_json)


@click.command(
    "latency-table",
    epilog=examples(
        "qdeploy latency-table RUN --target host -o prices.sqlite",
        "qdeploy latency-table RUN --target targets/raspberry-pi-5.toml --device 127.0.0.1:9190/pi -o prices.sqlite",
    ),
)
@click.argument("run", type=PATH)
@click.option("--target", type=TARGET, required=True, help="Target file, or the name of one that ships.")
@click.option("--device", help="local, or HOST:PORT/KEY of an RPC tracker (default: the target file's; else local).")
@noise
@data_dir
@click.option("--export", type=PATH, help="Also write everything in the database: NAME.json or NAME.csv.")
@option_out("Latency database (SQLite); what it holds is not measured.")
@as_json
def latency_table(  # noqa: PLR0913, PLR0917
    run: Path,
    target: Path,
    device: str | None,
    noise: float,
    data_dir: Path | None,
    export: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Measure the kernels that the space of a trained RUN needs on a target, those that the database lacks."""
    one_thread()
    import torch

    from qdeploy.errors import ModelError, RecipeError
    from qdeploy.farm.device import LOCAL, parse_device
    from qdeploy.files import read_bytes, write_atomic
    from qdeploy.profile.database import COLUMNS, LatencyDatabase
    from qdeploy.search.prices import fill
    from qdeploy.target import load_target

    if export is not None and export.suffix not in (".json", ".csv"):
        raise RecipeError(f"--export {export}: name a .json or a .csv file")
    torch.set_num_threads(1)
    chosen = load_target(target)
    where = parse_device(device if device is not None else chosen.device or LOCAL, noise / 100)
    read_bytes(run / "quantized.checkpoint", "the checkpoint of a trained run", ModelError)  # before a file is made
    database = LatencyDatabase(out)
    try:
        found = fill(run, chosen, database, where, data_dir, say)
        rows = database.rows()
    finally:
        database.close()
    if export is not None and export.suffix == ".json":
        write_atomic(export, json.dumps(rows, indent=1).encode() + b"\n")
    elif export is not None:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in rows)
        write_atomic(export, table.getvalue().encode())
    text = (
        f"{out}: {found.kernels} kernels of {run} on {chosen.name}, {found.measured} of them measured now "
        f"in {found.networks} networks"
    )
    counts = {"kernels": found.kernels, "measured": found.measured, "networks": found.networks}
    show({"out": str(out), "target": chosen.name} | counts, text, as_json)
