"""profile on a real artifact: what it holds and refuses. No assertion looks at a clock."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import CompileError, RecipeError
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet
from qdeploy.profile import latency as timing
from qdeploy.profile.latency import interleaved, latency, machine
from qdeploy.profile.report import profile, render
from qdeploy.target import load_target
from tests.nets_frozen import ladder_of, random_frozen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nets() -> list[FrozenNet]:
    return ladder_of(2, (2, 4), width=4, size=6, blocks=1)


@pytest.fixture(scope="module")
def folder(nets: list[FrozenNet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    for i, net in enumerate(nets):
        (folder / f"{i}.onnx").write_bytes(qdq_bytes(net))
    compile_model(folder / "0.onnx", load_target(ROOT / "targets" / "x86-64.toml"), folder / "a")
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    monkeypatch.setattr(timing, "BLOCK", 1e-5)


def test_a_profile_of_another_level_than_was_compiled(folder: Path, nets: list[FrozenNet]) -> None:
    found = profile(folder / "a", folder / "1.onnx", 3)
    assert json.loads(json.dumps(found)) == found
    for key in ("artifact", "onnxruntime"):
        low, high = found[key]["quartiles"]
        assert 0 < low <= found[key]["median"] <= high
        assert (found[key]["unit"], found[key]["source"], found[key]["rounds"]) == ("ms", "measured", 3)
    assert found["ratio"]["median"] > 0
    assert found["largest_difference"] <= nets[1].activations[nets[1].output].quantizer.scale * 1.01
    memory = {name: row["value"] for name, row in found["memory"].items()}
    weights = {name: net for name, net in nets[1].tensors.items() if name.endswith(".weight")}
    assert memory["weight_containers"] == sum(w.size for w in weights.values())
    bits = {row["layer"]: row["weight_bits"] for row in found["bitops"]["layers"]}
    assert memory["weights"] == sum(-(-w.size * bits[n.removesuffix(".weight")] // 8) for n, w in weights.items())
    code = (folder / "a" / "lib.so").stat().st_size
    assert memory["running"] == memory["packed"] + memory["arena"] + memory["input_output"] + code
    assert memory["packing"] == memory["packed"] + memory["parameters"] + code
    assert memory["peak"] == max(memory["running"], memory["packing"])
    text = render(found)
    for part in ("compiled artifact", "ONNX Runtime", "quartiles", "block0.conv1", "4 x 4", "packed", machine()["cpu"]):
        assert part in text


def test_another_graph_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(qdq_bytes(random_frozen(0, width=3, size=5, blocks=1)))
    with pytest.raises(CompileError, match="compiled from another graph"):
        latency(folder / "a", tmp_path / "m.onnx", 1)
    with pytest.raises(RecipeError, match="measure nothing"):
        latency(folder / "a", folder / "0.onnx", 0)


def test_both_runtimes_run_in_every_round() -> None:
    order: list[str] = []
    first, second = interleaved(lambda: order.append("a"), lambda: order.append("b"), 4)
    assert first.shape == second.shape == (4,) and (first > 0).all() and (second > 0).all()
    assert order.count("a") >= 4 and order.count("b") >= 4
    assert np.isfinite(first).all()


def test_the_machine_is_named() -> None:
    found = machine()
    assert set(found) == {"cpu", "arch", "cores", "governor", "load"} and found["cores"] >= 1
