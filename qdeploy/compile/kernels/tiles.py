"""Dense convolutions on AMX: one instruction multiplies R windows x 64 bytes with 64 bytes x 16 output channels.

Tiles 0 to 3 hold accumulators (2 runs of pixels x 2 blocks of channels), 4 and 5 windows, 6 and 7 weights. A tile of
windows is loaded straight from the codes: its rows are windows of neighbouring pixels, `step` bytes apart. A tile of
weights is `chunk` quads of the packing that the other kernels read as well (spec.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.correct import correct
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.emit import Buffer, Expr, const, load, local, loop, splat, store
from qdeploy.compile.kernels.requantize import VECTORS, Operands, Piece, finish
from qdeploy.compile.kernels.spec import TILE_ROWS, ConvSpec

LANES = 16  # int32 in a row of a tile
ROW = 64  # bytes in a row of a tile
WINDOWS, WEIGHTS = 4, 6  # first tile of each kind
Place = tuple[Expr, Expr]  # offsets of a run's first window and first output pixel


def call(name: str, *args: Expr) -> None:
    """One AMX instruction."""
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))


def tile_rows(pixels: int) -> int:
    """Windows in a tile for rows of `pixels`: the fewest tiles, and as few windows computed twice as can be."""
    most = min(pixels, TILE_ROWS)
    return min(range(most, max(0, most - 8), -1), key=lambda r: (-(-pixels // r) * (r + 1.5), pixels % (2 * r) != 0))


def configure(rows: int, chunk: int) -> None:
    """Load this thread's tile configuration; `dense` releases it at its end."""
    config = local(64, "uint8")
    store(config, splat(const(0, "uint8"), 64), 0, 64)
    store(config, const(1, "uint8"), 0)
    for tile in range(8):
        height, width = (rows, ROW) if tile < WINDOWS else (rows, chunk * GROUP)
        if tile >= WEIGHTS:
            height, width = chunk, ROW
        store(config, const(width, "uint8"), 16 + 2 * tile)
        store(config, const(height, "uint8"), 48 + tile)
    call("ldtilecfg", T.address_of(config[0]))


def dense(spec: ConvSpec, o: Operands) -> None:
    """All blocks, rows and pixels. The last tile of a row is moved back so that it is full."""
    width = spec.y.height * spec.y.width if spec.flat else spec.y.width
    rows = tile_rows(width)
    sums = local(4 * rows * LANES, "int32")
    starts = [min(p, width - rows) for p in range(0, width, rows)]
    configure(rows, spec.chunk)

    def place(h: Expr, p: Expr) -> Place:
        return spec.pixel(h, p), spec.y.at(h, p)

    def blocks(block: Expr, count: int, last: bool) -> None:
        def run(*places: Place) -> None:
            multiply(spec, rows, block, count, places, sums, o)
            for i, (x_at, y_at) in enumerate(places):
                write(spec, rows, block, count, last, (x_at, y_at), sums, i * count, o)

        def row(h: Expr) -> None:
            pairs = width // (2 * rows)
            loop(pairs, lambda i: run(place(h, i * (2 * rows)), place(h, i * (2 * rows) + rows)))
            if rest := starts[2 * pairs :]:
                run(*(place(h, p) for p in rest))

        if spec.flat:
            row(0)
        elif len(starts) > 1:
            loop(spec.y.height, row)
        else:  # a tile holds a row: take two rows at a time
            loop(spec.y.height // 2, lambda h: run(place(h * 2, 0), place(h * 2 + 1, 0)))
            if spec.y.height % 2:
                run(place(spec.y.height - 1, 0))

    whole = (spec.blocks - (spec.tail < LANES)) // 2
    loop(whole, lambda i: blocks(i * 2, 2, False))
    if spec.blocks > 2 * whole:
        blocks(2 * whole, spec.blocks - 2 * whole, True)
    call("tilerelease")


def multiply(
    spec: ConvSpec, rows: int, block: Expr, count: int, places: Sequence[Place], sums: Buffer, o: Operands
) -> None:
    """Sums of products of up to 2 runs of `rows` pixels x `count` blocks -> `sums` [run][block][row][lane]."""
    step = spec.window.stride[1] * spec.x.channels
    runs, chunks = len(places), spec.quads // spec.chunk
    for tile in range(runs * count):
        call("tilezero", const(tile, "int8"))

    def segment(s: Expr) -> None:
        def chunk(c: Expr) -> None:
            for i, (x_at, _) in enumerate(places):
                start = x_at + spec.segment_offset(s) + c * (spec.chunk * GROUP)
                call("tileloadd64", const(WINDOWS + i, "int8"), T.address_of(o.x[start]), const(step, "int64"))
            for j in range(count):
                index = ((block + j) * spec.segments + s) * spec.quads + c * spec.chunk
                call("tileloadd64", const(WEIGHTS + j, "int8"), T.address_of(o.w[index * ROW]), const(ROW, "int64"))
                for i in range(runs):
                    tiles = [const(t, "int8") for t in (i * count + j, WINDOWS + i, WEIGHTS + j)]
                    call("tdpbusd", *tiles)

        loop(chunks, chunk)

    loop(spec.segments, segment)
    for tile in range(runs * count):
        call("tilestored64", const(tile, "int8"), T.address_of(sums[tile * rows * LANES]), const(ROW, "int64"))


def write(
    spec: ConvSpec, rows: int, block: Expr, count: int, last: bool, at: Place, sums: Buffer, tile: int, o: Operands
) -> None:
    """Bias, correct, requantize and store one run; its sums are in tiles `tile`, `tile` + 1."""
    step, channels, first = spec.window.stride[1] * spec.x.channels, spec.y.channels, block * LANES
    biases = [T.Bind(load(o.integers, first + j * LANES, LANES)) for j in range(count)]
    scales = [T.Bind(load(o.scale, first + j * LANES, LANES)) for j in range(count)]

    def part(start: Expr, pixels: int) -> None:
        acc = [local(LANES, "int32") for _ in range(pixels * count)]
        for m in range(pixels):
            for j in range(count):
                found = load(sums, ((tile + j) * rows + start + m) * LANES, LANES)
                store(acc[m * count + j], found + biases[j], 0, LANES)
        correct(spec, acc, (pixels, count), first, at[0] + start * step, o)
        base = at[1] + first + start * channels
        pieces = []
        for m in range(pixels):
            for j in range(count):
                valid = spec.tail if last and j == count - 1 else LANES
                value = load(acc[m * count + j], 0, LANES)
                pieces.append(Piece(value, scales[j], valid, base, m * channels + j * LANES))
        finish(pieces, o, LANES)

    size = VECTORS // count
    loop(rows // size, lambda i: part(i * size, size))
    if rows % size:
        part(rows // size * size, rows % size)
