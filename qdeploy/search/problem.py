"""The optimisation problem: populations of genomes in, objectives and constraint violations out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.errors import RecipeError
from qdeploy.search.encoding import Encoding, Genomes
from qdeploy.search.objectives import Bound, Measured

Values = dict[str, np.ndarray]  # {Measured.key: float64 [n]}
Predict = Callable[[np.ndarray], Values]


@dataclass(frozen=True)
class Scored:
    """Genomes [n, V], what is minimised [n, objectives] (accuracy with a minus) and violations [n, constraints].

    A violation is relative, `Bound.excess`; a genome is feasible when none is above 0.
    """

    genomes: np.ndarray
    minimised: np.ndarray
    violations: np.ndarray

    def __len__(self) -> int:
        return len(self.genomes)

    def __getitem__(self, index: np.ndarray) -> Scored:
        return Scored(self.genomes[index], self.minimised[index], self.violations[index])

    @property
    def feasible(self) -> np.ndarray:
        """bool [n]."""
        return np.asarray((self.violations <= 0).all(1))

    @classmethod
    def joined(cls, parts: Sequence[Scored]) -> Scored:
        """All of them, in order."""
        fields = ("genomes", "minimised", "violations")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))

    @property
    def front(self) -> np.ndarray:
        """Indices of the feasible members that no feasible one dominates; of equal ones the first."""
        from moocore import is_nondominated

        index = np.flatnonzero(self.feasible)
        if not len(index):
            return index
        return np.asarray(index[is_nondominated(self.minimised[index], keep_weakly=False)])


class Question(ABC):
    """What a strategy optimises over genomes."""

    encoding: Genomes
    objectives: tuple[Measured, ...]
    bounds: tuple[Bound, ...]

    @abstractmethod
    def score(self, genomes: np.ndarray) -> Scored:
        """Canonical genomes with their values."""

    @abstractmethod
    def bounded(self, genomes: np.ndarray) -> Values:
        """Of each genome what the bounds are about."""

    def check_reachable(self, seen: Scored) -> None:
        """Raise RecipeError with the nearest reachable values unless some member of `seen` is feasible."""
        if seen.feasible.any():
            return
        values = self.bounded(seen.genomes)
        nearest = int(np.argmin(np.maximum(seen.violations, 0).sum(1)))
        parts = []
        for bound in self.bounds:
            column = values[bound.what.key]
            reached = column.max() if bound.what.quantity.maximised else column.min()
            parts.append(
                f"{bound.what.key} {bound.sign} {bound.limit:g} ({reached:.4g} is reachable alone, "
                f"{column[nearest]:.4g} in the subnet nearest to all)"
            )
        raise RecipeError(f"no subnet found that keeps {', '.join(parts)}: ease the limits")


@dataclass(frozen=True)
class Problem(Question):
    """Subnets: `predict` values whole populations.

    Bounds of no target must all hold. Bounds of several targets: a subnet serves a device class when it keeps that
    target's, and it is feasible when it serves at least one.
    """

    encoding: Encoding
    objectives: tuple[Measured, ...]
    bounds: tuple[Bound, ...]
    predict: Predict

    @property
    def targets(self) -> list[str]:
        """Targets that bounds name."""
        return list(dict.fromkeys(bound.what.target for bound in self.bounds if bound.what.target))

    def violated(self, values: Values, target: str) -> np.ndarray:
        """Greatest relative violation of the bounds of `target` ("": of those that belong to none), [n]."""
        rows = [b.excess(values[b.what.key]) for b in self.bounds if b.what.target == target]
        return np.asarray(np.max(rows, axis=0))

    def score(self, genomes: np.ndarray) -> Scored:
        values = self.predict(genomes)
        signs = [-1.0 if measured.quantity.maximised else 1.0 for measured in self.objectives]
        rows = [sign * values[measured.key] for sign, measured in zip(signs, self.objectives, strict=True)]
        return Scored(genomes, np.stack(rows, axis=1), self.violations(values, len(genomes)))

    def violations(self, values: Values, count: int) -> np.ndarray:
        """[n, constraints] of `values`: one column for each bound of no target, one for the targets together."""
        columns = [b.excess(values[b.what.key]) for b in self.bounds if not b.what.target]
        if self.targets:
            columns.append(np.min([self.violated(values, target) for target in self.targets], axis=0))
        return np.stack(columns, axis=1) if columns else np.zeros((count, 0))

    def bounded(self, genomes: np.ndarray) -> Values:
        return self.predict(genomes)
