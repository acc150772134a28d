"""AMX: shapes of tiles, which layers use them, and a system that refuses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tvm import tirx
from tvm.sym.analyzer import Analyzer

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.graph import Window
from qdeploy.compile.kernels import tiles
from qdeploy.compile.kernels.layout import SLACK, Layout
from qdeploy.compile.kernels.spec import TILE_QUADS, TILE_ROWS, ConvSpec
from qdeploy.compile.kernels.tiles import image_of, pairs_of, tile_rows
from qdeploy.compile.llvm import Dot, resolve
from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import DeviceError
from qdeploy.export.write import qdq_bytes
from qdeploy.target import load_target, missing_features
from tests.compile.kernels import target_of
from tests.compile.test_conv import check, kernels_of
from tests.compile.test_conv import spec_of as spec_of_shape
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


def test_pairs_of_tiles_cover_every_pixel() -> None:
    for height, width in [(1, 2), (2, 1), (1, 17), (7, 7), (5, 16), (3, 17), (4, 33), (56, 56), (9, 3)]:
        for kernel in (1, 3):
            layout = Layout(64, height, width, (kernel // 2,) * 4)
            window = Window((kernel, kernel), (1, 1), (kernel // 2,) * 4)
            spec = ConvSpec(layout, Layout(8, height, width, (0, 1, 0, 0)), window, 1, DOT)
            pairs = pairs_of(spec)
            assert 1 <= pairs.rows <= TILE_ROWS
            seen: list[int] = []
            for i in range(pairs.count):
                for run in range(2):
                    seen += [constant(base) + offset for base, offset in pairs.outputs(i, run, 0, pairs.rows)]
            assert set(seen) == {spec.y.at(h, w) for h in range(height) for w in range(width)}
            assert pairs.even == (len(seen) == height * width)
    assert tile_rows(56) == 14 and tile_rows(3136) == 16


def test_a_small_image_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "NEAR", 0)
    found = []
    for height, width, side in [(7, 7, 1), (7, 7, 0), (1, 64, 0), (2, 30, 1), (5, 3, 1), (4, 15, 1), (8, 8, 1)]:
        layout = Layout(64, height, width, (side,) * 4)
        window = Window((2 * side + 1,) * 2, (1, 1), (side,) * 4)
        spec = ConvSpec(layout, Layout(8, height, width, (0, 1, 0, 0)), window, 1, DOT)
        image = image_of(spec)
        found.append(image is not None)
        if image is None:
            continue
        assert 1 <= image.rows <= TILE_ROWS
        windows = {constant(image.window(0, run, m)): (run, m) for run in range(4) for m in range(image.rows)}
        assert min(windows) == 0 and max(windows) == spec.pixel(height - 1, width - 1)
        for h in range(height):
            for w in range(width):
                at = h * image.pitch + w
                run = min(at // image.apart, 3)
                assert 0 <= at - run * image.apart < image.rows and spec.pixel(h, w) in windows
    assert found == [True, True, True, False, True, False, False]


def constant(value: object) -> int:
    """A TIR expression without variables."""
    return int(Analyzer().simplify(tirx.convert(value)))


SHAPES = [
    (64, 40, 1, 7, 7, Window((1, 1)), (0, 0, 0, 0)),
    (80, 96, 1, 5, 9, Window((1, 1)), (1, 1, 1, 1)),
    (64, 40, 1, 7, 7, Window((1, 1)), (1, 2, 0, 1)),
    (64, 16, 1, 5, 3, Window((1, 1)), (1, 0, 0, 1)),
    (24, 33, 1, 9, 16, Window((3, 3), (1, 1), (1, 1, 1, 1)), (0, 0, 0, 0)),
    (3, 32, 1, 11, 40, Window((3, 3), (2, 2), (1, 1, 1, 1)), (0, 1, 0, 0)),
    (72, 16, 1, 1, 5, Window((3, 3), (1, 1), (1, 1, 1, 1)), (0, 0, 0, 0)),
    (260, 48, 1, 3, 21, Window((1, 1)), (0, 0, 0, 0)),
    (64, 56, 1, 7, 7, Window((3, 3), (1, 1), (1, 1, 1, 1)), (1, 1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("threads", "near", "far"), [(1, 0, 0), (1, 1 << 30, 1 << 30), (2, 0, 1 << 30), (3, 0, 0)])
def test_every_order_and_share_of_the_work_is_exact(
    threads: int, near: int, far: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "NEAR", near)
    monkeypatch.setattr(tiles, "FAR", far)
    target, rng = target_of("amx"), np.random.default_rng(0)
    specs = [replace(spec_of_shape(shape, target.dot), threads=threads) for shape in SHAPES]
    assert all(spec.tiled for spec in specs)
    assert any(image_of(spec) for spec in specs) == (near == 0)
    library = kernels_of(dict(enumerate(specs)), target.tvm)
    for i, spec in enumerate(specs):
        for extreme in ("random", "low", "zero_points", "steep", "relu"):
            check(library, i, spec, extreme, rng)


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
