"""Kernels at the edges of a network and pools: quantize, max and average pool, dequantize."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.emit import (
    HIGH,
    LOW,
    QUANT,
    SCALE,
    ZERO,
    Buffer,
    Expr,
    cast,
    centred,
    chunks,
    const,
    load,
    local,
    loop,
    prim_func,
    quantizer,
    splat,
    splat_const,
    store,
    to_codes,
)  # fmt: skip
from qdeploy.compile.kernels.layout import Layout, fill_border


def quantize_kernel(name: str, shape: tuple[int, ...], y: Layout, lanes: int) -> tirx.PrimFunc:
    """(float32 NCHW `shape`, quantizer) -> codes."""

    def body(source: Buffer, quant: Buffer, out: Buffer) -> None:
        fill_border(out, y, quant)

        def row(h: Expr) -> None:
            def channel(c: Expr) -> None:
                start, target = c * (y.height * y.width) + h * y.width, y.at(h, 0) + c

                def part(w: Expr, n: int) -> None:
                    codes = to_codes(load(source, start + w, n) / quantizer(quant, SCALE, n), quant, n)
                    if n == 1 or y.channels == 1:
                        store(out, codes, target + w * y.channels, n)
                        return
                    buffered = local(n, "uint8")
                    store(buffered, codes, 0, n)
                    for i in range(n):
                        store(out, load(buffered, i), target + (w + i) * y.channels)

                chunks(y.width, lanes, part)

            loop(y.channels, channel)

        loop(y.height, row)

    return prim_func(name, [("source", shape, "float32"), ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


# Pools ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolSpec:
    """Geometry of a pool; its window is cut at the input's edges."""

    x: Layout
    y: Layout
    window: Window
    lanes: int


def over_window(spec: PoolSpec, h: Expr, w: Expr, body: Any) -> None:
    """body(offset) for every code of output pixel (h, w)'s window that lies inside the input."""
    (kh, kw), (sh, sw), (dh, dw) = spec.window.kernel, spec.window.stride, spec.window.dilation
    top, left = spec.window.padding[:2]

    def inside(at: Expr, size: int) -> Expr:
        return T.And(at >= const(0), at < const(size))

    def line(i: Expr) -> None:
        row = h * sh - top + i * dh

        def column(j: Expr) -> None:
            column_at = w * sw - left + j * dw
            if _always_inside(spec):
                body(spec.x.at(row, column_at))
                return
            with T.If(T.And(inside(row, spec.x.height), inside(column_at, spec.x.width))), T.Then():
                body(spec.x.at(row, column_at))

        loop(kw, column)

    loop(kh, line)


def _always_inside(spec: PoolSpec) -> bool:
    """True when no window leaves the input."""
    window, sizes = spec.window, ((spec.x.height, spec.y.height), (spec.x.width, spec.y.width))
    reach = [
        (out - 1) * window.stride[a] + (window.kernel[a] - 1) * window.dilation[a] < size
        for a, (size, out) in enumerate(sizes)
    ]
    return window.padding[:2] == (0, 0) and all(reach)


def pixels_of(spec: PoolSpec, body: Any) -> None:
    """body(h, w, c, valid) for every output pixel and vector of channels, of which `valid` exist."""

    def pixel(h: Expr, w: Expr) -> None:
        whole = spec.y.channels // spec.lanes
        loop(whole, lambda c: body(h, w, c * spec.lanes, spec.lanes))
        if rest := spec.y.channels % spec.lanes:
            body(h, w, whole * spec.lanes, rest)

    loop(spec.y.height, lambda h: loop(spec.y.width, lambda w: pixel(h, w)))


def put(spec: PoolSpec, out: Buffer, codes: Expr, at: Expr, valid: int) -> None:
    """Store the first `valid` codes of a vector."""
    if valid == spec.lanes:
        store(out, codes, at, spec.lanes)
        return
    part = local(spec.lanes, "uint8")
    store(part, codes, 0, spec.lanes)
    for i in range(valid):
        store(out, load(part, i), at + i)


