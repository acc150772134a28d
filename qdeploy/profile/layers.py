"""Where an artifact's time goes, kernel by kernel, and what each kernel could reach on this machine.

The artifact's own `profile` function runs the network and reads the clock between two kernels, so that the caches hold
what they hold in a real run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from qdeploy.profile.peak import Peak

SLOW = 0.25  # below this share of what the machine could do, neither arithmetic nor memory is what limits a kernel


def called(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of artifact.json's `kernels` that a run calls, in order: constants are not computed."""
    return [row for row in rows if row["functions"]]


def by_row(times: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Times of calls, [repeat, call] -> of the rows that are `called`, [repeat, row]: a float region has several."""
    firsts = np.cumsum([0, *(len(row["functions"]) for row in called(rows))])[:-1]
    return np.asarray(np.add.reduceat(times, firsts, axis=1))


def repeated(ticks: Callable[[], np.ndarray], whole: Callable[[], Any], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of each call, [repeat, call], and of a `whole` run right before each repeat, [repeat]."""
    times, runs = [], np.empty(repeats + 1)
    for turn in range(repeats + 1):
        start = time.perf_counter()
        whole()
        runs[turn] = time.perf_counter() - start
        times.append(ticks())
    return np.stack(times)[1:] / 1e6, runs[1:] * 1e3  # the first turn warms the caches


def macs(row: Mapping[str, Any]) -> int:
    """Multiply-adds of a row of artifact.json: 0 for what is no convolution or fully connected layer."""
    if "kernel" not in row or "groups" not in row:
        return 0
    return prod(row["output"]) * prod(row["kernel"]) * row["inputs"][0][0] // row["groups"]


def kind(row: Mapping[str, Any]) -> str:
    """How people call a row: depthwise and fully connected layers are convolutions of their own kind."""
    if "kernel" in row and "groups" in row:
        if row["groups"] > 1 and row["groups"] == row["inputs"][0][0]:
            return "depthwise conv"
        if tuple(row["output"][1:]) == (1, 1) and row["kernel"] == row["inputs"][0][1:]:
            return "fully connected"
        return "grouped conv" if row["groups"] > 1 else f"conv {row['kernel'][0]}x{row['kernel'][1]}"
    return str(row["operator"])


def layer_rows(
    rows: Sequence[Mapping[str, Any]], times: np.ndarray, peak: Peak, batch: int = 1
) -> list[dict[str, Any]]:
    """One entry for each of the rows that are `called`, slowest first; `times`: milliseconds, [repeat, call].

    "ms" median and "quartiles" over the repeats, "share" of all kernels' time, "macs", "gops" (two operations a
    multiply-add), "peak_share" of the machine's dot-product peak, "bytes" touched, "gbytes_s", "memory_share" of what
    a copy of that size reaches here, "bound": what limits it, and the fusion lint: "arithmetic" and "reason". Counts
    are of the `batch` images of a run.
    """
    low, medians, high = np.percentile(by_row(times, rows), (25, 50, 75), axis=0)
    found = []
    for i, row in enumerate(called(rows)):
        seconds, count, touched = max(float(medians[i]), 1e-6) / 1e3, batch * macs(row), batch * row["bytes"]
        peak_share = 2 * count / seconds / peak.operations
        memory_share = touched / seconds / peak.bandwidth(row["bytes"])
        entry = {
            "layer": row["name"], "operator": kind(row), "kernel": ", ".join(row["functions"]),
            "arithmetic": row["arithmetic"], "reason": row.get("reason"),
            "ms": float(medians[i]), "quartiles": [float(low[i]), float(high[i])],
            "share": float(medians[i] / medians.sum()), "macs": count, "gops": 2 * count / seconds / 1e9,
            "peak_share": peak_share, "bytes": touched, "gbytes_s": touched / seconds / 1e9,
            "memory_share": memory_share, "bound": bound(peak_share, memory_share),
        }  # fmt: skip
        found.append(entry)
    return sorted(found, key=lambda entry: -entry["ms"])


def bound(peak_share: float, memory_share: float) -> str:
    """What a kernel comes nearest to: "arithmetic", "memory", or "neither" when both shares are small."""
    if max(peak_share, memory_share) < SLOW:
        return "neither"
    return "arithmetic" if peak_share >= memory_share else "memory"
