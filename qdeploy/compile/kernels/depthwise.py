"""Depthwise convolution kernels: vectors run over channels.

`rows` is for byte dot products: in each 32-bit lane stand 4 kernel rows of one channel, so a 3x3 kernel takes 3 dot
products a vector of outputs. Interleaving 4 rows of 4 * n neighbouring channels gives 4 vectors whose lanes are not in
the channels' order (ConvSpec.place); packing the results to bytes puts them back.
"""

from __future__ import annotations

from dataclasses import replace

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.dots import GROUP, dot_step
from qdeploy.compile.kernels.emit import Buffer, Expr, cast, const, load, local, loop, splat, store, typed
from qdeploy.compile.kernels.requantize import VECTORS, Operands, Piece, finish, finish_strip
from qdeploy.compile.kernels.spec import ConvSpec

UNROLLED = 25  # taps of a kernel that are written out


def plain(spec: ConvSpec, o: Operands) -> None:
    """One multiply a tap and channel, `lanes` channels at once; weights are packed [block][tap][lane]."""
    lanes, width = spec.dot.lanes, spec.y.width
    pixels = -(-width // -(-width // 8))
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
    lanes = spec.dot.lanes
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
            codes = cast("int32", load(o.x, start + m * step, lanes), lanes)
            store(acc[m], load(acc[m], 0, lanes) + codes * weight, 0, lanes)

    if spec.segments <= UNROLLED:
        for t in range(spec.segments):
            tap(t)
    else:
        loop(spec.segments, tap)
    scale = T.Bind(load(o.scale, first, lanes))
    pieces = [Piece(load(acc[m], 0, lanes), scale, valid, at[1] + first, m * spec.y.channels) for m in range(pixels)]
    finish(pieces, o, lanes)


def rows(spec: ConvSpec, o: Operands) -> None:
    """All rows, strips of channels and pixels, `pixels` of them in registers."""
    width, lanes = spec.y.width, spec.dot.lanes
    most = (spec.dot.registers - 8) // VECTORS
    even = [m for m in range(most, max(1, most - 3), -1) if width % m == 0]  # no code for a remainder
    pixels = even[0] if even else -(-width // -(-width // most))
    strips = spec.strips
    whole = sum(n == lanes and start + VECTORS * n <= spec.outputs for start, n in strips)

    def row(h: Expr) -> None:
        def strip(start: Expr, n: int, valid: int) -> None:
            def run(p: Expr, length: int) -> None:
                strip_tile(spec, length, start, n, valid, (spec.pixel(h, p), spec.y.at(h, p)), o)

            loop(width // pixels, lambda i: run(i * pixels, pixels))
            if width % pixels:
                run(width - width % pixels, width % pixels)

        loop(whole, lambda i: strip(i * (VECTORS * lanes), lanes, VECTORS * lanes))
        for start, n in strips[whole:]:
            strip(start, n, min(VECTORS * n, spec.outputs - start))

    loop(spec.y.height, row)


def strip_tile(
    spec: ConvSpec, pixels: int, start: Expr, n: int, valid: int, at: tuple[Expr, Expr], o: Operands
) -> None:
    """`pixels` neighbours of one row x 4 * n channels from `start` on; `at`: offsets of the first window and pixel."""
    (_, kw), sw, dw = spec.window.kernel, spec.window.stride[1], spec.window.dilation[1]
    dot, x_at = replace(spec.dot, lanes=n), at[0] + start
    acc = [[local(n, "int32") for _ in range(VECTORS)] for _ in range(pixels)]
    for v in range(VECTORS):
        bias = T.Bind(load(o.integers, start + v * n, n))
        for m in range(pixels):
            store(acc[m][v], bias, 0, n)
    users: dict[int, list[tuple[int, int]]] = {}  # column of the input -> pixels and kernel columns that read it
    for m in range(pixels):
        for t in range(kw):
            users.setdefault(m * sw + t * dw, []).append((m, t))
    for q in range(spec.row_quads):
        for column in sorted(users):
            vectors = interleaved(spec, o.x, x_at + column * spec.x.channels, q, n)
            for m, t in users[column]:
                for v in range(VECTORS):
                    index = start * (spec.row_quads * kw) + ((q * kw + t) * VECTORS + v) * n
                    weights = load(o.w, index * GROUP, GROUP * n)
                    store(acc[m][v], dot_step(dot, load(acc[m][v], 0, n), [vectors[v]], [weights]), 0, n)
    correct_strip(spec, acc, start, n, x_at, o)
    scales = [T.Bind(load(o.scale, start + v * n, n)) for v in range(VECTORS)]
    for m in range(pixels):
        sums = [load(part, 0, n) for part in acc[m]]
        finish_strip(sums, scales, valid, at[1] + start + m * spec.y.channels, o, n)


def interleaved(spec: ConvSpec, x: Buffer, at: Expr, q: Expr, n: int) -> list[Expr]:
    """Kernel rows 4q to 4q + 3 of 4 * n channels of one column -> 4 vectors of codes, int8 [4 * n]: [lane][row].

    For rows that the kernel does not have, any row is read: their weights are 0.
    """
    last, step = spec.window.kernel[0] - 1, spec.window.dilation[0] * spec.x.row

    def line(r: int) -> Expr:
        row = min(q * GROUP + r, last) if isinstance(q, int) else T.Min(q * GROUP + r, const(last))
        return T.Bind(load(x, at + row * step, VECTORS * n))

    def zipped(a: Expr, b: Expr, count: int, half: int) -> Expr:
        """Elements of one half of each 128 bits of a and b in turn; `count` elements in a vector."""
        unit = 16 * count // (VECTORS * n)
        index = []
        for lane in range(0, count, unit):
            for i in range(unit // 2):
                place = lane + half * (unit // 2) + i
                index += [const(place), const(count + place)]
        return T.Bind(T.Shuffle([a, b], index))

    lines = [line(r) for r in range(GROUP)]
    pairs = typed("int16", 2 * n)
    found = []
    for half in (0, 1):
        low, high = (T.reinterpret(pairs, zipped(lines[r], lines[r + 1], VECTORS * n, half)) for r in (0, 2))
        found += [T.Bind(T.reinterpret(typed("int8", GROUP * n), zipped(low, high, 2 * n, i))) for i in (0, 1)]
    return found


def correct_strip(spec: ConvSpec, acc: list[list[Buffer]], start: Expr, n: int, x_at: Expr, o: Operands) -> None:
    """Subtract z_w * sum q_x where any weight zero point is not 0: dot products with ones."""
    (kh, kw), pixels, dot = spec.window.kernel, len(acc), replace(spec.dot, lanes=n)
    with T.If(load(o.integers, const(2 * spec.padded)) != const(0)), T.Then():
        sums = local(pixels * VECTORS * n, "int32")
        loop(pixels * VECTORS, lambda i: store(sums, splat(const(0), n), i * n, n))

        def column(m: Expr, t: Expr) -> None:
            offset = (m * spec.window.stride[1] + t * spec.window.dilation[1]) * spec.x.channels
            for q in range(spec.row_quads):
                ones = const(0x01010101 >> 8 * max(0, GROUP * (q + 1) - kh))
                weights = T.reinterpret(typed("int8", GROUP * n), splat(ones, n))
                for v, codes in enumerate(interleaved(spec, o.x, x_at + offset, q, n)):
                    place = (m * VECTORS + v) * n
                    store(sums, dot_step(dot, load(sums, place, n), [codes], [weights]), place, n)

        loop(pixels, lambda m: loop(kw, lambda t: column(m, t)))
        for m in range(pixels):
            for v in range(VECTORS):
                zero = load(o.integers, spec.padded + start + v * n, n)
                found = load(sums, (m * VECTORS + v) * n, n)
                store(acc[m][v], load(acc[m][v], 0, n) - zero * found, 0, n)
