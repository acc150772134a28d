"""Folders as other commands write them, small: what a report is made of in tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from qdeploy.files import canonical_json
from qdeploy.search.evolve import COLUMNS
from qdeploy.search.front import Front, Member
from qdeploy.train.metrics import log_metrics
from tests.search.spaces import everything, problem, small_space

TIMING = {"median": 0.5, "quartiles": [0.4, 0.6]}
LAYERS = [{"layer": name, "weight_bits": bits, "activation_bits": bits} for name, bits in (("stem", 8), ("<b>", 2))]


def search_folder(folder: Path, limits: tuple[str, ...] = ("bitops=3",), name: str = "small") -> Front:
    """A finished search: every second member of the front was measured, foretold values were 1% too low."""
    folder.mkdir(parents=True, exist_ok=True)
    space = small_space(2)
    asked = problem(space, ("accuracy", "latency"), targets=("host",))
    scored = asked.score(everything(asked.encoding))
    genomes = scored.genomes[scored.front]
    values, specs = asked.predict(genomes), asked.encoding.specs(genomes)
    members, foretold, scores, measured = [], [], [], []
    for i, spec in enumerate(specs):
        real = {key: float(column[i]) for key, column in values.items()}
        said = real | {key: 0.99 * real[key] for key in ("accuracy", "latency_ms@host")}
        bars = {key: (0.97 * said[key], 1.03 * said[key]) for key in ("accuracy", "latency_ms@host")}
        members.append(Member(spec, said, real if i % 2 else {}, bars))
        if i % 2:
            foretold.append({"round": 0, "spec": spec.to_json(), "predicted": said, "bars": bars})
            scores.append({"spec_id": spec.id, "spec": spec.to_json(), "accuracy": real["accuracy"]})
            measured.append({"spec_id": spec.id, "latency_ms": real["latency_ms@host"]})
    front = Front(space.id, "0" * 12, ("accuracy", "latency_ms@host"), ("host",), tuple(members))
    (folder / "front.json").write_bytes(front.to_bytes())
    (folder / "search.json").write_bytes(canonical_json({"limits": list(limits), "floors": []}))
    for file, rows in (("foretold.jsonl", foretold), ("scores.jsonl", scores), ("host.jsonl", measured)):
        (folder / file).write_bytes(b"".join(canonical_json(row) for row in rows))
    with (folder / "history.csv").open("w", newline="") as out:
        csv.writer(out).writerows([COLUMNS, *([r, g, 10 * g, 8, 4, 1 + g / 10 + r] for r in (0, 1) for g in (1, 2, 3))])
    return front


def sensitivity(names: tuple[str, ...] = ("stem", "head")) -> dict[str, Any]:
    """sensitivity.json of some layers at 2 and 8 bits."""
    found = {str(bits): {"weight": 0.2 / bits, "output": 0.1 / bits**2, "agreement": 99.0} for bits in (2, 8)}
    layers = [{"name": name, "type": "3x3", "operator": "Conv", "weights": 9} | found for name in names]
    floats = [{"operator": "Softmax", "name": "last", "reason": "no integer kernel"}]
    types = [{"type": "3x3", "layers": len(names), "weights": 18} | found]
    return {"layers": layers, "types": types, "widths": [2, 8], "images": 4, "float": floats}


def profile(count: int = 3) -> dict[str, Any]:
    """What `qdeploy profile --layers --json` prints, in part: layer i takes i + 1 us, the last is float."""
    total, rows = count * (count + 1) / 2, []
    for i in range(count):
        last = i == count - 1
        rows.append(
            {
                "layer": f"layer{i}", "operator": "conv 3x3", "arithmetic": "float" if last else "integer",
                "reason": "no integer kernel" if last else None, "ms": (i + 1) / 1e3,
                "quartiles": [(i + 0.8) / 1e3, (i + 1.3) / 1e3], "share": (i + 1) / total, "macs": 0 if last else 9,
                "gops": 2.0, "peak_share": 0.5, "bytes": 4, "gbytes_s": 1.0, "memory_share": 0.1, "bound": "arithmetic",
            }
        )  # fmt: skip
    return {"machine": {"cpu": "a cpu"}, "layers": rows, "why": ["int8 here is as fast as <fp32>."]}


def run_folder(folder: Path) -> None:
    """A training of two phases by its metrics alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for phase in ("float", "quantized"):
        for epoch in (1, 2, 3):
            log_metrics(folder, phase, epoch, {"cross-entropy": 1.0 / epoch, "gradient": 2.0}, 100.0)


def demo_level(level: str, total: int) -> dict[str, Any]:
    return {
        "level": level,
        "layers": LAYERS,
        "bits_per_weight": 2.5,
        "fetched": {"planes": 1000, "side": total - 1000},
        "bytes": total,
        "total_bytes": total,
        "accuracy": 90.0,
        "profile": {"artifact": TIMING, "onnxruntime": TIMING},
        "parity": {"outputs": 1000, "differing": 0},
    }


def demo_result() -> dict[str, Any]:
    """demo.json, with names that must be escaped."""
    pick = {"spec_id": "<i>", "predicted": {"latency_ms": 0.4, "download_kib": 80.0}, "kept": True}
    pick |= {"measured": {"latency_ms": 0.45, "download_kib": 81.0, "accuracy": 88.5}}
    search = {
        "population": 10,
        "generations": 4,
        "seconds": 1.5,
        "samples": {"samples": 30, "kendall_tau": 0.8, "mae": 0.1},
        "measured_elsewhere": "another <cpu>",
        "limits": {"latency_ms": 0.5, "download_kib": 90.0},
        "front": [{"latency_ms": 0.1, "accuracy": 87.0}, {"latency_ms": 0.4, "accuracy": 88.0}],
        "attempts": [pick],
        "pick": pick,
    }
    return {
        "model": "m<script>",
        "machine": {"cpu": "a cpu", "cores": 2},
        "levels": [demo_level("w2", 2000), demo_level("w4", 3000)],
        "drop": {"level": "w2", "bytes": 0},
        "fetched_twice": 0,
        "planes": [{"planes": name, "coded": 10, "bound": 9.0} for name in ("base", "2", "all")],
        "search": search,
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
