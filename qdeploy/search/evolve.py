"""One round of a search: generations until the last, a checkpoint now and then, hypervolume of each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.progress import Counter, Echo
from qdeploy.search.folder import read_arrays, write_arrays
from qdeploy.search.problem import Scored
from qdeploy.search.strategy import Strategy

MARGIN = 1.1  # the reference point of the hypervolume, in the first generation's ranges
CHECKPOINT_SECONDS = 10.0
HYPERVOLUME_OBJECTIVES = 4  # the hypervolume of more takes longer than the generation
COLUMNS = ("round", "generation", "evaluations", "feasible", "front", "hypervolume")


@dataclass(frozen=True)
class Frame:
    """Ranges of the objectives that hypervolumes are relative to: those of the first generation."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def around(cls, minimised: np.ndarray) -> Frame:
        """The ranges of [n, objectives]."""
        low, high = minimised.min(0), minimised.max(0)
        return cls(low, np.where(high > low, high, low + np.maximum(np.abs(low), 1.0)))

    def hypervolume(self, scored: Scored) -> float:
        """Of the feasible front up to the reference point, in units of the ranges; 0 where nothing is feasible."""
        from moocore import hypervolume

        points = (scored.minimised[scored.front] - self.low) / (self.high - self.low)
        points = points[(points < MARGIN).all(1)]
        return float(hypervolume(points, ref=np.full(points.shape[1], MARGIN))) if len(points) else 0.0


class Evolution:
    """Runs a strategy for `generations`; `path` keeps its state. A killed one goes on as the uninterrupted would."""

    def __init__(self, strategy: Strategy, generations: int, path: Path, round_: int) -> None:
        self.strategy, self.generations, self.path, self.round = strategy, generations, path, round_
        self.frame: Frame | None = None
        self.done = 0
        self.history: list[list[float]] = []
        if path.exists():
            self._restore()

    def _restore(self) -> None:
        state = read_arrays(self.path)
        self.history = state.pop("history").tolist()
        self.done = int(state.pop("done"))
        self.frame = Frame(state.pop("low"), state.pop("high"))
        self.strategy.restore(state)

    def _keep(self) -> None:
        assert self.frame is not None
        state = self.strategy.state() | {"low": self.frame.low, "high": self.frame.high}
        state |= {"done": np.array(self.done), "history": np.array(self.history)}
        write_arrays(self.path, state)

    def _note(self) -> None:
        members = self.strategy.members
        if self.frame is None:
            self.frame = Frame.around(members.minimised)
        few = members.minimised.shape[1] <= HYPERVOLUME_OBJECTIVES
        volume = self.frame.hypervolume(members) if few or self.done == self.generations else float("nan")
        counts = (int(members.feasible.sum()), len(members.front))
        self.history.append([self.round, self.done, self.done * self.strategy.size, *counts, volume])

    def run(self, echo: Echo) -> Scored:
        """The members at the end."""
        kept, began = time.monotonic(), self.done
        counter = Counter(echo, f"round {self.round + 1}", self.generations, "generation", began)
        while self.done < self.generations:
            if not self.strategy.step():
                counter.stop()
                echo(f"generation {self.done}: nothing new to try")
                break
            self.done += 1
            self._note()
            now = time.monotonic()
            if now - kept > CHECKPOINT_SECONDS:
                self._keep()
                kept = now
            row = self.history[-1]
            counter.at(self.done, f"{int(row[4])} on the front, hypervolume {row[5]:.4f}")
        if self.done > began:
            self._keep()
        return self.strategy.members
