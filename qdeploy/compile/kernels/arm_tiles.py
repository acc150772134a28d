"""How dense kernels on ARM multiply a register tile: 16 codes of each window at a time, weights as they come.

Of 16 codes the by-lane forms of sdot, usdot and smull take 4 after 4 for all channels of a vector, so nothing but the
weights is loaded for each product. usmmla multiplies 8 codes of 2 neighbouring windows by 8 weights of 2 channels:
pairs of windows are joined once for all channels, and sums stand [pair][block][half of its channels][window][channel].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import neon
from qdeploy.compile.kernels.dots import GROUP, looked_up
from qdeploy.compile.kernels.emit import Buffer, Expr, const, load, local, loop, store, typed
from qdeploy.compile.kernels.spec import MATRIX, TABLE_BYTES, ConvSpec


@dataclass(frozen=True)
class Core:
    """Operations a cycle that are assumed of the processors that an instruction is meant for; none was measured.

    `multiplies`: of the instruction itself (of smull and smlal: of each of their products), `vectors`: of all vector
    instructions together, `loads`: of 16 bytes, `issued`: of all instructions.
    """

    multiplies: float
    vectors: float
    loads: float
    issued: float


CORTEX_A72 = Core(1, 2, 1, 3)
CORTEX_A76 = Core(2, 2, 2, 4)
NEOVERSE_V1 = Core(4, 4, 3, 8)
CORES = {
    "smull": CORTEX_A72, "smlal": CORTEX_A72, "sdot": CORTEX_A76, "usdot": NEOVERSE_V1,
    "usmmla": replace(NEOVERSE_V1, multiplies=2),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Instructions for 4 quads of a register tile."""

    multiplies: int
    vectors: int  # multiplies included
    loads: int

    def cycles(self, core: Core) -> float:
        """Where nothing waits for a result: the busiest unit's time."""
        issued = (self.vectors + self.loads) / core.issued
        return max(self.multiplies / core.multiplies, self.vectors / core.vectors, self.loads / core.loads, issued)


