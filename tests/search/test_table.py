"""The latency table: a subnet's sum is that of its own kernels, whatever its depth and shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import ModelError
from qdeploy.profile.database import LatencyDatabase
from qdeploy.search.device import COVERAGE, LinearModel, latency_features
from qdeploy.search.encoding import Encoding
from qdeploy.search.measure import LocalDevice
from qdeploy.search.prices import fill
from qdeploy.search.table import LatencyTable, owners
from qdeploy.space import SubnetSpec
from qdeploy.target import load_target
from tests.search.spaces import small_space

TARGET = load_target(Path(__file__).parents[2] / "targets" / "host.toml")


def calls_of(spec: SubnetSpec) -> list[tuple[str, str]]:
    """What a compiler could make of a spec of `small_space`: kernels that depend on a block's kernel and expansion."""
    assert spec.architecture is not None
    found = [("input", "quantize"), ("stem", "stem")]
    for index, block in enumerate(spec.architecture.stages[0]):
        found += [(f"{index}.a", f"a{block.kernel}"), ("between", f"pool{block.expand}")]
        found += [(f"{index}.b", f"b{block.kernel}/{block.expand}"), ("requantize", "table")]
    return [*found, ("head", "head"), ("dequantize", "dequantize")]


def test_sums_are_those_of_each_subnets_own_kernels() -> None:
    encoding, random = Encoding(small_space(3)), np.random.default_rng(0)
    covering = [calls_of(spec) for spec in encoding.specs(encoding.canonical(encoding.covering()))]
    prices = {signature: float(random.exponential()) for calls in covering for _, signature in calls}
    table = LatencyTable(encoding, covering, prices)
    genomes = encoding.sample(200, random)
    ms, count = table.sums(genomes)
    for spec, value, number in zip(encoding.specs(genomes), ms, count, strict=True):
        calls = calls_of(spec)
        assert value == pytest.approx(sum(prices[signature] for _, signature in calls)) and number == len(calls)
    with pytest.raises(ModelError, match="no price for 0.b"):
        LatencyTable(encoding, covering, {k: v for k, v in prices.items() if k != "b3/2"})


def test_narrow_weights_change_the_layers_that_were_timed_with_wide_ones() -> None:
    encoding, random = Encoding(small_space(3, (2, 4, 8))), np.random.default_rng(0)
    covering = [calls_of(spec) for spec in encoding.specs(encoding.canonical(encoding.covering()))]
    prices = {signature: float(random.exponential()) for calls in covering for _, signature in calls}
    table, genomes = LatencyTable(encoding, covering, prices), encoding.sample(100, random)
    rows = [{entry.layer: entry.weight_bits for entry in spec.layers} for spec in encoding.specs(genomes)]
    for spec, bits, value in zip(encoding.specs(genomes), rows, table.narrow(genomes), strict=True):
        of_layers = [(layer, prices[signature]) for layer, signature in calls_of(spec) if layer in bits]
        assert value == pytest.approx(sum(ms for layer, ms in of_layers if bits[layer] < 8))
    ms = table.sums(genomes)[0] - 0.45 * table.narrow(genomes)
    model = LinearModel(latency_features(table, genomes[:20]), ms[:20])
    assert model(latency_features(table, genomes[20:])) == pytest.approx(ms[20:], rel=0.06)
    never_wide = Encoding(small_space(3, (2, 4)))
    assert not LatencyTable(never_wide, covering, prices).narrow(never_wide.sample(50, random)).any()


def test_calls_belong_to_the_block_of_the_layer_before_them() -> None:
    encoding = Encoding(small_space(2))
    names = ["input", "stem", "0.a", "x", "0.b", "x", "1.a", "1.b", "x", "head", "x"]
    assert owners(encoding, [(name, "s") for name in names]) == [-1, -1, 0, 0, 0, 0, 1, 1, 1, -1, -1]


def test_error_bars_hold_as_often_as_they_say() -> None:
    """Relative noise of any kind: what is new lies within bars that were learned from 20 points."""
    held, widths = [], []
    for seed in range(60):
        random = np.random.default_rng(seed)
        features = np.stack([np.ones(60), random.uniform(1, 9, 60), random.integers(20, 60, 60)], 1)
        noise = random.normal(0, 0.03, 60) if seed % 2 else random.uniform(-0.1, 0.1, 60)
        y = features @ np.array([1.0, 0.8, 0.01]) * (1 + noise)
        model = LinearModel(features[:20], y[:20])
        low, high = model.bounds(features[20:])
        assert np.all((low < model(features[20:])) & (model(features[20:]) < high))
        held.append(np.mean((low <= y[20:]) & (y[20:] <= high)))
        widths.append(np.mean(high / low - 1))
    assert COVERAGE - 0.02 <= np.mean(held) <= COVERAGE + 0.06 and 0.05 < np.mean(widths) < 0.3
    wild = LinearModel(np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 900.0]))
    low, high = wild.bounds(np.ones((2, 1)))
    assert np.all((low > 0) & (low <= high))


def test_a_database_is_filled_once_and_resumes(elastic_run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "latency.sqlite"
    device = LocalDevice(noise=1000.0)

    def filled(device: LocalDevice) -> tuple[int, int, int]:
        database = LatencyDatabase(path)
        try:
            found = fill(elastic_run, TARGET, database, device, None, said.append)
            return found.kernels, found.measured, found.networks
        finally:
            database.close()

    kernels, measured, networks = filled(device)
    assert kernels == measured > 5 and networks == 1

    class Nowhere(LocalDevice):
        def measure(self, artifact: Path, params: object) -> dict[str, object]:
            raise AssertionError("measured again")

    assert filled(Nowhere()) == (kernels, 0, 0)
    database = LatencyDatabase(path)
    with database._connection as connection:  # what another version has left
        connection.execute("UPDATE kernels SET compiler = 'old'")
        connection.execute("UPDATE networks SET compiler = 'old'")
    database.close()
    assert filled(device) == (kernels, kernels, 1)
    assert any("of another compiler version" in line for line in said)
