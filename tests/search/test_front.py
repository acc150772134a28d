from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import ModelError, RecipeError
from qdeploy.search.chain import best_chain
from qdeploy.search.encoding import Encoding
from qdeploy.search.front import Front, Member, check_space, knee, pick, read_front, table
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
        members.append(Member(spec, predicted, predicted if measured and i % 2 else {}))
    return Front(asked.encoding.space.id, "0" * 12, ("accuracy", "bitops"), (), tuple(members))


def test_a_front_reads_back_and_damage_is_named(tmp_path: Path) -> None:
    whole = front()
    path = tmp_path / "front.json"
    path.write_bytes(whole.to_bytes())
    assert read_front(tmp_path) == whole
    check_space(whole, small_space(2), tmp_path)
    with pytest.raises(ModelError, match="another space"):
        check_space(whole, small_space(3), tmp_path)
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
        (["accuracy=90"], "no upper limit"),
        (["bitops=5", "bitops=6"], "given twice"),
    ]:
        with pytest.raises(RecipeError, match=text):
            pick(whole, limits, False)
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


def test_a_chain_nests_and_keeps_each_class_its_limits() -> None:
    limits = ("latency_ms@weak=9", "latency_ms@strong=6")
    asked = problem(small_space(2, (2, 3, 4)), ("accuracy", "bitops"), limits, targets=("strong", "weak"))
    genomes = everything(asked.encoding)
    chosen = genomes[np.random.default_rng(0).permutation(len(genomes))[:400]]
    chain = best_chain(asked, chosen)
    specs = asked.encoding.specs(np.stack([genome for _, genome in chain.levels]))
    assert {target for target, _ in chain.levels} == {"weak", "strong"}
    assert specs[0].nests_in(specs[1])
    for target, genome in chain.levels:
        assert asked.violated(asked.predict(genome[None]), target)[0] <= 0
    truth = best_chain(asked, genomes)
    assert chain.accuracy <= truth.accuracy + 1e-9
    tight = problem(small_space(2), limits=("latency_ms@a=0.001", "latency_ms@b=9"), targets=("a", "b"))
    with pytest.raises(RecipeError, match="no architecture"):
        best_chain(tight, everything(tight.encoding))
