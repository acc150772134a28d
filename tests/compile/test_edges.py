"""Kernels at the edges of a network and pools, of every instruction set, against numpy."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import tvm
from numpy.lib.stride_tricks import sliding_window_view

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.kernels.pointwise import (
    PoolSpec,
    average_pool_kernel,
    codes_kernel,
    dequantize_kernel,
    max_pool_kernel,
    mean_kernel,
    quantize_kernel,
)
from tests.compile.test_elementwise import WIDTHS, build, codes_of, planes, resolved, run

F = np.float32
BORDER = (1, 2, 0, 1)
QUANT = np.array([0.02, 117, 3, 250], F)


@pytest.mark.parametrize("cpu", WIDTHS)
def test_quantize(cpu: str) -> None:
    """Few and many channels, rows shorter than a vector, tails, ties and values far outside."""
    target, rng = resolved(cpu), np.random.default_rng(0)
    layouts = [
        Layout(3, 9, 35, BORDER), Layout(3, 5, 7), Layout(1, 4, 16), Layout(4, 3, 19, BORDER), Layout(5, 2, 3, BORDER),
        Layout(10, 3, 13), Layout(7, 1, 1), Layout(2, 6, 2, BORDER), Layout(66, 2, 9),
    ]  # fmt: skip
    kernels = {f"k{i}": quantize_kernel(f"k{i}", (1, *y.shape), y, target.dot) for i, y in enumerate(layouts)}
    library = build(kernels, target)
    for i, y in enumerate(layouts):
        for spread in (2.0, 1e9):
            x = rng.normal(0, spread, (1, *y.shape)).astype(F)
            x.flat[: min(4, x.size)] = [1e30, -1e30, 0.01, -0.03][: x.size]  # the last two are ties
            want = np.clip(np.rint(x[0] / QUANT[0]) + QUANT[1], QUANT[2], QUANT[3])
            np.testing.assert_array_equal(run(library[f"k{i}"], y, x, QUANT), want)


@pytest.mark.parametrize("cpu", WIDTHS)
def test_the_way_out(cpu: str) -> None:
    target, rng = resolved(cpu), np.random.default_rng(1)
    layouts = [Layout(70, 1, 1), Layout(3, 1, 1, BORDER), Layout(5, 4, 3, BORDER)]
    kernels = {}
    for i, layout in enumerate(layouts):
        shape = (1, *layout.shape)
        kernels[f"real{i}"] = dequantize_kernel(f"real{i}", layout, shape, target.dot)
        kernels[f"u8{i}"] = codes_kernel(f"u8{i}", layout, shape, False, target.dot)
        kernels[f"s8{i}"] = codes_kernel(f"s8{i}", layout, shape, True, target.dot)
    library = build(kernels, target)
    for i, layout in enumerate(layouts):
        codes = codes_of(layout, rng)
        want = planes(codes, layout)[None]
        for name, dtype, arguments, expected in (
            ("real", F, [QUANT], (want.astype(F) - QUANT[1]) * QUANT[0]),
            ("u8", np.uint8, [], want),
            ("s8", np.int8, [], want.astype(np.int32) - 128),
        ):
            out = tvm.runtime.tensor(np.zeros((1, *layout.shape), dtype))
            library[f"{name}{i}"](*(tvm.runtime.tensor(a) for a in (codes, *arguments)), out)
            np.testing.assert_array_equal(out.numpy(), expected)


POOLS = [
    (64, 12, 13, Window((3, 3), (2, 2), (1, 1, 1, 1)), (0, 0, 0, 0)),
    (70, 7, 7, Window((7, 7)), (0, 0, 0, 0)),
    (19, 20, 21, Window((20, 21)), BORDER),
    (24, 9, 8, Window((3, 2), (2, 1), (1, 0, 1, 1)), BORDER),
    (3, 300, 2, Window((300, 2)), (0, 0, 0, 0)),
    (5, 2, 300, Window((2, 300)), (0, 0, 0, 0)),
    (4, 30, 30, Window((30, 30)), (0, 0, 0, 0)),
]


@pytest.mark.parametrize("cpu", WIDTHS)
def test_pools(cpu: str) -> None:
    """Windows that are cut at edges, and sums of more codes than 16 bits hold."""
    target, rng = resolved(cpu), np.random.default_rng(2)
    specs = []
    for c, h, w, window, border in POOLS:
        specs.append(PoolSpec(Layout(c, h, w, border), Layout(c, *window.output(h, w), border), window, target.dot))
    kernels = {f"max{i}": max_pool_kernel(f"max{i}", spec) for i, spec in enumerate(specs)}
    for i, spec in enumerate(specs):
        kernels |= {f"average{i}{n}": average_pool_kernel(f"average{i}{n}", spec, n < 1, n > 1) for n in range(3)}
        if spec.inside:
            kernels[f"mean{i}"] = mean_kernel(f"mean{i}", spec)
    library, source = build(kernels, target), np.array([0.03, 5, 0, 255], F)
    for i, spec in enumerate(specs):
        codes = np.maximum(codes_of(spec.x, rng), 180 if i > 3 else 0)  # sums that are large
        image = planes(codes, spec.x).astype(np.int64)
        want = np.clip(windows(image, spec.window).max((3, 4)), QUANT[2], QUANT[3])
        np.testing.assert_array_equal(run(library[f"max{i}"], spec.y, codes, QUANT), want)
        inside = windows(np.ones_like(image), spec.window).sum((3, 4))
        every = np.full_like(inside, np.prod(spec.window.kernel))
        reals = windows((image - 5).astype(F) * source[0], spec.window)
        taps = np.moveaxis(reals.reshape(*reals.shape[:3], -1), 3, 0)
        total = reduce(np.add, taps, np.zeros(inside.shape, F))  # one after another
        for n, (area, shift) in enumerate(((every, 0), (inside, 0), (inside, 128))):
            want = np.rint(total / area.astype(F) / QUANT[0] + (QUANT[1] - F(shift))) + F(shift)
            want = np.clip(want, QUANT[2], QUANT[3])
            np.testing.assert_array_equal(run(library[f"average{i}{n}"], spec.y, codes, source, QUANT), want)
        if spec.inside:
            sums = windows(image - 5, spec.window).sum((3, 4))
            scale = source[0] / (QUANT[0] * F(every.flat[0]))
            want = np.clip(np.rint(sums.astype(F) * scale) + QUANT[1], QUANT[2], QUANT[3])
            np.testing.assert_array_equal(run(library[f"mean{i}"], spec.y, codes, source, QUANT), want)


def windows(image: np.ndarray, window: Window) -> np.ndarray:
    """[C, H', W', kh, kw], 0 outside."""
    top, left, bottom, right = window.padding
    padded = np.pad(image, ((0, 0), (top, bottom), (left, right)))
    sh, sw = window.stride
    return sliding_window_view(padded, window.kernel, axis=(1, 2))[:, ::sh, ::sw]
