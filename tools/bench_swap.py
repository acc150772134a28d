"""Levels changed while inference runs: the time and memory it takes in both modes, and whether outputs are pure.

    python tools/bench_swap.py [--model FILE] [--climbs N] [--rate BYTES] [-o JSON]

A ladder of 2, 4 and 8 bits is cut from the weights of one QDQ model, bundled, served on the loopback interface and
pulled. Then a process for each mode infers without end while another thread climbs and drops. Printed are the time of
an inference at rest and its longest while a level changed (other work of the machine included), how long inference was
kept from beginning (pause), resident bytes beyond those at rest, and how many outputs were not those of exactly one
level. Peaks are VmHWM, reset before a climb.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.client.runtime import MODES, LevelRunner
from qdeploy.errors import QDeployError
from qdeploy.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {"w2": 2, "w4": 4, "w8": 8}


def cut(model: Path, bits: int, out: Path) -> None:
    """The model with its int8 weights cut to `bits` bits, unknown ones at their midpoint."""
    import onnx
    from onnx import numpy_helper

    loaded = onnx.load(model)
    weights = {name for node in loaded.graph.node if node.op_type == "DequantizeLinear" for name in node.input[:1]}
    for tensor in loaded.graph.initializer:
        codes = numpy_helper.to_array(tensor)
        if tensor.name in weights and codes.dtype == np.int8 and codes.ndim > 1:
            below = 8 - bits
            middle = (1 << below >> 1) - 1 if below else 0
            cut_codes = ((codes.astype(np.int16) >> below) << below) + middle
            tensor.CopyFrom(numpy_helper.from_array(cut_codes.astype(np.int8), tensor.name))
    out.write_bytes(loaded.SerializeToString())


def ladder_tree(model: Path, folder: Path, tree: Path) -> list[Path]:
    """Cut, compile and bundle the ladder of `model` to `tree`; its levels, lowest first, and `artifact` in `folder`."""
    from qdeploy.bundle.write import write_bundle
    from qdeploy.compile.pipeline import compile_model
    from qdeploy.ladder import read_ladder
    from qdeploy.target import load_target

    paths = [folder / f"{name}.onnx" for name in LEVELS]
    for path, bits in zip(paths, LEVELS.values(), strict=True):
        cut(model, bits, path)
    ladder = read_ladder(paths)
    for path, level in zip(paths, ladder.levels, strict=True):
        path.write_bytes(level.data)  # the form in which the bundle gives it back
    compile_model(paths[0], load_target(ROOT / "targets" / "host.toml"), folder / "artifact")
    write_bundle(ladder, [folder / "artifact"], tree)
    return paths


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since `forget`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{field} is not in /proc/self/status")


def forget() -> None:
    """Begin VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Inference:
    """Runs one image again and again in a thread; keeps when each call began and ended, its level and its output."""

    def __init__(self, runner: LevelRunner, x: np.ndarray) -> None:
        self.calls: list[tuple[float, float, str, bytes]] = []
        self._over = threading.Event()
        self._runner, self._x = runner, x
        self._thread = threading.Thread(target=self._go)

    def _go(self) -> None:
        while not self._over.is_set():
            began = time.perf_counter()
            output, level = self._runner.run_with_level(self._x)
            self.calls.append((began, time.perf_counter(), level, output.tobytes()))

    def __enter__(self) -> Inference:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait(self, count: int) -> None:
        """Until so many calls more have ended."""
        wanted = len(self.calls) + count
        while len(self.calls) < wanted:
            time.sleep(0.001)


def one_level_each(calls: list[tuple[float, float, str, bytes]], known: dict[str, bytes]) -> int:
    """Outputs that are not those of the level that is said to have made them."""
    return sum(output != known[level] for _, _, level, output in calls)


