"""Run benchmarks into docs/numbers/NAME.json, one after another; make their page, docs/numbers.md, from these files.

    python tools/numbers_page.py                     the page
    python tools/numbers_page.py --run               what has no file yet, then the page; Ctrl-C and again goes on
    python tools/numbers_page.py --run swap memory   these anew
    python tools/numbers_page.py --list              what there is, and how long each takes

A file holds what its benchmark wrote, and where, when and by which command. Goals stand beside the figures, here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from qdeploy.files import write_atomic  # noqa: E402

FOLDER, PAGE = ROOT / "docs" / "numbers", ROOT / "docs" / "numbers.md"
FORMAT = "qdeploy-numbers/1"
PACKAGES = ("qdeploy", "numpy", "apache-tvm", "onnxruntime", "openvino")
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, goal: value <= goal,
    ">=": lambda value, goal: value >= goal,
    "=": lambda value, goal: value == goal,
}


@dataclass(frozen=True)
class Figure:
    """One number, and the goal it is held to: a sign of SIGNS and a number; None where there is no goal."""

    what: str
    value: float
    unit: str = ""
    goal: tuple[str, float] | None = None

    @property
    def short(self) -> bool:
        """Whether it misses its goal."""
        return self.goal is not None and not SIGNS[self.goal[0]](self.value, self.goal[1])


@dataclass(frozen=True)
class Bench:
    """A benchmark: what its figures say, its options, about how many minutes two quiet cores take, what it needs."""

    title: str
    minutes: float
    figures: Callable[[Any], Iterator[Figure]]
    options: str = ""
    needs: str = ""


def bundle(rows: Any) -> Iterator[Figure]:
    """Goals are those of networks of a million weights and more."""
    for row in rows:
        held = row["weights"] >= 1e6  # noqa: PLR2004
        yield Figure(f"{row['case']}: base over its entropy", row["base_over_framed"], "%", ("<=", 2) if held else None)
        yield Figure(f"{row['case']}: all planes", row["all_over_framed"], "%", ("<=", 4) if held else None)


def compiled(found: Any) -> Iterator[Figure]:
    """Geometric means over the networks; goals are those of each instruction set."""
    goals = {
        ("x86-64-amx", "ort"): 2.5, ("x86-64-amx", "openvino"): 1.5, ("x86-64-avx512", "ort"): 1.4,
    }  # fmt: skip
    for target in found["targets"]:
        name = target["target"]
        for peer, mean in target.get("means", {}).items():
            if peer == "missing":
                continue
            goal = goals.get((name, peer))
            yield Figure(
                f"{name}: times faster than {peer}, geometric mean of {mean['of']}", mean["mean"], "x",
                None if goal is None else (">=", goal),
            )  # fmt: skip
            least = (">=", 1.1) if (name, peer) == ("x86-64-avx512", "ort") else None
            yield Figure(f"{name}: least against {peer}", mean["least"], "x", least)


def gpu(found: Any) -> Iterator[Figure]:
    for row in found["rows"]:
        yield Figure(f"{row['network']}, batch {row['batch']}: runs that differ", row["differ"], "", ("=", 0))
        yield Figure(f"{row['network']}, batch {row['batch']}: a new level", row["prepare"], "ms")


def first_inference(rows: Any) -> Iterator[Figure]:
    """Of ResNet-18 a third of the time; of all, seconds that follow the bytes."""
    for row in rows:
        held = row["model"].startswith("resnet18.")
        share, apart = 100 * row["seconds_share"], 100 * abs(row["seconds_share"] - row["bytes_share"])
        yield Figure(f"{row['model']}: base, of the int8 download's time", share, "%", ("<=", 35) if held else None)
        yield Figure(f"{row['model']}: from its share of bytes", apart, "points", ("<=", 5))


def memory(rows: Any) -> Iterator[Figure]:
    for row in rows:
        error = 100 * abs(row["predicted"] / row["measured"] - 1)
        yield Figure(f"{row['network']}, {row['process']}: error of the prediction", error, "%", ("<=", 5))


def mixquant(rows: Any) -> Iterator[Figure]:
    goals = {"EfficientNet-Lite0": 0.2, "ResNet-50": 0.5}
    for row in rows:
        goal = goals.get(row["network"])
        what = f"{row['network']}, {row['criterion']}: error table"
        yield Figure(what, row["table_s"], "s", None if goal is None else ("<=", goal))


def prepare(rows: Any) -> Iterator[Figure]:
    for row in rows:
        yield Figure(f"{row['target']}: {row['weights'] / 1e6:.1f} M weights packed", row["ms"], "ms")
        for label, join in row["joins"].items():
            share = 100 * join["bytes_s"] / join["copy_bytes_s"]
            yield Figure(f"{row['target']}: planes joined, {label}, of a copy's speed", share, "%")


def server(rows: Any) -> Iterator[Figure]:
    """Beside nginx in the same run; goals for objects of 1 MiB."""
    for row in rows:
        case, ours, big = (
            f"{row['connections']} connections, {row['bytes']} bytes",
            row["qdeploy"],
            row["bytes"] == 2**20,
        )
        many = row["connections"] >= 1000  # noqa: PLR2004
        yield Figure(f"{case}: errors", ours["errors"], "", ("=", 0))
        yield Figure(f"{case}: peak memory", ours["peak_mib"], "MiB", ("<=", 100 * 1e6 / 2**20) if many else None)
        if theirs := row.get("nginx"):
            share = 100 * ours["mib_s"] / theirs["mib_s"]
            yield Figure(f"{case}: of nginx's throughput", share, "%", (">=", 50) if big and not many else None)
            p99 = ours["p99_ms"] / theirs["p99_ms"]
            yield Figure(f"{case}: p99 against nginx's", p99, "x", ("<=", 3) if many else None)


def browser(found: Any) -> Iterator[Figure]:
    """Of the page in Chromium; goals are for a page that is opened for the first time, and for its answers."""
    for what, seconds in found["seconds"].items():
        yield Figure(what, seconds, "s", ("<=", 1) if what == "usable" else None)
    for level, row in found["levels"].items():
        yield Figure(f"{level}: answers that are not Python's", row["other answers"], "", ("=", 0))
        yield Figure(f"{level}: an image", row["ms"], "ms")


def swap(rows: Any) -> Iterator[Figure]:
    for row in rows:
        yield Figure(f"{row['mode']}: outputs of no one level", row["impure"], "", ("=", 0))
        short = ("<=", row["inference_ms"]) if row["mode"] == "swap" else None
        yield Figure(f"{row['mode']}: longest pause of a change", row["pause_ms"], "ms", short)
        yield Figure(f"{row['mode']}: memory beyond the running level", row["extra_bytes"] / 1e6, "MB")


BENCHES = {
    "browser": Bench("A browser as a device", 2, browser, needs="`make web`, playwright and Chromium"),
    "bundle": Bench("Bytes of bundles", 3, bundle),
    "compile": Bench("Compiled networks beside their peers", 40, compiled, "--repeats 15"),
    "cuda": Bench("On a GPU", 20, gpu, needs="an NVIDIA GPU and its driver"),
    "first_inference": Bench(
        "Time to the first inference over 1 Mbit/s", 8, first_inference, needs="`compile` before it"
    ),
    "memory": Bench("Predicted memory", 3, memory, needs="`make cross`, and `compile` before it"),
    "mixquant": Bench("MixQuant's tables", 1, mixquant),
    "prepare": Bench("Going to another level", 2, prepare, needs="`compile` before it"),
    "server": Bench("The built-in server beside nginx", 3, server, needs="nginx"),
    "swap": Bench("Levels changed under inference", 3, swap, needs="`compile` before it"),
}
# their pages have their figures; they need hours, a trained run or image sets that do not ship
ELSEWHERE = {
    "ptq": "post-training quantization: [quantize](quantize.md)",
    "predictor": "the accuracy predictor: [search](search.md)",
    "latency_predictor": "the latency predictor: [devices](devices.md)",
    "search": "the search against pymoo and random search: [search](search.md)",
}


def versions() -> dict[str, str]:
    """Versions of what decides the figures, as far as it is installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(name: str) -> str:
    """Run a benchmark and write its file; "" or why there is none."""
    from qdeploy.profile.latency import machine
    from qdeploy.profile.report import machine_line

    command = ["tools/" + f"bench_{name}.py", *shlex.split(BENCHES[name].options)]
    start, began = time.monotonic(), datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        code = subprocess.run([sys.executable, *command, "-o", str(out)], cwd=ROOT, check=False).returncode
        if not out.is_file():
            return f"{name}: exit code {code}, nothing written"
        results = json.loads(out.read_bytes())
    found = {
        "format": FORMAT,
        "command": shlex.join(["python", *command]),
        "date": began.date().isoformat(),
        "seconds": round(time.monotonic() - start),
        "machine": machine_line(machine()),
        "versions": versions(),
        "results": results,
    }
    write_atomic(FOLDER / f"{name}.json", (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
    return ""


def number(value: float) -> str:
    """Three digits, more before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"  # noqa: PLR2004


def section(name: str, found: dict[str, Any] | None) -> list[str]:
    """One benchmark's part of the page."""
    bench = BENCHES[name]
    lines = [f"## {bench.title}", ""]
    if found is None:
        need = f" It needs {bench.needs}." if bench.needs else ""
        return [*lines, f"Not measured yet: `make bench NUMBERS={name}`, about {bench.minutes:g} minutes.{need}", ""]
    numbers = ", ".join(f"{package} {number}" for package, number in sorted(found["versions"].items()))
    lines += [f"`{found['command']}`, {found['date']}, {found['seconds']} s; {found['machine']}; {numbers}.", ""]
    lines += ["| | | goal | |", "|---|---:|---:|---|"]
    for figure in bench.figures(found["results"]):
        goal = "" if figure.goal is None else f"{figure.goal[0]} {number(figure.goal[1])}"
        verdict = "" if figure.goal is None else "**missed**" if figure.short else "met"
        lines.append(
            f"| {figure.what} | {number(figure.value)} {figure.unit} | {goal} | {verdict} |".replace("  |", " |")
        )
    return [*lines, ""]


def page() -> str:
    """docs/numbers.md."""
    found = {name: FOLDER / f"{name}.json" for name in BENCHES}
    results = {name: json.loads(path.read_bytes()) if path.is_file() else None for name, path in found.items()}
    held = [f for name, r in results.items() if r is not None for f in BENCHES[name].figures(r["results"]) if f.goal]
    short = sum(figure.short for figure in held)
    lines = [
        "# Numbers",
        "",
        "Made by `python tools/numbers_page.py` from `docs/numbers/*.json`, which `make bench` writes: a file each,",
        "from one run, with the machine it ran on. Goals stand beside the figures, also those that are missed.",
        "",
        f"{len(held)} figures have a goal: {len(held) - short} met, {short} missed.",
        "",
    ]
    for name in BENCHES:
        lines += section(name, results[name])
    lines += ["## Elsewhere", "", *(f"* `tools/bench_{name}.py`, {text}" for name, text in ELSEWHERE.items())]
    lines += ["* accuracy of the papers' methods, and of this project's: [claims](claims.md)"]
    lines += ["* faults that delivery was put through: [fault suites](faults.md)"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit code 1 when a benchmark wrote nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", choices=[[], *BENCHES], metavar="NAME")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        for name, bench in BENCHES.items():
            state = "there" if (FOLDER / f"{name}.json").is_file() else "missing"
            print(f"{name:16} {bench.minutes:4g} min  {state:8} {bench.needs}")
        return 0
    problems = []
    if args.run is not None:
        for name in args.run or [name for name in BENCHES if not (FOLDER / f"{name}.json").is_file()]:
            print(f"== {name}, about {BENCHES[name].minutes:g} minutes", flush=True)
            problems += [problem for problem in [run(name)] if problem]
            write_atomic(PAGE, page().encode())
    write_atomic(PAGE, page().encode())
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
