"""One subnet for real, on one target: extract, export, compile, bundle, run. What a device reports is a plain row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
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
from qdeploy.profile.latency import machine
from qdeploy.profile.memory import code_bytes
from qdeploy.profile.signature import Kernel, signatures
from qdeploy.profile.timing import NOISE, timed
from qdeploy.qdq import arrays, load_model
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.space import SubnetSpec
from qdeploy.subnet import extract
from qdeploy.target import Target

Row = dict[str, Any]
KIB = 1024.0
MODEL = "level.onnx"


class Device(Protocol):
    """Runs a compiled artifact somewhere. `artifact`: its folder; `params`: the level's ONNX initializers."""

    slots: int  # how many artifacts can be measured at once
    machine: str  # what ran them, as it says in results

    def measure(self, artifact: Path, params: Mapping[str, np.ndarray]) -> Row:
        """As `qdeploy.profile.timing.timed`; raises DeviceError."""


class LocalDevice:
    """This machine, in this process. `noise`: as `timed`'s limit."""

    slots = 1

    def __init__(self, noise: float = NOISE) -> None:
        self.noise = noise
        self.machine = str(machine()["cpu"])

    def measure(self, artifact: Path, params: Mapping[str, np.ndarray]) -> Row:
        return timed(load_artifact(artifact), params, self.noise)


def tree_bytes(folder: Path) -> int:
    """Bytes of all files of a published tree: what a first pull of its one level fetches."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def named(kernels: Sequence[Kernel], times: Sequence[Sequence[float]]) -> list[list[Any]]:
    """[[layer, operator, signature, low, median, high], ...]: what was called and how long it took, in ms."""
    if len(kernels) != len(times):
        raise ModelError(f"{len(times)} kernels were timed and {len(kernels)} were expected: compile without options")
    return [[k.layer, k.operator, k.signature, *row] for k, row in zip(kernels, times, strict=True)]


@dataclass
class Built:
    """A subnet ready to be measured, in a temporary folder that lives until `measure` ends."""

    spec: SubnetSpec
    target: Target
    folder: tempfile.TemporaryDirectory[str]
    kernels: list[Kernel]
    download: int
    code: int

    def measure(self, device: Device) -> Row:
        """{spec_id, spec, target, latency_ms, download_kib, peak_memory_kib and what they are made of}; DeviceError."""
        with self.folder as where:
            artifact, params = Path(where) / "artifact", arrays(load_model(Path(where) / MODEL)[1])
            found = device.measure(artifact, params)
        peak = found["packed_bytes"] + found["arena_bytes"] + self.code
        return {
            "spec_id": self.spec.id,
            "spec": self.spec.to_json(),
            "target": self.target.name,
            "latency_ms": found["latency"]["median"],
            "quartiles_ms": found["latency"]["quartiles"],
            "drift": found["drift"],
            "download_kib": self.download / KIB,
            "peak_memory_kib": peak / KIB,
            "packed_bytes": found["packed_bytes"],
            "arena_bytes": found["arena_bytes"],
            "code_bytes": self.code,
            "machine": found["machine"],
            "kernels": [] if self.target.gpu else named(self.kernels, found["kernels"]),
        }


@dataclass(frozen=True)
class Builder:
    """What is measured of `net` on `target`. `calibration`: training images uint8 [n, C, H, W]."""

    net: SimulatedNet
    name: str
    calibration: np.ndarray
    target: Target

    def export(self, spec: SubnetSpec, path: Path) -> None:
        """Write the QDQ ONNX file of `spec`."""
        export_onnx(extract(self.net, spec, self.name, self.calibration, None), path)

    def __call__(self, spec: SubnetSpec) -> Built:
        """Extract, export, compile, bundle; raises what the stages raise."""
        folder = tempfile.TemporaryDirectory(prefix="qdeploy-search-")
        try:
            where = Path(folder.name)
            model, artifact = where / MODEL, where / "artifact"
            self.export(spec, model)
            compile_model(model, self.target, artifact)
            write_bundle(read_ladder([model]), [artifact], where / "tree")
            kernels = [] if self.target.gpu else signatures(model, self.target)
            return Built(spec, self.target, folder, kernels, tree_bytes(where / "tree"), code_bytes(artifact))
        except BaseException:
            folder.cleanup()
            raise


class Measurements:
    """Rows of one target in a JSON lines file, each synced when it is measured."""

    def __init__(self, path: Path, build: Callable[[SubnetSpec], Built], device: Device) -> None:
        self.path, self._build, self._device = path, build, device
        self.rows: dict[str, Row] = {}
        if path.exists():
            for number, line in enumerate(read_bytes(path, "the measurements", ModelError).splitlines(), 1):
                row = parse_json(line, f"{path} line {number}", ModelError)
                if not isinstance(row, dict) or not {"spec_id", "spec", "latency_ms", "kernels"} <= set(row):
                    raise ModelError(f"{path} line {number} is no measurement: remove the file to measure again")
                self.rows[row["spec_id"]] = row

    def measure(self, specs: Sequence[SubnetSpec], done: Callable[[Row], None] = lambda row: None) -> None:
        """Measure those of `specs` that are not held, as many at once as the device has slots.

        One is built while others run. What was measured is kept also when a later one raises.
        """
        fresh = [spec for spec in dict.fromkeys(specs) if spec.id not in self.rows]
        running: set[Future[Row]] = set()
        failed: list[BaseException] = []
        most = self._device.slots
        with ThreadPoolExecutor(most) as pool:
            try:
                for spec in fresh:
                    running.add(pool.submit(self._build(spec).measure, self._device))
                    # on one device nothing is built while something runs: that would disturb it
                    while len(running) >= most and not failed:
                        failed += self._collect(running, done)
                    if failed:
                        break
            finally:
                while running:
                    failed += self._collect(running, done)
        if failed:
            raise failed[0]

    def _collect(self, running: set[Future[Row]], done: Callable[[Row], None]) -> list[BaseException]:
        """Keep the rows of runs that have ended, which leave `running`; what those raised that failed."""
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        running -= ended
        errors = [error for future in ended if (error := future.exception()) is not None]
        for row in (future.result() for future in ended if future.exception() is None):
            self.rows[row["spec_id"]] = row
            write_atomic(self.path, b"".join(canonical_json(held) for held in self.rows.values()))
            done(row)
        return errors
