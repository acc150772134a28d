"""Kernels at the edges of a network and pools: quantize, max and average pool, dequantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    chunks,
    const,
    load,
    local,
    loop,
    prim_func,
    quantizer,
    real_value,
    splat,
    splat_const,
    store,
    to_codes,
    typed,
)  # fmt: skip
from qdeploy.compile.kernels.layout import Layout, fill_border
from qdeploy.compile.kernels.requantize import (
    LEAST,
    SHIFT,
    VECTORS,
    cover,
    limits,
    own_code,
    own_limits,
    packed,
    store_run,
    to_integers,
)
from qdeploy.compile.llvm import Dot

NARROW = 256  # codes whose sum fits 16 bits


def quantize_kernel(name: str, shape: tuple[int, ...], y: Layout, dot: Dot) -> tirx.PrimFunc:
    """(float32 NCHW `shape`, quantizer) -> codes: up to 4 channels of `lanes` pixels at a time."""

    def body(source: Buffer, quant: Buffer, out: Buffer) -> None:
        fill_border(out, y, quant)
        bounds = limits(quant, dot)
        # rows that follow each other in both tensors are one
        rows, width = (1, y.height * y.width) if not any(y.border) else (y.height, y.width)

        def channels(first: Expr, count: int) -> None:
            def row(h: Expr) -> None:
                def run(w: Expr, n: int) -> None:
                    def steps(c: int) -> Expr:
                        at = (first + c) * (y.height * y.width) + h * y.width + w
                        real = load(source, at, n) / quantizer(quant, SCALE, n)
                        return T.Bind(to_integers(real, bounds, n))

                    found = [steps(c) for c in range(count)]
                    codes = packed(found + found[-1:] * (VECTORS - count), bounds, n, False)
                    scatter(codes, n, count, y.channels, out, y.at(h, 0) + w * y.channels + first)

                def single(w: Expr, c: Expr) -> None:
                    real = load(source, (first + c) * (y.height * y.width) + h * y.width + w)
                    code = to_codes(real / load(quant, const(SCALE)), quant, 1)
                    store(out, code, y.at(h, w) + first + c)

                if width < LEAST:
                    loop(width, lambda w: loop(count, lambda c: single(w, c)))
                else:
                    pixel_runs(width, dot.lanes, run)

            loop(rows, row)

        loop(y.channels // VECTORS, lambda i: channels(i * VECTORS, VECTORS))
        if rest := y.channels % VECTORS:
            channels(y.channels - rest, rest)

    return prim_func(name, [("source", shape, "float32"), ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


def pixel_runs(width: int, lanes: int, run: Callable[[Expr, int], None]) -> None:
    """Cover `width` pixels by run(first pixel, n): n is `lanes`, less where the row is shorter; the last moves back."""
    n = lanes
    while n > width:
        n //= 2
    loop(width // n, lambda i: run(i * n, n))
    if width % n:
        run(width - n, n)


def scatter(codes: Expr, n: int, count: int, channels: int, out: Buffer, at: Expr) -> None:
    """Store `count` channels of n pixels, `at` on; `codes`: 16 bytes hold 4 pixels of each of 4 vectors in turn."""
    size = VECTORS * n
    order = [const(16 * (p // 4) + 4 * c + p % 4) for p in range(n) for c in range(count)]
    if channels == count:
        padding = order[:1] * (size - len(order))
        store_run(out, T.Bind(T.Shuffle([codes], [*order, *padding])), size, 0, n * count, at)
        return
    pixels = T.Bind(T.Shuffle([codes], [const(16 * (p // 4) + 4 * c + p % 4) for p in range(n) for c in range(4)]))
    for p in range(n):
        store_run(out, pixels, size, VECTORS * p, count, at + p * channels)


# Pools ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolSpec:
    """Geometry of a pool; its window is cut at the input's edges."""

    x: Layout
    y: Layout
    window: Window
    dot: Dot

    @property
    def inside(self) -> bool:
        """True when no window leaves the input."""
        sizes = ((self.x.height, self.y.height), (self.x.width, self.y.width))
        reach = [
            (out - 1) * self.window.stride[a] + (self.window.kernel[a] - 1) * self.window.dilation[a] < size
            for a, (size, out) in enumerate(sizes)
        ]
        return self.window.padding[:2] == (0, 0) and all(reach)


def vectors_of(spec: PoolSpec, body: Callable[[Expr, Expr, Expr, int, int], None]) -> None:
    """body(h, w, c, n, valid) for every output pixel and vector of 4 * n channels, of which `valid` exist."""

    def pixel(h: Expr, w: Expr) -> None:
        cover(spec.y.channels, spec.dot.lanes, LEAST, lambda c, n, valid: body(h, w, c, n, valid))

    loop(spec.y.height, lambda h: loop(spec.y.width, lambda w: pixel(h, w)))


