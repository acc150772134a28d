"""Commands of publishing: keys, publish, rollout, refresh. Each parses, makes one call and prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdeploy.cli_options import PATH, Group, as_json, dry_run, examples, show

if TYPE_CHECKING:
    from qdeploy.trust.keys import KeyFolder
    from qdeploy.trust.publish import Published, Wish
    from qdeploy.trust.storage import Storage

passphrase_file = click.option(
    "--passphrase-file", type=PATH, help="Its first line encrypts the private keys of root and targets."
)
key_folders = click.option(
    "--keys", "folders", type=PATH, multiple=True, required=True, help="Folder of keys (repeatable: key holders')."
)
timestamp_days = click.option(
    "--days",
    type=click.FloatRange(0, 3650, min_open=True),
    default=7,
    show_default=True,
    help="Until the timestamp expires.",
)


def wishes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what devices are to do."""
    options = [
        click.option("--canary", metavar="PERCENT", help="Only so many per cent of the devices take it, such as 10%."),
        click.option("--minimum", metavar="LEVEL", help="No device may go below this level (kept by later releases)."),
        click.option(
            "--level", "levels", multiple=True, metavar="CLASS=LEVEL", help="What a hardware class runs (repeatable)."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _passphrase(path: Path | None) -> bytes | None:
    from qdeploy.errors import TrustError
    from qdeploy.files import read_bytes

    if path is None:
        return None
    words = read_bytes(path, "the passphrase", TrustError).split(b"\n")[0].rstrip(b"\r")
    if not words:
        raise TrustError(f"the first line of {path} is empty: write a passphrase there")
    return words


def _open_keys(folders: tuple[Path, ...], passphrase: Path | None, dry_run: bool = False) -> KeyFolder:
    from qdeploy.trust.keys import KeyFolder
    from qdeploy.trust.rehearse import RehearsedKeys

    found = (RehearsedKeys if dry_run else KeyFolder)(folders, _passphrase(passphrase))
    _ = found.root  # keys that cannot be used are refused before the place to publish to is touched
    return found


def _wish(canary: str | None, minimum: str | None, levels: tuple[str, ...], hold: bool | None) -> Wish:
    from qdeploy.errors import TrustError
    from qdeploy.trust.publish import Wish

    percent = None
    if canary is not None:
        digits = canary.removesuffix("%")
        if not digits.isdecimal() or not 1 <= int(digits) <= 100:
            raise TrustError(f"--canary {canary}: write a whole number of per cent from 1% to 100%")
        percent = int(digits)
    wanted = {}
    for text in levels:
        name, equals, level = text.rpartition("=")
        if not equals or not name:
            raise TrustError(f"--level {text}: write CLASS=LEVEL, or CLASS= to forget the class")
        wanted[name] = level
    return Wish(hold, minimum, wanted, percent)


def _place(where: str, dry_run: bool) -> Storage:
    """The place to publish to; with `dry_run` it is read, and writes go nowhere."""
    from qdeploy.trust.rehearse import Rehearsal
    from qdeploy.trust.storage import open_storage

    storage = open_storage(where)
    return Rehearsal(storage) if dry_run else storage


def _show(done: Published, where: str, dry_run: bool, as_json: bool) -> None:
    entry, expires = done.entry, f"{done.expires:%Y-%m-%d %H:%M} UTC"
    row = {"model": done.model, "channel": done.channel, "release": entry.release, "manifest": entry.sha256}
    row |= {"hold": entry.hold, "minimum": entry.minimum, "levels": dict(entry.levels), "percent": entry.percent}
    share = f" to {entry.percent}% of the devices" if entry.percent is not None else ""
    lines = [f"{where}: {done.model} release {entry.release}, {done.channel}{share}{', on hold' * entry.hold}"]
    rules = [f"minimum {entry.minimum}"] * (entry.minimum is not None)
    rules += [f"{name} runs {level}" for name, level in sorted(entry.levels.items())]
    if rules:
        lines.append("; ".join(rules))
    sent = f"dry run: {done.sent} bytes would be sent" if dry_run else f"{done.sent} bytes sent"
    lines.append(f"{sent}; the timestamp expires {expires}: run `qdeploy refresh` before")
    more = {"sent": done.sent, "expires": done.expires.isoformat(), "dry_run": dry_run}
    show(row | more, "\n".join(lines), as_json)


@click.group(cls=Group)
def keys() -> None:
    """Make and replace the keys that sign releases."""


@keys.command(
    epilog=examples(
        "qdeploy keys init keys",
        "qdeploy keys init keys --root 2/3 --targets 1/2 --passphrase-file words --dry-run",
    )
)
@click.argument("folder", type=PATH)
@click.option("--root", default="1/1", show_default=True, metavar="N/M", help="N of M signatures for new keys.")
@click.option("--targets", default="1/1", show_default=True, metavar="N/M", help="N of M signatures for a release.")
@passphrase_file
@dry_run
@as_json
def init(  # noqa: PLR0913, PLR0917
    folder: Path, root: str, targets: str, passphrase_file: Path | None, dry_run: bool, as_json: bool
) -> None:
    """Make a FOLDER of fresh keys; devices pin its 1.root.json.

    Keep the keys of root and targets off line, those of different holders apart. The online key signs timestamps only.
    """
    from qdeploy.files import check_free
    from qdeploy.trust.keys import Quorum, init_keys

    quorums, words = (Quorum.parse(root), Quorum.parse(targets)), _passphrase(passphrase_file)
    pinned = check_free(folder) and folder / "1.root.json" if dry_run else init_keys(folder, *quorums, words)
    plain = "" if passphrase_file else "; private keys are not encrypted, only their owner can read them"
    text = f"{pinned}: root metadata for devices, root {root}, targets {targets}, online 1/1{plain}"
    row = {"root": str(pinned), "quorums": {"root": root, "targets": targets, "online": "1/1"}, "dry_run": dry_run}
    show(row | {"encrypted": passphrase_file is not None}, "dry run: " * dry_run + text, as_json)


@keys.command(
    epilog=examples(
        "qdeploy keys rotate --keys keys --role online",
        "qdeploy keys rotate --keys keys --role targets --quorum 2/3 --dry-run",
    )
)
@key_folders
@click.option("--role", type=click.Choice(["root", "targets", "online"]), required=True, help="Whose keys go.")
@click.option("--quorum", metavar="N/M", help="N of M signatures from now on (default: as before).")
@passphrase_file
@dry_run
@as_json
def rotate(  # noqa: PLR0913, PLR0917
    folders: tuple[Path, ...], role: str, quorum: str | None, passphrase_file: Path | None, dry_run: bool, as_json: bool
) -> None:
    """Replace all keys of a role, stolen or lost below the threshold of root; then run `qdeploy refresh`."""
    from qdeploy.trust.keys import Quorum, rotate_keys
    from qdeploy.trust.rehearse import rehearse_rotation

    held = _open_keys(folders, passphrase_file)
    wanted = None if quorum is None else Quorum.parse(quorum)
    path = rehearse_rotation(held) if dry_run else rotate_keys(held, role, wanted, _passphrase(passphrase_file))
    text = f"{path}: new keys for {role}; publish them with `qdeploy refresh`"
    show({"root": str(path), "role": role, "dry_run": dry_run}, "dry run: " * dry_run + text, as_json)


@click.command(
    epilog=examples(
        "qdeploy publish tree --to site --keys keys",
        "qdeploy publish tree --to s3://bucket/site --keys keys --keys stick --canary 10% --dry-run",
        "qdeploy publish tree --to site --keys keys --minimum w3 --level raspberry-pi-5=w4",
    )
)
@click.argument("bundle", type=PATH)
@click.option("--to", "where", required=True, metavar="ROOT", help="A folder, or the URL of a store (s3://, gs://, …).")
@key_folders
@passphrase_file
@click.option("--release", type=click.IntRange(1), help="Its number; the next one by default, never one used before.")
@wishes
@click.option("--hold", is_flag=True, help="Publish it, but let no device take it yet.")
@timestamp_days
@dry_run
@as_json
def publish(  # noqa: PLR0913, PLR0917
    bundle: Path,
    where: str,
    folders: tuple[Path, ...],
    passphrase_file: Path | None,
    release: int | None,
    canary: str | None,
    minimum: str | None,
    levels: tuple[str, ...],
    hold: bool,
    days: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish BUNDLE as the next signed release of its model; to go back, publish the old bundle again."""
    from qdeploy.trust.publish import publish as run

    wish, held = _wish(canary, minimum, levels, hold), _open_keys(folders, passphrase_file, dry_run)
    _show(run(bundle, _place(where, dry_run), held, wish, release, days), where, dry_run, as_json)


@click.command(
    epilog=examples(
        "qdeploy rollout site --keys keys --canary 50%",
        "qdeploy rollout site --keys keys --promote --dry-run",
        "qdeploy rollout site --keys keys --hold",
    )
)
@click.argument("where", metavar="ROOT")
@key_folders
@passphrase_file
@click.option("--model", help="Needed where ROOT publishes several.")
@click.option("--promote", is_flag=True, help="All devices take the canary release.")
@wishes
@click.option("--hold/--no-hold", default=None, help="Let no more devices take the release; or let them again.")
@timestamp_days
@dry_run
@as_json
def rollout(  # noqa: PLR0913, PLR0917
    where: str,
    folders: tuple[Path, ...],
    passphrase_file: Path | None,
    model: str | None,
    promote: bool,
    canary: str | None,
    minimum: str | None,
    levels: tuple[str, ...],
    hold: bool | None,
    days: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Change who runs the release that ROOT publishes: the canary where there is one, else the stable one."""
    from qdeploy.trust.publish import change_rollout

    wish, held = _wish(canary, minimum, levels, hold), _open_keys(folders, passphrase_file, dry_run)
    _show(change_rollout(_place(where, dry_run), held, wish, model, promote, days), where, dry_run, as_json)


@click.command(
    epilog=examples("qdeploy refresh site --keys online", "qdeploy refresh site --keys online --days 2 --json")
)
@click.argument("where", metavar="ROOT")
@key_folders
@passphrase_file
@timestamp_days
@dry_run
@as_json
def refresh(  # noqa: PLR0913, PLR0917
    where: str, folders: tuple[Path, ...], passphrase_file: Path | None, days: float, dry_run: bool, as_json: bool
) -> None:
    """Sign a new timestamp for ROOT before the old one expires, and put new keys in force. Run it by a timer."""
    from qdeploy.trust.publish import refresh as run

    found = run(_place(where, dry_run), _open_keys(folders, passphrase_file, dry_run), days)
    later = f"targets {found.targets:%Y-%m-%d}, root {found.root:%Y-%m-%d}"
    text = f"{where}: expires: timestamp {found.timestamp:%Y-%m-%d %H:%M} UTC, {later}"
    row = {name: date.isoformat() for name, date in vars(found).items()}
    show(row | {"dry_run": dry_run}, "dry run: " * dry_run + text, as_json)
