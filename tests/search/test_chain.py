"""Chains of levels: they nest whatever is drawn; the best one of a tiny space is the one that enumeration finds."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.data import Dataset
from qdeploy.errors import RecipeError
from qdeploy.evaluate import Judge
from qdeploy.extract import read_spec
from qdeploy.recipe import from_dict
from qdeploy.search import chain as module
from qdeploy.search import predictor
from qdeploy.search import run as search
from qdeploy.search.chain import Chains, Fleet, measured_chain
from qdeploy.search.encoding import Encoding, keys
from qdeploy.search.evolve import Evolution
from qdeploy.search.measure import Builder
from qdeploy.search.nsga2 import Nsga2
from qdeploy.search.problem import Problem
from qdeploy.space import SubnetSpec
from qdeploy.target import Target, load_target
from qdeploy.train.run import load_run, train
from tests.search.spaces import everything, problem, small_space
from tests.train.runs import tiny_recipe

TARGETS = ("strong", "weak")
TARGET_FILES = Path(__file__).parents[2] / "targets"


def asked(limits: tuple[str, ...], objectives: tuple[str, ...] = ("accuracy",)) -> Problem:
    """Two classes; the second is twice as slow."""
    return problem(small_space(2), objectives, limits, targets=TARGETS)


def every_chain(encoding: Encoding) -> np.ndarray:
    """Every chain of two levels, [n, genes], made of pairs of subnets and not by `Chains`."""
    genomes = everything(encoding)
    names = [gene.name for gene in encoding.space.variables]
    widths = np.array([name.endswith("_bits") for name in names])
    weights = np.array([name.endswith("weight_bits") for name in names])
    groups: dict[bytes, list[int]] = {}
    for i, key in enumerate(keys(np.where(widths, 0, genomes))):
        groups.setdefault(key, []).append(i)
    pairs = np.array([pair for rows in groups.values() for pair in product(rows, rows)])
    low, high = genomes[pairs[:, 0]], genomes[pairs[:, 1]]
    nests = (low[:, weights] <= high[:, weights]).all(1)
    return np.concatenate([low, high[:, widths]], axis=1)[nests]


def improve(fleet: Fleet, genomes: np.ndarray, generations: int = 30) -> np.ndarray:
    strategy = Nsga2(fleet, 60, 0, genomes)
    for _ in range(generations):
        strategy.step()
    return strategy.members.genomes


def test_levels_nest_whatever_is_drawn() -> None:
    encoding, random = Encoding(small_space(3, (2, 3, 4))), np.random.default_rng(0)
    chains = Chains(encoding, 3)
    genomes = random.integers(0, chains.counts, (200, len(chains)))
    levels = chains.levels(genomes)
    for low, middle, high in zip(*(encoding.specs(level) for level in levels), strict=True):
        assert low.nests_in(middle) and middle.nests_in(high)
    canonical = chains.canonical(genomes)
    assert (chains.levels(canonical) == levels).all() and (chains.canonical(canonical) == canonical).all()
    assert (canonical[~chains.active(canonical)] == 0).all()
    one = encoding.sample(20, random)
    assert (chains.levels(chains.alike(one)) == one).all()


@pytest.mark.parametrize(
    ("limits", "objectives"),
    [
        (("latency_ms@strong=4.5", "latency_ms@weak=8"), ("accuracy",)),
        (("latency_ms@strong=3", "latency_ms@weak=9", "weights_kib=8"), ("accuracy",)),
        (("latency_ms@strong=4.5", "latency_ms@weak=7"), ("accuracy", "latency")),
    ],
)
def test_the_best_chain_is_the_one_that_enumeration_finds(
    tmp_path: Path, limits: tuple[str, ...], objectives: tuple[str, ...]
) -> None:
    one = asked(limits, objectives)
    fleet = Fleet.of(one)
    everyone = every_chain(one.encoding)
    assert set(keys(everyone)) == set(keys(fleet.encoding.canonical(everyone)))
    truth = fleet.score(everyone)
    assert 0 < truth.feasible.mean() < 0.2  # noqa: PLR2004
    for genome in everyone[truth.feasible][:50]:  # a level for each class, by hand
        low, high = (one.predict(level) for level in fleet.encoding.levels(genome[None]))
        ways = [{"weak": low, "strong": high}, {"weak": high, "strong": low}]
        assert any(all(one.violated(way[target], target)[0] <= 0 for target in TARGETS) for way in ways)
    strategy = Nsga2(fleet, 60, 0, fleet.encoding.alike(one.encoding.sample(4, np.random.default_rng(0))))
    members = Evolution(strategy, 60, tmp_path / "round.npz", 0).run(lambda _: None)
    assert members.feasible.all()
    assert members.minimised[:, 0].min() == pytest.approx(truth.minimised[truth.feasible, 0].min())
    best, kept = fleet.best(members.genomes)
    assert kept
    for target, genome in fleet.levels(best):
        assert one.violated(one.predict(genome[None]), target)[0] <= 0


def test_limits_that_no_fleet_keeps_name_the_nearest_values() -> None:
    one = asked(("latency_ms@strong=0.001", "latency_ms@weak=9"))
    fleet = Fleet.of(one)
    with pytest.raises(RecipeError, match=r"latency_ms@strong <= 0.001 \(.* is reachable alone"):
        fleet.check_reachable(fleet.score(fleet.encoding.sample(50, np.random.default_rng(0))))


def test_a_chain_is_not_believed_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies turn out 10 to 60% above what is predicted, differently for each subnet and target."""
    one = asked(("latency_ms@strong=5", "latency_ms@weak=9"))
    encoding, seen = one.encoding, list[np.ndarray]()

    def truth(rows: np.ndarray) -> dict[str, np.ndarray]:
        values = one.predict(rows)
        for i, target in enumerate(TARGETS):
            values[f"latency_ms@{target}"] = values[f"latency_ms@{target}"] * (1.1 + 0.1 * (rows.sum(1) * (i + 3) % 6))
        return values

    def known() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rows = np.concatenate(seen) if seen else everything(encoding)[:0]
        return rows, truth(rows)

    start = improve(Fleet.of(one), Chains(encoding, 2).alike(encoding.sample(4, np.random.default_rng(0))))
    chain = measured_chain(lambda: one, start, known, seen.append, improve)
    assert len(seen) > 1
    specs = encoding.specs(np.stack([genome for _, genome in chain]))
    assert {target for target, _ in chain} == set(TARGETS) and specs[0].nests_in(specs[1])
    for target, genome in chain:
        assert one.violated(truth(genome[None]), target)[0] <= 0
        assert set(keys(genome[None])) <= set(keys(known()[0]))
    monkeypatch.setattr(module, "CHAINS", 0)  # when tries are used up, what was measured still counts
    for target, genome in measured_chain(lambda: one, start, known, seen.append, improve):
        assert one.violated(truth(genome[None]), target)[0] <= 0
    seen.clear()
    with pytest.raises(RecipeError, match="kept its limits"):
        measured_chain(lambda: one, start, known, seen.append, improve)


