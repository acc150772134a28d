"""Convolution kernels: uint8 codes x int8 weights -> int32 -> requantized uint8 codes (docs/integers.md).

    acc[o] = sum q_x * q_w[o] + bias'[o] - z_w[o] * sum q_x,   bias' = bias - z_x * sum q_w[o] + K * z_x * z_w[o]

so the inner loop works on codes as they lie in memory: padding is a border of z_x. A window is cut into *segments*,
runs of bytes that are neighbours in memory (a kernel row where nothing is dilated or grouped), and a segment into
groups of 4 bytes, which the target's dot product multiplies at once. A tile of pixels x blocks of output channels stays
in registers. Weights are packed [group][block][segment][4 bytes][lane][byte]; zeros fill what is left over, so bytes
that are read behind a segment count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.emit import (
    GROUP,
    Buffer,
    Expr,
    cast,
    const,
    dot_inputs,
    dot_step,
    dot_weights,
    load,
    local,
    loop,
    prim_func,
    splat,
    store,
    to_codes,
)  # fmt: skip
from qdeploy.compile.graph import Window
from qdeploy.compile.layout import Layout, fill_border
from qdeploy.compile.llvm import Dot


@dataclass(frozen=True)
class ConvSpec:
    """Everything that a convolution's code depends on: geometry and target, no values."""

    x: Layout
    y: Layout
    window: Window
    groups: int
    dot: Dot

    @property
    def depthwise(self) -> bool:
        """One input and one output channel a group: vectors run over channels instead."""
        return self.groups > 1 and self.x.channels == self.y.channels == self.groups

    @property
    def outputs(self) -> int:
        """Output channels of a group (of all of them when depthwise)."""
        return self.y.channels if self.depthwise else self.y.channels // self.groups

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.x.channels // self.groups

    @property
    def blocks(self) -> int:
        """Vectors of output channels of a group."""
        return -(-self.outputs // self.dot.lanes)

    @property
    def padded(self) -> int:
        """Length of the per-channel arrays: groups x blocks x lanes."""
        return (1 if self.depthwise else self.groups) * self.blocks * self.dot.lanes

    @property
    def taps(self) -> int:
        """Kernel positions of one segment."""
        (kh, kw), (dh, dw) = self.window.kernel, self.window.dilation
        if self.groups > 1 or (dw > 1 and kw > 1):
            return 1
        whole = self.x.row == kw * self.x.channels and (dh == 1 or kh == 1)
        return kh * kw if whole else kw

    @property
    def segments(self) -> int:
        """Runs of neighbouring bytes in a window."""
        return self.window.kernel[0] * self.window.kernel[1] // self.taps

    @property
    def quads(self) -> int:
        """Groups of 4 bytes in a segment."""
        return -(-self.taps * self.inputs // GROUP)

    @property
    def weight_bytes(self) -> int:
        """Length of the packed weights."""
        if self.depthwise:
            return self.blocks * self.segments * self.dot.lanes
        return self.groups * self.blocks * self.segments * self.quads * GROUP * self.dot.lanes

    @property
    def flat(self) -> bool:
        """Pixels of all rows are neighbours in both buffers, so a tile may cross rows."""
        plain = self.window == Window((1, 1)) and self.x.border == self.y.border == (0, 0, 0, 0)
        return plain and not self.depthwise

    def segment_offset(self, segment: Expr) -> Expr:
        """Bytes from a window's first code to segment `segment`."""
        (_, kw), (dh, dw) = self.window.kernel, self.window.dilation
        step = dw * self.x.channels
        if self.taps > 1 or kw == 1:
            return segment * (dh * self.x.row)
        if isinstance(segment, int):
            return segment // kw * dh * self.x.row + segment % kw * step
        return T.floordiv(segment, kw) * (dh * self.x.row) + T.floormod(segment, kw) * step

    def pixel(self, h: Expr, w: Expr) -> Expr:
        """Offset of the first code of output pixel (h, w)'s window."""
        (sh, sw), (top, left) = self.window.stride, self.window.padding[:2]
        return self.x.at(h * sh - top, w * sw - left)


def tile(spec: ConvSpec, pixels: int) -> tuple[int, int]:
    """(pixels, blocks) of one register tile: the pair that needs least time on two ports for dots and two for loads."""
    dot = spec.dot
    weights = {"vpdpbusd": 1, "pmaddwd": 2, "none": 4}[dot.instruction]
    best = (float("inf"), 1, 1)
    for blocks in range(1, min(spec.blocks, 4) + 1):
        most = (dot.registers - (weights * blocks + weights + 1)) // blocks
        if most < 1:
            continue
        size = -(-pixels // -(-pixels // most))
        cost = 0.0
        for m, times_m in ((size, pixels // size), (pixels % size, 1)):
            for b, times_b in ((blocks, spec.blocks // blocks), (spec.blocks % blocks, 1)):
                if m and b:
                    cost += times_m * times_b * (max(m * b * weights, m + b * weights, 8) + 2)
        if cost < best[0] * 0.97:
            best = (cost, size, blocks)
    return best[1], best[2]


UNROLLED = 25  # taps of a depthwise kernel that are written out
Bounds = tuple[Buffer, Buffer, Buffer, Buffer, Buffer]  # integers, scale, output quantizer, output, input


def finish(spec: ConvSpec, acc: Expr, channel: Expr, valid: int, offset: Expr, buffers: Bounds) -> None:
    """Requantize one vector of accumulators and store its first `valid` codes at `offset`."""
    lanes, (_, scale, quant, y, _) = spec.dot.lanes, buffers
    codes = to_codes(cast("float32", acc, lanes) * load(scale, channel, lanes), quant, lanes)
    if valid == lanes:
        store(y, codes, offset, lanes)
        return
    part = local(lanes, "uint8")
    store(part, codes, 0, lanes)
    for i in range(valid):
        store(y, load(part, i), offset + i)


def accumulators(count: int, lanes: int) -> list[Buffer]:
    """One buffer a vector, so that each can be a register."""
    return [local(lanes, "int32") for _ in range(count)]


def correct(
    spec: ConvSpec, acc: list[Buffer], shape: tuple[int, int], first: Expr, x_at: Expr, buffers: Bounds
) -> None:
    """Subtract z_w * sum q_x from a tile where any weight zero point is not 0; `acc` is [pixel][block].

    `x_at` is the tile's first window, at its group's first channel.
    """
    lanes, (pixels, blocks) = spec.dot.lanes, shape
    integers, x = buffers[0], buffers[4]
    step = spec.window.stride[1] * spec.x.channels
    with T.If(load(integers, const(2 * spec.padded)) != const(0)), T.Then():
        sums = local(pixels, "int32")

        def pixel(m: Expr) -> None:
            store(sums, const(0), m)

            def segment(s: Expr) -> None:
                start = x_at + m * step + spec.segment_offset(s)

                def byte(i: Expr) -> None:
                    store(sums, load(sums, m) + cast("int32", load(x, start + i), 1), m)

                loop(spec.taps * spec.inputs, byte)

            loop(spec.segments, segment)

        loop(pixels, pixel)
        for m in range(pixels):
            for j in range(blocks):
                part = acc[m * blocks + j]
                zero = load(integers, spec.padded + first + j * lanes, lanes)
                store(part, load(part, 0, lanes) - zero * splat(load(sums, m), lanes), 0, lanes)


def dense_tile(
    spec: ConvSpec, shape: tuple[int, int], block: Expr, last: bool, at: tuple[Expr, Expr], group: Expr, w: Buffer,
    buffers: Bounds,
) -> None:  # fmt: skip
    """One register tile of `shape` = (pixels, blocks) from `block` on; `at`: offsets of its first window and pixel."""
    dot, lanes, (pixels, blocks) = spec.dot, spec.dot.lanes, shape
    integers, x = buffers[0], buffers[4]
    first = (group * spec.blocks + block) * lanes
    acc = accumulators(pixels * blocks, lanes)
    for j in range(blocks):
        bias = T.Bind(load(integers, first + j * lanes, lanes))
        for m in range(pixels):
            store(acc[m * blocks + j], bias, 0, lanes)
    x_at, step = at[0] + group * spec.inputs, spec.window.stride[1] * spec.x.channels
    vector = GROUP * lanes

    def segment(s: Expr) -> None:
        start = x_at + spec.segment_offset(s)

        def quad(q: Expr) -> None:
            weights = []
            for j in range(blocks):
                index = ((group * spec.blocks + block + j) * spec.segments + s) * spec.quads + q
                weights.append(dot_weights(dot, load(w, index * vector, vector)))
            for m in range(pixels):
                inputs = dot_inputs(dot, load(x, start + m * step + q * GROUP, GROUP))
                for j in range(blocks):
                    part = acc[m * blocks + j]
                    store(part, dot_step(dot, load(part, 0, lanes), inputs, weights[j]), 0, lanes)

        loop(spec.quads, quad)

    loop(spec.segments, segment)
    correct(spec, acc, shape, first, x_at, buffers)
    for m in range(pixels):
        for j in range(blocks):
            tail = spec.outputs - (spec.blocks - 1) * lanes
            valid = tail if last and j == blocks - 1 else lanes
            offset = at[1] + group * spec.outputs + block * lanes + m * spec.y.channels + j * lanes
            finish(spec, load(acc[m * blocks + j], 0, lanes), first + j * lanes, valid, offset, buffers)


def cover(count: int, size: int, body: Callable[[Expr, int, bool], None]) -> None:
    """body(start, length, is_last) over `count` in steps of `size`; is_last is known at compile time."""
    whole = count // size
    if count % size == 0:
        whole -= 1  # the last one on its own, so that its tail is code of its own
    loop(whole, lambda i: body(i * size, size, False))
    body(whole * size, count - whole * size, True)


def conv_kernel(name: str, spec: ConvSpec) -> tirx.PrimFunc:
    """(x, weights, integers, scale, output quantizer) -> y."""
    params = [
        ("x", (spec.x.size,), "uint8"),
        ("w", (spec.weight_bytes,), "int8"),
        ("integers", (2 * spec.padded + 1,), "int32"),
        ("scale", (spec.padded,), "float32"),
        ("quant", (4,), "float32"),
        ("y", (spec.y.size,), "uint8"),
    ]

    def body(x: Buffer, w: Buffer, integers: Buffer, scale: Buffer, quant: Buffer, y: Buffer) -> None:
        fill_border(y, spec.y, quant)
        buffers = (integers, scale, quant, y, x)
        (depthwise if spec.depthwise else dense)(spec, w, buffers)

    return prim_func(name, params, body)


def dense(spec: ConvSpec, w: Buffer, buffers: Bounds) -> None:
    """All groups, blocks, rows and pixels of a convolution that is not depthwise."""
    rows, width = (1, spec.y.height * spec.y.width) if spec.flat else (spec.y.height, spec.y.width)
    pixels, blocks = tile(spec, width)
    has_tail = spec.outputs % spec.dot.lanes != 0

    def group(g: Expr) -> None:
        def block(b: Expr, count: int, last_block: bool) -> None:
            def row(h: Expr) -> None:
                def run(p: Expr, length: int, _: bool) -> None:
                    at = (spec.pixel(h, p), spec.y.at(h, p))
                    dense_tile(spec, (length, count), b, last_block and has_tail, at, g, w, buffers)

                loop(width // pixels, lambda i: run(i * pixels, pixels, False))
                if width % pixels:
                    run(width - width % pixels, width % pixels, True)

            loop(rows, row)

        if has_tail:
            cover(spec.blocks, blocks, block)
        else:
            loop(spec.blocks // blocks, lambda i: block(i * blocks, blocks, False))
            if spec.blocks % blocks:
                block(spec.blocks - spec.blocks % blocks, spec.blocks % blocks, False)

    loop(spec.groups, group)


# Depthwise -----------------------------------------------------------------------------------------------------------


def depthwise(spec: ConvSpec, w: Buffer, buffers: Bounds) -> None:
    """One multiply a tap and channel, `lanes` channels at once; weights are packed [block][tap][lane]."""
    lanes, width = spec.dot.lanes, spec.y.width
    pixels = -(-width // -(-width // 8))

    def block(b: Expr, _: int, last: bool) -> None:
        valid = spec.outputs - (spec.blocks - 1) * lanes if last else lanes

        def row(h: Expr) -> None:
            def run(p: Expr, length: int) -> None:
                depthwise_tile(spec, length, b, valid, (spec.pixel(h, p), spec.y.at(h, p)), w, buffers)

            loop(width // pixels, lambda i: run(i * pixels, pixels))
            if width % pixels:
                run(width - width % pixels, width % pixels)

        loop(spec.y.height, row)

    cover(spec.blocks, 1, block)


def depthwise_tile(
    spec: ConvSpec, pixels: int, block: Expr, valid: int, at: tuple[Expr, Expr], w: Buffer, buffers: Bounds
) -> None:
    """`pixels` neighbours of one row, one vector of channels; `at`: offsets of the first window and pixel."""
    lanes, integers, x = spec.dot.lanes, buffers[0], buffers[4]
    first, step = block * lanes, spec.window.stride[1] * spec.x.channels
    acc = accumulators(pixels, lanes)
    bias = T.Bind(load(integers, first, lanes))
    for m in range(pixels):
        store(acc[m], bias, 0, lanes)
    zero = T.Bind(cast("int16", load(integers, spec.padded + first, lanes), lanes))

    def tap(t: Expr) -> None:
        # weight - z_w here, so no sum over codes is needed; in 16 bits, so that LLVM sees a 16-bit multiply
        narrow = cast("int16", load(w, (block * spec.segments + t) * lanes, lanes), lanes) - zero
        weight = T.Bind(cast("int32", narrow, lanes))
        start = at[0] + first + spec.segment_offset(t)
        for m in range(pixels):
            codes = cast("int32", load(x, start + m * step, lanes), lanes)
            store(acc[m], load(acc[m], 0, lanes) + codes * weight, 0, lanes)

    if spec.segments <= UNROLLED:
        for t in range(spec.segments):
            tap(t)
    else:
        loop(spec.segments, tap)
    for m in range(pixels):
        finish(spec, load(acc[m], 0, lanes), first, valid, at[1] + first + m * spec.y.channels, buffers)
