"""Depthwise convolution kernels: vectors run over channels.

`rows` is for byte dot products: in each 32-bit lane stand 4 kernel rows of one channel, so a 3x3 kernel takes 3 dot
products a vector of outputs. Interleaving 4 rows of 4 * n neighbouring channels gives 4 vectors whose lanes are not in
the channels' order (ConvSpec.place); packing the results to bytes puts them back. Each column is interleaved once for
all pixels that need it, for two rows of outputs where 4 rows of codes hold both windows. ConvSpec.strip_taps says what
each dot product multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import neon
from qdeploy.compile.kernels.dots import GROUP, dot_step
from qdeploy.compile.kernels.emit import Buffer, Expr, cast, const, load, local, loop, splat, spread, store, typed
from qdeploy.compile.kernels.requantize import VECTORS, Operands, Piece, bounded, cuts, finish, finish_strip
from qdeploy.compile.kernels.spec import ConvSpec
from qdeploy.compile.llvm import Dot

UNROLLED = 25  # taps of a kernel that are written out
PIXELS = 8  # neighbours that are computed at once, with a vector of sums each


def plain(spec: ConvSpec, o: Operands) -> None:
    """One multiply a tap and channel, `lanes` channels at once; weights are packed [block][tap][lane]."""
    lanes, width = spec.lanes, spec.y.width
    most = PIXELS * spec.dot.lanes // lanes * (2 if spec.dot.neon else 1)
    pixels = -(-width // -(-width // most))
    whole = spec.blocks - (spec.tail < lanes)

    def block(b: Expr, valid: int) -> None:
        def row(h: Expr) -> None:
            def run(p: Expr, length: int) -> None:
                plain_tile(spec, length, b, valid, (spec.pixel(h, p), spec.y.at(h, p)), o)

            loop(width // pixels, lambda i: run(i * pixels, pixels))
            if width % pixels:
                run(width - width % pixels, width % pixels)

        loop(spec.y.height, row)

    loop(whole, lambda b: block(b, lanes))
    if whole < spec.blocks:
        block(whole, spec.tail)


def plain_tile(spec: ConvSpec, pixels: int, block: Expr, valid: int, at: tuple[Expr, Expr], o: Operands) -> None:
    """`pixels` neighbours of one row, one vector of channels; `at`: offsets of the first window and pixel."""
    lanes, n = spec.lanes, spec.dot.lanes
    first, step = block * lanes, spec.window.stride[1] * spec.x.channels
    acc = [local(lanes, "int32") for _ in range(pixels)]
    bias = T.Bind(load(o.integers, first, lanes))
    for m in range(pixels):
        store(acc[m], bias, 0, lanes)
    zero = T.Bind(cast("int16", load(o.integers, spec.padded + first, lanes), lanes))

    def tap(t: Expr) -> None:
        # weight - z_w here, so no sum over codes is needed; in 16 bits, so that LLVM sees a 16-bit multiply
        narrow = cast("int16", load(o.w, (block * spec.segments + t) * lanes, lanes), lanes) - zero
        weight = T.Bind(cast("int32", narrow, lanes))
        start = at[0] + first + spec.segment_offset(t)
        for m in range(pixels):
            codes = load(o.x, start + m * step, lanes)
            if spec.multiply.offset:
                codes = neon.signed(spec.multiply, codes)
            store(acc[m], load(acc[m], 0, lanes) + cast("int32", codes, lanes) * weight, 0, lanes)

    if spec.segments <= UNROLLED:
        for t in range(spec.segments):
            tap(t)
    else:
        loop(spec.segments, tap)
    scale = T.Bind(load(o.scale, first, lanes))
    with T.If(load(o.integers, const(2 * spec.padded)) != const(0)), T.Then():
        limit = cuts(scale, lanes)
        for part in acc:
            store(part, bounded(load(part, 0, lanes), limit, lanes), 0, lanes)
    pieces = []
    for m in range(pixels):
        for v in range(0, valid, n):  # the vectors of a block
            scales = scale if n == lanes else T.Bind(load(o.scale, first + v, n))
            total, offset = load(acc[m], v, n), m * spec.y.channels + v
            pieces.append(Piece(total, scales, min(n, valid - v), at[1] + first, offset))
    finish(pieces, o, n)


@dataclass(frozen=True)
class Strip:
    """4 * lanes neighbouring channels from `start` on, of which `valid` exist."""

    start: Expr
    lanes: int
    valid: int


def rows(spec: ConvSpec, o: Operands) -> None:
    """All rows and strips of channels; `together` neighbouring rows share the interleaved codes."""
    lanes, together, strips = spec.dot.lanes, spec.rows_together, spec.strips
    whole = sum(n == lanes and start + VECTORS * n <= spec.outputs for start, n in strips)
    general = load(o.integers, const(2 * spec.padded)) != const(0)

    def band(i: Expr) -> None:
        def each(run: Callable[[ConvSpec, Strip, Expr, Operands], None]) -> None:
            h = i * together
            loop(whole, lambda s: run(spec, Strip(s * (VECTORS * lanes), lanes, VECTORS * lanes), h, o))
            for start, n in strips[whole:]:
                run(spec, Strip(start, n, min(VECTORS * n, spec.outputs - start)), h, o)

        with T.If(general):
            with T.Then():
                each(centred)
            with T.Else():
                each(slide)

    spread(spec.y.height // together, spec.threads, band)


def slide(spec: ConvSpec, strip: Strip, h: Expr, o: Operands) -> None:
    """Output rows `h` and, with two together, h + 1 of one strip: the window slides from pixel to pixel.

    Each column of the input is interleaved once and counts for every pixel whose window holds it: `acc` [row][pixel],
    of pixels that are not finished. Those behind the row's end are begun and never stored.
    """
    n, extent, stride = strip.lanes, spec.extent, spec.window.stride[1]
    begun, ended = uses(spec, 0, extent - stride), uses(spec, extent - stride, extent)
    pixels = 1 + max(pixel for _, users in begun + ended for pixel, _ in users)
    acc = [[[local(n, "int32") for _ in range(VECTORS)] for _ in range(pixels)] for _ in range(spec.rows_together)]
    dot, vector = replace(spec.multiply, lanes=n), VECTORS * n
    # 0, as LLVM cannot know: weights and biases are read where they are used, not kept on the stack
    still = T.Bind(T.shift_right(cast("int32", o.limits.zero, 1), const(8)))

    def begin(r: int, pixel: int, moved: Expr) -> None:
        for v, part in enumerate(acc[r][pixel]):
            store(part, load(o.integers, strip.start + moved + v * n, n), 0, n)

    def codes_of(found: list[Use], x_at: Expr) -> list[list[Expr]]:
        return [interleaved(dot, o.x, [x_at + offset for offset in offsets]) for offsets, _ in found]

    def multiply(found: list[Use], codes: list[list[Expr]], r: int, pixel: int, moved: Expr) -> None:
        for vectors, (_, users) in zip(codes, found, strict=True):
            for k in [k for user, k in users if user == pixel]:
                dots = r * (spec.strip_dots // spec.rows_together) + k
                for v, part in enumerate(acc[r][pixel]):
                    at = (strip.start * spec.strip_dots + dots * vector + v * n) * GROUP + moved
                    weights = load(o.w, at, GROUP * n)
                    store(part, dot_step(dot, load(part, 0, n), [vectors[v]], [weights]), 0, n)

    def step(p: Expr) -> None:
        moved = p * still
        codes = codes_of(ended, spec.pixel(h, p) + strip.start)
        scales = [load(o.scale, strip.start + moved + v * n, n) for v in range(VECTORS)]
        for r, row in enumerate(acc):
            multiply(ended, codes, r, 0, moved)
            sums = [load(part, 0, n) for part in row[0]]
            finish_strip(sums, scales, strip.valid, spec.y.at(h + r, p) + strip.start, o, n)
            for pixel in range(1, pixels):
                multiply(ended, codes, r, pixel, moved)
                for older, newer in zip(row[pixel - 1], row[pixel], strict=True):
                    store(older, load(newer, 0, n), 0, n)
            begin(r, pixels - 1, moved)

    codes = codes_of(begun, spec.pixel(h, 0) + strip.start)
    for r in range(spec.rows_together):
        for pixel in range(pixels):
            begin(r, pixel, 0)
            multiply(begun, codes, r, pixel, 0)
    loop(spec.y.width, step)


def centred(spec: ConvSpec, strip: Strip, h: Expr, o: Operands) -> None:
    """As `slide`, for weight zero points that are not 0 and sums that are too large. Pixel by pixel."""
    n, (_, kw) = strip.lanes, spec.window.kernel
    down, right = spec.window.dilation[0] * spec.x.row, spec.window.dilation[1] * spec.x.channels
    dot = replace(spec.multiply, lanes=n)
    acc, sums = ([local(n, "int32") for _ in range(VECTORS)] for _ in range(2))

    def pixel(h: Expr, p: Expr) -> None:
        for v in range(VECTORS):
            store(acc[v], load(o.integers, strip.start + v * n, n), 0, n)
            store(sums[v], splat(const(0), n), 0, n)
        x_at = spec.pixel(h, p) + strip.start
        for k, taps in enumerate(spec.strip_taps[: spec.strip_dots // spec.rows_together]):
            inside = next(tap for tap in taps if tap is not None)
            used = [inside if tap is None else tap for tap in taps]
            codes = interleaved(dot, o.x, [x_at + tap // kw * down + tap % kw * right for tap in used])
            counted = sum(1 << 8 * i for i, tap in enumerate(taps) if tap is not None)
            ones = T.reinterpret(typed("int8", GROUP * n), splat(const(counted), n))
            for v in range(VECTORS):
                at = (strip.start * spec.strip_dots + (k * VECTORS + v) * n) * GROUP
                store(acc[v], dot_step(dot, load(acc[v], 0, n), [codes[v]], [load(o.w, at, GROUP * n)]), 0, n)
                store(sums[v], dot_step(dot, load(sums[v], 0, n), [codes[v]], [ones]), 0, n)
        zeros = [load(o.integers, spec.padded + strip.start + v * n, n) for v in range(VECTORS)]
        scales = [T.Bind(load(o.scale, strip.start + v * n, n)) for v in range(VECTORS)]
        found = [load(a, 0, n) - zero * load(s, 0, n) for a, s, zero in zip(acc, sums, zeros, strict=True)]
        found = [bounded(value, cuts(scale, n), n) for value, scale in zip(found, scales, strict=True)]
        finish_strip(found, scales, strip.valid, spec.y.at(h, p) + strip.start, o, n)

    loop(spec.rows_together, lambda r: loop(spec.y.width, lambda p: pixel(h + r, p)))


Use = tuple[list[int], list[tuple[int, int]]]  # offsets of 4 codes of one channel; (pixel, dot) that take them


def uses(spec: ConvSpec, first: int, end: int) -> list[Use]:
    """What columns first .. end - 1 of pixel 0's window count for: pixel 0 and those behind it."""
    (kh, kw), (dh, dw), sw = spec.window.kernel, spec.window.dilation, spec.window.stride[1]
    last = kh - 1 + spec.rows_together - 1
    quads = spec.row_quads - spec.across
    found: list[Use] = []

    def offset(row: int, column: int) -> int:
        return min(row, last) * dh * spec.x.row + max(column, 0) * spec.x.channels

    for column in range(first, end):
        taps = [(pixel, column - pixel * sw) for pixel in range(column // sw + 1)]
        users = [(pixel, place // dw) for pixel, place in taps if place % dw == 0 and place < spec.extent]
        for q in range(quads if users else 0):
            dots = [(pixel, q * kw + t) for pixel, t in users]
            found.append(([offset(q * GROUP + i, column) for i in range(GROUP)], dots))
    if spec.across and end > 0:
        dots = [(0, quads * kw)] if end == spec.extent else []
        if kw > GROUP:
            dots.append((len(dots), quads * kw + 1))
        if dots:
            found.append(([offset(kh - 1, end - GROUP + i) for i in range(GROUP)], dots))
    return found


def interleaved(dot: Dot, x: Buffer, at: list[Expr]) -> list[Expr]:
    """Codes of 4 * n channels, n = dot.lanes, from 4 places -> 4 vectors of codes, int8 [4 * n]: [lane][place]."""
    n = dot.lanes

    def zipped(a: Expr, b: Expr, count: int, half: int) -> Expr:
        """Elements of one half of each 128 bits of a and b in turn; `count` elements in a vector."""
        unit = 16 * count // (VECTORS * n)
        index = []
        for lane in range(0, count, unit):
            for i in range(unit // 2):
                place = lane + half * (unit // 2) + i
                index += [const(place), const(count + place)]
        return T.Bind(T.Shuffle([a, b], index))

    lines = [neon.loaded(dot, x, place) if dot.neon else T.Bind(load(x, place, VECTORS * n)) for place in at]
    pairs = typed("int16", 2 * n)
    found = []
    for half in (0, 1):
        low, high = (T.reinterpret(pairs, zipped(lines[r], lines[r + 1], VECTORS * n, half)) for r in (0, 2))
        found += [T.Bind(T.reinterpret(typed("int8", GROUP * n), zipped(low, high, 2 * n, i))) for i in (0, 1)]
    return found
