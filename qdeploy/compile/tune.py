"""Measures ways to compute convolutions on this machine and remembers those that beat the cost models' way.

A cache file is JSON, and says which way is best for a convolution on a target:

    {"format": "qdeploy-tune/1", "targets": {ID: {"cpu": ..., "features": [...], "versions": {...}, "convolutions":
     {ID: {"shape": for people, "choice": {"family": ..., "pixels": ..., "blocks": ...}, "gain": ...}}}}}

An ID is the SHA-256 of what must be equal: of a target its cpu, features and versions, of a convolution its ConvSpec.
`gain` is the time of the cost models' way by that of the choice, 1 where nothing is faster.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy import __version__
from qdeploy.compile.artifact import THREAD_VARIABLES
from qdeploy.compile.codegen import library
from qdeploy.compile.kernels.conv import conv_kernel, ways
from qdeploy.compile.kernels.emit import Buffer, load, prim_func
from qdeploy.compile.kernels.spec import Choice, ConvSpec
from qdeploy.compile.llvm import Resolved
from qdeploy.errors import CompileError
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256, write_atomic

FORMAT = "qdeploy-tune/1"
WAYS = 8  # that are measured: those that the cost models put first
ROUNDS, FINAL_ROUNDS, FINALISTS = 7, 25, 2  # all ways in turn, then the best of them beside the default
BURST = 1e-3  # seconds of one measurement
GAIN = 0.97  # of the default's time, which a winner stays below; and below all of it in three rounds of four
QUANTIZER = np.array([0.02, 100, 0, 255], np.float32)

Cache = dict[str, Any]
Run = Callable[[int], float]  # turns -> seconds
Echo = Callable[[str], None]


def default_cache() -> Path:
    """Where `--tune` remembers what it measured: qdeploy/tune.json in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdeploy" / "tune.json"


def choices(
    specs: Sequence[ConvSpec], resolved: Resolved, cache: Path, seconds: float, say: Echo
) -> dict[ConvSpec, Choice]:
    """The best known way for each of `specs`, after measuring those that `cache` lacks for at most `seconds`.

    What takes most multiply-adds is measured first; a convolution that has begun is finished. What was measured is
    written to `cache` also when this is interrupted. Raises CompileError for a damaged cache, or a missing one where
    nothing is to be measured.
    """
    if not seconds and not cache.exists():
        raise CompileError(f"there is no tuning cache {cache}: make one with --tune SECONDS")
    found = known(read_cache(cache), specs, resolved)
    counts = Counter(spec for spec in specs if spec not in found and len(ways(spec)) > 1)
    missing = sorted(counts, key=lambda spec: -counts[spec] * multiply_adds(spec))
    if not seconds or not missing:
        return found
    end, measured = time.monotonic() + seconds, dict[ConvSpec, Measured]()
    try:
        for spec in missing:
            if time.monotonic() >= end:
                break
            measured[spec] = measure(spec, resolved)
    finally:
        if measured:
            write_atomic(cache, canonical_json(added(read_cache(cache), measured, resolved)))
    say(summary(measured, counts))
    return found | {spec: best.choice for spec, best in measured.items()}


def multiply_adds(spec: ConvSpec) -> int:
    """Of one convolution."""
    return prod(spec.y.shape) * prod(spec.window.kernel) * spec.inputs


@dataclass(frozen=True)
class Measured:
    """The best way, its seconds and those of the cost models' way."""

    choice: Choice
    seconds: float
    default: float


def summary(measured: dict[ConvSpec, Measured], counts: Counter[ConvSpec]) -> str:
    """What tuning gained, for people."""
    before = sum(counts[spec] * best.default for spec, best in measured.items())
    after = sum(counts[spec] * best.seconds for spec, best in measured.items())
    faster = sum(best.seconds < best.default for best in measured.values())
    text = f"tuning: {faster} of {len(measured)} convolutions are faster another way"
    text += f", all together {1e3 * after:.3f} instead of {1e3 * before:.3f} ms"
    left = len(counts) - len(measured)
    return text + (f"; no time was left for {left} smaller ones" if left else "")


# The cache ----------------------------------------------------------------------------------------------------------


def target_of(resolved: Resolved) -> dict[str, Any]:
    """What must be equal for a measurement to count."""
    versions = {"qdeploy": __version__, "apache-tvm": version("apache-tvm")}
    return {"cpu": resolved.cpu, "features": list(resolved.features), "versions": versions}


def spec_id(spec: ConvSpec) -> str:
    """Name of a convolution in the cache."""
    return sha256(canonical_json(asdict(replace(spec, choice=None))))


def read_cache(path: Path) -> Cache:
    """The cache in `path`, empty where there is none; raises CompileError for a damaged one."""
    if not path.exists():
        return {"format": FORMAT, "targets": {}}
    cache = parse_json(read_bytes(path, "the tuning cache", CompileError), str(path), CompileError)
    if not isinstance(cache, dict) or cache.get("format") != FORMAT or not isinstance(cache.get("targets"), dict):
        raise CompileError(f"{path} is not a tuning cache of format {FORMAT}: delete it")
    return cache


