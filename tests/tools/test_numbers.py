"""The page of figures: made from files alone, goals beside them, and no benchmark forgotten."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# what each benchmark writes, as short as can be
WRITTEN: dict[str, Any] = {
    "browser": {"seconds": {"usable": 0.4}, "levels": {"w2": {"other answers": 0, "ms": 1.5}}},
    "bundle": [
        {"case": "a", "weights": 2_000_000, "base_over_framed": 1.5, "all_over_framed": 4.5},
        {"case": "small", "weights": 1000, "base_over_framed": 50.0, "all_over_framed": 60.0},
    ],
    "compile": {
        "targets": [
            {"target": "x86-64-avx512", "means": {"ort": {"mean": 1.5, "least": 1.0, "of": 6}, "missing": []}},
            {"target": "x86-64-amx", "not_measured": ["tiles"]},
        ]
    },
    "cuda": {"rows": [{"network": "resnet18", "batch": 1, "differ": 0, "prepare": 2.5}]},
    "first_inference": [{"model": "resnet18.qdq.onnx", "seconds_share": 0.3, "bytes_share": 0.2}],
    "memory": [{"network": "a", "process": "runner", "predicted": 103, "measured": 100}],
    "mixquant": [{"network": "ResNet-50", "criterion": "mse", "table_s": 0.6}],
    "prepare": [
        {"target": "host", "weights": 11e6, "ms": 20.0, "joins": {"tight": {"bytes_s": 4e9, "copy_bytes_s": 8e9}}}
    ],
    "server": [
        {
            "connections": 1000,
            "bytes": 2**20,
            "qdeploy": {"errors": 0, "peak_mib": 53.0, "mib_s": 400, "p99_ms": 8.0},
            "nginx": {"mib_s": 700, "p99_ms": 10.0},
        }
    ],
    "swap": [{"mode": "swap", "impure": 0, "inference_ms": 5.0, "pause_ms": 0.01, "extra_bytes": 1e6}],
}
# how many of these figures miss their goal
MISSED = {"bundle": 1, "compile": 1, "first_inference": 1, "mixquant": 1}


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("numbers_page")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "numbers")
    return module


def write(folder: Path, name: str, results: Any) -> None:
    head = {"command": f"python tools/bench_{name}.py", "date": "2026-01-02", "seconds": 3, "machine": "a machine"}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(head | {"versions": {"numpy": "2"}, "results": results}))


def test_every_benchmark_has_its_place(numbers: ModuleType) -> None:
    scripts = {path.stem.removeprefix("bench_") for path in (ROOT / "tools").glob("bench_*.py")}
    assert scripts == {*numbers.BENCHES, *numbers.ELSEWHERE}
    assert set(WRITTEN) == set(numbers.BENCHES)
    for name in numbers.BENCHES:  # one way to ask all of them for a file
        assert '"-o", "--out"' in (ROOT / "tools" / f"bench_{name}.py").read_text(), name


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_goals_stand_beside_figures(numbers: ModuleType, name: str) -> None:
    figures = list(numbers.BENCHES[name].figures(WRITTEN[name]))
    assert figures and sum(figure.short for figure in figures) == MISSED.get(name, 0)


def test_the_page_is_made_from_the_files(numbers: ModuleType) -> None:
    empty = numbers.page()
    assert empty.count("Not measured yet") == len(numbers.BENCHES) and "0 figures have a goal" in empty
    for name, results in WRITTEN.items():
        write(numbers.FOLDER, name, results)
    text = numbers.page()
    assert text == numbers.page() and "Not measured yet" not in text
    assert text.count("**missed**") == sum(MISSED.values())
    assert "| a: all planes | 4.5 % | <= 4 | **missed** |" in text and "| small: all planes | 60 % | | |" in text
    assert "`python tools/bench_swap.py`, 2026-01-02, 3 s; a machine; numpy 2." in text


def test_the_committed_page_is_made_from_the_committed_files() -> None:
    """As `make bench` leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        module = importlib.import_module("numbers_page")
        assert (ROOT / "docs" / "numbers.md").read_text() == module.page(), "run python tools/numbers_page.py"
