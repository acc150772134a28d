"""What a subnet costs on one target: models that measured subnets teach, each with its error on subnets left out.

A device's figures follow from a few counted ones (multiply-adds, values read, channels, coded bytes, layers), linearly;
the coefficients are the target's. Ridge regression on relative errors needs a dozen measured subnets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdeploy.errors import ModelError
from qdeploy.search.costs import KIB, Costs
from qdeploy.space import SubnetSpec

RIDGE = 1e-3
LEAST = 4  # measured subnets that a model needs
KEYS = ("latency_ms", "download_kib", "peak_memory_kib")


class LinearModel:
    """y ~ features, least relative squares; `error`: the relative root mean square on points left out one by one."""

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
        self.least, self.most = float(y.min()), float(y.max())

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predictions [n], never below a quarter of what was ever measured: a line has no floor of its own."""
        return np.maximum(features / self.scale @ self.coefficients, self.least / 4)


class DeviceModel:
    """Latency, download and peak memory of genomes on one target. `rows`: results of `measure.measure`."""

    def __init__(self, costs: Costs, rows: Sequence[Mapping[str, Any]]) -> None:
        self.costs = costs
        genomes = costs.encoding.genomes([SubnetSpec.from_json(row["spec"]) for row in rows])
        features = self.features(genomes)
        self.models = {key: LinearModel(features[key], np.array([row[key] for row in rows], float)) for key in KEYS}

    def features(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """What each figure is computed from, float64 [n, features]."""
        parts = self.costs.parts(genomes)
        macs, inputs, channels = (parts[name].astype(np.float64) for name in ("macs", "inputs", "channels"))
        weights, count = parts["weights"].astype(np.float64), (parts["channels"] > 0).sum(1).astype(np.float64)
        dense = weights > channels * 64  # a depthwise layer has at most 49 weights a channel
        one = np.ones(len(genomes))
        live = np.sort(inputs, axis=1)[:, -2:].sum(1)
        return {
            "latency_ms": np.stack([one, count, (macs * dense).sum(1), (macs * ~dense).sum(1), inputs.sum(1)], 1),
            "download_kib": np.stack([one, count, channels.sum(1), parts["coded"].sum(1) / KIB], 1),
            "peak_memory_kib": np.stack([one, count, channels.sum(1), weights.sum(1) / KIB, live], 1),
        }

    def __call__(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """{key: float64 [n]}."""
        features = self.features(genomes)
        return {key: model(features[key]) for key, model in self.models.items()}

    def advice(self) -> str:
        """Errors of the models on subnets left out."""
        return ", ".join(f"{key} {100 * model.error:.1f}%" for key, model in self.models.items())
