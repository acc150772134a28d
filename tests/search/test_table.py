"""The latency table: a subnet's sum is that of its own kernels, whatever its depth and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import ModelError
from qdeploy.profile.database import LatencyDatabase
from qdeploy.search.device import COVERAGE, LinearModel
from qdeploy.search.encoding import Encoding
from qdeploy.search.measure import LocalDevice
from qdeploy.search.prices import fill
from qdeploy.search.table import KINDS, Calls, LatencyTable, networks, owners
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


def shown_by(encoding: Encoding, shifted: np.ndarray, calls: Callable[[SubnetSpec], Calls]) -> list[Calls]:
    return [calls(spec) for spec in encoding.specs(networks(encoding, shifted))]


def no_zero_points(encoding: Encoding) -> np.ndarray:
    return np.zeros((len(encoding.layers), encoding.shape_count, 9, *encoding.kinds), bool)


def test_sums_are_those_of_each_subnets_own_kernels() -> None:
    encoding, random = Encoding(small_space(3)), np.random.default_rng(0)
    none = no_zero_points(encoding)
    shown = shown_by(encoding, none, calls_of)
    assert len(shown) == encoding.shape_count  # no layer can be both wide and narrow
    prices = {signature: float(random.exponential()) for calls in shown for _, signature in calls}
    table = LatencyTable(encoding, none, shown, prices)
    genomes = encoding.sample(200, random)
    ms, count = table.sums(genomes)
    for spec, value, number in zip(encoding.specs(genomes), ms, count, strict=True):
        calls = calls_of(spec)
        assert value == pytest.approx(sum(prices[signature] for _, signature in calls)) and number == len(calls)
    with pytest.raises(ModelError, match="no price for 0.b"):
        LatencyTable(encoding, none, shown, {k: v for k, v in prices.items() if k != "b3/2"})


def test_narrow_weights_and_zero_points_have_prices_of_their_own() -> None:
    """Kernels that depend on both, zero points on the width too: some layers lack some of the four kinds."""
    space = small_space(3, (2, 4, 8))
    layers = tuple(
        replace(x, symmetry=("symmetric", "asymmetric")) if len(x.weight_bits) > 1 else x for x in space.layers
    )
    encoding, random = Encoding(replace(space, layers=layers)), np.random.default_rng(0)
    shifted = no_zero_points(encoding)
    shifted[..., 1] = random.random(shifted.shape[:-1]) < 0.5  # noqa: PLR2004
    shapes = encoding.shape_count

    def calls_with(spec: SubnetSpec) -> Calls:
        shape = encoding.shapes(encoding.genomes([spec]), encoding.layer_block)[0]
        row = {layer: i for i, layer in enumerate(encoding.layers)}
        found = []
        for layer, signature in calls_of(spec):
            if layer in row:
                i, entry = row[layer], spec[layer]
                zero = entry.symmetry == "asymmetric" and shifted[i, shape[i], entry.weight_bits, 0, 1]
                signature += " narrow" * (entry.weight_bits < 8) + " zero" * bool(zero)  # noqa: PLR2004, PLW2901
            found.append((layer, signature))
        return found

    shown = shown_by(encoding, shifted, calls_with)
    assert shapes < len(shown) <= 4 * shapes
    genomes = encoding.sample(300, random)
    specs = encoding.specs(genomes)
    needed = {signature for spec in specs for _, signature in calls_with(spec)}
    prices = {signature: float(random.exponential()) for calls in shown for _, signature in calls}
    assert needed <= prices.keys() and len(needed) > 30  # noqa: PLR2004
    ms = LatencyTable(encoding, shifted, shown, prices).sums(genomes)[0]
    assert ms == pytest.approx([sum(prices[signature] for _, signature in calls_with(spec)) for spec in specs])


def test_calls_belong_to_the_layer_before_them() -> None:
    encoding = Encoding(small_space(2))
    names = ["input", "stem", "0.a", "x", "0.b", "x", "1.a", "1.b", "x", "head", "x"]
    found = owners(encoding, [(name, "s") for name in names])
    assert [encoding.layers[i] if i >= 0 else "" for i in found] == [
        "", "stem", "0.a", "0.a", "0.b", "0.b", "1.a", "1.b", "1.b", "head", "head",
    ]  # fmt: skip


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
    assert kernels == measured > 5 and 1 < networks <= KINDS  # wide and narrow, with and without zero points

    class Nowhere(LocalDevice):
        def measure(self, artifact: Path, params: object) -> dict[str, object]:
            raise AssertionError("measured again")

    assert filled(Nowhere()) == (kernels, 0, 0)
    database = LatencyDatabase(path)
    with database._connection as connection:  # what another version has left
        connection.execute("UPDATE kernels SET compiler = 'old'")
        connection.execute("UPDATE networks SET compiler = 'old'")
    database.close()
    with pytest.raises(AssertionError, match="measured again"):
        filled(Nowhere())
    assert any("of another compiler version" in line for line in said)