class Counted:
    """Stands for building and measuring a subnet, which takes seconds: bytes follow from widths."""

    def __init__(self, net: object, name: str, images: object, target: Target) -> None:
        pass

    def __call__(self, spec: SubnetSpec) -> Counted:
        self.spec = spec
        return self

    def measure(self, device: object) -> dict[str, object]:
        kernels = [[entry.layer, "conv", f"kernel of {entry.layer}", 0.1, 0.1, 0.1] for entry in self.spec.layers]
        figures = {"latency_ms": 1.0, "download_kib": 10.0 + planes(self.spec), "peak_memory_kib": 50.0}
        return figures | {"spec_id": self.spec.id, "spec": self.spec.to_json(), "kernels": kernels}


def planes(spec: SubnetSpec) -> int:
    return sum(entry.weight_bits for entry in spec.layers)


def test_levels_of_two_classes_become_one_bundle(
    fashion_sample: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the search to the files: the weak class has room for few planes more than the least, the strong for all."""
    recipe = tiny_recipe(images=256, epochs=1).to_json()
    recipe["data"]["held_out"] = 100
    recipe["network"] = {"name": "resnet8", "width": 8, "stem_stride": 2}
    run, out = tmp_path / "run", tmp_path / "out"
    train(from_dict(recipe), run, None, lambda _: None)
    net = load_run(run)[1]
    least, most = (planes(net.uniform(bits)) for bits in (2, 4))
    monkeypatch.setattr(search, "Builder", Counted)
    monkeypatch.setattr(search, "IMPROVED", 5)
    monkeypatch.setattr(predictor, "STEPS", (20, 20))
    monkeypatch.setattr(Judge, "score", lambda self, spec: 50.0 + planes(spec))
    monkeypatch.setattr("qdeploy.report.front.write_report", lambda *_: None)
    targets = [word for name in ("x86-64", "x86-64-avx512") for word in ("--target", TARGET_FILES / f"{name}.toml")]
    limits = {"x86-64": 10 + least + 3, "x86-64-avx512": 10 + most}
    bounds = [word for name, most in limits.items() for word in ("--max", f"download_kib@{name}={most}")]
    size = ("--samples", 10, "--population", 16, "--generations", 10, "--measure", 2)
    call("search", run, *targets, *bounds, "--objective", "accuracy", *size, "-o", out)
    levels = {name: read_spec(out / "levels" / f"{name}.json") for name in limits}
    assert planes(levels["x86-64"]) <= least + 3 < planes(levels["x86-64-avx512"]) <= most
    assert levels["x86-64"].nests_in(levels["x86-64-avx512"])
    build = Builder(net, "net", fashion_sample.images[:256], load_target(TARGET_FILES / "x86-64.toml"))
    for name, spec in levels.items():
        build.export(spec, tmp_path / f"{name}.onnx")
    call("bundle", *(tmp_path / f"{name}.onnx" for name in limits), "-o", tmp_path / "tree")
    said = call("inspect", tmp_path / "tree")
    assert all(name in said for name in limits)


def call(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout
