"""Codes in another order: general shuffles, pixels with zero points between them; and float32 values of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Shuffle, Window
from qdeploy.compile.kernels.emit import (
    QUANT,
    ZERO,
    Buffer,
    Expr,
    cast,
    chunks,
    const,
    fence,
    load,
    loop,
    prim_func,
    splat,
    store,
)
from qdeploy.compile.kernels.layout import Layout, fill_border


def sources(shuffle: Shuffle, shape: tuple[int, int, int]) -> np.ndarray:
    """int64 [C, H, W]: which element of the input each element of the output is."""
    grid = np.full(shuffle.sizes, shuffle.offset, np.int64)
    for axis, (size, step) in enumerate(zip(shuffle.sizes, shuffle.steps, strict=True)):
        grid += (np.arange(size) * step).reshape([-1 if i == axis else 1 for i in range(len(shuffle.sizes))])
    return grid.reshape(shape)


def _run(x: Layout, y: Layout, shuffle: Shuffle) -> int:
    """Channels that stay neighbours: the largest n such that every n of them, in order, move together."""
    taken = sources(shuffle, (y.channels, y.height, y.width))
    area = x.height * x.width
    breaks = np.flatnonzero((np.diff(taken, axis=0) != area).any(axis=(1, 2))) + 1
    return int(np.gcd.reduce([y.channels, *breaks.tolist()]))


def shuffle_kernel(name: str, x: Layout, y: Layout, shuffle: Shuffle, lanes: int) -> tirx.PrimFunc:
    """(codes, output quantizer) -> the same codes in another order."""
    run = _run(x, y, shuffle)

    def body(source: Buffer, quant: Buffer, out: Buffer) -> None:
        fill_border(out, y, quant)

        def copy(c: Expr, h: Expr, w: Expr) -> None:
            at = _source(shuffle, (c * y.height + h) * y.width + w)
            area = x.height * x.width
            place = T.Bind(
                x.at(_part(at, x.width, x.height), _part(at, 1, x.width)) + T.floordiv(at, const(area))
                if area > 1
                else x.at(0, 0) + at
            )
            chunks(run, lanes, lambda i, n: store(out, load(source, place + i, n), y.at(h, w) + c + i, n))

        with T.serial(0, y.height) as h, T.serial(0, y.width) as w, T.serial(0, y.channels // run) as c:
            copy(c * run, h, w)

    return prim_func(name, [("x", (x.size,), "uint8"), ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


def _part(at: Expr, step: int, size: int) -> Expr:
    """One axis of element `at`, by whose places elements are `step` apart."""
    if size == 1:
        return const(0)
    return T.floormod(T.floordiv(at, const(step)) if step > 1 else at, const(size))


def _source(shuffle: Shuffle, at: Expr) -> Expr:
    """Element of the input that element `at` of the output is."""
    found: Expr = const(shuffle.offset)
    rest = 1
    for size, step in zip(shuffle.sizes[::-1], shuffle.steps[::-1], strict=True):
        found = found + _part(at, rest, size) * step
        rest *= size
    return found


def insert_kernel(name: str, x: Layout, y: Layout, window: Window, lanes: int) -> tirx.PrimFunc:
    """(codes, output quantizer) -> pixels at the window's stride, behind its padding; the zero point elsewhere."""
    (down, across), (top, left) = window.stride, window.padding[:2]

    def body(source: Buffer, quant: Buffer, out: Buffer) -> None:
        zero = T.Bind(cast("uint8", cast("int32", load(quant, const(ZERO)), 1), 1))
        chunks(y.rows * y.row, lanes, lambda i, n: store(out, splat(zero, n), i, n))

        def pixel(h: Expr, w: Expr) -> None:
            row, column = h * down + top, w * across + left
            inside = T.And(
                T.And(row >= const(0), row < const(y.height)), T.And(column >= const(0), column < const(y.width))
            )
            here, there = x.at(h, w), y.at(row, column)
            with T.If(inside), T.Then():
                chunks(y.channels, lanes, lambda c, n: store(out, load(source, here + c, n), there + c, n))

        with T.serial(0, x.height) as h, T.serial(0, x.width) as w:
            pixel(h, w)

    return prim_func(name, [("x", (x.size,), "uint8"), ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


# Parameters of float regions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealSpec:
    """A stored tensor: dtype and shape, and number and types of its scales and zero points along `axis`."""

    dtype: str
    shape: tuple[int, ...]
    scales: tuple[int, ...] | None  # the scale's shape; None where the values are taken as they are
    zeros: tuple[tuple[int, ...], str] | None
    axis: int
    turned: bool = False  # a matrix is written with its axes exchanged


def real_kernel(name: str, spec: RealSpec) -> tirx.PrimFunc:
    """(stored, scale?, zero point?) -> the values: as they are, or float32 (code - zero point) * scale."""
    axis = spec.axis % max(1, len(spec.shape))
    outer, size, inner = prod(spec.shape[:axis]), prod(spec.shape[axis : axis + 1]), prod(spec.shape[axis + 1 :])

    def body(*buffers: Buffer) -> None:
        stored, out = buffers[0], buffers[-1]

        def one(at: Expr, place: Expr) -> None:
            value = load(stored, at)
            if spec.scales is not None:
                code = cast("int32", value, 1)
                if spec.zeros is not None:
                    code = code - cast("int32", load(buffers[2], place if prod(spec.zeros[0]) > 1 else const(0)), 1)
                scale = load(buffers[1], place if prod(spec.scales) > 1 else const(0))
                value = fence(cast("float32", code, 1) * scale, 1)
            if spec.turned:
                rows, columns = spec.shape
                at = T.floormod(at, const(columns)) * rows + T.floordiv(at, const(columns))
            store(out, value, at)

        def axis_place(o: Expr, c: Expr) -> None:
            loop(inner, lambda i: one((o * size + c) * inner + i, c))

        loop(outer, lambda o: loop(size, lambda c: axis_place(o, c)))

    params = [("stored", spec.shape, spec.dtype)]
    if spec.scales is not None:
        params.append(("scale", spec.scales, "float32"))
    if spec.zeros is not None:
        params.append(("zero", *spec.zeros))
    dtype = spec.dtype if spec.scales is None else "float32"
    return prim_func(name, [*params, ("y", spec.shape[::-1] if spec.turned else spec.shape, dtype)], body)


@dataclass(frozen=True)
class ClipSpec:
    """A stored weight with a Clip behind its codes; float32 ones become codes by scale and zero point along `axis`."""

    dtype: str
    shape: tuple[int, ...]
    codes: str  # int8 or uint8
    scale: tuple[int, ...] | None  # None where codes are stored
    zero: tuple[int, ...] | None
    low: tuple[int, ...] | None
    high: tuple[int, ...] | None
    axis: int


def clip_kernel(name: str, spec: ClipSpec) -> tirx.PrimFunc:
    """(weight, scale?, zero point?, bound?, bound?) -> codes cut to the bounds."""
    parts = [
        ("scale", spec.scale, "float32"), ("zero", spec.zero, spec.codes), ("low", spec.low, spec.codes),
        ("high", spec.high, spec.codes),
    ]  # fmt: skip
    given = [(label, shape, dtype) for label, shape, dtype in parts if shape is not None]
    outer, size, inner = prod(spec.shape[: spec.axis]), spec.shape[spec.axis], prod(spec.shape[spec.axis + 1 :])
    least = -128 if spec.codes == "int8" else 0

    def body(*buffers: Buffer) -> None:
        stored, out = buffers[0], buffers[-1]
        found = dict(zip((label for label, _, _ in given), buffers[1:-1], strict=True))

        def part(label: str, place: Expr, shape: tuple[int, ...] | None) -> Expr:
            return load(found[label], place if shape is not None and prod(shape) > 1 else const(0))

        def one(at: Expr, c: Expr) -> None:
            value = load(stored, at)
            if spec.scale is not None:
                value = T.nearbyint(value / part("scale", c, spec.scale))
                if spec.zero is not None:
                    value = value + cast("float32", part("zero", c, spec.zero), 1)
                value = T.Min(T.Max(value, const(float(least), "float32")), const(float(least + 255), "float32"))
            value = cast("int32", value, 1)
            if spec.low is not None:
                value = T.Max(value, cast("int32", part("low", c, spec.low), 1))
            if spec.high is not None:
                value = T.Min(value, cast("int32", part("high", c, spec.high), 1))
            store(out, cast(spec.codes, value, 1), at)

        with T.serial(0, outer) as o, T.serial(0, size) as c, T.serial(0, inner) as i:
            one((o * size + c) * inner + i, c)

    return prim_func(name, [("w", spec.shape, spec.dtype), *given, ("y", spec.shape, spec.codes)], body)


def same_kernel(name: str, dtype: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], what: str) -> tirx.PrimFunc:
    """(parameter, parameter): fails with `what` unless their values are equal."""

    def body(a: Buffer, b: Buffer) -> None:
        def one(i: Expr) -> None:
            with T.Assert(load(a, i) == load(b, i), what):
                pass

        with T.serial(0, prod(shapes[0])) as i:
            one(i)

    return prim_func(name, [("a", shapes[0], dtype), ("b", shapes[1], dtype)], body)


def numbers_kernel(name: str, values: tuple[float, ...], shape: tuple[int, ...], dtype: str) -> tirx.PrimFunc:
    """() -> numbers that the compiler worked out."""

    def body(out: Buffer) -> None:
        for i, value in enumerate(values):
            store(out, const(value, dtype), const(i))

    return prim_func(name, [("y", shape, dtype)], body)
