"""Commands of publishers: `qdeploy serve` and `qdeploy fleet`. Each parses, makes one call and prints."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.cli_options import PATH, as_json, examples, show

PORT = click.IntRange(0, 65535)


@click.command(
    epilog=examples(
        "qdeploy serve site",
        "qdeploy serve site --devices fleet.sqlite --admin-port 9100",
        "qdeploy serve site --devices fleet.sqlite --admin-port 9100 --control-token-file token --keys keys",
    )
)
@click.argument("root", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=PORT, default=8000, show_default=True, help="0 picks a free one.")
@click.option("--log", type=PATH, help="Append one JSON line a request: path, range, status, bytes sent.")
@click.option("--access-log", type=PATH, help="Append one line a request in the common log format; - is stderr.")
@click.option("--cert", type=PATH, help="PEM certificate (chain): serve over TLS.")
@click.option("--key", type=PATH, help="Its PEM key.")
@click.option("--devices", type=PATH, metavar="STATE.sqlite", help="Take reports of devices into this SQLite file.")
@click.option("--token-file", type=PATH, help="File with the token that reports must carry.")
@click.option("--admin-port", type=PORT, help="For operators, on 127.0.0.1: fleet page, metrics, health.")
@click.option("--admin-name", "admin_names", multiple=True, help="Another name of that port, a proxy's (repeatable).")
@click.option("--control-token-file", type=PATH, help="File with the token that changes of the rollout must carry.")
@click.option(
    "--keys",
    "folders",
    type=PATH,
    multiple=True,
    help="Sign such changes here, with the keys in this folder (repeatable).",
)
@click.option("--passphrase-file", type=PATH, help="Its first line is the passphrase of these keys.")
@click.option("--browser", is_flag=True, help="Also serve the page that makes a browser a device, at /ui/device/.")
@click.option("--browser-files", type=PATH, metavar="DIR", help="That page with root.json and sample/*.npy of DIR.")
@click.option(
    "--connections", type=click.IntRange(1, 100_000), default=4096, show_default=True, help="More are answered 503."
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 3600),
    default=10,
    show_default=True,
    help="Seconds that running downloads have at a stop.",
)
def serve(  # noqa: PLR0913, PLR0917
    root: Path,
    host: str,
    port: int,
    log: Path | None,
    access_log: Path | None,
    cert: Path | None,
    key: Path | None,
    devices: Path | None,
    token_file: Path | None,
    admin_port: int | None,
    admin_names: tuple[str, ...],
    control_token_file: Path | None,
    folders: tuple[Path, ...],
    passphrase_file: Path | None,
    browser: bool,
    browser_files: Path | None,
    connections: int,
    grace: float,
) -> None:
    """Serve the published tree ROOT over HTTP until Ctrl-C (docs/serving.md)."""
    from qdeploy.serve.app import Options
    from qdeploy.serve.app import serve as run
    from qdeploy.serve.limits import Limits
    from qdeploy.serve.reports import read_token

    token, control = (None if path is None else read_token(path) for path in (token_file, control_token_file))
    limits = Limits(connections=connections, stop_s=grace)
    options = Options(
        host, port, log, access_log, cert, key, devices, token, admin_port, limits, browser, browser_files,
        admin_names, control, folders, passphrase_file,
    )  # fmt: skip
    run(root, options, click.echo)


@click.command(
    epilog=examples("qdeploy fleet fleet.sqlite --tree site", "qdeploy fleet http://127.0.0.1:9100 --device cam-17")
)
@click.argument("source", metavar="STATE.sqlite|URL")
@click.option("--device", help="The kept changes of this one device, oldest first.")
@click.option("--tree", type=PATH, help="Published tree: also say who does not run what its rollout wants.")
@click.option(
    "--silent-hours",
    type=click.FloatRange(0),
    default=24,
    show_default=True,
    help="Devices not heard of for so long are listed.",
)
@as_json
def fleet(source: str, device: str | None, tree: Path | None, silent_hours: float, as_json: bool) -> None:
    """Print which device runs which level of which release, from what devices reported.

    The URL is that of `qdeploy serve --admin-port`.
    """
    import time

    from qdeploy.serve.fleet import fleet as read
    from qdeploy.serve.fleet import history_lines, read_history, render

    if device is not None:
        rows = read_history(source, device)
        show(rows, "\n".join(history_lines(rows)), as_json)
        return
    found = read(source, time.time(), silent_hours * 3600, tree)
    show(found, render(found), as_json)
