"""Levels for several device classes that nest: one architecture, weight widths that rise from class to class.

Then one bundle serves the fleet: a device pulls the planes of its class's level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from qdeploy.errors import RecipeError
from qdeploy.search.encoding import Encoding, keys
from qdeploy.search.problem import Predict, Problem, Values

CANDIDATES = 40  # of one architecture, the most accurate for each class
ARCHITECTURES = 30
CHAINS = 8  # that are measured before a search gives up


@dataclass(frozen=True)
class Chain:
    """`levels`: (target, genome) from the lowest level up; `accuracy`: their predicted mean."""

    levels: tuple[tuple[str, np.ndarray], ...]
    accuracy: float


def _architecture_columns(encoding: Encoding) -> np.ndarray:
    """Which genes say something about the architecture and not about widths, bool [V]."""
    fields = ("weight_bits", "activation_bits", "granularity", "symmetry")
    return np.array([not gene.name.endswith(fields) for gene in encoding.space.variables], bool)


def _meets(encoding: Encoding, genomes: np.ndarray) -> np.ndarray:
    """The genomes and the lower one of each pair, gene by gene: it nests in both."""
    columns = ~_architecture_columns(encoding)
    first, second = (genomes[i] for i in np.triu_indices(len(genomes), 1))
    lower = np.where(columns, np.minimum(first, second), first)
    return encoding.unlike(np.concatenate([genomes, lower]), genomes[:0])


def _best_of(weights: np.ndarray, accuracy: np.ndarray, fits: np.ndarray) -> tuple[float, list[int]]:
    """The chain with the greatest summed accuracy, one candidate a class; fits bool [classes, n], classes in order."""
    nests = (weights[:, None, :] <= weights[None, :, :]).all(2)  # [low, high]
    value = np.where(fits[0], accuracy, -np.inf)
    came: list[np.ndarray] = []
    for row in fits[1:]:
        reach = np.where(nests, value[:, None], -np.inf)
        came.append(reach.argmax(0))
        value = np.where(row, reach.max(0) + accuracy, -np.inf)
    at = int(value.argmax())
    path = [at]
    for back in reversed(came):
        path.append(int(back[path[-1]]))
    return float(value.max()), path[::-1]


def best_chain(problem: Problem, genomes: np.ndarray, below: bool = True) -> Chain:
    """The best chain among `genomes` (those of a search) and, with `below`, what nests below two of them.

    Raises RecipeError for none.
    """
    encoding, targets = problem.encoding, problem.targets
    columns = _architecture_columns(encoding)
    groups: dict[bytes, list[int]] = {}
    for i, key in enumerate(keys(np.where(columns, genomes, 0))):
        groups.setdefault(key, []).append(i)
    accuracy = problem.predict(genomes)["accuracy"]
    ranked = sorted(groups.values(), key=lambda rows: -float(accuracy[rows].mean()))
    best: Chain | None = None
    for rows in ranked[:ARCHITECTURES]:
        candidates = genomes[sorted(rows, key=lambda i: -accuracy[i])[:CANDIDATES]]
        if below:
            candidates = _meets(encoding, candidates)
        values = problem.predict(candidates)
        shared = problem.violations({**values}, len(candidates))[:, : -1 if targets else None]
        common = (shared <= 0).all(1)
        fits = np.stack([common & (problem.violated(values, target) <= 0) for target in targets])
        weights = encoding.bits(candidates)[0]
        for order in permutations(range(len(targets))):
            total, path = _best_of(weights, values["accuracy"], fits[list(order)])
            mean = total / len(targets)
            if np.isfinite(total) and (best is None or mean > best.accuracy):
                levels = tuple((targets[t], candidates[i]) for t, i in zip(order, path, strict=True))
                best = Chain(levels, mean)
    if best is None:
        raise RecipeError(f"no architecture found has nesting levels for {', '.join(targets)}: raise the limits")
    return best


def overlaid(predict: Predict, genomes: np.ndarray, measured: Values) -> Predict:
    """`predict`, with the values of canonical `genomes` [n, V] replaced by the `measured` ones, {key: [n]}."""
    rows = {key: i for i, key in enumerate(keys(genomes))}

    def known_first(asked: np.ndarray) -> Values:
        values = {key: np.array(column, np.float64) for key, column in predict(asked).items()}
        source = np.array([rows.get(key, -1) for key in keys(asked)], np.int64)
        for key, column in measured.items() if len(genomes) else ():
            values[key] = np.where(source >= 0, column[source], values[key])
        return values

    return known_first


def measured_chain(
    problem: Callable[[], Problem],
    genomes: np.ndarray,
    known: Callable[[], tuple[np.ndarray, Values]],
    measure: Callable[[np.ndarray], None],
) -> Chain:
    """The best chain whose levels were all measured, and keep their classes' limits as measured.

    `problem` predicts from what was measured up to now, which `known` says; `measure` adds to it. What a prediction
    promised and a measurement does not keep is not chosen again. After CHAINS chains: the best of what was measured,
    or RecipeError.
    """
    for _ in range(CHAINS):
        asked, (seen, values) = problem(), known()
        chain = best_chain(replace(asked, predict=overlaid(asked.predict, seen, values)), genomes)
        fresh = asked.encoding.unlike(np.stack([genome for _, genome in chain.levels]), seen)
        if not len(fresh):
            return chain
        measure(fresh)
    asked, (seen, values) = problem(), known()
    try:
        return best_chain(replace(asked, predict=overlaid(asked.predict, seen, values)), seen, below=False)
    except RecipeError as e:
        raise RecipeError(
            f"{CHAINS} chains of nesting levels broke a limit when they were measured: raise the limits, or --rounds"
        ) from e
