"""The pieces by themselves: MixQuant's table, ranges, grids, rounding, rows of weights, folding."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import ModelError
from qdeploy.ptq import mixquant
from qdeploy.ptq.fold import equalize
from qdeploy.ptq.graph import outputs_of
from qdeploy.ptq.layers import patches, read_layer, rows, unrows
from qdeploy.ptq.prepare import prepare
from qdeploy.ptq.ranges import Samples, find_grid, make_grid
from qdeploy.ptq.rounding import least_squares, level_weights, nearest_prefix, refit_scale
from qdeploy.ptq.weights import fit_grid, ladder_levels, nearest, values
from tests.ptq.nets import FloatNet, inputs, saved

# MixQuant ------------------------------------------------------------------------------------------------------------


def plain_error(weight: np.ndarray, bits: int, criterion: str) -> float:
    """Asymmetric quantization as it is written, in float64."""
    w = weight.reshape(-1).astype(np.float64)
    low, high = min(w.min(), 0), max(w.max(), 0)
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    back = (np.clip(np.rint(w / step) + zero, 0, 2**bits - 1) - zero) * step
    if criterion == "mse":
        return float(np.mean((w - back) ** 2))
    return float(np.mean(np.abs(w - back)[w != 0] / np.abs(w[w != 0])))


@pytest.mark.parametrize("criterion", mixquant.CRITERIA)
@pytest.mark.parametrize("shape", [(3,), (70000,), (16, 3, 3, 3)], ids=str)
def test_the_table_is_the_definition(shape: tuple[int, ...], criterion: str) -> None:
    weight = np.random.default_rng(0).normal(0.3, 1, shape).astype(np.float32)
    weight.reshape(-1)[1] = 0
    table = mixquant.quantization_errors(weight, criterion)
    expected = [plain_error(weight, bits, criterion) for bits in mixquant.WIDTHS]
    np.testing.assert_allclose(table, expected, rtol=2e-3)


def test_the_smallest_width_is_chosen() -> None:
    table = {"a": np.array([500, 200, 100, 60, 15, 4.0, 1]), "b": np.array([3, 3, 3, 3, 3, 1.5, 1])}
    assert mixquant.choose(table, 1) == {"a": 8, "b": 8}
    assert mixquant.choose(table, 4) == {"a": 7, "b": 2}
    assert mixquant.choose(table, 99) == {"a": 5, "b": 2}
    assert mixquant.choose(table, 1e9) == {"a": 2, "b": 2}
    with pytest.raises(ModelError, match="below 1"):
        mixquant.choose(table, 0.5)
    assert mixquant.choose({"dead": mixquant.quantization_errors(np.zeros(5, np.float32))}, 2) == {"dead": 2}


@given(st.lists(st.lists(st.floats(1, 1000), min_size=6, max_size=6), min_size=1, max_size=5), st.floats(0, 1))
def test_the_least_qem_meets_the_size(ratios: list[list[float]], part: float) -> None:
    table = {str(i): np.array([*sorted(row, reverse=True), 1.0]) for i, row in enumerate(ratios)}
    sizes = {name: 10 + int(name) for name in table}
    total = sum(sizes.values())

    def bits(widths: object) -> int:
        return mixquant.size_bits(widths, sizes)  # type: ignore[arg-type]

    limit = int(total * (2 + 6 * part)) + 1
    qem = mixquant.for_size(table, bits, limit)
    assert bits(mixquant.choose(table, qem)) <= limit
    below = [q for q in mixquant.thresholds(table) if q < qem / (1 + 1e-9)]
    assert all(bits(mixquant.choose(table, float(q))) > limit for q in below)


def test_bounds_that_cannot_be_met_are_refused() -> None:
    table = {"a": np.array([500, 200, 100, 60, 15, 4.0, 1])}
    with pytest.raises(ModelError, match="the least is 20"):
        mixquant.for_size(table, lambda widths: mixquant.size_bits(widths, {"a": 10}), 19)
    with pytest.raises(ModelError, match="even 8 bits reach"):
        mixquant.for_accuracy(table, lambda widths: 50.0, 60)
    qem = mixquant.for_accuracy(table, lambda widths: 40.0 + 5 * widths["a"], 65)
    assert mixquant.choose(table, qem) == {"a": 5}
    with pytest.raises(ModelError, match="criterion"):
        mixquant.error_table({}, "entropy")


# Ranges --------------------------------------------------------------------------------------------------------------


def test_ranges_of_values_with_an_outlier() -> None:
    x = np.abs(np.random.default_rng(0).normal(0, 1, 20000)).astype(np.float32)
    x[7] = 40
    samples = Samples(float(x.min()), float(x.max()), x)
    ends = {
        m: find_grid(samples, 4, m, 99.9, "asymmetric").ends()[1] for m in ("minmax", "percentile", "mse", "entropy")
    }
    assert ends["minmax"] == pytest.approx(40, rel=1e-5)
    assert 3 < ends["percentile"] < 4.5
    assert 1.5 < ends["mse"] <= 13 and ends["entropy"] < 20
    assert all(find_grid(samples, 4, m, 99.9, "asymmetric").zero_point == 0 for m in ends)


def test_a_margin_leaves_room_up_to_what_the_operator_can_reach() -> None:
    values = np.array([-0.5, 4.0], np.float32)
    wide, cut, relu = (
        find_grid(Samples(-0.5, 4.0, values, limits), 8, "margin", 99.9, "asymmetric").ends()
        for limits in ((-np.inf, np.inf), (-np.inf, 4.5), (0.0, np.inf))
    )
    assert wide == pytest.approx((-0.625, 5.0), abs=0.03)
    assert cut == pytest.approx((-0.625, 4.5), abs=0.03)
    assert relu == pytest.approx((0, 5.0), abs=1e-5)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(2, 8), st.sampled_from(["asymmetric", "symmetric"]))
def test_a_grid_holds_zero_and_covers_its_range(a: float, b: float, bits: int, symmetry: str) -> None:
    low, high = min(a, b), max(a, b)
    grid = make_grid(low, high, bits, symmetry)
    assert grid.scale > 0 and grid.lo <= grid.zero_point <= grid.hi and np.isfinite(grid.scale)
    ends, half = grid.ends(), 0.51 * float(grid.scale) + 1e-6 * max(abs(low), abs(high))
    assert ends[0] <= min(low, 0) + half and ends[1] >= max(high, 0) - half


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 4, 6), (2, 4, 8), (3, 5, 7), (4,)], ids=str)
def test_levels_are_midpoints_on_one_grid(widths: tuple[int, ...]) -> None:
    levels = ladder_levels(widths)
    top = max(widths)
    w = np.arange(-(1 << (top - 1)), 1 << (top - 1))
    full = levels[-1].codes(w)
    for level in levels:
        codes = level.codes(w)
        assert codes.min() >= -128 and codes.max() <= 127
        assert len(np.unique(codes)) == 1 << level.bits
        for code in np.unique(codes):
            middle = np.mean(full[codes == code])
            assert 0 <= middle - code <= 0.5 if top == 8 else middle == code
    if top <= 6 and len(widths) > 1:
        assert np.abs(full).max() <= 64


def test_the_beam_finds_the_nearest_code() -> None:
    random = np.random.default_rng(0)
    levels = ladder_levels((2, 4, 6))
    matrix = random.normal(0, 1, (200, 1))
    grid = fit_grid(matrix, levels, "tensor", "symmetric", np.ones((1, 1)), np.ones(3))
    targets = matrix[None, :, 0] + random.normal(0, 0.1, (3, 200))
    weights = level_weights(levels, 0.5)
    found = nearest_prefix(targets, levels, grid, weights)

    def cost(w: np.ndarray) -> np.ndarray:
        parts = [
            weights[i] * (values(level, w[:, None], grid)[:, 0] - targets[i]) ** 2 for i, level in enumerate(levels)
        ]
        return np.sum(parts, 0)

    best = np.min([cost(np.full(200, w)) for w in range(-32, 32)], 0)
    assert np.mean(cost(found) <= best * (1 + 1e-9)) > 0.95  # a beam, not a proof
    assert np.mean(cost(found)) <= 1.02 * np.mean(best)


@pytest.mark.parametrize("groups", [1, 6])
def test_least_squares_lowers_the_output_error(groups: int) -> None:
    random = np.random.default_rng(1)
    matrix = random.normal(0, 1, (6, 24))
    x = random.normal(0, 1, (groups, 500, 24)) @ random.normal(0, 1, (24, 24)) + 1
    second = x.transpose(0, 2, 1) @ x / 500
    levels = ladder_levels((3,))
    importance = np.repeat(np.diagonal(second, axis1=1, axis2=2), 6 // groups, 0)
    grid = fit_grid(matrix, levels, "channel", "symmetric", importance, np.ones(1))

    def error(codes: np.ndarray, scale: np.ndarray) -> float:
        lost = (levels[0].codes(codes) * scale - matrix).reshape(groups, -1, 24)
        return float(np.einsum("goi,gij,goj->", lost, second, lost))

    plain, solved = nearest(matrix, levels, grid), least_squares(matrix, second, levels, grid, np.ones(1))
    assert error(solved, grid.scale) < 0.7 * error(plain, grid.scale)
    assert solved.min() >= grid.lo and solved.max() <= grid.hi
    fitted = refit_scale(matrix, solved, second, grid.scale)
    assert error(solved, fitted) <= error(solved, grid.scale)


@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("Conv", (6, 3, 3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}),
        ("Conv", (6, 1, 3, 3), {"group": 3, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("Conv", (6, 1, 3, 3), {"group": 3, "auto_pad": "SAME_LOWER"}),
    ],
    ids=["plain", "grouped", "lower"],
)
def test_patches_times_rows_are_the_layer(
    op: str, shape: tuple[int, ...], attributes: dict[str, object], tmp_path: Path
) -> None:
    net = FloatNet((1, 3, 9, 8))
    net.node(op, "x", net.store(net.random.normal(0, 1, shape)), **attributes)
    graph = prepare(saved(net.model("v0", rank=4), tmp_path))
    x = inputs(graph.shape, 1)
    layer = read_layer(graph, graph.nodes[0])
    assert not isinstance(layer, str)
    weight = graph.arrays[layer.weight]
    seen = patches(layer, graph.nodes[0], weight.shape[2:], x, 10**6, np.random.default_rng(0))
    matrix = rows(layer, weight).reshape(seen.shape[0], -1, seen.shape[2])
    got = np.einsum("gnk,gok->gon", seen, matrix).reshape(len(weight), -1)
    np.testing.assert_allclose(got, outputs_of(graph.model(), x, "v0")[0].reshape(len(weight), -1), atol=1e-4)


def test_rows_and_back() -> None:
    random = np.random.default_rng(0)
    forms = [("Conv", (6, 2, 3, 3), 3, {}), ("ConvTranspose", (4, 3, 2, 2), 2, {}), ("Gemm", (5, 7), 1, {}),
             ("Gemm", (5, 7), 1, {"transB": 1}), ("MatMul", (5, 7), 1, {})]  # fmt: skip
    for (op, shape, groups, more), seed in itertools.product(forms, range(3)):
        net = FloatNet((1, shape[1] * groups if op == "Conv" else shape[0] if not more else shape[1], 4, 4))
        weight = net.store(np.random.default_rng(seed).normal(0, 1, shape))
        net.node(op, "x", weight, **({"group": groups} if op.startswith("Conv") else more))
        from qdeploy.ptq.graph import FloatGraph

        graph = FloatGraph(net.nodes, net.arrays, "x", net.shape, [], 13, [], 8, {"x": net.shape})  # type: ignore[arg-type]
        layer = read_layer(graph, net.nodes[0])
        assert not isinstance(layer, str)
        values = random.normal(0, 1, shape)
        matrix = rows(layer, values)
        outputs = shape[1] * groups if op == "ConvTranspose" else shape[layer.axis]
        assert matrix.shape == (outputs, values.size // outputs)
        assert np.array_equal(unrows(layer, matrix, shape), values)


# Folding -------------------------------------------------------------------------------------------------------------


def test_affine_operators_go_into_layers_or_become_depthwise(tmp_path: Path) -> None:
    net = FloatNet((1, 3, 8, 8))
    x = net.node(
        "Div", net.node("Sub", "x", net.store([[[0.4]], [[0.5]], [[0.6]]])), net.store([[[0.2]], [[0.3]], [[0.2]]])
    )
    x = net.norm(net.conv(x, 3, 4, bias=False), 4)
    x = net.node("Mul", x, net.store(net.random.normal(0, 1, (1, 4, 1, 1))))
    up = net.store(net.random.normal(0, 1, (4, 3, 2, 2)))
    x = net.norm(net.node("ConvTranspose", x, up, group=2, strides=[2, 2]), 6)
    x = net.node("Relu", net.norm(net.node("Relu", x), 6))
    graph = prepare(saved(net.model(x, rank=4), tmp_path))  # it compares the outputs itself
    kinds = [node.op_type for node in graph.nodes]
    assert "BatchNormalization" not in kinds and "Mul" not in kinds and "Sub" not in kinds
    assert kinds[-3:] == ["Relu", "Conv", "Relu"]


def test_equalizing_evens_ranges_and_keeps_the_function(tmp_path: Path) -> None:
    net = FloatNet((1, 3, 8, 8))
    x = net.node("Relu", net.conv("x", 3, 8))
    net.arrays["p0"][::2] *= 50
    x = net.node("Relu", net.conv(x, 8, 8, groups=8))
    x = net.node("LeakyRelu", net.conv(x, 8, 4, 1))
    graph = prepare(saved(net.model(net.head(x, 4)), tmp_path))
    images = inputs(graph.shape, 4)
    before = outputs_of(graph.model(), images, graph.output_names[0])
    assert equalize(graph) == 2
    after = outputs_of(graph.model(), images, graph.output_names[0])
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4 * np.abs(before).max())
    first = np.abs(graph.arrays[graph.nodes[0].input[1]]).reshape(8, -1).max(1)
    assert first.max() / first.min() < 10
