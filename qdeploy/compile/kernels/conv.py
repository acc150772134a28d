"""Convolution kernels: uint8 codes x int8 weights -> int32 -> requantized uint8 codes (docs/integers.md).

    acc[o] = sum q_x * q_w[o] + bias'[o] - z_w[o] * sum q_x,   bias' = bias - z_x * sum q_w[o] + K * z_x * z_w[o]

so the inner loop works on codes as they lie in memory: padding is a border of z_x. A tile of pixels x blocks of output
channels stays in registers. Weights are packed [group][block][segment][quad][lane][byte] (spec.py); zeros fill what is
left over, so bytes that are read behind a segment count for nothing. pmaddwd multiplies 16 bits: weights are widened by
the load, codes once for all blocks of channels. Weights of 4 bits are unpacked once for all pixels, or as they are used
where there is but one tile of pixels (a fully connected layer, whose time is that of reading its weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import arm_tiles, depthwise, tiles
from qdeploy.compile.kernels.correct import SUMS, centred, correct, window_sum
from qdeploy.compile.kernels.dots import (
    GROUP,
    dot_inputs,
    dot_step,
    dot_weights,
    looked_up,
    part_of,
    steps,
    widened_part,
)
from qdeploy.compile.kernels.emit import Buffer, Expr, cast, const, load, local, loop, prim_func, spread, store, typed
from qdeploy.compile.kernels.layout import fill_border
from qdeploy.compile.kernels.requantize import Operands, Piece, finish, limits
from qdeploy.compile.kernels.spec import TABLE_BYTES, Choice, ConvSpec
from qdeploy.compile.llvm import Dot

UNPACKED = 1 << 18  # packed weights that are unpacked at once where several tiles multiply them: bytes of stack


def cycles(spec: ConvSpec, pixels: int, blocks: int) -> float:
    """Time of one register tile on a processor with two units that multiply, three that add, and two loads a cycle.

    Loads cost beside the arithmetic, as measured; 5 cycles a quad is what a chain of vpdpbusd waits at least. Those of
    ARM are an estimate (arm_tiles.cycles).
    """
    dot, count = spec.multiply, pixels * blocks
    if dot.neon:
        return arm_tiles.cycles(spec, pixels, blocks)
    arithmetic = {
        "vpdpbusd": max(count / 2, 5),
        "pmaddubsw": count,  # two multiplies and an addition
        "pmaddwd": (4 * count + 2 * blocks) / 3,  # and weights are widened
    }[dot.instruction]
    loads = steps(dot) * (pixels + blocks) / 2
    quad = max(arithmetic, loads) + loads / 4 + 1
    return spec.segments * (spec.quads * quad + 4) + 2.5 * count + 10


def free_registers(dot: Dot) -> int:
    """Of a register tile, for sums, inputs and weights: the rest holds products that are added apart, and the like."""
    taken = {"vpdpbusd": 1, "pmaddwd": 2, "pmaddubsw": 3, "sdot": 5, "usdot": 5, "usmmla": 2, "smull": 12, "smlal": 12}
    return dot.registers - taken[dot.instruction]


def register_tiles(spec: ConvSpec) -> list[tuple[int, int]]:
    """(pixels, blocks) of all register tiles of a dense kernel, those that take least time first.

    Beside the sums, registers hold the inputs or the weights of a quad (what there is less of; on ARM the inputs) and
    one of the others. Remainders are code of their own: they have to be worth it.
    """
    dot, (_, pixels) = spec.multiply, spec.lines
    free, most = free_registers(dot), 4 if pixels > 1 else 6  # more blocks store too short runs
    found = []
    for blocks in range(1, min(spec.blocks, 2 * most if dot.neon else most) + 1):
        for size in range(1, min(pixels, free) + 1):
            sums = (size + size % 2 if dot.instruction == "usmmla" else size) * blocks
            if sums + (size if dot.neon else min(size, blocks)) > free:
                break
            runs = [(size, pixels // size), (pixels % size, 1)]
            columns = [(blocks, spec.blocks // blocks), (spec.blocks % blocks, 1)]
            cost = sum(n * k * cycles(spec, m, b) for m, n in runs for b, k in columns if m and b)
            cost *= 1.02 ** ((pixels % size > 0) + (spec.blocks % blocks > 0))
            found.append((cost, size, blocks))
    return [(size, blocks) for _, size, blocks in sorted(found)]


def tile(spec: ConvSpec) -> tuple[int, int]:
    """(pixels, blocks) of one register tile: as chosen, or what takes least time."""
    return (spec.choice.pixels, spec.choice.blocks) if spec.choice is not None else register_tiles(spec)[0]


def way(spec: ConvSpec) -> Choice:
    """How `spec` is computed: as chosen, or as the cost models say."""
    return Choice("dense", *tile(spec)) if spec.family == "dense" else Choice(spec.family)


def ways(spec: ConvSpec) -> list[Choice]:
    """All ways to compute `spec`: first what the cost models say, then other kernels, then other register tiles."""
    free = replace(spec, choice=None)
    if spec.depthwise:
        found = [Choice("depthwise_rows")] * free.rows_apply + [Choice("depthwise")]
    else:
        found = [Choice("tiles")] * free.tiles_apply
        found += [Choice("dense", *shape) for shape in register_tiles(spec)]
    default = way(free)
    return [default, *(choice for choice in found if choice != default)]


def conv_kernel(name: str, spec: ConvSpec) -> tirx.PrimFunc:
    """(x, weights, integers, scale, output quantizer, those of `spec.then`) -> y."""
    params = [
        ("x", (spec.x.size,), "uint8"),
        ("w", (spec.weight_bytes,), "int8"),
        ("integers", (2 * spec.padded + 1,), "int32"),
        ("scale", (spec.padded,), "float32"),
        ("quant", (4,), "float32"),
        *(spec.then.params if spec.then is not None else []),
        ("y", (spec.y.size,), "uint8"),
    ]
    write = {"dense": dense, "tiles": tiles.dense, "depthwise": depthwise.plain, "depthwise_rows": depthwise.rows}

    def body(x: Buffer, w: Buffer, integers: Buffer, scale: Buffer, *rest: Buffer) -> None:
        quant, given, y = rest[0], rest[1:-1], rest[-1]
        fill_border(y, spec.y, rest[-2])
        operands = Operands(x, w, integers, scale, y, limits(quant, spec.dot))
        if spec.then is not None:
            operands = operands.fused(spec.then, spec.dot, spec.y, quant, given)
        write[spec.family](spec, operands)

    return prim_func(name, params, body)


@dataclass(frozen=True)
class Weights:
    """Where a dense kernel reads its weights: blocks from `first` on, as 4-bit indices where `packed`."""

    buffer: Buffer
    first: Expr
    packed: bool


def unpacked(spec: ConvSpec, first: Expr, count: int, o: Operands) -> Weights:
    """int8 weights of `count` blocks from `first` on, on the stack."""
    vector = GROUP * spec.dot.lanes
    buffer = local(count * spec.segments * spec.quads * vector, "int8")
    table = T.Bind(load(o.w, const(0), vector))

    def run(i: Expr) -> None:  # a segment of a block
        def pair(q: Expr, both: int) -> None:
            at = TABLE_BYTES + ((first * spec.segments + i) * spec.quad_pairs + q) * vector
            indices = T.Bind(T.reinterpret(typed("uint8", vector), load(o.w, at, vector)))
            for half in range(both):
                place = (i * spec.quads + 2 * q + half) * vector
                store(buffer, looked_up(spec.dot, table, indices, half == 1), place, vector)

        loop(spec.quads // 2, lambda q: pair(q, 2))
        if spec.quads % 2:
            pair(spec.quads // 2, 1)

    loop(count * spec.segments, run)
    return Weights(buffer, first, False)


@dataclass(frozen=True)
class Codes:
    """Where a dense kernel reads its input: uint8 codes, or some rows of them widened to int16, from `base` on."""

    buffer: Buffer
    base: Expr


def widened(spec: ConvSpec, first: Expr, rows: Expr, most: int, o: Operands) -> Codes:
    """The input of output rows `first` .. `first` + `rows` (`most` at most) as int16, on the stack."""
    lanes = 2 * spec.dot.lanes
    step = spec.window.stride[0] * spec.x.row
    base = spec.pixel(first, 0)
    buffer = local(-(-spec.read_bytes(most) // lanes) * lanes, "int16")
    vectors = T.floordiv((rows - 1) * step + (spec.read_bytes(1) + lanes - 1), const(lanes))
    with T.serial(0, vectors) as i:
        store(buffer, cast("int16", load(o.x, base + i * lanes, lanes), lanes), i * lanes, lanes)
    return Codes(buffer, base)


def dense_tile(
    spec: ConvSpec, shape: tuple[int, int], block: Expr, last: bool, at: tuple[Expr, Expr], group: Expr,
    codes: Codes, sums: Callable[[int], Expr] | None, weights: Weights, o: Operands,
) -> None:  # fmt: skip
    """One register tile of `shape` = (pixels, blocks) from `block` on; `at`: offsets of its first window and pixel.

    `last`: its last block is the last one of all, of which only the tail is stored. `sums(m)`: sum of the codes under
    the window of pixel m, where it was computed before.
    """
    lanes, (pixels, blocks) = spec.dot.lanes, shape
    first = (group * spec.blocks + block) * lanes
    acc = [local(lanes, "int32") for _ in range(pixels * blocks)]  # one buffer a vector, so that each can be a register
    for j in range(blocks):
        bias = T.Bind(load(o.integers, first + j * lanes, lanes))
        for m in range(pixels):
            store(acc[m * blocks + j], bias, 0, lanes)
    x_at = at[0] + group * spec.inputs
    multiply(spec, acc, shape, group * spec.blocks + block, x_at - codes.base, codes.buffer, weights)
    step = spec.window.stride[1] * spec.x.channels
    correct(spec, acc, shape, first, sums or (lambda m: window_sum(spec, o.x, x_at + m * step)), o)
    scales = [T.Bind(load(o.scale, first + j * lanes, lanes)) for j in range(blocks)]
    base = at[1] + group * spec.outputs + block * lanes
    pieces = []
    for m in range(pixels):
        for j in range(blocks):
            valid = spec.tail if last and j == blocks - 1 else lanes
            total = load(acc[m * blocks + j], 0, lanes)
            pieces.append(Piece(total, scales[j], valid, base, m * spec.y.channels + j * lanes))
    finish(pieces, o, lanes)


def multiply(
    spec: ConvSpec, acc: list[Buffer], shape: tuple[int, int], block: Expr, x_at: Expr, x: Buffer, w: Weights
) -> None:
    """Add all products of a tile to `acc` [pixel][block]; `x_at` is its first window, `block` its first of all groups.

    Of a quad's inputs and weights, those that are fewer stay in registers.
    """
    dot, (pixels, blocks) = spec.multiply, shape
    if dot.neon:
        arm_tiles.multiply(spec, acc, shape, block, x_at, x, (w.buffer, w.first, w.packed))
        return
    step, vector = spec.window.stride[1] * spec.x.channels, GROUP * dot.lanes

    def products(start: Expr, part: int, weights: Callable[[int], Expr]) -> None:
        """Products of one part of a quad; `weights(j)` is that of block j."""

        def inputs(m: int) -> Expr:
            return dot_inputs(dot, x, start + m * step, part)

        def add(m: int, j: int, left: Expr, right: Expr) -> None:
            sums = acc[m * blocks + j]
            store(sums, dot_step(dot, load(sums, 0, dot.lanes), [left], [right]), 0, dot.lanes)

        if pixels < blocks:
            held = [inputs(m) for m in range(pixels)]
            for j in range(blocks):
                one = weights(j)
                for m in range(pixels):
                    add(m, j, held[m], one)
        else:
            held = [weights(j) for j in range(blocks)]
            for m in range(pixels):
                one = inputs(m)
                for j in range(blocks):
                    add(m, j, one, held[j])

    def segment(s: Expr) -> None:
        start = x_at + spec.segment_offset(s)

        def run(j: int) -> Expr:
            return (block - w.first + j) * spec.segments + s

        def quad(q: Expr) -> None:
            def one(part: int, j: int) -> Expr:
                return dot_weights(dot, w.buffer, (run(j) * spec.quads + q) * vector, part)

            for part in range(steps(dot)):
                products(start + q * GROUP, part, partial(one, part))

        def pair(q: Expr, both: int) -> None:
            table = T.Bind(load(w.buffer, const(0), vector))
            places = [TABLE_BYTES + (run(j) * spec.quad_pairs + q) * vector for j in range(blocks)]
            indices = [T.Bind(T.reinterpret(typed("uint8", vector), load(w.buffer, at, vector))) for at in places]
            for half in range(both):
                found = [looked_up(dot, table, index, half == 1) for index in indices]
                for part in range(steps(dot)):
                    parts = [widened_part(dot, part_of(dot, codes, part)) for codes in found]
                    products(start + (2 * q + half) * GROUP, part, parts.__getitem__)

        if w.packed:
            loop(spec.quads // 2, lambda q: pair(q, 2))
            if spec.quads % 2:
                pair(spec.quads // 2, 1)
        else:
            loop(spec.quads, quad)

    loop(spec.segments, segment)


def window_sums(spec: ConvSpec, first: Expr, count: Expr, shape: tuple[int, int], o: Operands) -> Buffer | None:
    """int32 [group][row][pixel], sums of the codes under the windows of `count` rows from `first` on, on the stack.

    `shape`: rows at most, and pixels of a row. Nothing is written where all weight zero points are 0; None: too many.
    """
    rows, width = shape
    if spec.groups * rows * width > SUMS:
        return None
    buffer = local(spec.groups * rows * width, "int32")

    def row(g: Expr, h: Expr) -> None:
        def pixel(p: Expr) -> None:
            total = window_sum(spec, o.x, spec.pixel(first + h, p) + g * spec.inputs)
            store(buffer, total, (g * rows + h) * width + p)

        loop(width, pixel)

    with T.If(centred(spec, o)), T.Then():
        loop(spec.groups, lambda g: turns(count, partial(row, g)))
    return buffer


def turns(count: Expr, body: Callable[[Expr], None]) -> None:
    """`body(i)` for i below `count`, which may not be known when compiling."""
    if isinstance(count, int):
        loop(count, body)
    else:
        with T.serial(0, count) as i:
            body(i)


def dense(spec: ConvSpec, o: Operands) -> None:
    """All groups, blocks, rows and pixels of a convolution that is not depthwise."""
    rows, width = spec.lines
    pixels, blocks = tile(spec)
    whole = (spec.blocks - (spec.tail < spec.dot.lanes)) // blocks  # steps of full tiles; a tail is code of its own
    by_blocks = spec.groups * whole >= rows  # what threads share
    threads = 1 if by_blocks else spec.threads
    runs = -(-rows // spec.rows_at_once(rows)) if spec.widens else 1
    size = -(-rows // min(rows, -(-runs // threads) * threads))  # equal shares of whole runs

    def chunk(i: Expr) -> None:
        first = i * size
        count = size if rows % size == 0 else T.Min(const(size), rows - first)
        codes = widened(spec, first, count, size, o) if spec.widens else Codes(o.x, 0)
        sums = window_sums(spec, first, count, (size, width), o)

        def block(g: Expr, b: Expr, number: int, last: bool) -> None:
            weights = Weights(o.w, 0, spec.packed)
            if spec.packed and rows * width > pixels and number * spec.block_bytes <= UNPACKED:
                weights = unpacked(spec, g * spec.blocks + b, number, o)

            def row(i: Expr) -> None:
                h = first + i

                def run(p: Expr, length: int) -> None:
                    at = (spec.pixel(h, p), spec.y.at(h, p))
                    known = None if sums is None else lambda m: load(sums, (g * size + i) * width + p + m)
                    dense_tile(spec, (length, number), b, last, at, g, codes, known, weights, o)

                loop(width // pixels, lambda i: run(i * pixels, pixels))
                if width % pixels:
                    run(width - width % pixels, width % pixels)

            turns(count, row)

        def full(i: Expr) -> None:
            block(T.floordiv(i, whole), T.floormod(i, whole) * blocks, blocks, False)

        spread(spec.groups * whole, spec.threads if by_blocks else 1, full)
        if spec.blocks - whole * blocks:
            loop(spec.groups, lambda g: block(g, whole * blocks, spec.blocks - whole * blocks, True))

    spread(-(-rows // size), threads, chunk)
