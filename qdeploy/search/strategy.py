"""What every way to search shares: one generation at a time, and a state of plain arrays that resumes it exactly."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod

import numpy as np

from qdeploy.search.problem import Question, Scored

State = dict[str, np.ndarray]


class Strategy(ABC):
    """Searches `problem` with `population` evaluations a generation; the same seed gives the same generations.

    `seeds`: canonical genomes of known specs that the first generation contains.
    """

    def __init__(self, problem: Question, population: int, seed: int, seeds: np.ndarray) -> None:
        self.problem, self.size, self.seeds = problem, population, seeds
        self.random = np.random.default_rng(seed)
        self.members = Scored(seeds[:0], np.zeros((0, len(problem.objectives))), np.zeros((0, 0)))

    @abstractmethod
    def step(self) -> bool:
        """One generation; False when there is nothing new to try."""

    def first(self) -> np.ndarray:
        """Genomes of the first generation: the seeds, and random ones, no spec twice."""
        encoding = self.problem.encoding
        fresh = encoding.unlike(self.seeds[: self.size], self.seeds[:0])
        for _ in range(100):  # a small space has fewer specs than a generation
            if len(fresh) >= self.size:
                break
            drawn = np.concatenate([encoding.spread(self.size, self.random), encoding.sample(self.size, self.random)])
            fresh = np.concatenate([fresh, encoding.unlike(drawn, fresh)])
        return fresh[: self.size]

    def state(self) -> State:
        """Everything that the next generations depend on."""
        return {
            "genomes": self.members.genomes,
            "minimised": self.members.minimised,
            "violations": self.members.violations,
            "random": text_array(json.dumps(self.random.bit_generator.state)),
        }

    def restore(self, state: State) -> None:
        """Inverse of `state`."""
        self.members = Scored(state["genomes"], state["minimised"], state["violations"])
        self.random.bit_generator.state = json.loads(array_text(state["random"]))


def text_array(text: str) -> np.ndarray:
    """Text as uint8, for files of arrays."""
    return np.frombuffer(text.encode(), np.uint8)


def array_text(array: np.ndarray) -> str:
    """Inverse of `text_array`."""
    return bytes(array).decode()
