"""The latency table of a space: milliseconds of every block in every shape, summed from its kernels' prices.

Kernels depend on a block's shape, so the networks of `Encoding.covering` show all of them, at the greatest widths; and
on whether weights are narrow, which lets a target multiply faster: `narrow` sums what that can change. A call belongs
to the block of the last layer before it; what comes before any block, and after all, is `outside`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qdeploy.errors import ModelError
from qdeploy.search.encoding import Encoding

NARROW = 6  # bits of weights that are surely in narrow containers (docs/integers.md)
Calls = Sequence[tuple[str, str]]  # (layer, signature) of a network's run, in order


def owners(encoding: Encoding, calls: Calls) -> list[int]:
    """The block (index in `space.blocks`; -1: outside) of every call."""
    block_of = dict(zip(encoding.layers, encoding.layer_block.tolist(), strict=True))
    found, now = [], -1
    for layer, _ in calls:
        now = block_of.get(layer, now)
        found.append(now)
    return found


class LatencyTable:
    """ms [blocks + 1, shapes], the last row `outside`, and kernel calls in the same form."""

    def __init__(self, encoding: Encoding, covering: Sequence[Calls], prices: Mapping[str, float]) -> None:
        """`covering`: calls of each network of `Encoding.covering`, in its order. ModelError for a missing price."""
        self.encoding = encoding
        self.ms = np.zeros((len(encoding.space.blocks) + 1, encoding.shape_count))
        self.calls = np.zeros_like(self.ms)
        self.layer_ms = np.zeros((len(encoding.layers), encoding.shape_count))
        self.wide = encoding.bits(encoding.covering())[0] > NARROW  # [shapes, layers]
        rows = {layer: row for row, layer in enumerate(encoding.layers)}
        for shape, calls in enumerate(covering):
            if missing := [layer for layer, signature in calls if signature not in prices]:
                raise ModelError(f"the latency table has no price for {missing[0]}: measure the space again")
            for owner, (layer, signature) in zip(owners(encoding, calls), calls, strict=True):
                self.ms[owner, shape] += prices[signature]
                self.calls[owner, shape] += 1
                if layer in rows:
                    self.layer_ms[rows[layer], shape] += prices[signature]

    def sums(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(summed kernel times in ms, kernel calls), float64 [n] each."""
        blocks = np.concatenate([np.arange(len(self.ms) - 1), [-1]])
        shapes = self.encoding.shapes(genomes, blocks)
        kept = np.concatenate([self.encoding.blocks(genomes), np.ones((len(genomes), 1), bool)], axis=1)
        return (self.ms[blocks, shapes] * kept).sum(1), (self.calls[blocks, shapes] * kept).sum(1)

    def narrow(self, genomes: np.ndarray) -> np.ndarray:
        """Summed kernel times in ms, float64 [n], of layers whose weights are narrow and were wide when timed."""
        blocks = np.concatenate([np.arange(len(self.ms) - 1), [-1]])
        shapes = self.encoding.shapes(genomes, blocks)[:, self.encoding.layer_block]
        bits, layers = self.encoding.bits(genomes)[0], np.arange(len(self.layer_ms))
        changed = (bits > 0) & (bits <= NARROW) & self.wide[shapes, layers]
        return np.asarray((self.layer_ms[layers, shapes] * changed).sum(1))
