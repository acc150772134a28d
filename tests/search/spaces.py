"""Spaces small enough to enumerate, and objectives that are computed, not learned."""

from __future__ import annotations

from itertools import product

import numpy as np

from qdeploy.search.encoding import Encoding
from qdeploy.search.objectives import parse_bounds, parse_objectives
from qdeploy.search.problem import Problem, Values
from qdeploy.space import LayerSpace, SearchSpace


def small_space(blocks: int = 2, bits: tuple[int, ...] = (2, 4)) -> SearchSpace:
    """A stem, one elastic stage of up to `blocks` blocks of two layers that share their input, a head."""
    layers = [LayerSpace("stem", (8,), (8,))]
    for block in range(blocks):
        layers.append(LayerSpace(f"{block}.a", bits, (4, 8), block=(0, block)))
        layers.append(LayerSpace(f"{block}.b", bits, (4, 8), shares=f"{block}.a", block=(0, block)))
    layers.append(LayerSpace("head", (8,), (8,)))
    return SearchSpace("small", tuple(layers), (tuple(range(1, blocks + 1)),), (3, 5), (2, 3))


def everything(encoding: Encoding) -> np.ndarray:
    """Every canonical genome once."""
    rows = np.array(list(product(*(range(n) for n in encoding.counts))), np.int64)
    return np.unique(encoding.canonical(rows), axis=0)


class Formula:
    """Accuracy with diminishing returns and an interaction; costs that rise with it. Pure, so fronts can be known."""

    def __init__(self, encoding: Encoding, seed: int = 0, targets: tuple[str, ...] = ()) -> None:
        random = np.random.default_rng(seed)
        self.encoding, self.targets = encoding, targets
        self.gain, self.cost = random.exponential(1, len(encoding)), random.exponential(1, len(encoding))

    def __call__(self, genomes: np.ndarray) -> Values:
        active = self.encoding.active(genomes)
        high = genomes / np.maximum(self.encoding.counts - 1, 1)
        pairs = (high[:, 1:] * high[:, :-1] * self.gain[1:]).sum(1)
        accuracy = 50 + ((np.sqrt(high) + 0.3) * active * self.gain).sum(1) + 0.3 * pairs
        cost = ((high + 0.2) * active * self.cost).sum(1)
        found = {"accuracy": accuracy, "bitops": cost, "weights_kib": 3 + (high * active * self.gain).sum(1)}
        for i, target in enumerate(self.targets):
            found[f"latency_ms@{target}"] = cost * (1 + i)
        return found


def problem(
    space: SearchSpace,
    objectives: tuple[str, ...] = ("accuracy", "bitops"),
    limits: tuple[str, ...] = (),
    seed: int = 0,
    targets: tuple[str, ...] = (),
) -> Problem:
    encoding = Encoding(space)
    return Problem(
        encoding,
        tuple(parse_objectives(objectives, targets)),
        tuple(parse_bounds(limits, targets)),
        Formula(encoding, seed, targets),
    )
