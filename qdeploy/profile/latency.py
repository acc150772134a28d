"""Latency of a compiled artifact and of ONNX Runtime, side by side on this machine: one thread, rounds interleaved."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.compile.artifact import Artifact, Packed, load_artifact
from qdeploy.errors import CompileError, DeviceError, RecipeError
from qdeploy.qdq import arrays, canonical_bytes, graph_digest, load_model, parse_model

WARM_UP = 0.2  # seconds for each runtime before the first round
BLOCK = 2e-3  # seconds that one block of a round takes about; a shorter one would measure the clock


def machine() -> dict[str, Any]:
    """What the figures depend on: cpu model, cores, frequency governor and load now; None where it cannot be read."""
    model, governor = None, None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        pass
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "governor": governor,
        "load": round(os.getloadavg()[0], 2),
    }


def load_pair(artifact: Path, onnx_path: Path) -> tuple[Artifact, Packed, bytes]:
    """The artifact, the level in `onnx_path` packed for it, and that file's canonical bytes.

    Raises CompileError when the model is of another graph than the artifact was compiled from.
    """
    data, model = load_model(Path(onnx_path))
    loaded = load_artifact(Path(artifact))
    if graph_digest(data) != loaded.graph:
        raise CompileError(f"{artifact} was compiled from another graph than {onnx_path}: compile that model")
    canonical = canonical_bytes(model)
    return loaded, loaded.prepare(arrays(parse_model(canonical))), canonical


def ort_runner(model: bytes, x: np.ndarray) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    """(run once on bound memory, read the output) of a stock ONNX Runtime session on one thread."""
    try:
        import onnxruntime
    except ImportError as e:
        raise DeviceError("comparing with ONNX Runtime needs the package onnxruntime: install it") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
        binding.bind_output(session.get_outputs()[0].name)
        session.run_with_iobinding(binding)
    except Exception as e:  # its own exception classes are not public
        raise DeviceError(f"ONNX Runtime cannot run the model: {str(e).splitlines()[0]}") from e

    def run() -> None:
        session.run_with_iobinding(binding)

    return run, lambda: binding.copy_outputs_to_cpu()[0]


def _turns(run: Callable[[], Any]) -> int:
    """How often to call `run` in a block of about BLOCK seconds, after a warm-up."""
    end, count = time.perf_counter() + WARM_UP, 0
    while time.perf_counter() < end or count < 3:
        run()
        count += 1
    start = time.perf_counter()
    run()
    return max(1, round(BLOCK / max(time.perf_counter() - start, 1e-7)))


def _block(run: Callable[[], Any], turns: int) -> float:
    """Milliseconds a call."""
    start = time.perf_counter()
    for _ in range(turns):
        run()
    return (time.perf_counter() - start) / turns * 1e3


def rounds(runners: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:
    """Milliseconds a call, [runner, round]; each round starts with another runner, so that drift hits all alike."""
    turns = [_turns(run) for run in runners]
    times = np.empty((len(runners), repeats))
    for i in range(repeats):
        for k in range(len(runners)):
            which = (i + k) % len(runners)
            times[which, i] = _block(runners[which], turns[which])
    return times


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """`rounds` of two."""
    times = rounds((first, second), repeats)
    return times[0], times[1]


def summary(times: np.ndarray) -> dict[str, Any]:
    """Median and quartiles in milliseconds."""
    low, median, high = (float(v) for v in np.percentile(times, (25, 50, 75)))
    return {"median": median, "quartiles": [low, high], "unit": "ms", "source": "measured", "rounds": len(times)}


def latency(artifact: Path, onnx_path: Path, repeats: int = 30) -> dict[str, Any]:
    """Time both runtimes on one batch of noise; ONNX Runtime on one thread.

    {"artifact", "onnxruntime"}: median and quartiles over `repeats` rounds in ms; "ratio": artifact over ONNX Runtime,
    of the medians, with the quartiles of the rounds' own ratios (below 1: the artifact is faster);
    "largest_difference": between both outputs; "machine". Raises as `load_pair` and `ort_runner` do.
    """
    return measure(*load_pair(artifact, onnx_path), repeats)


def measure(
    loaded: Artifact, packed: Packed, model: bytes, repeats: int, float_model: bytes | None = None
) -> dict[str, Any]:
    """`latency` of what is loaded already; `float_model` adds "float", ONNX Runtime on it, to the same rounds."""
    if repeats < 1:
        raise RecipeError(f"{repeats} repeats measure nothing: give 1 or more")
    x = np.random.default_rng(0).standard_normal(loaded.input_shape).astype(np.float32)
    run, output = ort_runner(model, x)
    runners = {"artifact": loaded.runner(x, packed), "onnxruntime": run}
    if float_model is not None:
        runners["float"] = ort_runner(float_model, x)[0]
    times = dict(zip(runners, rounds(list(runners.values()), repeats), strict=True))
    ours, theirs = times["artifact"], times["onnxruntime"]
    ratios = np.percentile(ours / theirs, (25, 75))
    ratio = {
        "median": float(np.median(ours) / np.median(theirs)),
        "quartiles": [float(v) for v in ratios],
        "unit": "ratio",
        "source": "measured",
    }
    return {name: summary(values) for name, values in times.items()} | {
        "ratio": ratio,
        "largest_difference": float(np.abs(loaded.run(x, packed) - output()).max(initial=0)),
        "machine": machine(),
    }
