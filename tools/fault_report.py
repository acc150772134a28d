"""Run the fault suites in their long form and write docs/faults.md: what was tried, how often, and what went wrong.

    python tools/fault_report.py [--share S] [--log FILE] [-o docs/faults.md] [TEST ...]

`--share` is the part of the long form to run (1: all of it). `--log` keeps the counts, one JSON line a test, and adds
to those that are there, so that a run can be done in parts; with `--no-run` the page is made of them alone. Exit code
1 when a suite failed: then no page is written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Fault suites: counts reached

Written by `tools/fault_report.py`; do not edit. {date}, {machine}.

`make test` runs a short form of each suite, `make test-faults` the long one. How they work, and what holds after every
fault, is in the docstrings of `tests/faults/`. A test that finds a wrong output, a lost level, a counter that fell or a
byte too many fails: only tests that found none are counted here. Suites need not all have run in their long form: the
counts say how far each went.

| suite | tests | counts |
|---|---|---|
"""
SKIPPED = ("suite", "test", "seconds")


def merge(rows: list[dict[str, Any]]) -> dict[str, tuple[int, dict[str, Any]]]:
    """{suite: (tests, counts)}: counts of a suite add up, but of "worst_...", "of" and "calls" the highest stays; what
    a test counted twice counts as it was last."""
    latest = {(row["suite"], row["test"]): row for row in rows}
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for row in latest.values():
        number, counts = found.get(row["suite"], (0, {}))
        for key, value in row.items():
            if key in SKIPPED:
                continue
            if key not in counts:
                counts[key] = value
            elif key.startswith("worst_") or key in ("of", "calls"):
                counts[key] = max(counts[key], value)
            else:
                counts[key] += value
        found[row["suite"]] = (number + 1, counts)
    return found


def page(rows: list[dict[str, Any]], machine: str, date: str) -> str:
    """The report as Markdown."""
    text = HEAD.format(machine=machine, date=date)
    for suite, (number, counts) in sorted(merge(rows).items()):
        words = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items())
        text += f"| {suite} | {number} | {words} |\n"
    return text


def run(log: Path, share: float, tests: list[str]) -> bool:
    """Run the suites; whether all passed."""
    environment = os.environ | {"QDEPLOY_FAULTS": str(share), "QDEPLOY_FAULTS_LOG": str(log.resolve())}
    command = [sys.executable, "-m", "pytest", "-q", *(tests or ["tests/faults"])]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> int:
    """Exit code."""
    from qdeploy.profile.latency import machine
    from qdeploy.profile.report import machine_line

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tests", nargs="*", help="tests to run (default: tests/faults)")
    parser.add_argument("--share", type=float, default=1.0, help="part of the long form")
    parser.add_argument("--log", type=Path, help="where counts are kept")
    parser.add_argument("--no-run", action="store_true", help="make the page of --log alone")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "faults.md")
    args = parser.parse_args()
    if args.no_run and args.log is None:
        parser.error("--no-run needs --log FILE")
    with tempfile.TemporaryDirectory() as folder:
        log = args.log or Path(folder) / "counts"
        if not args.no_run and not run(log, args.share, args.tests):
            print("a suite failed: the page is not written", file=sys.stderr)
            return 1
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_atomic(args.out, page(rows, machine_line(machine()), today).encode())
    print(f"{args.out}: {len(merge(rows))} suites")
    return 0


if __name__ == "__main__":
    sys.exit(main())
