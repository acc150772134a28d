"""A fleet of several device classes: one architecture, one level for each class, weight widths that nest.

Then one bundle serves the fleet: a device pulls the planes of its class's level. A chain is a genome: a spec's genes,
then the genes of the widths once more for each level above. A level has at least the weight widths of the one below,
so levels nest whatever is drawn, crossed or mutated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from qdeploy.errors import RecipeError
from qdeploy.search.encoding import Encoding, Genomes, keys
from qdeploy.search.objectives import Bound, Measured
from qdeploy.search.problem import Problem, Question, Scored, Values

CHAINS = 8  # that are measured before a search gives up


class Chains(Genomes):
    """Genomes of chains of `count` levels, int64 [n, V + (count - 1) * widths]."""

    def __init__(self, encoding: Encoding, count: int) -> None:
        self.encoding, self.count = encoding, count
        names = [gene.name for gene in encoding.space.variables]
        self._weights = np.array([name.endswith(" weight_bits") for name in names], bool)
        self._own = self._weights | np.array([name.endswith(" activation_bits") for name in names], bool)
        self.counts = np.concatenate([encoding.counts, *(count - 1) * [encoding.counts[self._own]]])

    def levels(self, genomes: np.ndarray) -> np.ndarray:
        """Canonical genomes of the levels, lowest first, int64 [count, n, V]."""
        base, *above = np.split(genomes, len(self._own) + self._own.sum() * np.arange(self.count - 1), axis=1)
        found = [self.encoding.canonical(base)]
        for widths in above:
            level = base.copy()
            level[:, self._own] = widths
            level = np.where(self._weights, np.maximum(level, found[-1]), level)
            found.append(self.encoding.canonical(level))
        return np.stack(found)

    def joined(self, levels: np.ndarray) -> np.ndarray:
        """Inverse of `levels`."""
        return np.concatenate([levels[0], *(level[:, self._own] for level in levels[1:])], axis=1)

    def active(self, genomes: np.ndarray) -> np.ndarray:
        active = self.encoding.active(genomes[:, : len(self._own)])
        return np.concatenate([active, *(self.count - 1) * [active[:, self._own]]], axis=1)

    def canonical(self, genomes: np.ndarray) -> np.ndarray:
        return self.joined(self.levels(genomes))

    def alike(self, genomes: np.ndarray) -> np.ndarray:
        """Chains that have the same spec at every level."""
        return self.joined(np.broadcast_to(genomes, (self.count, *genomes.shape)))


@dataclass(frozen=True)
class Fleet(Question):
    """The chains of `problem`'s subnets: a level for each target that its bounds name, and each keeps its class's.

    Which class gets which level is whatever keeps most. A device's figures are those of its class's level; of all
    others the mean over the levels is optimised, and every level keeps their bounds. `known`: canonical genomes [m,
    V] and measured values of subnets, which replace predicted ones; `margins`, {Measured.key: share of the limit}:
    how much more than predicted a figure is taken to be.
    """

    encoding: Chains
    objectives: tuple[Measured, ...]
    bounds: tuple[Bound, ...]
    problem: Problem
    known: tuple[np.ndarray, Values]
    margins: Mapping[str, float]

    @classmethod
    def of(
        cls,
        problem: Problem,
        known: tuple[np.ndarray, Values] | None = None,
        margins: Mapping[str, float] | None = None,
    ) -> Fleet:
        """Of a problem whose bounds name targets."""
        chains = Chains(problem.encoding, len(problem.targets))
        nothing = np.zeros((0, len(problem.encoding)), np.int64), dict[str, np.ndarray]()
        return cls(chains, problem.objectives, problem.bounds, problem, known or nothing, margins or {})

    def values(self, genomes: np.ndarray) -> Values:
        """Of canonical genomes of subnets [n, V]."""
        found = {key: np.array(column, np.float64) for key, column in self.problem.predict(genomes).items()}
        for bound in self.bounds:
            more = self.margins.get(bound.what.key, 0.0) * bound.limit
            found[bound.what.key] += -more if bound.what.quantity.maximised else more
        if len(self.known[0]):
            rows = {key: i for i, key in enumerate(keys(self.known[0]))}
            source = np.array([rows.get(key, -1) for key in keys(genomes)], np.int64)
            for key, column in self.known[1].items():
                found[key] = np.where(source >= 0, column[source], found[key])
        return found

    def read(self, genomes: np.ndarray) -> tuple[np.ndarray, Values, np.ndarray]:
        """(levels [count, n, V], their values [count, n] each, the level that each target gets [targets, n])."""
        levels = self.encoding.levels(genomes)
        values = self.values(levels.reshape(-1, levels.shape[2]))
        values = {key: column.reshape(levels.shape[:2]) for key, column in values.items()}
        orders = np.array(list(permutations(range(len(levels)))))
        broken = np.stack([np.maximum(self.problem.violated(values, target), 0) for target in self.problem.targets])
        least = broken[np.arange(len(levels)), orders].sum(1).argmin(0)  # [orders, targets, n] -> [n]
        return levels, values, orders[least].T

    def _of_class(self, column: np.ndarray, what: Measured, places: np.ndarray) -> np.ndarray | None:
        """The figure at the level of its target's class, [n]; None for one that belongs to no class."""
        if what.target not in self.problem.targets:
            return None
        place = places[self.problem.targets.index(what.target)]
        return np.asarray(np.take_along_axis(column, place[None], 0)[0])

    def _bounded(self, values: Values, places: np.ndarray) -> Values:
        found = {}
        for bound in self.bounds:
            column, key = values[bound.what.key], bound.what.key
            own = self._of_class(column, bound.what, places)
            worst = column.min(0) if bound.what.quantity.maximised else column.max(0)
            found[key] = worst if own is None else own
        return found

    def bounded(self, genomes: np.ndarray) -> Values:
        """The figure at its class's level, or the worst of all levels; {key: [n]}."""
        _, values, places = self.read(genomes)
        return self._bounded(values, places)

    def score(self, genomes: np.ndarray) -> Scored:
        _, values, places = self.read(genomes)
        found = self._bounded(values, places)
        rows = []
        for one in self.objectives:
            own = self._of_class(values[one.key], one, places)
            rows.append((values[one.key].mean(0) if own is None else own) * (-1 if one.quantity.maximised else 1))
        broken = [bound.excess(found[bound.what.key]) for bound in self.bounds]
        return Scored(genomes, np.stack(rows, axis=1), np.stack(broken, axis=1))

    def best(self, genomes: np.ndarray) -> tuple[np.ndarray, bool]:
        """Of canonical chains [n] the one that breaks limits least, then is best in the first objective, [1]; and
        whether it is feasible."""
        scored = self.score(genomes)
        broken = np.maximum(scored.violations, 0).sum(1)
        at = np.lexsort((scored.minimised[:, 0], broken))[:1]
        return genomes[at], bool(scored.feasible[at[0]])

    def levels(self, genome: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """(target, genome of its level) of one chain [1], lowest level first."""
        levels, _, places = self.read(genome)
        order = np.argsort(places[:, 0])
        return [(self.problem.targets[target], levels[places[target, 0], 0]) for target in order]


def measured_chain(
    problem: Callable[[], Problem],
    genomes: np.ndarray,
    known: Callable[[], tuple[np.ndarray, Values]],
    measure: Callable[[np.ndarray], None],
    improve: Callable[[Fleet, np.ndarray], np.ndarray],
) -> list[tuple[str, np.ndarray]]:
    """As `Fleet.levels`, the best chain whose levels were all measured, and keep their limits as measured.

    `problem` predicts from what was measured up to now, which `known` says; `measure` adds to it; `improve` goes on
    searching from chains. What a measured level broke a limit by is a margin from then on. After CHAINS chains: the
    best of what was measured, or RecipeError.
    """
    margins: dict[str, float] = {}
    tried = genomes[:0]
    for _ in range(CHAINS):
        asked = Fleet.of(problem(), known(), dict(margins))
        genomes = improve(asked, np.concatenate([genomes, tried]))
        chain, kept = asked.best(np.concatenate([genomes, _held(asked, tried)]))
        tried = np.concatenate([tried, chain])
        levels = asked.levels(chain)
        fresh = asked.problem.encoding.unlike(np.stack([genome for _, genome in levels]), known()[0])
        if not len(fresh):
            if kept:
                return levels
            break
        measure(fresh)
        seen = replace(asked, known=known())
        for target, genome in levels:
            values = seen.values(genome[None])
            for bound in (b for b in asked.bounds if b.what.target in ("", target)):
                excess = float(bound.excess(values[bound.what.key])[0])
                margins[bound.what.key] = margins.get(bound.what.key, 0.0) + max(0.0, excess)
    asked = Fleet.of(problem(), known())
    held = _held(asked, tried)
    if len(held):
        chain, kept = asked.best(held)
        if kept:
            return asked.levels(chain)
    raise RecipeError(
        f"none of {len(tried)} chains of nesting levels kept its limits when measured: ease limits or add --rounds"
    )


def _held(asked: Fleet, tried: np.ndarray) -> np.ndarray:
    """Chains of measured levels: those that were tried, and every subnet that was measured as the level of all."""
    return np.concatenate([tried, asked.encoding.alike(asked.known[0])])
