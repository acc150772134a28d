"""One subnet for real, on one target: extract, export, compile, bundle, run. What a device reports is a plain row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qdeploy.bundle.write import write_bundle
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import ModelError
from qdeploy.export import export_onnx
from qdeploy.files import canonical_json, parse_json, read_bytes, write_atomic
from qdeploy.ladder import read_ladder
from qdeploy.profile.latency import machine, rounds, summary
from qdeploy.profile.memory import code_bytes
from qdeploy.qdq import arrays, load_model
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.space import SubnetSpec
from qdeploy.subnet import extract
from qdeploy.target import Target

Row = dict[str, Any]
REPEATS = 15
KIB = 1024.0


class Device(Protocol):
    """Runs a compiled artifact somewhere. `artifact`: its folder; `params`: the level's ONNX initializers."""

    def measure(self, artifact: Path, params: Mapping[str, np.ndarray]) -> Row:
        """{"latency": summary in ms, "packed_bytes", "arena_bytes", "machine"}; raises DeviceError."""


class LocalDevice:
    """This machine, in this process."""

    def measure(self, artifact: Path, params: Mapping[str, np.ndarray]) -> Row:
        loaded = load_artifact(artifact)
        packed = loaded.prepare(params)
        x = np.random.default_rng(0).standard_normal(loaded.input_shape).astype(np.float32)
        times = rounds([loaded.runner(x, packed)], REPEATS)[0]
        found = {"packed_bytes": packed.nbytes, "arena_bytes": loaded.arena_bytes}
        return found | {"latency": summary(times), "machine": machine()["cpu"]}


def tree_bytes(folder: Path) -> int:
    """Bytes of all files of a published tree: what a first pull of its one level fetches."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(
    net: SimulatedNet, spec: SubnetSpec, name: str, calibration: np.ndarray, target: Target, device: Device
) -> Row:
    """{spec_id, spec, target, latency_ms, download_kib, peak_memory_kib and what they are made of}.

    `calibration`: training images uint8 [n, C, H, W]. Raises what the stages raise.
    """
    frozen = extract(net, spec, name, calibration, None)
    with tempfile.TemporaryDirectory(prefix="qdeploy-search-") as where:
        folder = Path(where)
        model, artifact = folder / "level.onnx", folder / "artifact"
        export_onnx(frozen, model)
        compile_model(model, target, artifact)
        write_bundle(read_ladder([model]), [artifact], folder / "tree")
        download, code = tree_bytes(folder / "tree"), code_bytes(artifact)
        found = device.measure(artifact, arrays(load_model(model)[1]))
    peak = found["packed_bytes"] + found["arena_bytes"] + code
    return {
        "spec_id": spec.id,
        "spec": spec.to_json(),
        "target": target.name,
        "latency_ms": found["latency"]["median"],
        "quartiles_ms": found["latency"]["quartiles"],
        "download_kib": download / KIB,
        "peak_memory_kib": peak / KIB,
        "packed_bytes": found["packed_bytes"],
        "arena_bytes": found["arena_bytes"],
        "code_bytes": code,
        "machine": found["machine"],
    }


class Measurements:
    """Rows of one target in a JSON lines file, each synced before the next subnet is measured."""

    def __init__(self, path: Path, measure_one: Callable[[SubnetSpec], Row]) -> None:
        self.path, self._measure = path, measure_one
        self.rows: dict[str, Row] = {}
        if path.exists():
            for number, line in enumerate(read_bytes(path, "the measurements", ModelError).splitlines(), 1):
                row = parse_json(line, f"{path} line {number}", ModelError)
                if not isinstance(row, dict) or not {"spec_id", "spec", "latency_ms"} <= set(row):
                    raise ModelError(f"{path} line {number} is no measurement: remove the file to measure again")
                self.rows[row["spec_id"]] = row

    def of(self, spec: SubnetSpec) -> Row:
        """The row of `spec`, measured now if it is not held."""
        if spec.id not in self.rows:
            self.rows[spec.id] = self._measure(spec)
            write_atomic(self.path, b"".join(canonical_json(row) for row in self.rows.values()))
        return self.rows[spec.id]
