from __future__ import annotations

import pytest

from qdeploy.cost import Cost, Measure
from qdeploy.errors import RecipeError


def test_a_cost_names_its_measures() -> None:
    cost = Cost.build([("latency", 12.5, "ms", "measured"), ("weights", 100, "bytes", "predicted")])
    assert cost["latency"] == Measure(12.5, "ms", "measured")
    assert cost.to_json()["weights"] == {"value": 100, "unit": "bytes", "source": "predicted"}
    with pytest.raises(RecipeError, match="no measure 'size': there are latency, weights"):
        cost["size"]


def test_sums_keep_the_weaker_source() -> None:
    measured, predicted = Measure(1, "ms", "measured"), Measure(2, "ms", "predicted")
    assert measured + predicted == Measure(3, "ms", "predicted")
    assert (measured + measured).source == "measured"
    with pytest.raises(RecipeError, match="cannot add ms and bytes"):
        measured + Measure(1, "bytes", "measured")


@pytest.mark.parametrize("args", [(1, "h", "measured"), (1, "ms", "guessed")])
def test_unknown_units_and_sources_are_refused(args: tuple) -> None:
    with pytest.raises(RecipeError, match="choose one of"):
        Measure(*args)


def test_a_name_stands_once() -> None:
    with pytest.raises(RecipeError, match="twice"):
        Cost.build([("a", 1, "ms", "measured"), ("a", 2, "ms", "measured")])
