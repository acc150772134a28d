from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from qdeploy.report.front import label, merged, search_blocks
from qdeploy.report.grids import bits_plot, sensitivity_plot
from qdeploy.report.ladder import Rung, climb_plot
from qdeploy.report.layers import time_plot
from qdeploy.report.pareto import (
    FrontView,
    Point,
    agreement_plot,
    error_ends,
    errors,
    front_plot,
    hypervolume_plot,
    kendall_tau,
)
from tests.report.material import profile, search_folder, sensitivity

VIEW = {"accuracy": "top-1 accuracy (%)", "latency_ms": "latency (ms)"}


def view(limit: float) -> FrontView:
    believed, seen = {"accuracy": 90.0, "latency_ms": 2.0}, {"accuracy": 89.0, "latency_ms": 2.5}
    points = [
        Point("a", {"accuracy": 80.0, "latency_ms": 1.0}, {}, {"latency_ms": (0.5, None)}),
        Point("b", believed, seen, {"accuracy": (88.0, 92.0)}),
    ]
    return FrontView(["accuracy", "latency_ms"], VIEW, points, {"latency_ms": limit}, {"pick": 1})


def test_a_front_says_what_was_measured_and_what_was_believed() -> None:
    drawn = front_plot(view(2.0))
    texts = [text for texts in drawn.marks.values() for text in texts]
    assert len(texts) == 2
    assert texts[0].startswith("a\n") and "latency (ms), predicted: 1" in texts[0]
    assert "top-1 accuracy (%), measured: 89\n    predicted: 90 (88 to 92)" in texts[1]
    axes = drawn.figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency (ms)", "top-1 accuracy (%)")
    assert {text.get_text() for text in axes.texts} == {"limit 2", "pick"}
    assert drawn.data.rows[1] == ["b", 90.0, 89.0, 2.0, 2.5]


@pytest.mark.parametrize(
    ("limit", "said"), [(9.0, "limit 9 \N{RIGHTWARDS ARROW}"), (0.001, "limit 0.001 \N{LEFTWARDS ARROW}")]
)
def test_a_limit_far_from_the_front_does_not_squeeze_it(limit: float, said: str) -> None:
    axes = front_plot(view(limit)).figure.axes[0]
    assert said in [text.get_text() for text in axes.texts]
    assert axes.get_xlim()[1] < 4 and axes.get_xlim()[0] > 0


