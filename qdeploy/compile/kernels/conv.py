"""Convolution kernels: uint8 codes x int8 weights -> int32 -> requantized uint8 codes (docs/integers.md).

    acc[o] = sum q_x * q_w[o] + bias'[o] - z_w[o] * sum q_x,   bias' = bias - z_x * sum q_w[o] + K * z_x * z_w[o]

so the inner loop works on codes as they lie in memory: padding is a border of z_x. A tile of pixels x blocks of output
channels stays in registers. Weights are packed [group][block][segment][quad][lane][byte] (spec.py); zeros fill what is
left over, so bytes that are read behind a segment count for nothing.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import depthwise, tiles
from qdeploy.compile.kernels.correct import correct
from qdeploy.compile.kernels.dots import GROUP, dot_inputs, dot_step, dot_weights
from qdeploy.compile.kernels.emit import Buffer, Expr, load, local, loop, prim_func, store
from qdeploy.compile.kernels.layout import fill_border
from qdeploy.compile.kernels.requantize import Operands, Piece, finish, limits
from qdeploy.compile.kernels.spec import ConvSpec


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
    write = {"dense": dense, "tiles": tiles.dense, "depthwise": depthwise.plain, "depthwise_rows": depthwise.rows}

    def body(x: Buffer, w: Buffer, integers: Buffer, scale: Buffer, quant: Buffer, y: Buffer) -> None:
        fill_border(y, spec.y, quant)
        write[spec.family](spec, Operands(x, w, integers, scale, y, limits(quant)))

    return prim_func(name, params, body)


def dense_tile(
    spec: ConvSpec, shape: tuple[int, int], block: Expr, last: bool, at: tuple[Expr, Expr], group: Expr, o: Operands
) -> None:
    """One register tile of `shape` = (pixels, blocks) from `block` on; `at`: offsets of its first window and pixel.

    `last`: its last block is the last one of all, of which only the tail is stored.
    """
    dot, lanes, (pixels, blocks) = spec.dot, spec.dot.lanes, shape
    first = (group * spec.blocks + block) * lanes
    acc = [local(lanes, "int32") for _ in range(pixels * blocks)]  # one buffer a vector, so that each can be a register
    for j in range(blocks):
        bias = T.Bind(load(o.integers, first + j * lanes, lanes))
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
                weights.append(dot_weights(dot, load(o.w, index * vector, vector)))
            for m in range(pixels):
                inputs = dot_inputs(dot, load(o.x, start + m * step + q * GROUP, GROUP))
                for j in range(blocks):
                    part = acc[m * blocks + j]
                    store(part, dot_step(dot, load(part, 0, lanes), inputs, weights[j]), 0, lanes)

        loop(spec.quads, quad)

    loop(spec.segments, segment)
    correct(spec, acc, shape, first, x_at, o)
    scales = [T.Bind(load(o.scale, first + j * lanes, lanes)) for j in range(blocks)]
    base = at[1] + group * spec.outputs + block * lanes
    pieces = []
    for m in range(pixels):
        for j in range(blocks):
            valid = spec.tail if last and j == blocks - 1 else lanes
            sums = load(acc[m * blocks + j], 0, lanes)
            pieces.append(Piece(sums, scales[j], valid, base, m * spec.y.channels + j * lanes))
    finish(pieces, o, lanes)


def dense(spec: ConvSpec, o: Operands) -> None:
    """All groups, blocks, rows and pixels of a convolution that is not depthwise."""
    rows, width = (1, spec.y.height * spec.y.width) if spec.flat else (spec.y.height, spec.y.width)
    pixels, blocks = tile(spec, width)
    whole = (spec.blocks - (spec.tail < spec.dot.lanes)) // blocks  # steps of full tiles; a tail is code of its own

    def group(g: Expr) -> None:
        def block(b: Expr, count: int, last: bool) -> None:
            def row(h: Expr) -> None:
                def run(p: Expr, length: int) -> None:
                    dense_tile(spec, (length, count), b, last, (spec.pixel(h, p), spec.y.at(h, p)), g, o)

                loop(width // pixels, lambda i: run(i * pixels, pixels))
                if width % pixels:
                    run(width - width % pixels, width % pixels)

            loop(rows, row)

        loop(whole, lambda i: block(i * blocks, blocks, False))
        if spec.blocks - whole * blocks:
            block(whole * blocks, spec.blocks - whole * blocks, True)

    loop(spec.groups, group)
