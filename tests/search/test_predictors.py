from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from qdeploy.errors import ModelError
from qdeploy.search import predictor as module
from qdeploy.search.device import LinearModel
from qdeploy.search.encoding import Encoding
from qdeploy.search.predictor import AccuracyPredictor, Quality, kendall_tau, ridge
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


def test_what_is_learned_of_all_samples_is_kept_whether_a_curve_is_drawn_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STEPS", (20, 20))
    random = np.random.default_rng(0)
    x = random.integers(0, 2, (60, 12)).astype(np.float32)
    y = 80 + x @ random.standard_normal(12) + 0.1 * random.standard_normal(60)
    with_curve, without = AccuracyPredictor(x, y), AccuracyPredictor(x, y, curve=False)
    assert (with_curve(x)[0] == without(x)[0]).all() and with_curve.error == without.error
    assert with_curve.quality == without.quality and len(without.curve) == 1
    assert with_curve.quality.tau == kendall_tau(with_curve.unseen, y) > 0.8


def test_a_line_is_found_among_more_columns_than_samples() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 40)) * np.linspace(3, 0.01, 40)
    law = random.standard_normal(40)
    weights, intercept = ridge(x, 7 + x @ law + 0.1 * random.standard_normal(30))
    fresh = random.standard_normal((500, 40)) * np.linspace(3, 0.01, 40)
    assert np.corrcoef(fresh @ weights + intercept, fresh @ law)[0, 1] > 0.7
    few = ridge(x, np.full(30, 5.0))
    assert few[1] == pytest.approx(5) and np.abs(few[0]).max() < 1e-9


def predictor_with(curve: list[Quality]) -> AccuracyPredictor:
    found = AccuracyPredictor.__new__(AccuracyPredictor)
    found.curve, found.quality = curve, curve[-1]
    return found


def test_advice_says_how_many_samples_suffice() -> None:
    """1 - tau halves where samples grow four times: from 0.3 to 0.2 it takes 2.25 times as many."""
    rising = predictor_with([Quality(50, 0.4, 1.0), Quality(200, 0.7, 0.5)])
    assert "tau 0.8 is wanted, score about 450 specs" in rising.advice()
    assert "wanted" not in predictor_with([Quality(50, 0.4, 1.0), Quality(200, 0.8, 0.5)]).advice()
    flat = predictor_with([Quality(50, 0.5, 1.0), Quality(200, 0.5, 1.0)]).advice()
    assert "but 200 samples have hardly raised it above what 50 gave: hold out more images" in flat
    slow = predictor_with([Quality(62, 0.78, 0.2), Quality(249, 0.79, 0.2)]).advice()
    assert "hardly raised" in slow and "score about" not in slow
    unknown = predictor_with([Quality(20, 0.5, 1.0)]).advice()
    assert unknown.endswith("mean error 1.00 points: tau 0.8 is wanted")  # no curve, no number


def test_members_that_disagree_ask_for_samples_like_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", (20, 20))
    random = np.random.default_rng(0)
    x = np.zeros((60, 20), np.float32)
    x[:, :10] = random.integers(0, 2, (60, 10))
    x[:2, 10:] = 1  # few samples say anything of the other columns
    found = AccuracyPredictor(x, 80 + x @ random.standard_normal(20) + 0.1 * random.standard_normal(60), curve=False)
    assert found.doubt(x) == ""
    x[:, 10:] = random.integers(0, 2, (60, 10)) * 3
    assert "score some subnets like these" in found.doubt(x)


def test_noise_asks_for_more_samples_and_few_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", (30, 30))
    random = np.random.default_rng(0)
    x = random.integers(0, 2, (40, 12)).astype(np.float32)
    noise = AccuracyPredictor(x, random.standard_normal(40))
    assert [one.samples for one in noise.curve] == [10, 20, 40]
    assert noise.quality.tau < 0.5 and "is wanted" in noise.advice()
    with pytest.raises(ModelError, match="score 10 or more"):
        AccuracyPredictor(x[:9], np.zeros(9))


@pytest.mark.parametrize("steps", [40, 300])
def test_the_optimizer_is_torchs_adamw_in_one_cycle(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(2)]
    theirs = [torch.nn.Parameter(one.detach().clone()) for one in ours]
    mine = module._AdamW(ours, steps)
    adamw = torch.optim.AdamW(theirs, module.LEARNING_RATE, weight_decay=module.WEIGHT_DECAY)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        adamw, module.LEARNING_RATE, total_steps=steps, pct_start=module.WARM_UP
    )
    for _ in range(steps):
        wanted = torch.randn(3, 4, generator=generator)
        for first, second in (ours, theirs):
            torch.autograd.backward(((first * second - wanted) ** 2).sum())
        mine.step()
        adamw.step()
        adamw.zero_grad()
        cycle.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


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
