"""Dense convolutions on AMX: one instruction multiplies R windows x 64 bytes with 64 bytes x 16 output channels.

Tiles 0 to 3 hold accumulators (2 runs of pixels x 2 blocks of channels; 4 x 1 of small images), 4 and 5 windows, 6
and 7 weights. A tile of windows is loaded straight from the codes: its rows are windows of neighbouring pixels, `step`
bytes apart. A tile of weights is `chunk` quads of the packing that the other kernels read as well (spec.py).

Tiles and vectors are separate units: while one step's tiles are multiplied, the sums of the step before it, which went
to the stack, are requantized. (Vectors take longer then: floating-point ones get one of two ports.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tvm.ir import Call, PointerType, PrimType
from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.correct import SUMS, centred, window_sum
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.emit import Buffer, Expr, const, load, local, loop, splat, spread, store
from qdeploy.compile.kernels.requantize import VECTORS, Operands, Piece, bounded, cuts, finish
from qdeploy.compile.kernels.spec import TILE_ROWS, ConvSpec

LANES = 16  # int32 in a row of a tile
ROW = 64  # bytes in a row of a tile
NEAR = 24 << 10  # bytes that stay in the first cache
FAR = 1 << 17  # bytes that may not stay in the second one, which all layers share
AHEAD = 256  # quads of weights between those that are multiplied and those that are asked for
WINDOWS, WEIGHTS = 4, 6  # first tile of each kind


def call(name: str, *args: Expr) -> None:
    """One AMX instruction."""
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))


@dataclass(frozen=True)
class Pixel:
    """An output pixel: its run and row in the sums, and where its codes are, from `base` + `offset` on."""

    run: Expr
    row: Expr
    base: Expr
    offset: int


@dataclass(frozen=True)
class Pairs:
    """How output pixels become pairs of runs, each a tile of `rows` neighbours; the last pair is moved back to be full.

    A pair lies in a line of `width` pixels, or where a row fits a tile it is two rows.
    """

    spec: ConvSpec
    rows: int
    per_line: int  # pairs in a line; 0: two rows are one pair
    count: int
    runs: ClassVar[int] = 2

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

    def window(self, i: Expr, run: Expr, m: Expr) -> Expr:
        """Offset of the window of pixel `m` of a run of pair `i`."""
        return self.windows(i) + run * self.second[0] + m * (self.spec.window.stride[1] * self.spec.x.channels)

    def outputs(self, i: Expr, run: Expr, start: Expr, count: int) -> list[tuple[Expr, int]]:
        """Base and offset of each of `count` output pixels, from pixel `start` of a run of pair `i` on."""
        y, (h, p) = self.spec.y, self.first(i)
        if one_line(self.spec) and not self.spec.flat:
            pixels = [p + run * self.rows + start + m for m in range(count)]
            return [(y.at(T.floordiv(q, const(y.width)), T.floormod(q, const(y.width))), 0) for q in pixels]
        base = y.at(h, p) + run * self.second[1] + start * y.channels
        return [(base, m * y.channels) for m in range(count)]

    def each(self, i: Expr, size: int, body: Callable[[list[Pixel]], None]) -> None:
        """`body` for all output pixels of pair `i`, `size` neighbours at a time."""

        def some(run: Expr, start: Expr) -> None:
            found = self.outputs(i, run, start, size)
            body([Pixel(run, start + m, base, offset) for m, (base, offset) in enumerate(found)])

        def one(run: Expr) -> None:
            loop(self.rows // size, lambda k: some(run, k * size))
            if self.rows % size:
                some(run, self.rows - size)

        loop(2, one)

    @property
    def second(self) -> tuple[int, int]:
        """Bytes from a pair's first run to its second one: windows and output."""
        x, y, stride = self.spec.x, self.spec.y, self.spec.window.stride
        if not self.per_line:
            return stride[0] * x.row, y.row
        return self.rows * stride[1] * x.channels, self.rows * y.channels


