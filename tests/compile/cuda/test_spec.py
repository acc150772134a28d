"""Which kernel and which tile a convolution gets, and what the estimates behind that must say."""

from __future__ import annotations

import re
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.compile.cuda.library import HERE
from qdeploy.compile.cuda.spec import GPUS, TILES, Tile, best_tile, cuda_conv, pitch_of, tiles
from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.layout import Layout
from tests.compile.test_conv import SHAPES

T4 = GPUS["sm_75"]


def test_large_products_take_large_tiles_and_small_ones_spread() -> None:
    assert best_tile(T4, 100_000, 512, 4608, 1, 16) == TILES[-1]
    assert best_tile(T4, 49, 512, 4608, 1, 16).slices > 1  # 7 x 7 pixels: few tiles, deep ones
    assert best_tile(T4, 100_000, 24, 64, 1, 16).channels == 32  # not a tile of which most is empty


@given(st.integers(1, 10**6), st.integers(1, 4096), st.integers(16, 10**5), st.sampled_from(sorted(GPUS)))
def test_estimates_grow_with_the_work(pixels: int, channels: int, depth: int, arch: str) -> None:
    gpu = GPUS[arch]
    for tile in TILES:
        least = tile.cycles(gpu, pixels, channels, depth, 1)
        # no faster than all processors at their peak
        assert least >= pixels * channels * depth / gpu.products / gpu.processors * 0.999
        assert tile.cycles(gpu, 2 * pixels, channels, depth, 1) >= least
        assert tile.cycles(gpu, pixels, channels, 2 * depth, 1) >= least


def test_tiles_fit_every_gpu() -> None:
    for tile in TILES:
        assert tile.threads <= 1024 and 2 * tile.shared <= min(gpu.shared for gpu in GPUS.values())
        assert tile.shared + 256 <= 48 << 10  # memory that needs no request
    assert set(tiles(16)) == set(TILES) and Tile(4, 1, 1) not in tiles(4)


def test_shared_memory_is_what_the_kernel_declares() -> None:
    text = HERE.joinpath("device/conv_gemm.cuh").read_text(encoding="utf-8")
    assert re.search(r"BK = WK == 1 \? 64 : 32 \* WK, ROW = BK \+ 16, STAGE = \(BM \+ BN\) \* ROW", text)


@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_layouts_hold_every_weight(i: int) -> None:
    inputs, outputs, groups, height, width, window, _ = SHAPES[i]
    y = Layout(outputs, *window.output(height, width))
    spec, tile = cuda_conv(Layout(inputs, height, width), y, window, groups, 1, T4)
    taps = prod(window.kernel)
    if spec.depthwise:
        assert spec.kernel == "conv_depthwise" and spec.weight_bytes == -(-outputs // 4) * 4 * taps
    else:
        assert spec.weight_bytes == outputs * taps * spec.tap_bytes and spec.padded == outputs
        assert spec.tap_bytes >= spec.inputs and spec.tap_bytes % spec.vector == 0
    assert (tile is not None) == spec.kernel.startswith("conv_gemm")


@given(st.integers(1, 5000))
def test_pitches_are_whole_words_or_vectors(channels: int) -> None:
    pitch = pitch_of(channels)
    assert pitch >= channels and (pitch in (4, 8) or pitch % 16 == 0) and pitch - channels < 16


def test_few_pixels_read_weights_once() -> None:
    spec, tile = cuda_conv(Layout(512, 1, 1), Layout(1000, 1, 1), Window((1, 1)), 1, 1, T4)
    assert tile is None and spec.kernel == "conv_gemv_16"
    spec, tile = cuda_conv(Layout(512, 1, 1), Layout(1000, 1, 1), Window((1, 1)), 1, 64, T4)
    assert tile is not None
