"""`qdeploy latency-table`: measure the kernels that a space needs on a target, and those alone, into a database.

The `networks` of the table show every kernel. One whose kernels all have a price already is not compiled; one
that the database has seen is not even extracted. Killed, the same command goes on.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import DeviceError, ModelError
from qdeploy.extract import calibration_set
from qdeploy.files import read_bytes, sha256
from qdeploy.profile.database import Key, LatencyDatabase, Timed
from qdeploy.profile.signature import compiler_version, fingerprint, signatures
from qdeploy.progress import Counter, Echo
from qdeploy.qdq import arrays, load_model
from qdeploy.quant.calibrate import CALIBRATION_BATCH
from qdeploy.search.encoding import Encoding
from qdeploy.search.geometry import geometry
from qdeploy.search.measure import Builder, Device, named
from qdeploy.search.table import LatencyTable, networks
from qdeploy.space import SubnetSpec
from qdeploy.subnet import check_integer
from qdeploy.target import Target, local_gpu
from qdeploy.train.run import load_run


@dataclass(frozen=True)
class Filled:
    """What `fill` found: the table, kernels in it, and how many of them and of the networks were measured now."""

    table: LatencyTable
    kernels: int
    measured: int
    networks: int


class _Filling:
    """One space, one target, one database."""

    def __init__(self, builder: Builder, database: LatencyDatabase, device: Device, run: str) -> None:
        self.builder, self.database, self.device, self.run = builder, database, device, run
        self.key = Key(fingerprint(builder.target, _machine(builder.target, device)), compiler_version())
        self.measured: set[str] = set()
        self.networks = 0

    def calls(self, spec: SubnetSpec) -> list[tuple[str, str]]:
        """The kernel calls of a network, each with a price when this returns."""
        network = f"{self.run}/{spec.id}"
        known, prices = self.database.networks(self.key).get(network), self.database.prices(self.key)
        if known is not None and all(signature in prices for _, signature in known):
            return known
        with tempfile.TemporaryDirectory(prefix="qdeploy-table-") as where:
            model = Path(where) / "level.onnx"
            self.builder.export(spec, model)
            kernels = signatures(model, self.builder.target)
            needed = {kernel.signature for kernel in kernels} - prices.keys()
            if needed:
                artifact = Path(where) / "artifact"
                compile_model(model, self.builder.target, artifact)
                found = self.device.measure(artifact, arrays(load_model(model)[1]))
                rows = named(kernels, found["kernels"])
                timed = [Timed(layer, kind, sign, ms, low, high) for layer, kind, sign, low, ms, high in rows]
                self.database.record(self.key, network, timed)
                self.measured |= needed
                self.networks += 1
        calls = [(kernel.layer, kernel.signature) for kernel in kernels]
        if not needed:
            self.database.note(self.key, network, calls)
        return calls


def _machine(target: Target, device: Device) -> str:
    """What runs the kernels: a device, or its GPU. Raises DeviceError where there is none."""
    if not target.gpu:
        return device.machine
    found = local_gpu()
    if isinstance(found, str):
        raise DeviceError(f"target {target.name} computes on a GPU, and {found}: run this on the machine with the GPU")
    return f"{found.name}, {found.processors} processors, driver {found.driver}"


def fill(
    run: Path, target: Target, database: LatencyDatabase, device: Device, data_dir: Path | None, echo: Echo
) -> Filled:
    """Measure what `database` lacks for the space of a trained `run` on `target`, by `device`.

    Raises ModelError, CompileError and DeviceError.
    """
    recipe, net = load_run(run)
    check_integer(net)
    encoding = Encoding(net.space)
    digest = sha256(read_bytes(run / "quantized.checkpoint", "the checkpoint", ModelError))[:12]
    images = calibration_set(recipe, data_dir).images[:CALIBRATION_BATCH]  # times do not depend on values
    filling = _Filling(Builder(net, recipe.name, images, target), database, device, digest)
    if others := database.others(filling.key):
        echo(f"{others} kernels of another compiler version are in {database.path}: they are not used")
    shifted = geometry(net, encoding, images.shape[1:]).shifted
    showing = encoding.specs(networks(encoding, shifted))
    calls, counter = [], Counter(echo, target.name, len(showing), "network")
    for count, spec in enumerate(showing, 1):
        calls.append(filling.calls(spec))
        counter.at(count, f"{len(filling.measured)} kernels measured")
    table = LatencyTable(encoding, shifted, calls, database.prices(filling.key))
    signs = {signature for network in calls for _, signature in network}
    return Filled(table, len(signs), len(filling.measured), filling.networks)