def work(spec: ConvSpec, pixels: int, blocks: int) -> Work:
    """What 4 quads of a tile take: products, codes made signed or joined in pairs, sums of products, loads."""
    dot, pairs = spec.multiply, -(-pixels // 2)
    codes, loads = pixels * (dot.offset > 0), pixels + 4 * blocks
    if dot.instruction == "usmmla":
        multiplies = 4 * pairs * blocks
        return Work(multiplies, multiplies + 2 * pairs, loads)
    if dot.instruction in ("smull", "smlal"):
        multiplies = 8 * pixels * blocks
        added = multiplies // (2 if dot.instruction == "smlal" else 1)
        return Work(multiplies, multiplies + added + codes + 8 * pixels, loads)
    return Work(4 * pixels * blocks, 4 * pixels * blocks + codes, loads)


def cycles(spec: ConvSpec, pixels: int, blocks: int) -> float:
    """An estimate of the time of one register tile: products, then about 6 instructions to requantize a vector."""
    core = CORES[spec.multiply.instruction]
    quads = work(spec, pixels, blocks).cycles(core) / 4 * spec.quads + 2
    return spec.segments * quads + 6 * pixels * blocks / core.vectors + 10


def multiply(
    spec: ConvSpec, acc: list[Buffer], shape: tuple[int, int], block: Expr, x_at: Expr, x: Buffer,
    w: tuple[Buffer, Expr, bool],
) -> None:  # fmt: skip
    """Add all products of a tile of `shape` = (pixels, blocks) to `acc` [pixel][block]; `x_at` is its first window.

    `w`: the weights, their first block, and whether they are 4-bit indices; `block` is the tile's first of all groups.
    """
    step, (buffer, first, indices) = spec.window.stride[1] * spec.x.channels, w
    tile = (_Matrices if spec.multiply.instruction == "usmmla" else _Lanes)(spec, acc, shape)

    def segment(s: Expr) -> None:
        start = x_at + spec.segment_offset(s)

        def read(j: int, quad: Expr, count: int) -> list[list[Expr]]:
            run = (block - first + j) * spec.segments + s
            return _indexed(spec, buffer, run, quad, count) if indices else _plain(spec, buffer, run, quad, count)

        def some(quad: Expr, count: int) -> None:
            codes = [neon.loaded(spec.multiply, x, start + m * step + quad * GROUP) for m in range(shape[0])]
            tile.add(codes, lambda j: read(j, quad, count), count)

        loop(spec.quads // GROUP, lambda i: some(i * GROUP, GROUP))
        if spec.quads % GROUP:
            some(spec.quads // GROUP * GROUP, spec.quads % GROUP)

    loop(spec.segments, segment)
    tile.end()


def _plain(spec: ConvSpec, w: Buffer, run: Expr, quad: Expr, count: int) -> list[list[Expr]]:
    """`count` packed vectors from `quad` on of segment `run`, each in parts."""
    return [neon.weights_of(spec.multiply, w, (run * spec.quads + quad + i) * neon.BYTES) for i in range(count)]


def _indexed(spec: ConvSpec, w: Buffer, run: Expr, quad: Expr, count: int) -> list[list[Expr]]:
    """The same of 4-bit indices, two quads in a vector; `quad` is even."""
    table, found = T.Bind(load(w, const(0), neon.BYTES)), []
    for pair in range(-(-count // 2)):
        at = TABLE_BYTES + (run * spec.quad_pairs + T.floordiv(quad, const(2)) + pair) * neon.BYTES
        index = T.Bind(T.reinterpret(typed("uint8", neon.BYTES), load(w, at, neon.BYTES)))
        found += [looked_up(spec.dot, table, index, half == 1) for half in range(min(2, count - 2 * pair))]
    return [neon.parts_of(spec.multiply, vector) for vector in found]


class _Lanes:
    """Sums [pixel][block]."""

    def __init__(self, spec: ConvSpec, acc: list[Buffer], shape: tuple[int, int]) -> None:
        self.dot, self.acc, self.shape = spec.multiply, acc, shape

    def add(self, codes: list[Expr], weights: Callable[[int], list[list[Expr]]], count: int) -> None:
        """Products of `count` quads of every window's `codes`."""
        pixels, blocks = self.shape
        found = [weights(j) for j in range(blocks)]
        for i in range(count):
            for j in range(blocks):
                one = [T.Bind(part) for part in found[j][i]]
                for m in range(pixels):
                    sums = self.acc[m * blocks + j]
                    total = neon.lane_products(self.dot, load(sums, 0, neon.LANES), codes[m], i, one)
                    store(sums, total, 0, neon.LANES)

    def end(self) -> None:
        """Sums are where they belong."""


class _Matrices:
    """Sums [pair of pixels][block][half], each of 2 pixels by 2 channels; an odd last pixel is a pair with itself."""

    def __init__(self, spec: ConvSpec, acc: list[Buffer], shape: tuple[int, int]) -> None:
        self.acc, (self.pixels, self.blocks) = acc, shape
        self.pairs = [(m, min(m + 1, self.pixels - 1)) for m in range(0, self.pixels, 2)]
        self.sums = [local(neon.LANES, "int32") for _ in range(len(self.pairs) * self.blocks * 2)]
        for p, pixels in enumerate(self.pairs):
            for j in range(self.blocks):
                both = [load(acc[m * self.blocks + j], 0, neon.LANES) for m in pixels]
                for half in (0, 1):
                    store(self.part(p, j, half), _joined(both, half, 2), 0, neon.LANES)

    def part(self, pair: int, block: int, half: int) -> Buffer:
        """Sums of 2 pixels and 2 channels."""
        return self.sums[(pair * self.blocks + block) * 2 + half]

    def add(self, codes: list[Expr], weights: Callable[[int], list[list[Expr]]], count: int) -> None:
        """Products of `count` quads, an even number, of every window's `codes`."""
        assert count % 2 == 0 and MATRIX == 2 * GROUP
        found = [weights(j) for j in range(self.blocks)]
        for i in range(count // 2):
            joined = [T.Bind(_joined([codes[a], codes[b]], i, MATRIX)) for a, b in self.pairs]
            for j in range(self.blocks):
                for half in (0, 1):
                    one = T.Bind(found[j][2 * i + half][0])
                    for p, both in enumerate(joined):
                        sums = self.part(p, j, half)
                        store(sums, neon.matrix_products(load(sums, 0, neon.LANES), both, one), 0, neon.LANES)

    def end(self) -> None:
        """Put the sums where they belong."""
        for p, pixels in enumerate(self.pairs):
            for j in range(self.blocks):
                both = [load(self.part(p, j, half), 0, neon.LANES) for half in (0, 1)]
                for i, m in enumerate(dict.fromkeys(pixels)):
                    store(self.acc[m * self.blocks + j], _joined(both, i, 2), 0, neon.LANES)


def _joined(both: list[Expr], half: int, count: int) -> Expr:
    """One half, of `count` elements, of each of two vectors."""
    places = [v * 2 * count + half * count + i for v in (0, 1) for i in range(count)]
    return T.Shuffle(both, [const(place) for place in places])
