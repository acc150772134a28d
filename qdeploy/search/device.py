"""What a subnet costs on one target: models that measured subnets teach, each with its error on subnets left out.

Latency is the table's sum of kernel times (table.py), corrected by what whole runs took: fixed costs, calls, caches.
Download and memory follow from counted figures (channels, coded bytes, layers). All corrections are linear with the
target's coefficients; ridge regression on relative errors needs a dozen measured subnets. On GPUs, where kernels are
not told apart, latency follows from counted figures too (multiply-adds, values read, layers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from qdeploy.errors import ModelError
from qdeploy.search.costs import KIB, Costs
from qdeploy.search.encoding import Encoding, keys
from qdeploy.search.table import LatencyTable, networks
from qdeploy.space import SubnetSpec

RIDGE = 1e-3
LEAST = 4  # measured subnets that a model needs
COVERAGE = 0.9  # of an error band
KEYS = ("latency_ms", "download_kib", "peak_memory_kib")


class LinearModel:
    """y ~ features, least relative squares; of points left out one by one: `error`, the relative root mean square, and
    `band`, which the relative error keeps within for COVERAGE of new points (jackknife: Barber et al. 2021, eq. 3)."""

    def __init__(self, features: np.ndarray, y: np.ndarray) -> None:
        if len(y) < LEAST:
            raise ModelError(f"{len(y)} measured subnets teach no device model: measure {LEAST} or more")
        self.scale = np.abs(features).max(0)
        self.scale[self.scale == 0] = 1.0
        rows = features / self.scale / y[:, None]
        gram = rows.T @ rows + RIDGE * len(y) * np.diag(np.mean(rows**2, axis=0) + 1e-12)
        inverse = np.linalg.inv(gram)
        self.coefficients = inverse @ rows.T @ np.ones(len(y))
        hat = np.einsum("ij,jk,ik->i", rows, inverse, rows)
        left_out = (1.0 - rows @ self.coefficients) / np.maximum(1.0 - hat, 1e-6)
        self.error = float(np.sqrt(np.mean(left_out**2)))
        rank = min(len(y), int(np.ceil(COVERAGE * (len(y) + 1))))
        self.band = float(np.sort(np.abs(left_out))[rank - 1])
        self.least = float(y.min())

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predictions [n], never below a quarter of what was ever measured: a line has no floor of its own."""
        return np.maximum(features / self.scale @ self.coefficients, self.least / 4)

    def bounds(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Error bars, [n] each: a new measurement lies between them with probability COVERAGE.

        A band of 100% or more has no upper end: infinity.
        """
        predicted = self(features)
        upper = predicted / (1 - self.band) if self.band < 1 else np.full_like(predicted, np.inf)
        return predicted / (1 + self.band), upper


def latency_features(table: LatencyTable, genomes: np.ndarray) -> np.ndarray:
    """What a latency is computed from on a processor, float64 [n, 3]: fixed costs, summed kernel times, calls."""
    return np.stack([np.ones(len(genomes)), *table.sums(genomes)], 1)


def table_of(encoding: Encoding, shifted: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> LatencyTable | None:
    """The latency table that measured subnets hold; None where the device tells no kernels (a GPU).

    `shifted`: as `Geometry` has it. `rows`: results of `measure.measure`, among them every one of `networks`; a kernel
    that several of them call costs the median. Raises ModelError.
    """
    if not all(row["kernels"] for row in rows):
        return None
    times: dict[str, list[float]] = {}
    by_genome = {}
    for row, key in zip(rows, keys(encoding.genomes([SubnetSpec.from_json(r["spec"]) for r in rows])), strict=True):
        by_genome[key] = [(layer, signature) for layer, _, signature, *_ in row["kernels"]]
        for _, _, signature, _, ms, _ in row["kernels"]:
            times.setdefault(signature, []).append(ms)
    wanted = keys(networks(encoding, shifted))
    if missing := [i for i, key in enumerate(wanted) if key not in by_genome]:
        raise ModelError(
            f"no measured subnet shows the kernels of network {missing[0]}: remove the folder and search again"
        )
    prices = {signature: median(found) for signature, found in times.items()}
    return LatencyTable(encoding, shifted, [by_genome[key] for key in wanted], prices)


class DeviceModel:
    """Latency, download and peak memory of genomes on one target. `rows`: results of `measure.measure`."""

    def __init__(self, costs: Costs, rows: Sequence[Mapping[str, Any]]) -> None:
        self.costs, self.table = costs, table_of(costs.encoding, costs.geometry.shifted, rows)
        genomes = costs.encoding.genomes([SubnetSpec.from_json(row["spec"]) for row in rows])
        features = self.features(genomes)
        self.models = {key: LinearModel(features[key], np.array([row[key] for row in rows], float)) for key in KEYS}

    def features(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """What each figure is computed from, float64 [n, features]."""
        parts = self.costs.parts(genomes)
        macs, inputs, channels = (parts[name].astype(np.float64) for name in ("macs", "inputs", "channels"))
        weights, count = parts["weights"].astype(np.float64), (parts["channels"] > 0).sum(1).astype(np.float64)
        one = np.ones(len(genomes))
        if self.table is not None:
            latency = latency_features(self.table, genomes)
        else:
            dense = weights > channels * 64  # a depthwise layer has at most 49 weights a channel
            latency = np.stack([one, count, (macs * dense).sum(1), (macs * ~dense).sum(1), inputs.sum(1)], 1)
        live = np.sort(inputs, axis=1)[:, -2:].sum(1)
        return {
            "latency_ms": latency,
            "download_kib": np.stack([one, count, channels.sum(1), parts["coded"].sum(1) / KIB], 1),
            "peak_memory_kib": np.stack([one, count, channels.sum(1), weights.sum(1) / KIB, live], 1),
        }

    def __call__(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """{key: float64 [n]}."""
        features = self.features(genomes)
        return {key: model(features[key]) for key, model in self.models.items()}

    def bounds(self, genomes: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Error bars of `__call__`, {key: (low, high)}, float64 [n] each, in the unit of the key."""
        features = self.features(genomes)
        return {key: model.bounds(features[key]) for key, model in self.models.items()}

    def advice(self) -> str:
        """Errors of the models on subnets left out, and the bands that new subnets should keep within."""
        return ", ".join(
            f"{key} {100 * model.error:.1f}% ({COVERAGE:.0%} within {100 * model.band:.1f}%)"
            for key, model in self.models.items()
        )
