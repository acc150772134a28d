"""Other ways to search: random, the honest baseline; EQ-Net's genetic search; eq. 12 of vertical layering."""

from __future__ import annotations

import numpy as np

from qdeploy.errors import RecipeError
from qdeploy.search.problem import Problem, Question, Scored
from qdeploy.search.strategy import State, Strategy

PARENTS = 0.25  # EQ-Net: the elite's share of a generation
MUTATION = 0.1  # EQ-Net: probability that a gene of a mutant changes


def best(scored: Scored, count: int) -> np.ndarray:
    """Indices of `count` members: feasible before infeasible, then whole fronts, the most crowded left out."""
    from moocore import pareto_rank
    from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance

    violation = np.maximum(scored.violations, 0).sum(1)
    chosen: list[int] = []
    index = np.flatnonzero(violation <= 0)
    ranks = pareto_rank(scored.minimised[index]) if len(index) else np.zeros(0, int)
    for rank in range(int(ranks.max(initial=-1)) + 1):
        front = index[ranks == rank]
        crowding = calc_crowding_distance(scored.minimised[front])
        chosen += front[np.argsort(-crowding, kind="stable")].tolist()
        if len(chosen) >= count:
            return np.array(chosen[:count], np.int64)
    others = np.flatnonzero(violation > 0)
    chosen += others[np.argsort(violation[others], kind="stable")].tolist()
    return np.array(chosen[:count], np.int64)


class RandomSearch(Strategy):
    """Specs drawn at random, uniformly and spread in turn; the best so far are `members`."""

    def step(self) -> bool:
        encoding = self.problem.encoding
        if not len(self.members):
            drawn = self.first()
        else:
            half = self.size - self.size // 2
            drawn = np.concatenate([encoding.sample(half, self.random), encoding.spread(self.size // 2, self.random)])
        fresh = encoding.unlike(drawn, self.members.genomes)
        if not len(fresh):
            return len(self.members) > 0 and len(drawn) > 0
        found = self.problem.score(fresh)
        found = Scored.joined([self.members, found]) if len(self.members) else found
        self.members = found[best(found, self.size)]
        return True


class Genetic(Strategy):
    """EQ-Net's genetic search: the elite of all generations alone has children, by mutation and by crossover.

    Its fitness is the first objective; the constraints bound the rest, as the paper bounds average widths.
    """

    def __init__(self, problem: Question, population: int, seed: int, seeds: np.ndarray) -> None:
        super().__init__(problem, population, seed, seeds)
        self.elite = Scored(self.members.genomes, self.members.minimised, self.members.violations)

    def _children(self) -> np.ndarray:
        """Half of a generation are mutants, half crossings, of the elite."""
        encoding, random = self.problem.encoding, self.random
        parents = self.elite.genomes
        mutants = parents[random.integers(0, len(parents), self.size // 2)]
        changed = random.random(mutants.shape) < MUTATION
        changed |= ~encoding.active(mutants)  # of use only if the depth comes to reach them
        mutants = np.where(changed, random.integers(0, encoding.counts, mutants.shape), mutants)
        pairs = random.integers(0, len(parents), (2, self.size - self.size // 2))
        first, second = parents[pairs[0]], parents[pairs[1]]
        crossed = np.where(random.random(first.shape) < 0.5, first, second)  # noqa: PLR2004
        return encoding.canonical(np.concatenate([mutants, crossed]))

    def step(self) -> bool:
        genomes = self._children() if len(self.elite) else self.first()
        fresh = self.problem.encoding.unlike(genomes, self.members.genomes)
        if not len(fresh):
            return len(self.elite) > 0
        found = self.problem.score(fresh)
        everything = Scored.joined([self.members, found]) if len(self.members) else found
        violation = np.maximum(everything.violations, 0).sum(1)
        order = np.lexsort((everything.minimised[:, 0], violation))
        self.elite = everything[order[: max(2, int(self.size * PARENTS))]]
        self.members = everything[best(everything, self.size)]
        return True

    def state(self) -> State:
        fields = ("genomes", "minimised", "violations")
        return super().state() | {f"elite/{name}": getattr(self.elite, name) for name in fields}

    def restore(self, state: State) -> None:
        super().restore(state)
        self.elite = Scored(*(state[f"elite/{name}"] for name in ("genomes", "minimised", "violations")))


class Allocation(Strategy):
    """Eq. 12: the widths with the least summed weight error within a byte budget, for a row of budgets.

    `errors` [L, bits] and `bytes` [L, bits] of each layer at each width, for a space in which nothing else varies.
    Lagrangian relaxation: for each price of a byte every layer takes its own best width; the row of prices gives the
    convex hull of the exact trade-off.
    """

    def __init__(
        self, problem: Problem, population: int, seed: int, seeds: np.ndarray, errors: np.ndarray, bytes_: np.ndarray
    ) -> None:
        super().__init__(problem, population, seed, seeds)
        self.encoding = problem.encoding
        if self.encoding.shape_count > 1 or self.encoding.space.depths:
            raise RecipeError("strategy allocation shares out bits, and this space varies the architecture: use nsga2")
        self.errors, self.bytes = errors, bytes_

    def step(self) -> bool:
        if len(self.members):
            return False
        encoding = self.encoding
        layers, fitting = encoding.space.layers, np.isfinite(self.errors)
        ratios = [self.errors[i, fitting[i]] / np.maximum(self.bytes[i, fitting[i]], 1) for i in range(len(layers))]
        positive = np.concatenate(ratios)
        positive = positive[positive > 0]
        prices = np.geomspace(positive.min() / 1e3, positive.max() * 1e3, self.size) if len(positive) else np.zeros(1)
        rows = []
        for price in prices:
            bits = np.argmin(np.where(fitting, self.errors + price * self.bytes, np.inf), axis=1)
            rows.append(self._genome(bits))
        found = self.problem.score(encoding.unlike(encoding.canonical(np.array(rows)), self.seeds[:0]))
        self.members = found[best(found, self.size)]
        return True

    def _genome(self, bits: np.ndarray) -> np.ndarray:
        """Weight widths [L] -> genome; activations get the width of the weights that read them, the widest of these."""
        encoding = self.encoding
        wanted = {layer.layer: int(b) for layer, b in zip(encoding.space.layers, bits, strict=True)}
        reads: dict[str, int] = {}
        for layer in encoding.space.layers:
            leader = layer.shares or layer.layer
            reads[leader] = max(reads.get(leader, 0), wanted[layer.layer])
        row = np.zeros(len(encoding), np.int64)
        for i, gene in enumerate(encoding.space.variables):
            name, _, field = gene.name.rpartition(" ")
            if field == "weight_bits":
                row[i] = gene.choices.index(wanted[name])
            elif field == "activation_bits":
                able = [b for b in gene.choices if int(b) >= reads[name]] or [gene.choices[-1]]
                row[i] = gene.choices.index(able[0])
        return row
