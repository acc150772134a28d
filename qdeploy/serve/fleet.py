"""The fleet as devices reported it: who runs which level, who is behind, who is silent, and what the rollout wants."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from qdeploy.bundle.rollout import Channels, choose
from qdeploy.client.fetch import Patience, Source
from qdeploy.client.status import NAME, DeviceState
from qdeploy.errors import BundleError, DataError
from qdeploy.files import parse_json
from qdeploy.serve.catalogue import read_signed
from qdeploy.serve.database import history, page, reading, state_of

PAGE_LIMIT = 4 << 20  # bytes of a page of the admin port
SHOWN = 20  # names in a line for people
Rows = list[tuple[float, DeviceState]]


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _fetch(source: Source, path: str) -> list[dict[str, Any]]:
    found = parse_json(source.small(path, PAGE_LIMIT), f"{source.url}/{path}", DataError)
    if not isinstance(found, dict) or not isinstance(found.get("devices"), list):
        raise DataError(f"{source.url} does not list devices: give the URL of `qdeploy serve --admin-port`")
    return list(found["devices"])


def read_fleet(source: str) -> Rows:
    """(when it was last heard of, state) of every device, by name. `source` is a state database or an admin URL.

    Raises DataError, DeviceError, FetchError.
    """
    rows: Rows = []

    def last() -> str:
        return rows[-1][1].device if rows else ""

    if _is_url(source):
        with Source(source, Patience(attempts=2)) as server:
            while found := [state_of(row) for row in _fetch(server, f"devices?{urlencode({'after': last()})}")]:
                if found[0][1].device <= last():
                    raise DataError(f"{source} repeats itself: give the URL of `qdeploy serve --admin-port`")
                rows += found
        return rows
    with reading(Path(source)) as db:
        while page_rows := page(db, last()):
            rows += [state_of(row) for row in page_rows]
    return rows


def read_history(source: str, device: str) -> list[dict[str, Any]]:
    """The kept changes of one device, oldest first; raises DataError when it never reported."""
    if NAME.fullmatch(device) is None:
        raise DataError(f"{device!r} is no name of a device")
    if _is_url(source):
        with Source(source, Patience(attempts=2)) as server:
            rows = _fetch(server, f"devices/{device}")
    else:
        with reading(Path(source)) as db:
            rows = history(db, device)
    if not rows:
        raise DataError(f"{source} has heard nothing of {device}")
    for row in rows:
        state_of(row)
    return rows


def wish_of(rollout: dict[str, Channels], state: DeviceState) -> dict[str, Any] | None:
    """What the rollout wants of a device that does otherwise; None when all is well."""
    try:
        channel, entry = choose(rollout, state.model, state.device, state.channel)
    except BundleError as e:
        return {"device": state.device, "problem": str(e)}
    level = entry.levels.get(state.target)
    if state.release == entry.release:
        content = level in (None, state.reached)
    else:
        content = entry.hold and state.release < entry.release
    if content:
        return None
    return {
        "device": state.device,
        "channel": channel,
        "release": state.release,
        "wanted_release": entry.release,
        "level": state.reached,
        "wanted_level": level,
    }


def summarize(rows: Rows, now: float, silent_s: float, rollout: dict[str, Channels] | None = None) -> dict[str, Any]:
    """The fleet at time `now`: counts of (model, channel, release, level), and who needs a look.

    `rollout` None leaves out who does not run what it wants.
    """
    states = [state for _, state in rows]
    counts = Counter((s.model, s.channel or "", s.release, s.reached) for s in states)
    found: dict[str, Any] = {
        "devices": len(states),
        "runs": [
            {"model": model, "channel": channel or None, "release": release, "level": level, "devices": count}
            for (model, channel, release, level), count in sorted(counts.items())
        ],
        "fetched_bytes": sum(s.fetched for s in states),
        "behind": [
            {"device": s.device, "wanted": s.wanted, "reached": s.reached} for s in states if s.wanted != s.reached
        ],
        "stale": [s.device for s in states if s.stale],
        "errors": [{"device": s.device, "error": s.error} for s in states if s.error is not None],
        "silent": [{"device": s.device, "seconds": round(now - seen)} for seen, s in rows if now - seen > silent_s],
    }
    if rollout is not None:
        wishes = [wish_of(rollout, s) for s in states]
        found["otherwise"] = [wish for wish in wishes if wish is not None]
    return found


def fleet(source: str, now: float, silent_s: float, tree: Path | None = None) -> dict[str, Any]:
    """`summarize` what `source` says, beside the rollout of the published tree `tree`. Raises as its readers do."""
    rollout = None if tree is None else read_signed(tree).rollout
    return summarize(read_fleet(source), now, silent_s, rollout)


def _listed(title: str, texts: list[str]) -> list[str]:
    more = [f"and {len(texts) - SHOWN} more"] * (len(texts) > SHOWN)
    return [f"{title} ({len(texts)}): {', '.join(texts[:SHOWN] + more)}"] if texts else []


def _wish(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"{row['device']}: {row['problem']}"
    wanted = f"release {row['wanted_release']}" + (f" {row['wanted_level']}" if row["wanted_level"] else "")
    return f"{row['device']} on {row['channel']}: release {row['release']} {row['level']}, not {wanted}"


def render(found: dict[str, Any]) -> str:
    """The summary for people: a table of what runs, then a line for each kind of trouble there is."""
    lines = [f"{found['devices']} devices, {found['fetched_bytes']} bytes fetched"]
    cells = [("model", "channel", "release", "level", "devices")]
    for row in found["runs"]:
        cells.append((row["model"], row["channel"] or "-", str(row["release"]), row["level"], str(row["devices"])))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    if found["runs"]:
        lines += [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
    lines += _listed(
        "behind", [f"{row['device']} ({row['reached']}, wants {row['wanted']})" for row in found["behind"]]
    )
    lines += _listed("stale", found["stale"])
    lines += _listed("errors", [f"{row['device']}: {row['error']}" for row in found["errors"]])
    lines += _listed("silent", [f"{row['device']} ({row['seconds'] // 3600} h)" for row in found["silent"]])
    lines += _listed("not what the rollout wants", [_wish(row) for row in found.get("otherwise", [])])
    return "\n".join(lines)


def history_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The changes of one device for people, a line each, in UTC."""
    lines = []
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(row["seen"]))
        runs = f"{row['model']} release {row['release']} {row['reached']}"
        wants = "" if row["wanted"] == row["reached"] else f", wants {row['wanted']}"
        lines.append(f"{when} {runs}{wants}{', stale' * row['stale']}{', ' + row['error'] if row['error'] else ''}")
    return lines
