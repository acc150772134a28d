"""Fronts against exhaustive enumeration, constraints, resuming, and random search as the baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import RecipeError
from qdeploy.search import evolve as evolve_module
from qdeploy.search.baselines import Allocation, Genetic, RandomSearch
from qdeploy.search.encoding import Encoding, keys
from qdeploy.search.evolve import Evolution, Frame
from qdeploy.search.nsga2 import Nsga2
from qdeploy.search.problem import Problem, Scored
from qdeploy.search.strategy import Strategy
from qdeploy.space import LayerSpace, SearchSpace
from tests.search.spaces import everything, problem, small_space

NOTHING = np.zeros((0, 0), np.int64)


def quiet(_: str) -> None:
    pass


def run(strategy: Strategy, generations: int, path: Path) -> Scored:
    return Evolution(strategy, generations, path, 0).run(quiet)


def front_of(scored: Scored) -> set[bytes]:
    return {row.tobytes() for row in np.round(scored.minimised[scored.front], 9)}


def none(asked: Problem) -> np.ndarray:
    return np.zeros((0, len(asked.encoding)), np.int64)


@pytest.mark.parametrize(
    ("objectives", "limits"),
    [
        (("accuracy", "bitops"), ()),
        (("accuracy", "bitops"), ("weights_kib=6",)),
        (("accuracy", "bitops", "weights"), ("weights_kib=5",)),
    ],
)
def test_the_front_is_the_true_one(objectives: tuple[str, ...], limits: tuple[str, ...], tmp_path: Path) -> None:
    asked = problem(small_space(2), objectives, limits)
    truth = asked.score(everything(asked.encoding))
    wanted = front_of(truth)
    found = run(Nsga2(asked, 3 * len(wanted), 1, none(asked)), 30, tmp_path / "state.npz")
    assert 10 < len(wanted) < len(truth) / 8
    assert front_of(found) == wanted
    assert len(set(keys(found.genomes))) == len(found)
    assert not limits or 0 < truth.feasible.mean() < 0.9


def test_a_small_space_ends_when_all_is_tried(tmp_path: Path) -> None:
    asked = problem(small_space(1))
    found = run(Nsga2(asked, 100, 0, none(asked)), 50, tmp_path / "state.npz")
    assert front_of(found) == front_of(asked.score(everything(asked.encoding)))


@pytest.mark.parametrize("kind", [Nsga2, RandomSearch, Genetic])
def test_seeds_are_in_the_first_generation_and_seeded_runs_repeat(kind: type[Strategy]) -> None:
    asked = problem(small_space(3, (2, 3, 4)), limits=("weights_kib=9",))
    seeds = asked.encoding.sample(5, np.random.default_rng(7))
    first, second, other = (kind(asked, 40, seed, seeds) for seed in (3, 3, 4))
    for strategy in (first, second, other):
        strategy.step()
        assert set(keys(seeds)) <= set(keys(strategy.members.genomes))
        for _ in range(4):
            strategy.step()
    assert (first.members.genomes == second.members.genomes).all()
    assert (
        first.members.genomes.shape != other.members.genomes.shape
        or (first.members.genomes != other.members.genomes).any()
    )


@pytest.mark.parametrize("kind", [Nsga2, RandomSearch, Genetic])
def test_a_killed_run_goes_on_as_the_uninterrupted_one(
    kind: type[Strategy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evolve_module, "CHECKPOINT_SECONDS", 0.0)
    asked = problem(small_space(3, (2, 3, 4)), ("accuracy", "bitops", "weights"), ("weights_kib=9",))
    whole = run(kind(asked, 40, 0, none(asked)), 12, tmp_path / "whole.npz")

    killed = kind(asked, 40, 0, none(asked))
    real = killed.step
    steps = iter(range(7))
    monkeypatch.setattr(killed, "step", lambda: real() if next(steps, None) is not None else exit_now())
    with pytest.raises(KeyboardInterrupt):
        run(killed, 12, tmp_path / "state.npz")
    again = Evolution(kind(asked, 40, 0, none(asked)), 12, tmp_path / "state.npz", 0)
    assert again.done == 7
    members = again.run(quiet)
    assert (members.genomes == whole.genomes).all() and (members.minimised == whole.minimised).all()
    reference = Evolution(kind(asked, 40, 0, none(asked)), 12, tmp_path / "whole.npz", 0)
    assert again.history == reference.history and len(again.history) == 12


def exit_now() -> bool:
    raise KeyboardInterrupt


def test_hypervolume_is_above_random_search(tmp_path: Path) -> None:
    for seed in range(3):
        asked = problem(small_space(4, (2, 3, 4)), seed=seed)
        found, drawn = (
            run(kind(asked, 60, seed, none(asked)), 30, tmp_path / f"{kind.__name__}{seed}.npz")
            for kind in (Nsga2, RandomSearch)
        )
        frame = Frame.around(np.concatenate([found.minimised, drawn.minimised]))
        assert frame.hypervolume(found) > frame.hypervolume(drawn) > 0


def test_genetic_search_finds_the_most_accurate_within_the_limit(tmp_path: Path) -> None:
    asked = problem(small_space(3), ("accuracy",), ("bitops=6",))
    truth = asked.score(everything(asked.encoding))
    found = run(Genetic(asked, 80, 0, none(asked)), 40, tmp_path / "state.npz")
    best = truth.minimised[truth.feasible].min()
    assert found.feasible.any() and found.minimised[found.feasible].min() == pytest.approx(best, rel=2e-3)


def test_hypervolume_by_hand() -> None:
    frame = Frame(np.zeros(2), np.ones(2))
    points = np.array([[0.1, 0.6], [0.6, 0.1], [0.7, 0.7], [0.0, 0.0]])
    scored = Scored(np.zeros((4, 1), np.int64), points, np.array([[0.0], [-1.0], [0.0], [0.1]]))
    assert frame.hypervolume(scored) == pytest.approx(1.0 * 0.5 + 0.5 * 0.5)
    assert sorted(scored.front) == [0, 1]


def test_impossible_limits_name_the_nearest_values() -> None:
    asked = problem(small_space(2), limits=("weights_kib=0.5",))
    with pytest.raises(RecipeError, match=r"weights_kib <= 0.5 \(3 is reachable alone"):
        asked.check_reachable(asked.score(everything(asked.encoding)))
    fine = problem(small_space(2), limits=("weights_kib=100",))
    fine.check_reachable(fine.score(everything(fine.encoding)))


def test_a_subnet_that_serves_one_of_two_targets_is_feasible() -> None:
    asked = problem(small_space(2), ("accuracy", "bitops"), ("latency_ms@a=6", "latency_ms@b=6"), targets=("a", "b"))
    genomes = everything(asked.encoding)
    values, scored = asked.predict(genomes), asked.score(genomes)
    assert (scored.feasible == (values["latency_ms@a"] <= 6)).all()
    assert (values["latency_ms@b"] > values["latency_ms@a"]).all()


def test_allocation_is_on_the_convex_hull() -> None:
    layers = tuple(LayerSpace(f"l{i}", (2, 3, 4), (2, 3, 4)) for i in range(4))
    asked = problem(SearchSpace("plain", layers))
    random = np.random.default_rng(0)
    errors, sizes = np.full((4, 9), np.inf), np.zeros((4, 9))
    for row in range(4):
        errors[row, 2:5] = np.sort(random.exponential(1, 3))[::-1]
        sizes[row, 2:5] = np.cumsum(random.integers(5, 50, 3))
    strategy = Allocation(asked, 50, 0, none(asked), errors, sizes)
    strategy.step()
    weights = asked.encoding.bits(strategy.members.genomes)[0]
    assert len(weights) > 3 and not strategy.step()
    exhaustive = asked.encoding.bits(everything(asked.encoding))[0]
    rows = np.arange(4)
    points = {(sizes[rows, w].sum(), errors[rows, w].sum()) for w in exhaustive}
    for w in weights:
        size, error = sizes[rows, w].sum(), errors[rows, w].sum()
        assert min(e for s, e in points if s <= size) == pytest.approx(error)
    with pytest.raises(RecipeError, match="varies the architecture"):
        Allocation(problem(small_space(2)), 50, 0, NOTHING, errors, sizes)


def test_the_encoding_of_the_seeds_is_checked() -> None:
    space, other = small_space(2), small_space(3)
    with pytest.raises(RecipeError):
        Encoding(space).genomes(Encoding(other).specs(everything(Encoding(other))[-1:]))
