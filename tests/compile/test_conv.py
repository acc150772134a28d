"""Every convolution kernel of every instruction set against exact integer arithmetic, at the ends of the ranges too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.conv import ConvSpec, conv_kernel, tile
from qdeploy.compile.kernels.layout import SLACK, Layout
from qdeploy.compile.kernels.pack import Stored
from qdeploy.compile.kernels.pack_weights import WeightSpec, weights_kernel
from qdeploy.compile.llvm import Dot
from qdeploy.frozen import Node, Quantizer
from qdeploy.integer import conv_accumulate, requantize, requantize_scale
from tests.compile.kernels import CPUS, built, target_of

# channels in, channels out, groups, height, width, window, border of the output
SHAPES = [
    (1, 1, 1, 5, 5, Window((3, 3), (1, 1), (1, 1, 1, 1)), (0, 0, 0, 0)),
    (3, 17, 1, 9, 8, Window((3, 3), (2, 2), (0, 0, 1, 1)), (1, 1, 1, 1)),
    (17, 33, 1, 6, 7, Window((3, 3), (1, 1), (1, 1, 1, 1)), (0, 1, 2, 3)),
    (33, 3, 1, 5, 4, Window((1, 1)), (0, 0, 0, 0)),
    (16, 70, 1, 4, 5, Window((1, 1)), (0, 0, 0, 0)),
    (8, 16, 1, 7, 7, Window((1, 1), (2, 2)), (0, 0, 0, 0)),
    (5, 6, 1, 9, 9, Window((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)), (0, 0, 0, 0)),
    (4, 8, 1, 8, 9, Window((2, 5), (1, 2), (0, 3, 1, 0), (2, 1)), (0, 0, 0, 0)),
    (12, 18, 3, 6, 6, Window((3, 3), (1, 1), (1, 1, 1, 1)), (0, 0, 0, 0)),
    (4, 8, 4, 6, 6, Window((3, 3), (2, 2), (1, 1, 1, 1)), (0, 0, 0, 0)),
    (3, 3, 3, 7, 6, Window((3, 3), (1, 1), (1, 1, 1, 1)), (1, 0, 0, 1)),
    (33, 33, 33, 8, 19, Window((3, 3), (2, 2), (1, 1, 1, 1)), (0, 0, 0, 0)),
    (20, 20, 20, 9, 9, Window((5, 5), (1, 1), (4, 4, 4, 4), (2, 2)), (0, 0, 0, 0)),
    (7, 13, 1, 3, 4, Window((3, 4)), (0, 0, 0, 0)),
    (6, 40, 1, 1, 1, Window((1, 1)), (0, 0, 0, 0)),
    (70, 40, 1, 5, 37, Window((3, 3), (1, 1), (1, 1, 1, 1)), (1, 1, 0, 0)),
    (68, 48, 1, 7, 5, Window((1, 1)), (0, 0, 0, 0)),
    (100, 100, 100, 7, 9, Window((3, 3), (1, 1), (1, 1, 1, 1)), (0, 1, 0, 0)),
    (70, 70, 70, 9, 8, Window((5, 3), (2, 1), (2, 1, 2, 1)), (0, 0, 0, 0)),
    (960, 10, 1, 3, 3, Window((3, 3)), (0, 0, 0, 0)),
    (20, 20, 20, 9, 9, Window((7, 7), (1, 1), (3, 3, 3, 3)), (0, 0, 0, 0)),
]  # fmt: skip
FEW = (1, 2, 7, 8, 11, 17)  # shapes for instructions that differ little from another one
CODES = np.arange(-128, 128).astype(np.int8)
FULL = ("vpdpbusd", "pmaddwd", "amx")


def spec_of(shape: tuple, dot: Dot) -> ConvSpec:
    inputs, outputs, groups, height, width, window, border = shape
    size = window.output(height, width)
    return ConvSpec(
        Layout(inputs, height, width, window.padding), Layout(outputs, *size, border), window, groups, dot
    )  # fmt: skip


def nhwc(codes: np.ndarray, layout: Layout, zero: int, rng: np.random.Generator) -> np.ndarray:
    """[C, H, W] -> the flat buffer, border and random slack included."""
    top, left, bottom, right = layout.border
    out = np.full((layout.rows, left + layout.width + right, layout.channels), zero, np.uint8)
    out[top : top + layout.height, left : left + layout.width] = codes.transpose(1, 2, 0)
    return np.concatenate([out.reshape(-1), rng.integers(0, 256, SLACK).astype(np.uint8)])


def weight_spec(spec: ConvSpec) -> WeightSpec:
    window, outputs = spec.window.kernel, spec.y.channels
    channel = (outputs,)
    return WeightSpec(
        spec, Stored("int8", (outputs, spec.inputs, *window)), Stored("float32", channel), Stored("int8", channel),
        Stored("int32", channel), Stored("float32", channel), None, "conv", True,
    )  # fmt: skip


@pytest.mark.parametrize("name", CPUS)
def test_every_shape_is_exact(name: str) -> None:
    target = target_of(name)
    chosen = range(len(SHAPES)) if name in FULL else FEW
    library = kernels_of({i: spec_of(SHAPES[i], target.dot) for i in chosen}, target.tvm)
    rng = np.random.default_rng(0)
    for i in chosen:
        for extreme in ("random", "high", "low", "zero_points", "steep", "relu"):
            check(library, i, spec_of(SHAPES[i], target.dot), extreme, rng)


def kernels_of(specs: dict[int, ConvSpec], target: Any) -> tvm.runtime.Module:
    """Kernels conv{i} and pack{i} of each convolution."""
    functions = {}
    for i, spec in specs.items():
        functions[f"conv{i}"] = conv_kernel(f"conv{i}", spec)
        functions[f"pack{i}"] = weights_kernel(f"pack{i}", weight_spec(spec).code)
    return built(functions, target)


def check(
    library: tvm.runtime.Module, i: int, spec: ConvSpec, extreme: str, rng: np.random.Generator,
    allowed: np.ndarray = CODES,
) -> None:  # fmt: skip
    """One convolution with weights out of `allowed` against the definition."""
    x, y, window = spec.x, spec.y, spec.window
    shape = (y.channels, spec.inputs, *window.kernel)
    codes = rng.integers(0, 256, (x.channels, x.height, x.width)).astype(np.uint8)
    weight = rng.choice(allowed, shape)
    zero_w = np.zeros(y.channels, np.int8)
    if extreme == "high":  # saturates any 16-bit pair sum
        codes[:], weight[:] = 255, allowed.max()
    elif extreme == "low":
        codes[:], weight[:] = 255, allowed.min()
    elif extreme == "zero_points":
        zero_w = rng.integers(-128, 128, y.channels).astype(np.int8)
    bias = rng.integers(-3000, 3000, y.channels).astype(np.int32)
    quant_x = Quantizer(float(np.float32(0.013)), 255 if extreme == "low" else int(rng.integers(0, 256)))
    depth = spec.inputs * window.kernel[0] * window.kernel[1]
    quant = Quantizer(float(np.float32(0.05 * np.sqrt(depth))), 100, 3, 250, True)
    scale = rng.uniform(0.01, 0.04, y.channels).astype(np.float32)
    if extreme == "steep":  # products far outside of int32, and all sums between 0 and those
        codes = rng.choice(np.array([0, 255], np.uint8), codes.shape)
        weight = rng.choice(allowed[[0, -1]], shape)
        scale = (10 ** rng.uniform(-3, 12, y.channels)).astype(np.float32)
    elif extreme == "relu":  # sums from the least to the largest
        codes = np.where(rng.random(codes.shape) < 0.9, np.uint8(255), codes)
        weight[::3], weight[1::3] = allowed[-1], allowed[0]
        quant = Quantizer(quant.scale, 7, 7, 250, True)
    unit = (np.float32(quant_x.scale) * scale).astype(np.float32)

    attributes = {
        "stride": window.stride, "padding": window.padding, "dilation": window.dilation, "groups": spec.groups,
    }  # fmt: skip
    centred = codes[None].astype(np.int32) - quant_x.zero_point
    acc = conv_accumulate(centred, weight, Node("n", "conv", (), "", False, attributes))
    plain = window_sums(centred, shape, attributes)
    acc = acc - zero_w[:, None, None].astype(np.int64) * plain + bias[:, None, None]
    want = requantize(acc, requantize_scale(quant_x.scale, scale, quant.scale)[:, None, None], quant)[0]

    def packed(q: Quantizer) -> np.ndarray:
        return np.array([q.scale, q.zero_point, q.lo, q.hi], np.float32)

    outs = [
        np.empty(spec.weight_bytes, np.int8),
        np.empty(2 * spec.padded + 1, np.int32),
        np.empty(spec.padded, np.float32),
    ]
    outs = [tvm.runtime.tensor(out) for out in outs]
    args = [weight.reshape(-1), scale, zero_w, bias, unit, packed(quant_x), packed(quant)]
    library[f"pack{i}"](*weight_spec(spec).sizes, *map(tvm.runtime.tensor, args), *outs)
    buffer = tvm.runtime.tensor(nhwc(codes, x, quant_x.zero_point, rng))
    guard = rng.integers(0, 256, y.size).astype(np.uint8)
    result = tvm.runtime.tensor(guard)
    library[f"conv{i}"](buffer, *outs, tvm.runtime.tensor(packed(quant)), result)
    expected = nhwc(want, y, quant.zero_point, rng)
    expected[-SLACK:] = guard[-SLACK:]  # nothing is written behind the codes
    np.testing.assert_array_equal(result.numpy(), expected, err_msg=f"{spec} {extreme}")


def window_sums(centred: np.ndarray, shape: tuple[int, ...], attributes: dict) -> np.ndarray:
    """Sum of the centred codes under each window."""
    return conv_accumulate(centred, np.ones(shape, np.int8), Node("n", "conv", (), "", False, attributes))


def test_a_tile_fits_the_registers() -> None:
    for dot in (Dot("vpdpbusd", 16, 32), Dot("pmaddwd", 8, 16), Dot("pmaddwd", 4, 16)):
        for shape in SHAPES:
            spec = spec_of(shape, dot)
            pixels, blocks = tile(spec)
            assert 1 <= pixels <= spec.lines[1] and 1 <= blocks <= spec.blocks
            assert pixels * blocks < dot.registers


def test_a_spec_is_a_key() -> None:
    spec = spec_of(SHAPES[1], Dot("pmaddwd", 8, 16))
    assert spec == replace(spec) and hash(spec) == hash(replace(spec))
    assert spec != replace(spec, groups=3)
