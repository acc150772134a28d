"""Where an artifact's time goes, kernel by kernel, and what each kernel could reach on this machine.

The calls of one real run are recorded, functions and buffers, and made again in their order with a clock around each:
the caches hold what they hold in a real run, and nothing is done between two kernels but reading the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.compile.artifact import LIBRARY, Packed
from qdeploy.errors import DeviceError
from qdeploy.profile.peak import Peak

RUNTIME = "vm."  # what the virtual machine calls besides kernels: checks, memory
SLOW = 0.25  # below this share of what the machine could do, neither arithmetic nor memory is what limits a kernel


@dataclass(frozen=True)
class Call:
    """One kernel call of a run."""

    kernel: str
    function: Any
    args: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all buffers that it reads or writes, borders and packed weights included."""
        return sum(prod(arg.shape) * np.dtype(str(arg.dtype)).itemsize for arg in self.args)


def recorded(artifact: Path, packed: Packed, x: np.ndarray) -> list[Call]:
    """The kernel calls of `main` on `x`, in order; running them again computes the same."""
    import tvm
    from tvm.runtime.vm import VirtualMachine

    machine = VirtualMachine(tvm.runtime.load_module(str(Path(artifact) / LIBRARY)), tvm.cpu())
    calls: list[Call] = []

    def instrument(function: Any, name: str, before: bool, _: Any, *args: Any) -> int:
        if before and not name.startswith(RUNTIME):
            calls.append(Call(name, function, args))
        return 0

    machine.set_instrument(instrument)
    machine["main"](tvm.runtime.tensor(x), *packed.tensors)
    if not calls:
        raise DeviceError(f"{artifact} calls no kernels that could be timed: compile the model again")
    return calls


def replayed(calls: Sequence[Call], whole: Callable[[], Any], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of each call, [repeat, call], and of a `whole` run right before each repeat, [repeat]."""
    times, runs = np.empty((repeats + 1, len(calls))), np.empty(repeats + 1)
    clock = time.perf_counter
    for turn, row in enumerate(times):
        start = clock()
        whole()
        runs[turn] = clock() - start
        for i, call in enumerate(calls):
            function, args = call.function, call.args
            start = clock()
            function(*args)
            row[i] = clock() - start
    return times[1:] * 1e3, runs[1:] * 1e3  # the first turn warms the caches


def aligned(calls: Sequence[Call], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """artifact.json's row of each call; what lies between and behind the file's operators (the way out) gets its own.

    Kernels are named OPERATOR_NUMBER and are called in the order of artifact.json's `kernels`. Raises DeviceError when
    they are not: the folder's two files do not belong together.
    """
    found, at = [], 0
    for call in calls:
        label = call.kernel.rpartition("_")[0]
        if at < len(rows) and rows[at]["operator"] == label:
            found.append(dict(rows[at]))
            at += 1
        elif label == "dequantize":
            reason = {"arithmetic": "float", "reason": "the output is float32"}
            found.append({"name": label, "operator": label} | reason)
        else:
            found.append({"name": label, "operator": label, "arithmetic": "integer"})
    if at < len(rows):
        raise DeviceError(f"the library does not call {rows[at]['name']} of artifact.json: compile the model again")
    return found


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
    calls: Sequence[Call], rows: Sequence[Mapping[str, Any]], times: np.ndarray, peak: Peak
) -> list[dict[str, Any]]:
    """One entry a kernel call, slowest first.

    "ms" median and "quartiles" over the repeats, "share" of all kernels' time, "macs", "gops" (two operations a
    multiply-add), "peak_share" of the machine's dot-product peak, "bytes" touched, "gbytes_s", "memory_share" of what
    a copy of that size reaches here, "bound": what limits it, and the fusion lint: "arithmetic" and "reason".
    """
    low, medians, high = np.percentile(times, (25, 50, 75), axis=0)
    found = []
    for i, (call, row) in enumerate(zip(calls, aligned(calls, rows), strict=True)):
        seconds, count, touched = float(medians[i]) / 1e3, macs(row), call.bytes
        peak_share = 2 * count / seconds / peak.operations
        memory_share = touched / seconds / peak.bandwidth(touched)
        entry = {
            "layer": row["name"], "operator": kind(row), "kernel": call.kernel, "arithmetic": row["arithmetic"],
            "reason": row.get("reason"), "ms": float(medians[i]), "quartiles": [float(low[i]), float(high[i])],
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
