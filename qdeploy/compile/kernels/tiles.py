"""Dense convolutions on AMX: one instruction multiplies R windows x 64 bytes with 64 bytes x 16 output channels.

Tiles 0 to 3 hold accumulators (2 runs of pixels x 2 blocks of channels), 4 and 5 windows, 6 and 7 weights. A tile of
windows is loaded straight from the codes: its rows are windows of neighbouring pixels, `step` bytes apart. A tile of
weights is `chunk` quads of the packing that the other kernels read as well (spec.py).

Tiles and vectors are separate units: while one step's tiles are multiplied, the sums of the step before it, which went
to the stack, are requantized. (Vectors take longer then: floating-point ones get one of two ports.)
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Call, PointerType, PrimType
from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.correct import correct
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.emit import Buffer, Expr, const, load, local, loop, splat, spread, store
from qdeploy.compile.kernels.requantize import VECTORS, Operands, Piece, finish
from qdeploy.compile.kernels.spec import TILE_ROWS, ConvSpec

LANES = 16  # int32 in a row of a tile
ROW = 64  # bytes in a row of a tile
NEAR = 24 << 10  # bytes that stay in the first cache
FAR = 1 << 20  # bytes that may not stay in the second one
WINDOWS, WEIGHTS = 4, 6  # first tile of each kind


def call(name: str, *args: Expr) -> None:
    """One AMX instruction."""
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))


@dataclass(frozen=True)
class Pairs:
    """How output pixels become pairs of runs, each a tile of `rows` neighbours; the last pair is moved back to be full.

    A pair lies in a line of `width` pixels, or where a row fits a tile it is two rows.
    """

    spec: ConvSpec
    rows: int
    per_line: int  # pairs in a line; 0: two rows are one pair
    count: int

    @property
    def even(self) -> bool:
        """No pixel is in two pairs."""
        pixels = self.spec.y.height * self.spec.y.width
        return pixels == 2 * self.rows * self.count

    def first(self, i: Expr) -> tuple[Expr, Expr]:
        """Line and pixel where the first run of pair `i` begins."""
        if not self.per_line:
            return T.Min(const(2) * i, const(self.spec.y.height - 2)), 0
        h = 0 if one_line(self.spec) else T.floordiv(i, const(self.per_line))
        return h, T.Min((i - h * self.per_line) * (2 * self.rows), const(line_width(self.spec) - 2 * self.rows))

    def windows(self, i: Expr) -> Expr:
        """Offset of the first window of pair `i`."""
        return self.spec.pixel(*self.first(i))

    def outputs(self, i: Expr, run: Expr, start: Expr, count: int) -> list[tuple[Expr, int]]:
        """Base and offset of each of `count` output pixels, from pixel `start` of a run of pair `i` on."""
        y, (h, p) = self.spec.y, self.first(i)
        if one_line(self.spec) and not self.spec.flat:
            pixels = [p + run * self.rows + start + m for m in range(count)]
            return [(y.at(T.floordiv(q, const(y.width)), T.floormod(q, const(y.width))), 0) for q in pixels]
        base = y.at(h, p) + run * self.second[1] + start * y.channels
        return [(base, m * y.channels) for m in range(count)]

    @property
    def second(self) -> tuple[int, int]:
        """Bytes from a pair's first run to its second one: windows and output."""
        x, y, stride = self.spec.x, self.spec.y, self.spec.window.stride
        if not self.per_line:
            return stride[0] * x.row, y.row
        return self.rows * stride[1] * x.channels, self.rows * y.channels