def known(cache: Cache, specs: Sequence[ConvSpec], resolved: Resolved) -> dict[ConvSpec, Choice]:
    """Choices of the cache for `specs`; raises CompileError for one that is none of its ways."""
    try:
        rows = cache["targets"].get(sha256(canonical_json(target_of(resolved))), {"convolutions": {}})["convolutions"]
        found = {spec: Choice(**rows[spec_id(spec)]["choice"]) for spec in set(specs) if spec_id(spec) in rows}
    except (KeyError, TypeError, AttributeError) as e:
        raise CompileError("the tuning cache is damaged: delete it") from e
    for spec, choice in found.items():
        if choice not in ways(spec):
            raise CompileError(f"the tuning cache has no way to compute a convolution ({choice}): delete it")
    return found


def added(cache: Cache, measured: dict[ConvSpec, Measured], resolved: Resolved) -> Cache:
    """`cache` with what was measured."""
    target = target_of(resolved)
    rows = cache["targets"].setdefault(sha256(canonical_json(target)), target | {"convolutions": {}})["convolutions"]
    for spec, best in measured.items():
        (kh, kw), (sh, sw) = spec.window.kernel, spec.window.stride
        shape = f"{json.dumps(spec.x.shape)} -> {json.dumps(spec.y.shape)}, kernel {kh}x{kw}, stride {sh}x{sw}"
        gain = round(best.default / best.seconds, 3)
        rows[spec_id(spec)] = {"shape": shape, "choice": asdict(best.choice), "gain": gain}
    return cache


# Measurement --------------------------------------------------------------------------------------------------------


def measure(spec: ConvSpec, resolved: Resolved) -> Measured:
    """Time the ways of one convolution in turn; another one than the default wins by more than the noise."""
    candidates = ways(spec)[:WAYS]
    runs = loaded([replace(spec, choice=choice) for choice in candidates], resolved)
    first = np.median(rounds(runs, ROUNDS), axis=0)
    finalists = [0, *(1 + np.argsort(first[1:])[:FINALISTS])]
    times = rounds([runs[i] for i in finalists], FINAL_ROUNDS)
    ratios = times / times[:, :1]
    medians, uppers = np.percentile(ratios, (50, 75), axis=0)
    best = int(np.argmin(medians))
    if medians[best] >= GAIN or uppers[best] >= 1:
        best = 0
    default = float(np.median(times[:, 0]))
    return Measured(candidates[finalists[best]], default * float(medians[best]), default)


def rounds(runs: Sequence[Run], count: int) -> np.ndarray:
    """Seconds a turn, float64 [count, runs], measured in turns of one after the other."""
    turns = [max(1, int(BURST / max(run(1), 1e-9))) for run in runs]
    times = [[run(n) / n for run, n in zip(runs, turns, strict=True)] for _ in range(count)]
    return np.array(times)


def loaded(specs: Sequence[ConvSpec], resolved: Resolved) -> list[Run]:
    """Functions that run each of `specs` on random codes and weights."""
    import tvm

    threads = max(spec.threads for spec in specs)
    if threads > 1 and not any(name in os.environ for name in THREAD_VARIABLES):
        os.environ["TVM_NUM_THREADS"] = str(threads)  # as loading an artifact does
    kernels = {f"way{i}": conv_kernel(f"way{i}", spec) for i, spec in enumerate(specs)}
    entries = {f"run{i}": entry(f"run{i}", name, kernel) for i, (name, kernel) in enumerate(kernels.items())}
    with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
        path = Path(folder) / "lib.so"
        path.write_bytes(library(kernels, entries, resolved.tvm, "00"))
        module = tvm.runtime.load_module(str(path))
    return [runner(module[f"run{i}"], kernel) for i, kernel in enumerate(kernels.values())]


def kinds(kernel: tirx.PrimFunc) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of a kernel's buffers."""
    types = [param.ty for param in kernel.params]
    return [(tuple(int(n) for n in kind.shape), str(kind.dtype)) for kind in types]


def entry(name: str, kernel: str, function: tirx.PrimFunc) -> tirx.PrimFunc:
    """(turns int32 [1], buffers...): calls `kernel` so many times."""

    def body(turns: Buffer, *buffers: Buffer) -> None:
        with T.serial(0, load(turns, 0)):
            T.evaluate(T.call_extern("int32", kernel, *(T.address_of(buffer[0]) for buffer in buffers)))

    params = [(f"buffer{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds(function))]
    return prim_func(name, [("turns", (1,), "int32"), *params], body)


def runner(function: Any, kernel: tirx.PrimFunc) -> Run:
    """Times `function`, an `entry` of `kernel`; weight zero points are 0."""
    import tvm

    rng = np.random.default_rng(0)

    def array(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        if dtype == "float32":
            return QUANTIZER if shape == QUANTIZER.shape else np.full(shape, 1e-4, np.float32)
        if dtype == "int32":
            return np.zeros(shape, np.int32)
        return rng.integers(0, 256, shape).astype(dtype)

    buffers = [tvm.runtime.tensor(array(shape, dtype)) for shape, dtype in kinds(kernel)]

    def run(turns: int) -> float:
        count = tvm.runtime.tensor(np.array([turns], np.int32))
        start = time.perf_counter()
        function(count, *buffers)
        return time.perf_counter() - start

    return run
