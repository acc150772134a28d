"""NSGA-II (Deb et al. 2002) by pymoo, on canonical genomes: duplicates are the same spec, never the same subnet twice.

pymoo selects, sorts and crowds; crossover and mutation are whole-population numpy, since genes can be inactive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pymoo.core.problem
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.termination import NoTermination

from qdeploy.search.encoding import Genomes, keys
from qdeploy.search.problem import Question, Scored
from qdeploy.search.strategy import State, Strategy

CROSSOVER = 0.06  # probability that a gene comes from the other parent
MUTATION = 0.006  # probability that a gene changes; in genomes of fewer than 167 genes one changes on average
UNRANKED = -1  # of an infeasible member


class _Problem(pymoo.core.problem.Problem):
    """Our problem as pymoo asks for it."""

    def __init__(self, problem: Question) -> None:
        encoding = problem.encoding
        constraints = problem.score(np.zeros((1, len(encoding)), np.int64)).violations.shape[1]
        super().__init__(
            n_var=len(encoding), n_obj=len(problem.objectives), n_ieq_constr=constraints, xl=0, xu=encoding.counts - 1
        )
        self.problem = problem

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        scored = self.problem.score(x)
        out["F"], out["G"] = scored.minimised, scored.violations


class _Exchange(Crossover):
    """Two parents exchange genes; one that is inactive in a parent comes from the other."""

    def __init__(self, encoding: Genomes) -> None:
        super().__init__(2, 2, prob=1.0)
        self.encoding = encoding

    def _do(self, problem: Any, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        first, second = x
        active = self.encoding.active(first), self.encoding.active(second)
        swap = random_state.random(first.shape) < CROSSOVER
        filled = np.where(active[0], first, second), np.where(active[1], second, first)
        return np.stack([np.where(swap, filled[1], filled[0]), np.where(swap, filled[0], filled[1])])


class _Change(Mutation):
    """Genes change to one of their other choices; genes of blocks that come anew are drawn uniformly."""

    def __init__(self, encoding: Genomes) -> None:
        super().__init__(prob=1.0)
        self.encoding = encoding
        self.probability = max(MUTATION, 1.0 / max(1, len(encoding)))

    def _do(self, problem: Any, x: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        counts = self.encoding.counts
        drawn = random_state.integers(0, counts, x.shape)
        filled = np.where(self.encoding.active(x), x, drawn)
        changed = random_state.random(x.shape) < self.probability
        step = 1 + random_state.integers(0, np.maximum(counts - 1, 1), x.shape)
        return self.encoding.canonical(np.where(changed, (filled + step) % counts, filled))


class _Same(DuplicateElimination):
    """Equal canonical genomes are one spec."""

    def _do(self, pop: Any, other: Any, is_duplicate: np.ndarray) -> np.ndarray:
        seen = set() if other is None else set(keys(other.get("X")))
        for i, key in enumerate(keys(pop.get("X"))):
            is_duplicate[i] = key in seen
            if other is None:
                seen.add(key)
        return is_duplicate


class Nsga2(Strategy):
    """NSGA-II; the survivors of a generation are `members`."""

    def __init__(self, problem: Question, population: int, seed: int, seeds: np.ndarray) -> None:
        super().__init__(problem, population, seed, seeds)
        self._problem = _Problem(problem)
        self._algorithm: Any = None

    def _set_up(self, sampling: Any) -> Any:
        encoding = self.problem.encoding
        algorithm = NSGA2(
            pop_size=self.size, sampling=sampling, crossover=_Exchange(encoding), mutation=_Change(encoding),
            eliminate_duplicates=_Same(), output=None,
        )  # fmt: skip
        algorithm.setup(self._problem, termination=NoTermination(), verbose=False)
        algorithm.random_state = self.random
        return algorithm

    def step(self) -> bool:
        if self._algorithm is None:
            self._algorithm = self._set_up(self.first())
        infills = self._algorithm.ask()
        if infills is None or not len(infills):
            return False
        self._algorithm.evaluator.eval(self._problem, infills)
        self._algorithm.tell(infills=infills)
        found = self._algorithm.pop
        self.members = Scored(found.get("X"), found.get("F"), found.get("G"))
        return True

    def state(self) -> State:
        found = super().state()
        if self._algorithm is not None:
            ranks, crowding = self._algorithm.pop.get("rank"), self._algorithm.pop.get("crowding")
            found["rank"] = np.array([UNRANKED if rank is None else rank for rank in ranks], np.int64)
            found["crowding"] = np.array([np.nan if value is None else value for value in crowding], np.float64)
        return found

    def restore(self, state: State) -> None:
        super().restore(state)
        if "rank" not in state:
            return
        members = self.members
        population = Population.new("X", members.genomes, "F", members.minimised, "G", members.violations)
        for one, rank, crowding in zip(population, state["rank"], state["crowding"], strict=True):
            one.evaluated = {"F", "G", "H"}
            one.set("rank", None if rank == UNRANKED else int(rank))
            one.set("crowding", None if np.isnan(crowding) else float(crowding))
        self._algorithm = self._set_up(population)
        self._algorithm.pop, self._algorithm.is_initialized, self._algorithm.n_iter = population, True, 2