def max_pool_kernel(name: str, spec: PoolSpec) -> tirx.PrimFunc:
    """(codes, output quantizer) -> the largest code of each window."""
    lanes = spec.lanes

    def body(x: Buffer, quant: Buffer, y: Buffer) -> None:
        fill_border(y, spec.y, quant)

        def one(h: Expr, w: Expr, c: Expr, valid: int) -> None:
            best = local(lanes, "uint8")
            store(best, splat_const(0, "uint8", lanes), 0, lanes)

            def code(at: Expr) -> None:
                store(best, T.Max(load(best, 0, lanes), load(x, at + c, lanes)), 0, lanes)

            over_window(spec, h, w, code)
            low, high = (
                splat(cast("uint8", cast("int32", load(quant, const(field)), 1), 1), lanes) for field in (LOW, HIGH)
            )
            put(spec, y, T.Min(T.Max(load(best, 0, lanes), low), high), spec.y.at(h, w) + c, valid)

        pixels_of(spec, one)

    params = [("x", (spec.x.size,), "uint8"), ("quant", *QUANT), ("y", (spec.y.size,), "uint8")]
    return prim_func(name, params, body)


def window_area(spec: PoolSpec, h: Expr, w: Expr) -> Expr:
    """How many positions of output pixel (h, w)'s window lie inside the input (dilation 1)."""
    sizes = (spec.x.height, spec.x.width)
    spans = []
    for axis, out in enumerate((h, w)):
        start = out * spec.window.stride[axis] - spec.window.padding[axis]
        end = T.Min(start + spec.window.kernel[axis], const(sizes[axis]))
        spans.append(end - T.Max(start, const(0)))
    return reduce(lambda a, b: a * b, spans)


def average_pool_kernel(name: str, spec: PoolSpec, count_padding: bool) -> tirx.PrimFunc:
    """(codes, their quantizer, output quantizer) -> codes of the mean: scale = s_x / (s_y * positions)."""
    lanes = spec.lanes

    def body(x: Buffer, quant_x: Buffer, quant: Buffer, y: Buffer) -> None:
        fill_border(y, spec.y, quant)
        zero = splat(cast("int32", load(quant_x, const(ZERO)), 1), lanes)

        def one(h: Expr, w: Expr, c: Expr, valid: int) -> None:
            acc = local(lanes, "int32")
            store(acc, splat_const(0, "int32", lanes), 0, lanes)

            def code(at: Expr) -> None:
                store(acc, load(acc, 0, lanes) + cast("int32", load(x, at + c, lanes), lanes) - zero, 0, lanes)

            over_window(spec, h, w, code)
            (kh, kw) = spec.window.kernel
            area = const(kh * kw) if count_padding or _always_inside(spec) else window_area(spec, h, w)
            unit = load(quant, const(SCALE)) * cast("float32", area, 1)
            scale = splat(load(quant_x, const(SCALE)) / unit, lanes)
            codes = to_codes(cast("float32", load(acc, 0, lanes), lanes) * scale, quant, lanes)
            put(spec, y, codes, spec.y.at(h, w) + c, valid)

        pixels_of(spec, one)

    params = [("x", (spec.x.size,), "uint8"), ("quant_x", *QUANT), ("quant", *QUANT), ("y", (spec.y.size,), "uint8")]
    return prim_func(name, params, body)


# The way out ---------------------------------------------------------------------------------------------------------


def _every_code(x: Layout, body: Any) -> None:
    """body(offset in NHWC codes, offset in NCHW)."""
    loop(
        x.height,
        lambda h: loop(
            x.width,
            lambda w: loop(x.channels, lambda c: body(x.at(h, w) + c, (c * x.height + h) * x.width + w)),
        ),
    )


def dequantize_kernel(name: str, x: Layout, shape: tuple[int, ...]) -> tirx.PrimFunc:
    """(codes, their quantizer) -> float32 NCHW `shape`."""

    def body(source: Buffer, quant: Buffer, out: Buffer) -> None:
        def one(at: Expr, to: Expr) -> None:
            store(out, centred(load(source, at), quant, 1) * load(quant, const(SCALE)), to)

        _every_code(x, one)

    return prim_func(name, [("x", (x.size,), "uint8"), ("quant", *QUANT), ("y", shape, "float32")], body)


def codes_kernel(name: str, x: Layout, shape: tuple[int, ...], signed: bool) -> tirx.PrimFunc:
    """codes -> the file's own codes, NCHW `shape`, int8 where `signed`."""

    def body(source: Buffer, out: Buffer) -> None:
        def one(at: Expr, to: Expr) -> None:
            code = load(source, at)
            value = cast("int8", cast("int32", code, 1) - const(128), 1) if signed else code
            store(out, value, to)

        _every_code(x, one)

    return prim_func(name, [("x", (x.size,), "uint8"), ("y", shape, "int8" if signed else "uint8")], body)
