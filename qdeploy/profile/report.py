"""profile: everything that one level costs on this machine, as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.compile.artifact import Artifact, Packed
from qdeploy.errors import DeviceError
from qdeploy.profile.bitops import bitops, read_values
from qdeploy.profile.explain import layer_lines, sentences
from qdeploy.profile.float_model import float_model
from qdeploy.profile.latency import load_pair, measure
from qdeploy.profile.layers import layer_rows, repeated
from qdeploy.profile.memory import footprint, memory
from qdeploy.profile.peak import SIZES, measured_peak
from qdeploy.qdq import parse_model
from qdeploy.target import TILE_FEATURES


def profile(artifact: Path, onnx_path: Path, repeats: int = 30, layers: bool = False) -> dict[str, Any]:
    """Latency of `artifact` running level `onnx_path` and of ONNX Runtime, BitOPs, memory.

    `latency`'s keys, and "target", "threads", "batch", "bitops" ({"layers", "total"}), "memory" ({name: measure});
    numbers say their unit and whether they are measured or predicted. `layers` adds "float" (ONNX Runtime on the float
    network), "peak" (measured here), "run" (a whole run, and what of it passes between kernels), "layers"
    (`layer_rows`) and "why".
    Raises ModelError, CompileError or DeviceError for what cannot be used.
    """
    loaded, packed, model = load_pair(artifact, onnx_path)
    shape = (loaded.description["inputs"][0]["name"], loaded.input_shape)
    graph, values = read_values(onnx_path, shape)
    cost = memory(graph, values, loaded.arena_bytes, packed.nbytes)
    process = {name: row for name, row in footprint(artifact).to_json().items() if name not in ("packed", "arena")}
    sizes = cost.to_json() | process
    head = {"target": loaded.description["target"], "bitops": bitops(onnx_path, shape), "memory": sizes}
    head |= {"threads": loaded.description["threads"], "batch": loaded.input_shape[0]}
    if not layers:
        return head | measure(loaded, packed, model, repeats)
    fp32 = float_model(parse_model(model, str(onnx_path))).SerializeToString()
    found = head | measure(loaded, packed, model, repeats, fp32) | by_layer(loaded, packed, repeats)
    return found | {"why": sentences(found)}


def by_layer(loaded: Artifact, packed: Packed, repeats: int) -> dict[str, Any]:
    """The part of `profile` that `layers` adds, but for the sentences."""
    target = loaded.description["target"]
    if "gpu" in target:
        raise DeviceError("--layers compares with this machine's processor: profile a GPU's artifact without it")
    peak = measured_peak(tuple(target["features"]))
    fastest = "tdpbusd" if set(TILE_FEATURES) <= set(target["features"]) else target["dot"]
    x = np.random.default_rng(0).standard_normal(loaded.input_shape).astype(np.float32)
    times, runs = repeated(loaded.ticks(x, packed), loaded.runner(x, packed), repeats)
    rows = layer_rows(loaded.description["kernels"], times, peak, loaded.input_shape[0])
    copies = [{"bytes": size, "gbytes_s": rate / 1e9} for size, rate in zip(SIZES, peak.bytes, strict=True)]
    whole, between = float(np.median(runs)), float(np.median(runs - times.sum(1)))
    return {
        "peak": {"gops": peak.operations / 1e9, "dot": fastest, "copies": copies},
        "run": {"whole": whole, "between": max(0.0, between), "unit": "ms", "source": "measured"},
        "layers": rows,
    }


def machine_line(machine: Mapping[str, Any], threads: int = 1, batch: int = 1) -> str:
    """One line about a machine and how the artifact ran on it."""
    governor = f", governor {machine['governor']}" if machine["governor"] else ""
    how = f"{'one thread' if threads == 1 else f'up to {threads} threads'}, batch {batch}"
    return f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}{governor}; {how}"


def latency_lines(found: Mapping[str, Any]) -> list[str]:
    """Both runtimes and their ratio."""
    lines = []
    for key, label in (("artifact", "compiled artifact"), ("onnxruntime", "ONNX Runtime"), ("float", "its fp32")):
        if key not in found:
            continue
        row = found[key]
        low, high = row["quartiles"]
        lines.append(f"{label:18} {row['median']:9.3f} ms   quartiles {low:.3f} .. {high:.3f}, {row['rounds']} rounds")
    ratio = found["ratio"]
    low, high = ratio["quartiles"]
    lines.append(
        f"{'ratio':18} {ratio['median']:9.2f}      quartiles {low:.2f} .. {high:.2f}; below 1 the artifact is faster"
    )
    return lines


def render(found: Mapping[str, Any]) -> str:
    """A profile as text for a terminal."""
    total, sizes = found["bitops"]["total"], found["memory"]
    lines = [
        machine_line(found["machine"], found["threads"], found["batch"]),
        f"target {found['target']['name']} ({found['target']['cpu']})",
        "",
    ]
    lines += [*latency_lines(found), f"largest difference of the outputs: {found['largest_difference']:.3g}", ""]
    lines.append("layer                          macs        W x A bits        BitOPs")
    for row in found["bitops"]["layers"]:
        bits = f"{row['weight_bits']} x {row['activation_bits']}"
        lines.append(f"{row['layer']:24} {row['macs']:>12,} {bits:>12} {row['bitops']:>16,}")
    lines.append(f"{'total':24} {total['macs']['value']:>12,} {'':12} {total['bitops']['value']:>16,}")
    lines += [f"complexity (BitOPs / 64): {total['complexity']['value']:,.0f} multiply-adds", ""]
    for name, row in sizes.items():
        lines.append(f"{name.replace('_', ' '):18} {row['value']:>12,} bytes ({row['source']})")
    if "layers" in found:
        lines += ["", *layer_lines(found)]
    return "\n".join(lines)
