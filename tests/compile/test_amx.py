"""AMX: shapes of tiles, which layers use them, and a system that refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.layout import SLACK, Layout
from qdeploy.compile.kernels.spec import TILE_QUADS, TILE_ROWS, ConvSpec
from qdeploy.compile.kernels.tiles import tile_rows
from qdeploy.compile.llvm import Dot, resolve
from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import DeviceError
from qdeploy.export.write import qdq_bytes
from qdeploy.target import load_target, missing_features
from tests.nets_frozen import ladder_of

TARGET = load_target(Path(__file__).parents[2] / "targets" / "x86-64-amx.toml")
DOT = Dot("vpdpbusd", 16, 32, True)


def spec_of(inputs: int, outputs: int, size: int, kernel: int, groups: int = 1) -> ConvSpec:
    side = kernel // 2
    layout = Layout(inputs, size, size, (side,) * 4)
    return ConvSpec(layout, Layout(outputs, size, size), Window((kernel, kernel), (1, 1), (side,) * 4), groups, DOT)


def test_a_tile_never_reads_behind_the_slack() -> None:
    for inputs in range(1, 1100):
        spec = spec_of(inputs, 16, 14, 3)
        assert spec.tiled or inputs < 8
        assert 1 <= spec.chunk <= TILE_QUADS and (spec.quads % spec.chunk == 0 or not spec.tiled)
        assert 0 <= 4 * spec.quads - spec.taps * spec.inputs <= SLACK


def test_rows_of_a_tile_fill_it() -> None:
    for pixels in range(1, 300):
        rows = tile_rows(pixels)
        assert 1 <= rows <= min(TILE_ROWS, pixels)
        assert -(-pixels // rows) * (rows + 1.5) <= -(-pixels // min(TILE_ROWS, pixels)) * (TILE_ROWS + 1.5)
    assert tile_rows(56) == 14 and tile_rows(7) == 7 and tile_rows(3136) == 16


def test_tiles_are_for_dense_layers_of_some_pixels_and_channels() -> None:
    assert spec_of(64, 64, 14, 3).family == "tiles"
    assert not spec_of(3, 64, 14, 3).tiled  # 9 bytes of each 64
    assert not spec_of(64, 64, 1, 1).tiled  # fully connected
    assert not spec_of(64, 64, 14, 3, groups=64).tiled


def test_a_system_that_refuses_tiles_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = ladder_of(2, (2,), width=4, size=6, blocks=1)[0]
    (tmp_path / "m.onnx").write_bytes(qdq_bytes(net))
    compile_model(tmp_path / "m.onnx", TARGET, tmp_path / "a")
    if lacking := missing_features(resolve(TARGET).features):
        pytest.skip(f"this machine has no {', '.join(lacking)}")
    monkeypatch.setattr("qdeploy.compile.artifact.request_tiles", lambda: False)
    with pytest.raises(DeviceError, match="keeps AMX tiles from processes"):
        load_artifact(tmp_path / "a")


def test_the_host_is_compiled_without_tiles_that_it_does_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeploy.compile.llvm.request_tiles", lambda: False)
    resolved = resolve(load_target(Path(__file__).parents[2] / "targets" / "host.toml"))
    assert not resolved.dot.tiles and "amx-int8" not in resolved.features
