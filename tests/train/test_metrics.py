import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdeploy.errors import RecipeError
from qdeploy.nets import build
from qdeploy.train import metrics
from qdeploy.train.memory import keep_freed_memory
from qdeploy.train.run import check_precision
from tests.train.runs import elastic_recipe, tiny_recipe


def test_metrics_are_appended_to_jsonl_and_csv(tmp_path: Path) -> None:
    metrics.log_metrics(tmp_path, "float", 1, {"fp": 2.0}, 1234.56)
    metrics.log_metrics(tmp_path, "quantized", 1, {"w3": 1.5, "w2": 1.75}, 500.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"phase": "quantized", "epoch": 1, "loss": {"w3": 1.5, "w2": 1.75}, "images_per_second": 500.0}
    table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert {(r["phase"], r["name"]): float(r["value"]) for r in table}["quantized", "w2"] == 1.75
    assert len(table) == 5


def test_tensorboard_gets_the_same_figures_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scalars: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *args: object) -> None:
            scalars.append(("closed",))

        def add_scalar(self, *args: object) -> None:
            scalars.append(args)

    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    metrics.log_metrics(tmp_path, "float", 3, {"fp": 2.0}, 100.0)
    assert scalars == [("float/fp", 2.0, 3), ("float/images_per_second", 100.0, 3), ("closed",)]


def test_bfloat16_is_for_networks_that_it_makes_faster() -> None:
    recipe = tiny_recipe().replace(precision="bfloat16")
    check_precision(recipe, build("resnet8", 1, 10, 8, 2))
    with pytest.raises(RecipeError, match="slower: leave precision out"):
        check_precision(recipe, build("mobilenetv2", 1, 10, 8, 2))
    assert "precision" not in elastic_recipe().to_json()  # earlier runs stay the same recipe


def test_freed_memory_can_be_kept() -> None:
    assert keep_freed_memory() in (True, False)
