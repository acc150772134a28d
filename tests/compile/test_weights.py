"""Weights of few different codes in 4 bits each: `compile --weights packed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.compile.read.handlers import read_graph
from qdeploy.errors import DeviceError
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet
from qdeploy.integer import dequantize
from qdeploy.qdq import arrays, parse_model
from qdeploy.target import auto_targets
from tests.nets_frozen import ladder_of

PORTABLE = auto_targets()[-1]
INNER = ("block0.conv1", "block0.conv2")


@pytest.fixture(scope="module")
def ladder() -> list[FrozenNet]:
    return ladder_of(6, (2, 4), width=16, size=8, blocks=1)


@pytest.fixture(scope="module")
def model(ladder: list[FrozenNet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "m.onnx"
    path.write_bytes(qdq_bytes(ladder[-1]))
    return path


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    compile_model(model, PORTABLE, model.parent / "packed", options=Options(indices=True))
    return model.parent / "packed"


def params_of(net: FrozenNet) -> dict[str, np.ndarray]:
    return arrays(parse_model(qdq_bytes(net)))


def rows_of(folder: Path) -> dict[str, Any]:
    (variant,) = json.loads((folder / "artifact.json").read_bytes())["variants"]
    return {row["name"]: row for row in variant["kernels"] if row["operator"] == "conv"}


def test_few_codes_are_counted(ladder: list[FrozenNet]) -> None:
    for net in ladder:
        graph = read_graph(parse_model(qdq_bytes(net)))
        few = {op.name: op.weights.few for op in graph.ops if op.weights is not None}
        values = params_of(net)
        assert few == {name: len(np.unique(values[f"{name}.weight"])) <= 16 for name in few}
        assert few["block0.conv1"] and few["block0.conv2"] and not few["stem"]


def test_levels_give_the_same_codes(ladder: list[FrozenNet], packed: Path) -> None:
    artifact = load_artifact(packed)
    for net in ladder:
        level = artifact.prepare(params_of(net))
        images = dequantize(net.golden[net.input], net.activations[net.input].quantizer)
        got = np.concatenate([artifact.codes(x[None], level) for x in images])
        np.testing.assert_array_equal(got, net.golden[net.output])


def test_the_description_says_how_weights_are_kept(model: Path, packed: Path, tmp_path: Path) -> None:
    compile_model(model, PORTABLE, tmp_path / "int8")
    few, plain = rows_of(packed), rows_of(tmp_path / "int8")
    assert {row["weights"] for row in plain.values()} == {"int8"}
    assert {name for name, row in few.items() if row["weights"] == "4-bit"} == set(INNER)
    for name in INNER:
        assert few[name]["weight_bytes"] == 64 + plain[name]["weight_bytes"] // 2
    sizes = [load_artifact(folder).description["packed_bytes"] for folder in (packed, tmp_path / "int8")]
    assert sizes[0] == sizes[1] - sum(plain[name]["weight_bytes"] // 2 - 64 for name in INNER)


def test_a_level_of_more_codes_is_refused_by_name(ladder: list[FrozenNet], packed: Path) -> None:
    params = params_of(ladder[-1])
    name = "block0.conv2.weight"
    params[name] = np.resize(np.arange(17, dtype=np.int8), params[name].shape)
    with pytest.raises(DeviceError, match=rf"weight {name} must have .*at most 16 different codes.*without --weights"):
        load_artifact(packed).prepare(params)


def test_the_command(model: Path, packed: Path, tmp_path: Path) -> None:
    target = Path(__file__).parents[2] / "targets" / "x86-64.toml"
    arguments = ["compile", str(model), "--target", str(target), "-o", str(tmp_path / "a"), "--weights", "packed"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert rows_of(tmp_path / "a") == rows_of(packed)