def test_error_bars_have_no_negative_length() -> None:
    assert error_ends([1.0, 2.0, 3.0, 4.0], [None, (1.5, None), (None, 3.5), (5.0, 3.0)]) == [
        [0.0, 0.5, 0.0, 0.0],
        [0.0, 0.0, 0.5, 0.0],
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_kendalls_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    ours = kendall_tau(first, second)
    if len(set(first)) < 2 or len(set(second)) < 2:
        assert ours is None
    else:
        assert ours == pytest.approx(kendalltau(first, second).statistic)


def test_errors_are_relative_but_of_accuracy() -> None:
    pairs = [(9.0, 10.0, (8.0, 9.5)), (22.0, 20.0, (19.0, None))]
    found = errors(pairs, per_cent=False)
    assert (found["subnets"], found["mean error"], found["largest error"], found["bias"]) == (2, "10%", "10%", "+0%")
    assert found["inside the error bar"] == "1 of 2" and found["Kendall tau"] == 1
    assert errors(pairs, per_cent=True)["mean error"] == "1.5 points"
    assert errors([(1.0, 0.0, (None, None))], per_cent=False)["mean error"] == "1"


def test_agreement_has_equal_scales_and_the_line_of_equals() -> None:
    drawn = agreement_plot({"accuracy": [(1.0, 2.0, (None, None))], "empty": []}, {"accuracy": "accuracy (%)"})
    (axes,) = drawn.figure.axes
    assert axes.get_xlim() == axes.get_ylim() and axes.get_aspect() == 1
    assert any(list(line.get_xdata()) == list(line.get_ydata()) for line in axes.lines)


def test_bars_start_at_zero() -> None:
    for plot, across in (
        (time_plot(profile(30)["layers"]), True),
        (climb_plot([Rung("w2", {"planes": 2048}), Rung("w4", {"planes": 1024, "side": 10})]), True),
    ):
        low, high = plot.figure.axes[0].get_xlim()
        assert low == 0 < high and across


def test_a_climb_starts_where_the_rung_below_ended() -> None:
    drawn = climb_plot([Rung("w2", {"planes": 2048}), Rung("w4", {"planes": 1024, "side": 512}, 90.0)])
    bars = [(bar.get_x(), bar.get_width()) for bar in drawn.figure.axes[0].patches]
    assert bars == [(0, 2), (0, 2), (2, 1), (3, 0.5)]  # KiB
    assert [text for texts in drawn.marks.values() for text in texts][1] == "w4\nkept (KiB): 2\nsent again: 0"
    assert drawn.data.rows[1] == ["w4", 1024, 512, 1536, 3584, 90.0]


def test_slow_operators_have_bars_and_the_others_are_counted() -> None:
    drawn = time_plot(profile(40)["layers"])
    assert len(drawn.marks) == 25 and "15 others take" in drawn.caption and len(drawn.data.rows) == 40
    first = drawn.marks["mark0"][0]
    assert first.startswith("layer39") and "why: no integer kernel" in first


def test_cells_of_a_map_are_those_of_the_data() -> None:
    drawn = bits_plot(["one", "two"], [{"a": 8.0, "b": 2.5}, {"a": 8.0}], None, ["a", "b"])
    texts = [text for texts in drawn.marks.values() for text in texts]
    assert texts == [
        "one\nlayer: a\nbits of its weights: 8", "one\nlayer: b\nbits of its weights: 2.5",
        "two\nlayer: a\nbits of its weights: 8",
    ]  # fmt: skip
    many = bits_plot([str(i) for i in range(99)], [{"a": 2.0}] * 99, [{"a": 4.0}] * 99, ["a"])
    assert "24 of 99 networks" in many.caption and len(many.marks) == 48 and len(many.data.rows) == 198
    report = sensitivity()
    shades = {cell.get_facecolor() for cell in sensitivity_plot(report["layers"], [2, 8]).figure.axes[0].patches[:4]}
    assert len(shades) == 2


def test_a_map_of_nothing_but_zeros_is_drawn() -> None:
    zero = {"2": {"weight": 0.0, "output": 0.0, "agreement": 100.0}, "name": "a", "type": "b"}
    assert len(sensitivity_plot([zero], [2]).marks) == 1


def test_orders_are_merged_without_contradiction() -> None:
    assert merged([["a", "c"], ["a", "b", "c"], ["b", "d", "c"]]) == ["a", "b", "d", "c"]
    random = np.random.default_rng(0)
    whole = [str(i) for i in range(20)]
    parts = [[name for name in whole if random.random() < 0.5] for _ in range(30)]
    assert merged([whole, *parts]) == whole


def test_labels_have_units() -> None:
    assert label("latency_ms@host") == "latency on host (ms)" and label("peak_memory_kib@a") == "peak memory on a (KiB)"
    assert label("accuracy") == "top-1 accuracy (%)" and label("bitops") == "bitops"


def test_a_search_folder_is_drawn_whole(tmp_path: Path) -> None:
    front = search_folder(tmp_path / "s")
    blocks, missing = search_blocks(tmp_path / "s")
    assert missing == {} and [block.section for block in blocks] == ["front", "bits", "agreement", "hypervolume"]
    text = " ".join(blocks[0].text)
    assert "bitops \N{LESS-THAN OR EQUAL TO} 3" in text and "The knee is " in text and "The pick is " in text
    half = sum(1 for member in front.members if member.measured)
    assert len(blocks[0].plots[0].data.rows) == len(front.members)
    assert f"{half} of them measured" in blocks[0].plots[0].caption
    table = {row[0]: row for row in blocks[2].tables[0].rows}
    assert table["latency on host (ms)"][1:4] == [half, "1%", "1%"]  # subnets, mean and largest error


def test_a_search_under_limits_that_nothing_keeps_says_so(tmp_path: Path) -> None:
    search_folder(tmp_path / "s", limits=("bitops=0.001",))
    blocks, _ = search_blocks(tmp_path / "s")
    assert any(text.startswith("No pick: no subnet of the front keeps bitops") for text in blocks[0].text)


def test_hypervolume_has_a_curve_a_round() -> None:
    drawn = hypervolume_plot([(r, g, 10 * g, 1.0 + g) for r in (0, 1) for g in range(100)])
    assert len(drawn.marks) == 2 and all(len(texts) <= 60 for texts in drawn.marks.values())
    assert drawn.marks["mark1"][0] == "round 2\ngeneration: 0\nevaluations: 0\nhypervolume: 1"