def one_line(spec: ConvSpec) -> bool:
    """All windows are neighbours; also where outputs are not, if rows are so short that tiles of one would be small."""
    bare = spec.window == Window((1, 1)) and spec.x.border == (0, 0, 0, 0)
    return spec.flat or (bare and spec.y.width <= TILE_ROWS // 2)


def line_width(spec: ConvSpec) -> int:
    """Neighbouring pixels that a tile may hold."""
    return spec.y.height * spec.y.width if one_line(spec) else spec.y.width


def tile_rows(pixels: int) -> int:
    """Windows in a tile for lines of `pixels`, 2 or more, in pairs of tiles: least time, 1.5 rows a tile included."""
    most = min(pixels // 2, TILE_ROWS)
    return min(range(most, max(0, most - 8), -1), key=lambda r: -(-pixels // (2 * r)) * (r + 1.5))


def pairs_of(spec: ConvSpec) -> Pairs:
    """The pairs of a convolution of at least 2 pixels."""
    if not one_line(spec) and spec.y.width <= TILE_ROWS and spec.y.height > 1:
        return Pairs(spec, spec.y.width, 0, -(-spec.y.height // 2))
    width = line_width(spec)
    rows = tile_rows(width)
    per_line = -(-width // (2 * rows))
    return Pairs(spec, rows, per_line, per_line if one_line(spec) else per_line * spec.y.height)


def aligned(count: int) -> Buffer:
    """int32 on the stack from a multiple of 64 bytes on; TVM aligns to 16, where rows of tiles cross cache lines."""
    memory, pointer = local(count + LANES, "int32"), PointerType(PrimType("int32"), "local")
    for end in (0, count + LANES - 1):  # TVM keeps what lies between elements that it sees
        store(memory, const(0), end)
    masked = T.call_llvm_pure_intrin("handle", "llvm.ptrmask", T.address_of(memory[LANES - 1]), const(-ROW, "int64"))
    start = T.Bind(Call(masked.op, list(masked.args), ret_ty=pointer), pointer)
    return T.decl_buffer((count,), "int32", data=start, scope="local")


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
    """All blocks and pixels, in `spec.threads` runs of pairs of pixels."""
    pairs = pairs_of(spec)
    size = -(-pairs.count // spec.threads)
    if spec.threads > 1:
        unit = max(1, pairs.per_line) if not one_line(spec) else 1
        size = -(-size // unit) * unit
        if size < pairs.count and (pairs.count - 1) % size == 0 and unit == 1 and not pairs.even:
            size += 1  # the last pair writes pixels of the one before it: both are one thread's

    def work(t: Expr) -> None:
        configure(pairs.rows, spec.chunk)
        first = t * size
        count = size if pairs.count <= size else T.Min(const(size), pairs.count - first)
        whole = (spec.blocks - (spec.tail < LANES)) // 2
        if whole:
            steps(Step(spec, pairs, 2, LANES, o), first, count, 0, whole)
        if spec.blocks > 2 * whole:
            steps(Step(spec, pairs, spec.blocks - 2 * whole, spec.tail, o), first, count, 2 * whole, 1)
        call("tilerelease")

    spread(-(-pairs.count // size), spec.threads, work)


def steps(step: Step, first: Expr, count: Expr, block: int, groups: int) -> None:
    """`count` pairs from `first` on x `groups` of blocks from `block` on.

    A step is multiplied, then the one before it requantized, then its sums stored: vectors need not wait for tiles.
    """

    def part(s: Expr) -> tuple[Expr, Expr]:
        if groups == 1:
            return first + s, const(block)
        if step.pixels_first:
            return first + T.floordiv(s, const(groups)), T.floormod(s, const(groups)) * step.count + block
        return first + T.floormod(s, count), T.floordiv(s, count) * step.count + block

    total = count * groups
    size = step.count * 2 * step.pairs.rows * LANES  # int32 of one step
    sums = aligned(size)
    with T.serial(0, total + 1) as s:
        with T.If(s < total), T.Then():
            step.multiply(*part(s))
        with T.If(s > const(0)), T.Then():
            step.write(*part(s - 1), sums)
        with T.If(s < total), T.Then():
            step.store(sums)


@dataclass(frozen=True)
class Step:
    """Two runs of pixels x `count` blocks, of whose last one `valid` channels exist. Sums: [run][block][row][lane]."""

    spec: ConvSpec
    pairs: Pairs
    count: int
    valid: int
    o: Operands

    @property
    def pixels_first(self) -> bool:
        """All blocks of a pair one after the other, codes read once; else all pairs for one set of weights.

        What is read again comes from the second cache, unless all of it stays in the first.
        """
        spec = self.spec
        weights, codes, groups = spec.weight_bytes, spec.x.size, -(-spec.blocks // 2)
        by_pixels = codes + weights * (self.pairs.count if weights > NEAR else 1)
        by_blocks = weights + codes * (groups if codes > NEAR else 1) + spec.y.size
        return by_pixels < by_blocks

    def multiply(self, pair: Expr, block: Expr) -> None:
        """Bias and sums of products -> the accumulators."""
        spec, o, count = self.spec, self.o, self.count
        step, x_at = spec.window.stride[1] * spec.x.channels, self.pairs.windows(pair)
        runs = range(2)
        for j in range(count):  # each row of an accumulator begins with the bias
            bias = T.address_of(o.integers[(block + j) * LANES])
            for i in runs:
                call("tileloadd64", const(i * count + j, "int8"), bias, const(0, "int64"))

        def chunk(s: Expr, c: Expr) -> None:
            for i in runs:
                start = x_at + i * self.pairs.second[0] + spec.segment_offset(s) + c * (spec.chunk * GROUP)
                call("tileloadd64", const(WINDOWS + i, "int8"), T.address_of(o.x[start]), const(step, "int64"))
            for j in range(count):
                index = ((block + j) * spec.segments + s) * spec.quads + c * spec.chunk
                call("tileloadd64", const(WEIGHTS + j, "int8"), T.address_of(o.w[index * ROW]), const(ROW, "int64"))
                self.prefetch(pair, index)
                for i in runs:
                    tiles = [const(t, "int8") for t in (i * count + j, WINDOWS + i, WEIGHTS + j)]
                    call("tdpbusd", *tiles)

        loop(spec.segments, lambda s: loop(spec.quads // spec.chunk, lambda c: chunk(s, c)))

    def prefetch(self, pair: Expr, index: Expr) -> None:
        """Each pair asks for its share of the weights that the next blocks will need, if they come from far away."""
        spec = self.spec
        if self.pixels_first or spec.weight_bytes < FAR:
            return
        share = -(-spec.chunk // self.pairs.count)
        following = index + self.count * spec.segments * spec.quads + T.Min(pair * share, const(spec.chunk - share))
        for line in range(share):
            address = T.address_of(self.o.w[(following + line) * ROW])
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, const(0), const(2), const(1)))

    def store(self, sums: Buffer) -> None:
        """Accumulators -> `sums`."""
        for tile in range(2 * self.count):
            place = T.address_of(sums[tile * self.pairs.rows * LANES])
            call("tilestored64", const(tile, "int8"), place, const(ROW, "int64"))

    def write(self, pair: Expr, block: Expr, sums: Buffer) -> None:
        """Correct, requantize and store."""
        spec, o, rows, count = self.spec, self.o, self.pairs.rows, self.count
        first = block * LANES
        with T.If(load(o.integers, const(2 * spec.padded)) != const(0)), T.Then():
            loop(2, lambda i: loop(rows, lambda m: self.centre(i, m, self.pairs.windows(pair), first, sums)))
        scales = [T.Bind(load(o.scale, first + j * LANES, LANES)) for j in range(count)]
        size = min(VECTORS // count, rows)

        def part(i: Expr, start: Expr) -> None:
            pieces = []
            for m, (base, offset) in enumerate(self.pairs.outputs(pair, i, start, size)):
                for j in range(count):
                    value = load(sums, ((i * count + j) * rows + start + m) * LANES, LANES)
                    valid = self.valid if j == count - 1 else LANES
                    pieces.append(Piece(value, scales[j], valid, base + first, offset + j * LANES))
            finish(pieces, o, LANES)

        def run(i: Expr) -> None:
            loop(rows // size, lambda k: part(i, k * size))
            if rows % size:
                part(i, rows - size)

        loop(2, run)

    def centre(self, run: Expr, m: Expr, x_at: Expr, first: Expr, sums: Buffer) -> None:
        """Subtract z_w * sum q_x from the sums of row `m` of a run."""
        spec, rows, count = self.spec, self.pairs.rows, self.count
        acc = [local(LANES, "int32") for _ in range(count)]
        places = [((run * count + j) * rows + m) * LANES for j in range(count)]
        for part, place in zip(acc, places, strict=True):
            store(part, load(sums, place, LANES), 0, LANES)
        window = x_at + run * self.pairs.second[0] + m * (spec.window.stride[1] * spec.x.channels)
        correct(spec, acc, (1, count), first, window, self.o)
        for part, place in zip(acc, places, strict=True):
            store(sums, load(part, 0, LANES), place, LANES)
