"""One subnet for real, on one target: extract, export, compile, bundle, run. What a device reports is a plain row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from qdeploy.bundle.write import write_bundle
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import ModelError
from qdeploy.evaluate import PackedImages, RunCopy, unpacked_images
from qdeploy.export import export_onnx
from qdeploy.files import canonical_json, parse_json, read_bytes, write_atomic
from qdeploy.ladder import read_ladder
from qdeploy.profile.latency import machine
from qdeploy.profile.memory import footprint
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
CHUNK = 16  # subnets that are built elsewhere before the first of them is measured


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
    peak: int  # bytes, `footprint`

    def measure(self, device: Device) -> Row:
        """{spec_id, spec, target, latency_ms, download_kib, peak_memory_kib and what they are made of}; DeviceError."""
        with self.folder as where:
            artifact, params = Path(where) / "artifact", arrays(load_model(Path(where) / MODEL)[1])
            found = device.measure(artifact, params)
        return {
            "spec_id": self.spec.id,
            "spec": self.spec.to_json(),
            "target": self.target.name,
            "latency_ms": found["latency"]["median"],
            "quartiles_ms": found["latency"]["quartiles"],
            "drift": found["drift"],
            "download_kib": self.download / KIB,
            "peak_memory_kib": self.peak / KIB,
            "packed_bytes": found["packed_bytes"],
            "arena_bytes": found["arena_bytes"],
            "machine": found["machine"],
            "kernels": [] if self.target.gpu else named(self.kernels, found["kernels"]),
        }


@dataclass(frozen=True)
class Packed:
    """A `Built` as it travels between processes: the files that measuring needs, by their paths in its folder."""

    spec: SubnetSpec
    target: Target
    files: Mapping[str, bytes]
    kernels: list[Kernel]
    download: int
    peak: int

    @classmethod
    def of(cls, built: Built) -> Packed:
        """The files of `built`, whose folder is removed."""
        with built.folder as name:
            where = Path(name)
            paths = [where / MODEL, *(path for path in (where / "artifact").rglob("*") if path.is_file())]
            files = {str(path.relative_to(where)): path.read_bytes() for path in paths}
        return cls(built.spec, built.target, files, built.kernels, built.download, built.peak)

    def unpacked(self) -> Built:
        """Inverse of `of`."""
        folder = tempfile.TemporaryDirectory(prefix="qdeploy-search-")
        for name, data in self.files.items():
            path = Path(folder.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return Built(self.spec, self.target, folder, self.kernels, self.download, self.peak)


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
            peak = int(footprint(artifact)["peak"].value)
            return Built(spec, self.target, folder, kernels, tree_bytes(where / "tree"), peak)
        except BaseException:
            folder.cleanup()
            raise


@dataclass(frozen=True)
class Building:
    """Makes what builds subnets in another process; arguments as `Builder` has them, images as `packed_images`."""

    run: RunCopy
    name: str
    calibration: PackedImages
    target: Target

    def __call__(self) -> Callable[[SubnetSpec], Packed]:
        torch.set_num_threads(1)
        build = Builder(self.run.load()[1], self.name, unpacked_images(self.calibration), self.target)
        return lambda spec: Packed.of(build(spec))


Spread = Callable[[Mapping[str, SubnetSpec]], Iterator[tuple[str, Packed]]]


class Measurements:
    """Rows of one target in a JSON lines file, each synced when it is measured.

    `spread`: builds several specs elsewhere, in place of `build`.
    """

    def __init__(
        self, path: Path, build: Callable[[SubnetSpec], Built], device: Device, spread: Spread | None = None
    ) -> None:
        self.path, self._build, self._device, self._spread = path, build, device, spread
        self.rows: dict[str, Row] = {}
        if path.exists():
            for number, line in enumerate(read_bytes(path, "the measurements", ModelError).splitlines(), 1):
                row = parse_json(line, f"{path} line {number}", ModelError)
                if not isinstance(row, dict) or not {"spec_id", "spec", "latency_ms", "kernels"} <= set(row):
                    raise ModelError(f"{path} line {number} is no measurement: remove the file to measure again")
                self.rows[row["spec_id"]] = row

    def measure(self, specs: Sequence[SubnetSpec], done: Callable[[Row], None] = lambda row: None) -> None:
        """Measure those of `specs` that are not held, as many at once as the device has slots.

        One is built while others run, unless they are built elsewhere. What was measured is kept also when a later one
        raises.
        """
        fresh = [spec for spec in dict.fromkeys(specs) if spec.id not in self.rows]
        running: set[Future[Row]] = set()
        failed: list[BaseException] = []
        most = self._device.slots
        with ThreadPoolExecutor(most) as pool:
            try:
                for built in self._built(fresh):
                    running.add(pool.submit(built.measure, self._device))
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

    def _built(self, specs: Sequence[SubnetSpec]) -> Iterator[Built]:
        """Each of `specs`, ready; those built elsewhere CHUNK at a time, so that nothing is measured meanwhile."""
        if self._spread is None:
            for spec in specs:
                yield self._build(spec)
            return
        for start in range(0, len(specs), CHUNK):
            chunk = {spec.id: spec for spec in specs[start : start + CHUNK]}
            found = dict(self._spread(chunk))
            for key in chunk:
                yield found[key].unpacked()

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