def window_row(spec: PoolSpec, h: Expr, w: Expr, i: Expr, body: Callable[[Expr], None], again: bool) -> None:
    """body(offset) for the codes of kernel row i of output pixel (h, w)'s window that lie inside the input.

    With `again` it may be called for one of them several times, which is faster where the window is not dilated.
    """
    (_, kw), (sh, sw), (dh, dw) = spec.window.kernel, spec.window.stride, spec.window.dilation
    top, left = spec.window.padding[:2]
    row = h * sh - top + i * dh

    def within(at: Expr, size: int) -> Expr:
        return T.Min(T.Max(at, const(0)), const(size - 1))

    def column(j: Expr) -> None:
        at = w * sw - left + j * dw
        if spec.inside:
            body(spec.x.at(row, at))
        elif again and (dh, dw) == (1, 1):
            body(spec.x.at(within(row, spec.x.height), within(at, spec.x.width)))
        else:
            rows = T.And(row >= const(0), row < const(spec.x.height))
            with T.If(T.And(rows, T.And(at >= const(0), at < const(spec.x.width)))), T.Then():
                body(spec.x.at(row, at))

    loop(kw, column)


def max_pool_kernel(name: str, spec: PoolSpec) -> tirx.PrimFunc:
    """(codes, output quantizer) -> the largest code of each window."""

    def body(x: Buffer, quant: Buffer, y: Buffer) -> None:
        fill_border(y, spec.y, quant)
        low, high = (T.Bind(cast("uint8", cast("int32", load(quant, const(f)), 1), 1)) for f in (LOW, HIGH))

        def one(h: Expr, w: Expr, c: Expr, n: int, valid: int) -> None:
            size = VECTORS * n
            best = local(size, "uint8")
            store(best, splat(low, size), 0, size)

            def code(at: Expr) -> None:
                store(best, T.Max(load(best, 0, size), load(x, at + c, size)), 0, size)

            loop(spec.window.kernel[0], lambda i: window_row(spec, h, w, i, code, True))
            codes = T.Bind(T.Min(load(best, 0, size), splat(high, size)))
            store_run(y, codes, size, 0, valid, spec.y.at(h, w) + c)

        vectors_of(spec, one)

    params = [("x", (spec.x.size,), "uint8"), ("quant", *QUANT), ("y", (spec.y.size,), "uint8")]
    return prim_func(name, params, body)


def window_area(spec: PoolSpec, h: Expr, w: Expr) -> Expr:
    """How many positions of output pixel (h, w)'s window lie inside the input (dilation 1)."""
    if spec.inside:
        return const(spec.window.kernel[0] * spec.window.kernel[1])
    sizes = (spec.x.height, spec.x.width)
    spans = []
    for axis, out in enumerate((h, w)):
        start = out * spec.window.stride[axis] - spec.window.padding[axis]
        end = T.Min(start + spec.window.kernel[axis], const(sizes[axis]))
        spans.append(end - T.Max(start, const(0)))
    return spans[0] * spans[1]


def average_pool_kernel(name: str, spec: PoolSpec, count_padding: bool, signed: bool) -> tirx.PrimFunc:
    """(codes, their quantizer, output quantizer) -> codes of the mean of real values; `signed`: int8 in the file."""
    kh, kw = spec.window.kernel

    def body(x: Buffer, quant_x: Buffer, quant: Buffer, y: Buffer) -> None:
        fill_border(y, spec.y, quant)
        bounds, zero = own_limits(quant, signed, spec.dot), T.Bind(own_code(quant, ZERO, signed))

        def one(h: Expr, w: Expr, c: Expr, n: int, valid: int) -> None:
            sums = [local(n, "float32") for _ in range(VECTORS)]
            for part in sums:
                store(part, splat_const(0.0, "float32", n), 0, n)

            def code(place: Expr) -> None:
                for k, part in enumerate(sums):
                    real = real_value(load(x, place + c + k * n, n), quant_x, n)
                    store(part, load(part, 0, n) + real, 0, n)

            loop(kh, lambda i: window_row(spec, h, w, i, code, False))
            divisor = const(kh * kw) if count_padding else window_area(spec, h, w)
            count = T.Bind(cast("float32", divisor, 1))

            def mean(part: Buffer) -> Expr:
                return load(part, 0, n) / splat(count, n) / quantizer(quant, SCALE, n) + splat(zero, n)

            codes = packed([to_integers(mean(part), bounds, n) for part in sums], bounds, n, True)
            store_run(y, codes, VECTORS * n, 0, valid, spec.y.at(h, w) + c)

        vectors_of(spec, one)

    params = [("x", (spec.x.size,), "uint8"), ("quant_x", *QUANT), ("quant", *QUANT), ("y", (spec.y.size,), "uint8")]
    return prim_func(name, params, body)


