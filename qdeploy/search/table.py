"""The latency table of a space: milliseconds of every layer in every shape, summed from its kernels' prices.

A kernel depends on the shape of its layer's block and on two properties of its weights: narrow ones let some targets
multiply faster, those with a zero point other than 0 take longer. `networks` show all of these. A call belongs to the
last layer before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from qdeploy.errors import ModelError
from qdeploy.search.encoding import Encoding

NARROW = 6  # bits of weights that are surely in narrow containers (docs/integers.md)
Calls = Sequence[tuple[str, str]]  # (layer, signature) of a network's run, in order


KINDS = 4  # of weights: wide or narrow, each without or with a zero point


def networks(encoding: Encoding, shifted: np.ndarray) -> np.ndarray:
    """Canonical genomes [n, V] that show every kernel: each shape throughout, with weights of every kind that a layer
    can have there. `shifted`: as `Geometry` has it."""
    found = []
    for shape, genome in enumerate(encoding.covering()):
        drawn = np.repeat(genome[None], KINDS, axis=0)
        for row, layer in enumerate(encoding.space.layers):
            columns = [encoding.column(f"{layer.layer} {name}") for name in ("weight_bits", "granularity", "symmetry")]
            choices = (layer.weight_bits, layer.granularity or (None,), layer.symmetry or (None,))
            for at in product(*(range(len(one)) for one in choices)):  # the greatest choice of each kind stays
                bits = layer.weight_bits[at[0]]
                kind = 2 * (bits <= NARROW) + shifted[row, shape, bits, at[1], at[2]]
                for column, choice in zip(columns, at, strict=True):
                    if column is not None:
                        drawn[kind, column] = choice
        found.append(drawn)
    genomes = encoding.canonical(np.concatenate([encoding.covering(), *found]))
    return encoding.unlike(genomes, genomes[:0])


def owners(encoding: Encoding, calls: Calls) -> list[int]:
    """The layer (index in `encoding.layers`; -1: before any) that every call belongs to."""
    rows = {layer: row for row, layer in enumerate(encoding.layers)}
    found, now = [], -1
    for layer, _ in calls:
        now = rows.get(layer, now)
        found.append(now)
    return found


class LatencyTable:
    """`ms` [KINDS, layers + 1, shapes] of layers with weights of each kind, the last row what comes before any layer;
    `calls`: kernel calls in the same form. `shifted`: as `Geometry` has it."""

    def __init__(
        self, encoding: Encoding, shifted: np.ndarray, shown: Sequence[Calls], prices: Mapping[str, float]
    ) -> None:
        """`shown`: calls of each of `networks`, in their order. ModelError for a missing price."""
        self.encoding, self.shifted = encoding, shifted
        self.ms = np.zeros((KINDS, len(encoding.layers) + 1, encoding.shape_count))
        self.calls = np.zeros_like(self.ms)
        cells = zip(*self._cells(networks(encoding, shifted)), strict=True)
        rows = np.arange(self.ms.shape[1])
        for (kinds, shapes), calls in zip(cells, shown, strict=True):
            if missing := [layer for layer, signature in calls if signature not in prices]:
                raise ModelError(f"the latency table has no price for {missing[0]}: measure the space again")
            owner = np.array(owners(encoding, calls), np.int64) % len(rows)
            times = [prices[signature] for _, signature in calls]
            self.ms[kinds, rows, shapes] = np.bincount(owner, times, len(rows))
            self.calls[kinds, rows, shapes] = np.bincount(owner, None, len(rows))

    def _cells(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kind of the weights and shape of each row of the table, int64 [n, layers + 1] each."""
        encoding, rows = self.encoding, np.arange(len(self.encoding.layers))
        shapes = encoding.shapes(genomes, np.append(encoding.layer_block, -1))
        bits = encoding.bits(genomes)[0]
        kinds = 2 * (bits <= NARROW) + self.shifted[rows, shapes[:, :-1], bits, *encoding.kind(genomes)]
        return np.pad(kinds, ((0, 0), (0, 1))), shapes

    def sums(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(summed kernel times in ms, kernel calls), float64 [n] each."""
        encoding, (kinds, shapes) = self.encoding, self._cells(genomes)
        cells = kinds, np.arange(self.ms.shape[1]), shapes
        present = np.pad(encoding.present(genomes), ((0, 0), (0, 1)), constant_values=True)
        return (self.ms[cells] * present).sum(1), (self.calls[cells] * present).sum(1)
