"""One artifact's latency for a record: whole runs and single kernels in turn, and whether the machine was quiet enough.

The check: consecutive thirds of the rounds must agree in their medians. Where they do not, it is measured again, and
after some attempts refused: a figure that does not repeat within a minute teaches a search nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qdeploy.compile.artifact import Artifact
from qdeploy.errors import DeviceError
from qdeploy.profile.latency import BLOCK, WARM_UP, machine, summary

ROUNDS = 15
PARTS, ATTEMPTS = 3, 4
NOISE = 0.2  # medians of the parts may differ by so much, relatively


def drift(times: np.ndarray) -> float:
    """Greatest difference between the medians of consecutive thirds of `times`, relative to the median of all."""
    medians = [float(np.median(part)) for part in np.array_split(times, PARTS)]
    return (max(medians) - min(medians)) / float(np.median(times))


def quiet(measure: Callable[[], Any], times: Callable[[Any], np.ndarray], limit: float, what: str) -> Any:
    """What `measure` returns in the first of ATTEMPTS whose `times` drift by at most `limit`; DeviceError for none."""
    seen = []
    for _ in range(ATTEMPTS):
        found = measure()
        seen.append(drift(times(found)))
        if seen[-1] <= limit:
            return found
    raise DeviceError(
        f"{what} is too noisy to record a latency: medians of one measurement differ by {min(seen):.0%}, "
        f"{limit:.0%} is allowed: stop what else runs there, or allow more with --noise"
    )


def turns(run: Callable[[], Any]) -> int:
    """How many runs take about BLOCK seconds, after a warm-up; by the fastest seen, so that no interruption counts."""
    best, end = float("inf"), time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        best = min(best, elapsed(run))
    return max(1, round(BLOCK / max(best, 1e-7)))


def elapsed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(loaded: Artifact, params: Mapping[str, np.ndarray], limit: float = NOISE) -> dict[str, Any]:
    """{"latency": `summary`, "kernels": [[low, median, high], ...] in ms for each call of a run, "packed_bytes",
    "arena_bytes", "machine", "drift"}. Raises DeviceError, also for a machine that is too noisy.

    Every run is timed by itself and medians are taken: where another process gets the processor in between, that is a
    few runs among many and not a longer time for all. A run on a GPU ends when its outputs are here; times of single
    kernels are those between the GPU's own events, and "machine" is its name.
    """
    packed = loaded.prepare(params)
    x = np.random.default_rng(0).standard_normal(loaded.input_shape).astype(np.float32)
    run, ticks = loaded.runner(x, packed), loaded.ticks(x, packed)
    count = turns(run)

    def measure() -> tuple[np.ndarray, np.ndarray]:
        whole, calls = np.empty(ROUNDS), []
        for i in range(ROUNDS):
            whole[i] = np.median([elapsed(run) for _ in range(count)]) * 1e3
            calls += [ticks() for _ in range(count)][count // 4 :]
        return whole, np.stack(calls)

    name = loaded.connect() or str(machine()["cpu"])
    whole, calls = quiet(measure, lambda found: found[0], limit, name)
    kernels = np.percentile(calls / 1e6, (25, 50, 75), axis=0).T.tolist()
    found = {"latency": summary(whole), "kernels": kernels, "drift": drift(whole), "machine": name}
    return found | {"packed_bytes": packed.nbytes, "arena_bytes": loaded.arena_bytes}