def mean_kernel(name: str, spec: PoolSpec) -> tirx.PrimFunc:
    """(codes, their quantizer, output quantizer) -> codes of the mean of whole windows, from their integer sums."""
    area = spec.window.kernel[0] * spec.window.kernel[1]

    def body(x: Buffer, quant_x: Buffer, quant: Buffer, y: Buffer) -> None:
        fill_border(y, spec.y, quant)
        bounds = limits(quant, spec.dot)
        offset = T.Bind(cast("int32", load(quant_x, const(ZERO)), 1) * const(area))
        scale = T.Bind(load(quant_x, const(SCALE)) / (load(quant, const(SCALE)) * const(float(area), "float32")))

        def one(h: Expr, w: Expr, c: Expr, n: int, valid: int) -> None:
            acc = [local(n, "int32") for _ in range(VECTORS)]
            for part in acc:
                store(part, splat(const(0) - offset, n), 0, n)
            window_sums(spec, x, (h, w, c), acc, n)
            real = [cast("float32", load(part, 0, n), n) * splat(scale, n) for part in acc]
            codes = packed([to_integers(value, bounds, n) for value in real], bounds, n, True)
            store_run(y, codes, VECTORS * n, 0, valid, spec.y.at(h, w) + c)

        vectors_of(spec, one)

    params = [("x", (spec.x.size,), "uint8"), ("quant_x", *QUANT), ("quant", *QUANT), ("y", (spec.y.size,), "uint8")]
    return prim_func(name, params, body)


def window_sums(spec: PoolSpec, x: Buffer, at: tuple[Expr, Expr, Expr], acc: Sequence[Buffer], n: int) -> None:
    """Add the codes of a window, 4 * n channels, to 4 vectors `acc`; up to NARROW of them are added in 16 bits."""
    (h, w, c), (kh, kw) = at, spec.window.kernel
    rows = max(1, NARROW // kw)
    halves = [local(2 * n, "uint16") for _ in range(2)]

    def widen() -> None:
        for k, part in enumerate(acc):
            half = load(halves[k // 2], k % 2 * n, n)
            store(part, load(part, 0, n) + cast("int32", half, n), 0, n)

    def run(first: Expr, count: int) -> None:
        for half in halves:
            store(half, splat_const(0, "uint16", 2 * n), 0, 2 * n)

        def code(place: Expr) -> None:
            for k, half in enumerate(halves):
                codes = cast("uint16", load(x, place + c + 2 * n * k, 2 * n), 2 * n)
                store(half, load(half, 0, 2 * n) + codes, 0, 2 * n)
            if kw > NARROW:
                widen()
                for half in halves:
                    store(half, splat_const(0, "uint16", 2 * n), 0, 2 * n)

        loop(count, lambda i: window_row(spec, h, w, first + i, code, False))
        widen()

    loop(kh // rows, lambda i: run(i * rows, rows))
    if kh % rows:
        run(kh - kh % rows, kh % rows)


# The way out ---------------------------------------------------------------------------------------------------------


def every_code(x: Layout, lanes: int, body: Callable[[Expr, Expr, int], None]) -> None:
    """body(offset in NHWC codes, offset in NCHW, how many neighbours) for all codes."""
    if x.height * x.width == 1:
        chunks(x.channels, lanes, lambda c, n: body(x.at(0, 0) + c, c, n))
        return

    def row(c: Expr, h: Expr) -> None:
        loop(x.width, lambda w: body(x.at(h, w) + c, (c * x.height + h) * x.width + w, 1))

    loop(x.channels, lambda c: loop(x.height, lambda h: row(c, h)))


def dequantize_kernel(name: str, x: Layout, shape: tuple[int, ...], dot: Dot) -> tirx.PrimFunc:
    """(codes, their quantizer) -> float32 NCHW `shape`."""

    def body(source: Buffer, quant: Buffer, out: Buffer) -> None:
        def some(at: Expr, to: Expr, n: int) -> None:
            store(out, real_value(load(source, at, n), quant, n), to, n)

        every_code(x, dot.lanes, some)

    return prim_func(name, [("x", (x.size,), "uint8"), ("quant", *QUANT), ("y", shape, "float32")], body)


def codes_kernel(name: str, x: Layout, shape: tuple[int, ...], signed: bool, dot: Dot) -> tirx.PrimFunc:
    """codes -> the file's own codes, NCHW `shape`, int8 where `signed`."""

    def body(source: Buffer, out: Buffer) -> None:
        def some(at: Expr, to: Expr, n: int) -> None:
            codes = load(source, at, n)
            if signed:
                codes = T.reinterpret(typed("int8", n), T.bitwise_xor(codes, splat_const(SHIFT, "uint8", n)))
            store(out, codes, to, n)

        every_code(x, 4 * dot.lanes, some)

    return prim_func(name, [("x", (x.size,), "uint8"), ("y", shape, "int8" if signed else "uint8")], body)