@dataclass(frozen=True)
class Image:
    """A small image as one step of 4 runs x 1 block, so that weights are read once: they come from far away.

    Windows lie at equal distances across rows too, `pitch` of them in a row, the ones in the border for nothing. Runs
    of `rows` windows begin `apart` windows from each other.
    """

    spec: ConvSpec
    rows: int
    apart: int
    pitch: int
    count: ClassVar[int] = 1
    runs: ClassVar[int] = 4

    def window(self, i: Expr, run: Expr, m: Expr) -> Expr:
        """Offset of window `m` of a run."""
        return self.spec.pixel(0, 0) + (run * self.apart + m) * self.spec.x.channels

    def each(self, i: Expr, size: int, body: Callable[[list[Pixel]], None]) -> None:
        """`body` for all output pixels, `size` neighbours at a time."""
        y = self.spec.y
        size = min(size, y.width)

        def some(h: Expr, w: Expr) -> None:
            pixels = []
            for m in range(size):
                window = h * self.pitch + w + m
                run = T.Min(T.floordiv(window, const(self.apart)), const(self.runs - 1))
                pixels.append(Pixel(run, window - run * self.apart, y.at(h, w), m * y.channels))
            body(pixels)

        def row(h: Expr) -> None:
            loop(y.width // size, lambda k: some(h, k * size))
            if y.width % size:
                some(h, y.width - size)

        loop(y.height, row)


def image_of(spec: ConvSpec) -> Image | None:
    """An image whose weights are many and whose windows fit 4 tiles."""
    pitch = spec.x.border[1] + spec.x.width + spec.x.border[3]
    windows = (spec.y.height - 1) * pitch + spec.y.width
    if spec.window.stride != (1, 1) or spec.weight_bytes < NEAR:
        return None
    for rows in range(-(-windows // Image.runs), TILE_ROWS + 1):
        if windows > Image.runs and (windows - rows) % (Image.runs - 1) == 0:
            return Image(spec, rows, (windows - rows) // (Image.runs - 1), pitch)
    return None


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
    """All blocks and pixels, in `spec.threads` shares of the pairs of pixels, or of the blocks of a small image."""
    image = image_of(spec)
    if image is not None:
        image_blocks(image, o)
        return
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
        sums = window_sums(pairs, first, count, size, o)
        if whole:
            pair_steps(Step(spec, pairs, 2, LANES, sums, o), first, count, 0, whole)
        if spec.blocks > 2 * whole:
            pair_steps(Step(spec, pairs, spec.blocks - 2 * whole, spec.tail, sums, o), first, count, 2 * whole, 1)
        call("tilerelease")

    spread(-(-pairs.count // size), spec.threads, work)


def image_blocks(image: Image, o: Operands) -> None:
    """All blocks of a small image; each thread has neighbours."""
    spec = image.spec
    whole = spec.blocks - (spec.tail < LANES)
    size = -(-whole // spec.threads)

    def some(first: Expr, count: Expr, valid: int) -> None:
        configure(image.rows, spec.chunk)
        step = Step(spec, image, 1, valid, window_sums(image, 0, 1, 1, o), o)
        steps(step, count, lambda s: (const(0), first + s))
        call("tilerelease")

    def work(t: Expr) -> None:
        some(t * size, size if whole % size == 0 else T.Min(const(size), whole - t * size), LANES)

    if whole:
        spread(-(-whole // size), spec.threads, work)
    if whole < spec.blocks:
        some(const(whole), 1, spec.tail)


@dataclass(frozen=True)
class Sums:
    """Sums of the codes under windows, int32 [pair or image][run][row] from pair `first` on."""

    buffer: Buffer
    first: Expr


def window_sums(pairs: Pairs | Image, first: Expr, count: Expr, most: int, o: Operands) -> Sums | None:
    """Those of `count` pairs (`most` at most) from `first` on, where a weight zero point is not 0; None: too many."""
    spec, rows, runs = pairs.spec, pairs.rows, pairs.runs
    if most * runs * rows > SUMS:
        return None
    sums = Sums(local(most * runs * rows, "int32"), first)
    with T.If(centred(spec, o)), T.Then(), T.serial(0, count) as i, T.serial(0, runs) as run, T.serial(0, rows) as m:
        store(sums.buffer, window_sum(spec, o.x, pairs.window(first + i, run, m)), (i * runs + run) * rows + m)
    return sums


def pair_steps(step: Step, first: Expr, count: Expr, block: int, groups: int) -> None:
    """`count` pairs from `first` on x `groups` of blocks from `block` on."""

    def part(s: Expr) -> tuple[Expr, Expr]:
        if groups == 1:
            return first + s, const(block)
        if step.pixels_first:
            return first + T.floordiv(s, const(groups)), T.floormod(s, const(groups)) * step.count + block
        return first + T.floormod(s, count), T.floordiv(s, count) * step.count + block

    steps(step, count * groups, part)


def steps(step: Step, total: Expr, part: Callable[[Expr], tuple[Expr, Expr]]) -> None:
    """`total` steps; `part`: the pair (0 where there is one image) and the first block of each.

    A step is multiplied, then the one before it requantized, then its sums stored: vectors need not wait for tiles.
    """
    sums = aligned(step.count * step.pairs.runs * step.pairs.rows * LANES)
    with T.serial(0, total + 1) as s:
        with T.If(s < total), T.Then():
            step.multiply(*part(s))
        with T.If(s > const(0)), T.Then():
            step.write(*part(s - 1), sums)
        with T.If(s < total), T.Then():
            step.store(sums)


@dataclass(frozen=True)
class Step:
    """All runs of a pair x `count` blocks, of whose last one `valid` channels exist. Sums: [run][block][row][lane]."""

    spec: ConvSpec
    pairs: Pairs | Image
    count: int
    valid: int
    codes: Sums | None  # what was summed up before
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
        step = spec.window.stride[1] * spec.x.channels
        windows = [self.pairs.window(pair, i, 0) for i in range(self.pairs.runs)]
        for j in range(count):  # each row of an accumulator begins with the bias
            bias = T.address_of(o.integers[(block + j) * LANES])
            for i in range(self.pairs.runs):
                call("tileloadd64", const(i * count + j, "int8"), bias, const(0, "int64"))

        def chunk(s: Expr, c: Expr) -> None:
            for j in range(count):
                index = ((block + j) * spec.segments + s) * spec.quads + c * spec.chunk
                call("tileloadd64", const(WEIGHTS + j, "int8"), T.address_of(o.w[index * ROW]), const(ROW, "int64"))
                self.prefetch(pair, index)
            for i, window in enumerate(windows):
                start, tile = window + spec.segment_offset(s) + c * (spec.chunk * GROUP), WINDOWS + i % 2
                call("tileloadd64", const(tile, "int8"), T.address_of(o.x[start]), const(step, "int64"))
                for j in range(count):
                    call("tdpbusd", *[const(t, "int8") for t in (i * count + j, tile, WEIGHTS + j)])

        loop(spec.segments, lambda s: loop(spec.quads // spec.chunk, lambda c: chunk(s, c)))

    def prefetch(self, pair: Expr, index: Expr) -> None:
        """Each pair asks for its share of the weights that the next blocks will need, if they come from far away."""
        spec = self.spec
        if isinstance(self.pairs, Image):
            share, following = spec.chunk, index + AHEAD
        elif self.pixels_first or spec.weight_bytes < FAR:
            return
        else:
            share = -(-spec.chunk // self.pairs.count)
            following = index + self.count * spec.segments * spec.quads
            following += T.Min(pair * share, const(spec.chunk - share))
        for line in range(share):
            address = T.address_of(self.o.w[(following + line) * ROW])
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, const(0), const(2), const(1)))

    def store(self, sums: Buffer) -> None:
        """Accumulators -> `sums`."""
        for tile in range(self.pairs.runs * self.count):
            place = T.address_of(sums[tile * self.pairs.rows * LANES])
            call("tilestored64", const(tile, "int8"), place, const(ROW, "int64"))

    def write(self, pair: Expr, block: Expr, sums: Buffer) -> None:
        """Correct, requantize and store."""
        spec, o, rows, count = self.spec, self.o, self.pairs.rows, self.count
        first = block * LANES
        with T.If(centred(spec, o)), T.Then():
            loop(self.pairs.runs, lambda i: loop(rows, lambda m: self.centre(pair, i, m, first, sums)))
        scales = [T.Bind(load(o.scale, first + j * LANES, LANES)) for j in range(count)]

        def part(pixels: list[Pixel]) -> None:
            pieces = []
            for pixel in pixels:
                for j in range(count):
                    value = load(sums, ((pixel.run * count + j) * rows + pixel.row) * LANES, LANES)
                    valid = self.valid if j == count - 1 else LANES
                    pieces.append(Piece(value, scales[j], valid, pixel.base + first, pixel.offset + j * LANES))
            finish(pieces, o, LANES)

        self.pairs.each(pair, min(VECTORS // count, rows), part)

    def centre(self, pair: Expr, run: Expr, m: Expr, first: Expr, sums: Buffer) -> None:
        """Subtract z_w * sum q_x from the sums of row `m` of a run, and cut them."""
        spec, rows, found = self.spec, self.pairs.rows, self.codes
        if found is None:
            total = window_sum(spec, self.o.x, self.pairs.window(pair, run, m))
        else:
            total = load(found.buffer, ((pair - found.first) * self.pairs.runs + run) * rows + m)
        for j in range(self.count):
            place = ((run * self.count + j) * rows + m) * LANES
            zero = load(self.o.integers, spec.padded + first + j * LANES, LANES)
            limit = cuts(load(self.o.scale, first + j * LANES, LANES), LANES)
            centred_sums = load(sums, place, LANES) - zero * splat(total, LANES)
            store(sums, bounded(centred_sums, limit, LANES), place, LANES)
