"""The compile report: what is not integer, why, and its measured share of the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qdeploy.compile.pipeline import compile_model
from qdeploy.inspect import describe
from qdeploy.profile.lint import NAMED, lint, lint_lines
from qdeploy.qdq import canonical_bytes
from qdeploy.target import auto_targets
from tests.qdq_models import Net


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A convolution, then two operators that run in float together, then a sum."""
    folder, net = tmp_path_factory.mktemp("lint"), Net()
    x = net.q(net.node("Conv", net.q("x"), *net.weight(4, 4, 3, 3), pads=[1, 1, 1, 1]))
    y = net.q(net.node("LogSoftmax", net.node("LogSoftmax", x)))
    (folder / "m.onnx").write_bytes(canonical_bytes(net.model(net.q(net.node("Sub", y, x)))))
    head = compile_model(folder / "m.onnx", auto_targets()[-1], folder / "a")
    return folder / "a", folder / "m.onnx", head


def test_shares_of_the_time_are_measured(compiled: tuple[Path, Path, dict[str, Any]]) -> None:
    found = lint(*compiled)
    assert found["unmeasured"] is None and found["rows"]
    assert {row["operator"] for row in found["rows"]} == {"quantize", "float", "sub", "dequantize"}
    shares = [row["share"] for row in found["rows"]]
    assert shares == sorted(shares, reverse=True) and all(0 < share < 1 for share in shares)
    assert found["share"] == pytest.approx(sum(shares)) and found["share"] < 1  # the convolution has the rest
    first, *rest = lint_lines(found)
    assert first.startswith(f"not integer on {found['target']}: {len(shares)} of {len(shares) + 1} operators, ")
    text = "\n".join(rest)
    assert text.count("LogSoftmax logsoftmax") == 2
    assert "no integer kernel" in text and "its input is float32" in text and f"{shares[0]:.1%}" in text


def test_a_machine_that_cannot_run_it_measures_nothing(
    compiled: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdeploy.target.machine_flags", lambda: frozenset({"sse2"}))
    found = lint(*compiled)
    assert found["share"] is None and {row["share"] for row in found["rows"]} == {None}
    assert found["target"] == "x86-64"
    first, *rest = lint_lines(found)
    assert "not measured here: this machine's cpu lacks" in first and "\n" not in first
    assert all("%" not in line for line in rest) and len(rest) > 4


def test_inspect_names_them_too(compiled: tuple[Path, Path, dict[str, Any]]) -> None:
    rows = describe(compiled[0])["not integer"]
    assert [row["operator"] for row in rows].count("LogSoftmax") == 2
    assert all(row["reason"] for row in rows) and all("share" not in row for row in rows)


def test_long_reports_are_cut() -> None:
    node = {"operator": "Det", "name": "d", "reason": "none"}
    row = {"operator": "float", "name": "r", "share": 0.02, "nodes": [node] * (NAMED + 2)}
    found = {"target": "t", "operators": 40, "rows": [row] * (NAMED + 3), "unmeasured": None, "share": 0.3}
    lines = lint_lines(found)
    assert lines.count("            and 2 more") == NAMED and lines[-1] == "  3 more, 6.0%"
    found = lint_lines(found | {"rows": [row | {"share": None}] * (NAMED + 3), "unmeasured": "no", "share": None})
    assert found[-1] == "  3 more"
