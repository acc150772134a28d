"""Costs of whole populations that need no device: counted from the layers' shapes and widths."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qdeploy.cost import complexity
from qdeploy.search.encoding import Encoding
from qdeploy.search.geometry import Geometry

KIB = 1024.0
FLOAT_BYTES = 4


class Costs:
    """Prices genomes by a `Geometry`."""

    def __init__(self, encoding: Encoding, geometry: Geometry) -> None:
        self.encoding, self.geometry = encoding, geometry
        self._rows = np.arange(len(encoding.layers))

    def __call__(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """{key: float64 [n]}: bitops, complexity, weights_kib, activations_kib."""
        found = self.parts(genomes)
        weight, activation = found["weight_bits"], found["activation_bits"]
        real = self.geometry.real
        bitops = (found["macs"] * weight * activation * ~real).sum(1)
        flops = (found["macs"] * real).sum(1)
        bits = np.where(real, 8 * FLOAT_BYTES, weight)
        read = np.where(real, 8 * FLOAT_BYTES, activation)
        return {
            "bitops": bitops.astype(np.float64),
            "complexity": complexity(flops, bitops).astype(np.float64),
            "weights_kib": -(-found["weights"] * bits // 8).sum(1) / KIB,
            "activations_kib": (found["inputs"] * read).sum(1) / 8 / KIB,
        }

    def parts(self, genomes: np.ndarray) -> Mapping[str, np.ndarray]:
        """Of each layer, int64 [n, L], 0 where it is not present: the tables of `Geometry` and both widths."""
        geometry, present = self.geometry, self.encoding.present(genomes)
        shapes = self.encoding.shapes(genomes, self.encoding.layer_block)
        weight, activation = self.encoding.bits(genomes)
        names = ("macs", "weights", "channels", "inputs")
        found = {name: getattr(geometry, name)[self._rows, shapes] * present for name in names}
        coded = geometry.coded[self._rows, shapes, weight] * present
        return found | {"coded": coded, "weight_bits": weight, "activation_bits": activation}
