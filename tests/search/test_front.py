from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.errors import ModelError, RecipeError
from qdeploy.search.encoding import Encoding
from qdeploy.search.front import Foretold, Front, Member, agreement, knee, pick, read_front, table
from qdeploy.search.objectives import parse_bounds, parse_objectives
from tests.search.spaces import everything, problem, small_space


def front(measured: bool = True) -> Front:
    asked = problem(small_space(2))
    scored = asked.score(everything(asked.encoding))
    genomes = scored.genomes[scored.front]
    values, specs = asked.predict(genomes), asked.encoding.specs(genomes)
    members = []
    for i, spec in enumerate(specs):
        predicted = {key: float(column[i]) for key, column in values.items()}
        members.append(Member(spec, predicted, predicted if measured and i % 2 else {}, {"bitops": (i / 2, None)}))
    return Front(asked.encoding.space.id, "0" * 12, ("accuracy", "bitops"), (), tuple(members))


def test_a_front_reads_back_and_damage_is_named(tmp_path: Path) -> None:
    whole = front()
    path = tmp_path / "front.json"
    path.write_bytes(whole.to_bytes())
    assert read_front(tmp_path) == whole
    value = json.loads(whole.to_bytes())
    for change in ({"format": "x"}, {"members": [{}]}, {"members": 3}, {"objectives": None}):
        path.write_text(json.dumps(value | change))
        with pytest.raises(ModelError, match=r"search again"):
            read_front(tmp_path)
    with pytest.raises(ModelError, match="cannot read the front"):
        read_front(tmp_path / "absent")


def test_pick_keeps_the_limits_and_prefers_what_was_measured() -> None:
    whole = front()
    costs = sorted(m.measured["bitops"] for m in whole.members if m.measured)
    limit = costs[len(costs) // 2]
    chosen = pick(whole, [f"bitops={limit}"], False)
    assert chosen.measured and chosen.measured["bitops"] <= limit
    rivals = [m for m in whole.members if m.measured and m.measured["bitops"] <= limit]
    assert chosen.measured["accuracy"] == max(m.measured["accuracy"] for m in rivals)
    predicted = pick(front(measured=False), [], False)
    assert predicted.predicted["accuracy"] == max(m.predicted["accuracy"] for m in whole.members)
    head, rows = table(whole)
    assert len(rows) == len(whole.members) and all(len(row) == len(head) for row in rows)


def test_the_knee_is_where_the_front_bends() -> None:
    spec = Encoding(small_space(2)).specs(everything(Encoding(small_space(2)))[:1])[0]
    points = [(90.0, 10.0), (89.0, 2.0), (80.0, 1.0), (50.0, 0.9)]
    members = [Member(spec, {"accuracy": a, "bitops": b}, {}) for a, b in points]
    assert knee(members, ("accuracy", "bitops")).predicted["accuracy"] == 89.0


def test_bad_requests_say_what_to_write() -> None:
    whole = front()
    for limits, text in [
        (["bitops=0.001"], r"bitops <= 0.001 \(the least is"),
        (["bitop=5"], "did you mean bitops"),
        (["weights=5"], "write weights_kib=5"),
        (["weights_mib=5"], "has no unit 'mib': write weights_kib"),
        (["activations_kib=5"], "the search has no activations_kib"),
        (["latency_ms=5"], "name one with --target"),
        (["bitops=five"], "'five' is no positive number"),
        (["bitops=-1"], "no positive number"),
        (["bitops=nan"], "no positive number"),
        (["bitops"], "no positive number"),
        (["accuracy=90"], "limit it with --min"),
        (["bitops=5", "bitops=6"], "given twice"),
    ]:
        with pytest.raises(RecipeError, match=text):
            pick(whole, limits, False)
    for floors, text in [
        (["bitops=5"], "limit it with --max"),
        (["accuracy=1000"], r"accuracy >= 1000 \(the greatest is"),
        (["accuracy=high"], "no positive number"),
        (["accuracy=50", "accuracy=51"], "given twice"),
    ]:
        with pytest.raises(RecipeError, match=text):
            pick(whole, [], False, floors)
    for objectives, text in [
        (["latency_us"], "has no unit 'us': write latency_ms"),
        (["acuracy"], "did you mean accuracy"),
        ([], "needs an objective"),
        (["accuracy", "accuracy"], "given twice"),
        (["latency@c"], "unknown target"),
        (["bitops@a"], "the same on every target"),
    ]:
        with pytest.raises(RecipeError, match=text):
            parse_objectives(objectives, ["a", "b"])
    assert [one.key for one in parse_objectives(["latency", "latency_ms@b"][:1], ["a", "b"])] == [
        "latency_ms@a",
        "latency_ms@b",
    ]
    assert [b.what.key for b in parse_bounds(["latency_ms=5"], ["a", "b"])] == ["latency_ms@a", "latency_ms@b"]


def test_limits_from_below() -> None:
    asked = problem(small_space(2), ("bitops",), ("weights_kib=6",))
    floors = tuple(parse_bounds((), (), ["accuracy=55"]))
    bounded = replace(asked, bounds=(*asked.bounds, *floors))
    genomes = everything(asked.encoding)
    values, scored = bounded.predict(genomes), bounded.score(genomes)
    assert (scored.feasible == ((values["accuracy"] >= 55) & (values["weights_kib"] <= 6))).all()
    assert 0 < scored.feasible.sum() < asked.score(genomes).feasible.sum()
    hopeless = replace(asked, bounds=tuple(parse_bounds((), (), ["accuracy=99"])))
    with pytest.raises(RecipeError, match=rf"accuracy >= 99 \({values['accuracy'].max():.4g} is reachable alone"):
        hopeless.check_reachable(hopeless.score(genomes))


def test_each_round_says_how_its_predictions_fared() -> None:
    whole = front()
    on = [member.spec.id for member in whole.members[:2]]
    said = {"accuracy": 90.0, "latency_ms@a": 1.0}
    rows = [
        Foretold(0, on[0], said, {"accuracy": 89.0, "latency_ms@a": 2.0}),
        Foretold(0, "elsewhere", said, {"accuracy": 90.5, "latency_ms@a": 1.0}),
        Foretold(1, on[1], said, {"accuracy": 90.0, "latency_ms@a": 1.25}),
    ]
    assert agreement(rows, whole, ["accuracy", "latency_ms@a"]) == [
        "round 1: 2 of its front measured, 1 of these on the final front; "
        "mean error of what was predicted: accuracy 0.75 points, latency_ms@a 25.0%",
        "round 2: 1 of its front measured, 1 of these on the final front; "
        "mean error of what was predicted: accuracy 0.00 points, latency_ms@a 20.0%",
    ]
    assert agreement(rows[:1], whole, []) == ["round 1: 1 of its front measured, 1 of these on the final front"]
    assert agreement([], whole, ["accuracy"]) == []


def test_error_bars_travel_with_the_front() -> None:
    whole = front()
    barred = replace(
        whole, members=tuple(replace(m, bars={"accuracy": (1.5, 2.5), "bitops": (0.0, None)}) for m in whole.members)
    )
    head, rows = table(barred)
    assert head[-4:] == ["low accuracy", "high accuracy", "low bitops", "high bitops"]
    assert rows[0][-4:] == [1.5, 2.5, 0.0, ""] and all(len(row) == len(head) for row in rows)
