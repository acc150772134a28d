from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from qdeploy.errors import ModelError
from qdeploy.search import predictor as module
from qdeploy.search.device import LinearModel
from qdeploy.search.encoding import Encoding
from qdeploy.search.predictor import AccuracyPredictor, kendall_tau
from qdeploy.space import LayerSpace, SearchSpace
from tests.search.spaces import Formula, small_space


def test_kendall_tau_by_counting_pairs() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, 20), random.integers(0, 6, 20)
    pairs = list(combinations(range(20), 2))
    agree = sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs)
    untied = [sum(x[i] != x[j] for i, j in pairs) for x in (a, b)]
    assert kendall_tau(a, b) == pytest.approx(agree / np.sqrt(untied[0] * untied[1]))
    assert kendall_tau(a, a) == 1 and kendall_tau(a, -a) == -1
    assert kendall_tau(np.zeros(5), np.arange(5)) == 0


def test_the_predictor_ranks_what_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", (200, 200))
    encoding = Encoding(small_space(3, (2, 3, 4)))
    random, formula = np.random.default_rng(0), Formula(Encoding(small_space(3, (2, 3, 4))))
    seen, unseen = encoding.spread(120, random), encoding.spread(200, random)
    x, y = encoding.one_hot(seen), formula(seen)["accuracy"]
    first, again = (AccuracyPredictor(x, y, seed=1, curve=False) for _ in range(2))
    said, deviation = first(encoding.one_hot(unseen))
    assert (said == again(encoding.one_hot(unseen))[0]).all()
    truth = formula(unseen)["accuracy"]
    assert kendall_tau(said, truth) > 0.8
    assert first.quality.samples == 120 and first.quality.tau > 0.75
    assert first.quality.mae == pytest.approx(np.abs(said - truth).mean(), rel=1.0)
    assert (deviation > 0).all() and "Kendall tau" in first.advice()


def test_noise_asks_for_more_samples_and_few_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", (30, 30))
    random = np.random.default_rng(0)
    x = random.integers(0, 2, (40, 12)).astype(np.float32)
    noise = AccuracyPredictor(x, random.standard_normal(40))
    assert [one.samples for one in noise.curve] == [10, 20, 40]
    assert noise.quality.tau < 0.5 and "is wanted" in noise.advice()
    with pytest.raises(ModelError, match="score 10 or more"):
        AccuracyPredictor(x[:9], np.zeros(9))


def test_conditions_reach_the_input() -> None:
    """EQ-Net's condition bits: symmetry and granularity change what the predictor reads."""
    layers = tuple(
        LayerSpace(f"l{i}", (2, 4), (4,), ("tensor", "channel"), ("symmetric", "asymmetric")) for i in range(3)
    )
    encoding = Encoding(SearchSpace("eq", layers))
    columns = encoding.space.columns
    genome = np.zeros((1, len(encoding)), np.int64)
    for column, gene in enumerate(encoding.space.variables):
        other = genome.copy()
        other[0, column] = 1
        changed = np.flatnonzero(encoding.one_hot(genome)[0] != encoding.one_hot(other)[0])
        assert [columns[i].partition("=")[0] for i in changed] == [gene.name] * 2


def test_linear_models_find_their_law_and_their_error() -> None:
    random = np.random.default_rng(0)
    features = np.column_stack([np.ones(20), random.exponential(1e6, (20, 2))])
    law = np.array([5.0, 2e-6, 7e-6])
    exact = LinearModel(features, features @ law)
    assert exact(features) == pytest.approx(features @ law, rel=2e-2) and exact.error < 2e-2
    noisy = LinearModel(features, features @ law * (1 + 0.1 * random.standard_normal(20)))
    assert 0.05 < noisy.error < 0.2
    with pytest.raises(ModelError, match="measure 4 or more"):
        LinearModel(features[:3], np.ones(3))
