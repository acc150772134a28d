"""A device process: inference without end, with commands on its input and a JSON line for each thing that happens.

Commands, one a line: `climb LEVEL`, `drop LEVEL`, `stop`; the end of input stops too. Reports:

* `{"event": "ready", "level", "levels_held", "images"}`
* `{"event": "run", "level", "first", "n", "correct", "median_ms", "max_ms"}`: n images from number `first` on, all by
  this level; one line at the end of each pass over the images and at each change of level
* `{"event": "climb"|"drop", "level", "fetched", "bytes", "seconds", "pause_ms"}`: done; inference went on meanwhile
* `{"event": "error", "command", "error"}`: the level before stays
* `{"event": "stopped", "level"}`
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np

from qdeploy.client.images import load_images, load_labels, to_input
from qdeploy.client.runtime import LevelRunner
from qdeploy.errors import DataError, QDeployError

COMMANDS = "climb LEVEL, drop LEVEL, stop"


@dataclass
class _Stretch:
    """Images run one after another by one level."""

    level: str
    first: int
    correct: int = 0
    times_ms: list[float] = field(default_factory=list)

    def report(self, labelled: bool) -> dict[str, Any]:
        return {
            "event": "run",
            "level": self.level,
            "first": self.first,
            "n": len(self.times_ms),
            "correct": self.correct if labelled else None,
            "median_ms": round(median(self.times_ms), 4),
            "max_ms": round(max(self.times_ms), 4),
        }


class _Reporter:
    """Writes JSON lines from several threads; a reader that went away stops the process."""

    def __init__(self, out: TextIO, stop: threading.Event) -> None:
        self._out, self._stop, self._lock = out, stop, threading.Lock()

    def __call__(self, row: dict[str, Any]) -> None:
        with self._lock:
            try:
                self._out.write(json.dumps(row) + "\n")
                self._out.flush()
            except (BrokenPipeError, ValueError):
                self._stop.set()


def _obey(runner: LevelRunner, commands: TextIO, report: _Reporter, stop: threading.Event) -> None:
    """Carry out commands until `stop` or the end of input."""
    try:
        for line in commands:
            verb, _, level = line.strip().partition(" ")
            if verb == "stop" or stop.is_set():
                break
            if verb not in ("climb", "drop") or not level:
                report({"event": "error", "command": line.strip(), "error": f"commands are {COMMANDS}"})
                continue
            began = time.perf_counter()
            try:
                done = runner.climb(level) if verb == "climb" else runner.drop(level)
            except QDeployError as e:
                report({"event": "error", "command": line.strip(), "error": str(e)})
                continue
            seconds = round(time.perf_counter() - began, 4)
            fetched = {kind: size for kind, size in done.fetched.items() if size}
            row = {"event": verb, "level": done.level, "fetched": fetched, "bytes": done.total_fetched}
            report(row | {"seconds": seconds, "pause_ms": round(runner.pause_s * 1e3, 4)})
    finally:
        stop.set()


def _one_pass(
    runner: LevelRunner,
    x: np.ndarray,
    labels: np.ndarray | None,
    interval_s: float,
    report: _Reporter,
    stop: threading.Event,
) -> None:
    stretch = None
    for i in range(len(x)):
        if stop.is_set():
            break
        began = time.perf_counter()
        output, level = runner.run_with_level(x[i : i + 1])
        taken = (time.perf_counter() - began) * 1e3
        if stretch is None or stretch.level != level:
            if stretch is not None:
                report(stretch.report(labels is not None))
            stretch = _Stretch(level, i)
        stretch.times_ms.append(taken)
        if labels is not None:
            stretch.correct += int(output[0].argmax() == labels[i])
        if interval_s:
            stop.wait(interval_s)
    if stretch is not None:
        report(stretch.report(labels is not None))


def serve_inference(
    folder: Path,
    images: Path,
    labels: Path | None,
    commands: TextIO,
    out: TextIO,
    runtime: str = "tvm",
    interval_s: float = 0.0,
    mode: str = "swap",
    rate: float | None = None,
) -> None:
    """Run the images in `images` over and over until told to stop; see the module's docstring.

    `interval_s` is a rest between two images, `mode` how levels change (runtime.py), `rate` caps the bytes a second of
    climbs. Raises what `LevelRunner` and `load_images` raise, before "ready".
    """
    runner = LevelRunner(folder, runtime, mode=mode, rate=rate)
    x = to_input(load_images(images), runner.sample)
    truth = load_labels(labels) if labels is not None else None
    if truth is not None and len(truth) != len(x):
        raise DataError(f"{labels} holds {len(truth)} labels for {len(x)} images")
    stop = threading.Event()
    report = _Reporter(out, stop)
    report({"event": "ready", "level": runner.level, "levels_held": runner.levels_held, "images": len(x)})
    threading.Thread(target=_obey, args=(runner, commands, report, stop), daemon=True).start()
    while not stop.is_set():
        _one_pass(runner, x, truth, interval_s, report, stop)
    report({"event": "stopped", "level": runner.level})