def measure(folder: Path, mode: str, climbs: int, rate: float | None) -> dict[str, Any]:
    """In a process of its own: climb and drop `climbs` times under inference."""
    runner = LevelRunner(folder, mode=mode, rate=rate)
    artifact = runner._backend._artifact  # type: ignore[union-attr]
    x = np.random.default_rng(0).random((1, *runner.sample), np.float32)
    known, steps, extra = {}, [], []
    for level in LEVELS:  # also fetches everything, so that what follows measures the change alone
        if level != runner.level:
            before = resident("VmRSS")
            forget()
            runner.climb(level)
            extra.append(resident("VmHWM") - before)
        known[level] = runner.run(x).tobytes()
    fetched = max(extra)
    runner.drop("w2")
    with Inference(runner, x) as inference:
        inference.wait(20)
        rest = sorted(end - begin for begin, end, _, _ in inference.calls)
        peaks = []
        for _ in range(climbs):
            for go, level in ((runner.climb, "w4"), (runner.climb, "w8"), (runner.drop, "w2")):
                before, first = resident("VmRSS"), len(inference.calls)
                forget()
                go(level)
                inference.wait(2)
                peaks.append(resident("VmHWM") - before)
                steps.append((max(end - begin for begin, end, _, _ in inference.calls[first:]), runner.pause_s))
    layers = [int(np.prod(p.shape)) for p in artifact.params if p.dtype in ("int8", "uint8")]
    return {
        "mode": mode,
        "changes": len(peaks),
        "inferences": len(inference.calls),
        "impure": one_level_each(inference.calls, known),
        "inference_ms": 1e3 * rest[len(rest) // 2],
        "longest_ms": 1e3 * max(longest for longest, _ in steps),
        "pause_ms": 1e3 * max(pause for _, pause in steps),
        "packed_bytes": artifact.description["packed_bytes"],
        "arena_bytes": artifact.arena_bytes,
        "largest_layer_bytes": max(layers),
        "extra_bytes": max(peaks),
        "extra_fetching_bytes": fetched,
    }


def line(row: dict[str, Any]) -> str:
    """One mode, for people."""
    packed, layer, extra = row["packed_bytes"], row["largest_layer_bytes"], row["extra_bytes"]
    bound = packed if row["mode"] == "swap" else layer + (packed + row["arena_bytes"]) // 10
    return (
        f"{row['mode']:9} inference {row['inference_ms']:.1f} ms, longest in a change {row['longest_ms']:.1f} ms, "
        f"pause {row['pause_ms']:.3f} ms; beyond the running level {extra / 1e6:.2f} MB "
        f"({row['extra_fetching_bytes'] / 1e6:.2f} with the download), bound {bound / 1e6:.2f} MB "
        f"(packed {packed / 1e6:.2f}, arena {row['arena_bytes'] / 1e6:.2f}, largest layer {layer / 1e6:.2f}); "
        f"{row['impure']} of {row['inferences']} outputs of no one level in {row['changes']} changes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "bench" / "resnet18.qdq.onnx")
    parser.add_argument("--climbs", type=int, default=4)
    parser.add_argument("--rate", type=float, help="bytes a second of a climb")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], args.climbs, args.rate)))
        return
    from qdeploy.client.pull import pull
    from qdeploy.profile.latency import machine
    from qdeploy.profile.report import machine_line
    from qdeploy.serve.app import serving

    if not args.model.is_file():
        raise SystemExit(f"{args.model} is missing: make it by tools/bench_compile.py --networks resnet18")
    print(machine_line(machine()))
    rows = []
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        try:
            ladder_tree(args.model, folder, folder / "tree")
        except QDeployError as e:
            raise SystemExit(f"{args.model} makes no ladder: {e}") from e
        with serving(folder / "tree") as url:
            for mode in MODES:
                pull(url, folder / mode, "w2", unsigned=True)
                command = [
                    sys.executable,
                    __file__,
                    "--climbs",
                    str(args.climbs),
                    "--measure",
                    str(folder / mode),
                    mode,
                ]
                command += [] if args.rate is None else ["--rate", str(args.rate)]
                rows.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
                print(line(rows[-1]), flush=True)
    if args.out:
        write_atomic(args.out, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
