"""ConvSpec: what a convolution's code depends on, and how its weights lie in memory; no values, no code.

A window is cut into *segments*, runs of bytes that are neighbours in memory (a kernel row where nothing is dilated or
grouped), and a segment into quads of 4 bytes, which the target's dot product multiplies at once.

Dense weights are int8 [group][block][segment][quad] of vectors of GROUP * lanes bytes, each ordered by
`ConvSpec.byte_place(lane, byte)`. With `packed` they are 4-bit indices into a table of the tensor's 16 codes:

    byte 0 .. 63      the table, int8 [16], four times
    byte 64 ..        uint8 [group][block][segment][pair of quads][GROUP * lanes]: byte i holds the index of byte i of
                      the first quad's vector in its low 4 bits, that of the second quad's vector in its high 4 bits

A segment with an odd number of quads ends in a pair without a second one, whose bits are not read. Lanes behind the
last channel may hold any index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.emit import Expr, const
from qdeploy.compile.kernels.layout import SLACK, Layout
from qdeploy.compile.kernels.requantize import Fused
from qdeploy.compile.llvm import Dot

TILE_ROWS, TILE_QUADS = 16, 16  # rows and 32-bit columns of an AMX tile
WIDENED = 1 << 16  # codes of the input that are widened to 16 bits at once: 128 KiB of stack
MATRIX = 8  # bytes of a window and of a channel that usmmla multiplies
TABLE_BYTES = 64  # codes of packed weights: a table of 16, once in each 128 bits of a vector


@dataclass(frozen=True)
class Choice:
    """One of the ways to compute a convolution.

    `family`: dense, tiles (AMX), depthwise or depthwise_rows. A dense kernel computes `pixels` x `blocks` vectors of
    output channels in registers; the others have no such choice (0).
    """

    family: str
    pixels: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class ConvSpec:
    """Everything that a convolution's code depends on: geometry, target and way, no values."""

    x: Layout
    y: Layout
    window: Window
    groups: int
    dot: Dot
    threads: int = 1  # runs of work that are done at once
    narrow: bool = False  # no weight is beyond Dot.reach, so that no pair of products leaves 16 bits
    packed4: bool = False  # dense weights may be kept as 4-bit indices: they have at most 16 different codes
    then: Fused | None = None  # what is done to the codes before they are stored
    choice: Choice | None = None  # the way; None: what the cost models say

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
    def lanes(self) -> int:
        """Output channels of a block: a vector of int32, or of bytes of the plain depthwise kernel on ARM."""
        return GROUP * self.dot.lanes if self.depthwise and self.dot.neon else self.dot.lanes

    @property
    def blocks(self) -> int:
        """Vectors of output channels of a group."""
        return -(-self.outputs // self.lanes)

    @property
    def tail(self) -> int:
        """Channels of a group's last vector."""
        return self.outputs - (self.blocks - 1) * self.lanes

    @property
    def family(self) -> str:
        """Which kernel computes it."""
        if self.choice is not None:
            return self.choice.family
        if self.depthwise:
            return "depthwise_rows" if self.rows_pay else "depthwise"
        return "tiles" if self.tiles_pay else "dense"

    @property
    def by_rows(self) -> bool:
        """Depthwise with 4 kernel rows in a lane of a dot product (depthwise.rows)."""
        return self.family == "depthwise_rows"

    @property
    def rows_apply(self) -> bool:
        """It can be computed by rows; the code of that grows with the kernel."""
        byte_products = self.multiply.instruction in ("vpdpbusd", "pmaddubsw", "sdot", "usdot")
        return self.depthwise and prod(self.window.kernel) <= 25 and byte_products

    @property
    def rows_pay(self) -> bool:
        """Pixels whose windows overlap are summed up at once: few registers hold those of few pixels."""
        dot, pixels = self.multiply, -(-self.extent // self.window.stride[1])
        if dot.neon:
            return self.rows_apply and pixels * self.rows_together <= 6
        most = 9 if dot.instruction == "vpdpbusd" or dot.registers >= 32 else 3
        return self.rows_apply and pixels <= most

    @property
    def row_quads(self) -> int:
        """Groups of 4 kernel rows."""
        return -(-self.window.kernel[0] // GROUP)

    @property
    def extent(self) -> int:
        """Columns from a window's first one to its last one."""
        return (self.window.kernel[1] - 1) * self.window.dilation[1] + 1

    @property
    def rows_together(self) -> int:
        """Output rows that depthwise.rows computes at once: two where they share 4 rows of the input."""
        (kh, _), (dh, _), (sh, _) = self.window.kernel, self.window.dilation, self.window.stride
        return 2 if kh == 3 and dh == sh == 1 and self.y.height % 2 == 0 and self.dot.registers >= 32 else 1

    @property
    def across(self) -> bool:
        """The last of 5 kernel rows is taken in quads of neighbouring columns instead of with 3 rows of zeros."""
        (kh, kw), stride = self.window.kernel, self.window.stride[1]
        return kh == 5 and self.extent == kw and (kw == 4 or (kw == 5 and stride <= GROUP))

    @property
    def strip_taps(self) -> list[list[int | None]]:
        """What each dot product of a strip multiplies: kernel positions (row * kw + column), None where a weight is 0.

        Quads of rows column by column, then the quads of columns; then all again one row lower for a second output row.
        """
        kh, kw = self.window.kernel
        quads = self.row_quads - self.across
        dots: list[list[int | None]] = []
        for lower in range(self.rows_together):
            for q in range(quads):
                rows = [q * GROUP + i - lower for i in range(GROUP)]
                dots += [[row * kw + t if 0 <= row < kh else None for row in rows] for t in range(kw)]
        if self.across:
            dots.append([(kh - 1) * kw + t for t in range(kw - GROUP, kw)])
            if kw > GROUP:  # column 0, read with the quad that ends before the window's last `stride` columns
                dots.append([(kh - 1) * kw if i == self.window.stride[1] - 1 else None for i in range(GROUP)])
        return dots

    @property
    def strip_dots(self) -> int:
        """Dot products whose weights a strip holds."""
        return len(self.strip_taps)

    @property
    def strips(self) -> list[tuple[int, int]]:
        """(first channel, lanes n) of the strips of 4 * n channels that cover all: full vectors, narrower ones last."""
        found, start = [], 0
        while start < self.outputs:
            n = self.dot.lanes
            while n > 4 and self.outputs - start <= 3 * n:
                n //= 2
            found.append((start, n))
            start += 4 * n
        return found

    def strip_of(self, channel: Expr) -> tuple[Expr, Expr]:
        """First channel and lanes of the strip that holds `channel`."""
        full = 4 * self.dot.lanes
        start: Expr = T.floordiv(channel, const(full)) * full
        lanes: Expr = const(self.dot.lanes)
        for first, n in self.strips:
            if n < self.dot.lanes:
                start = T.if_then_else(channel >= const(first), const(first), start)
                lanes = T.if_then_else(channel >= const(first), const(n), lanes)
        return start, lanes

    def place(self, channel: Expr) -> Expr:
        """Where a channel of a group stands in the per-channel arrays: in order, but for strips.

        Of every 16 channels of a strip, 4 stand in each of its 4 vectors.
        """
        return strip_place(channel, *self.strip_of(channel)) if self.by_rows else channel

    @property
    def padded(self) -> int:
        """Length of the per-channel arrays: groups x blocks x lanes, or what the strips cover."""
        if self.by_rows:
            start, lanes = self.strips[-1]
            return start + 4 * lanes
        return (1 if self.depthwise else self.groups) * self.blocks * self.lanes

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
    def least_quads(self) -> int:
        """Groups of 4 bytes that a segment needs."""
        return -(-self.taps * self.inputs // GROUP)

    @property
    def tiled(self) -> bool:
        """Multiplied in AMX tiles."""
        return self.family == "tiles"

    @property
    def tiles_apply(self) -> bool:
        """It can be computed in AMX tiles, whose rows are neighbouring pixels."""
        return self.dot.tiles and self.groups == 1 and not self.packed4 and self.lines[1] > 1

    @property
    def tiles_pay(self) -> bool:
        """Tiles take fewer cycles for a pixel of a block than dot products.

        Cycles as measured on Sapphire Rapids, fixed part with requantization first. A tile takes its time whatever the
        part of it that is used, so few pixels, as of a fully connected layer, or few channels make tiles lose.
        """
        pixels = min(TILE_ROWS, self.lines[1])
        parts = self.segments * -(-self.least_quads // TILE_QUADS)
        return self.tiles_apply and 3.6 + 17.8 * parts / pixels < 2.6 + 0.49 * self.segments * self.least_quads

    @property
    def chunk(self) -> int:
        """Quads that one AMX tile of weights holds: equal parts of a segment."""
        parts = -(-self.least_quads // TILE_QUADS)
        size = -(-self.least_quads // parts)
        # what a part reads behind its segment must stay within the slack behind the codes
        return size if (size * parts - self.least_quads + 1) * GROUP <= SLACK else TILE_QUADS

    @property
    def quads(self) -> int:
        """Groups of 4 bytes in a segment as it is packed."""
        if self.group > GROUP:
            return -(-self.least_quads * GROUP // self.group) * self.group // GROUP
        return -(-self.least_quads // self.chunk) * self.chunk if self.tiled else self.least_quads

    @property
    def multiply(self) -> Dot:
        """The dot product of convolutions: the target's, or a shorter one that narrow weights allow."""
        if self.dot.instruction == "usmmla" and (self.depthwise or self.packed4 or self.y.width == 1):
            return replace(self.dot, instruction="usdot")
        return self.dot.shorter if self.narrow and self.dot.reach else self.dot

    @property
    def group(self) -> int:
        """Neighbouring bytes of a channel in a packed vector, or two."""
        return MATRIX if self.multiply.instruction == "usmmla" else GROUP

    @property
    def depth(self) -> int:
        """Products of an output."""
        return self.segments * self.taps * self.inputs

    @property
    def packed(self) -> bool:
        """Weights are 4-bit indices: where asked for, and nothing has to be filled with zeros inside a quad."""
        whole = self.taps * self.inputs % GROUP == 0
        return self.packed4 and (self.dot.neon or self.dot.lanes > 4) and self.family == "dense" and whole

    @property
    def quad_pairs(self) -> int:
        """Pairs of quads of a segment whose weights are packed."""
        return -(-self.quads // 2)

    @property
    def block_bytes(self) -> int:
        """int8 weights of a block."""
        return self.segments * self.quads * GROUP * self.dot.lanes

    def read_bytes(self, rows: int) -> int:
        """Bytes that `rows` rows of outputs read, the rest of the last quad included; a flat kernel has one row."""
        rows = self.y.height if self.flat else rows
        (sh, sw), (dh, dw), (kh, kw) = self.window.stride, self.window.dilation, self.window.kernel
        down, across = (rows - 1) * sh + (kh - 1) * dh, (self.y.width - 1) * sw + (kw - 1) * dw
        return down * self.x.row + (across + 1) * self.x.channels + GROUP - 1

    @property
    def widens(self) -> bool:
        """A dense kernel first widens its input to 16 bits, some rows at a time (otherwise: each time it is read)."""
        return self.multiply.instruction == "pmaddwd" and self.read_bytes(1) <= WIDENED

    def rows_at_once(self, rows: int) -> int:
        """How many of `rows` rows of outputs are computed from input that is widened at once."""
        return max(n for n in range(1, rows + 1) if n == 1 or self.read_bytes(n) <= WIDENED)

    def byte_place(self, lane: Expr, byte: Expr) -> Expr:
        """Where byte `byte` (0 .. 3; 0 .. 7 for usmmla) of lane `lane` stands in a packed vector of dense weights.

        For pmaddwd, smull and smlal, which multiply pairs, the first two bytes of all lanes stand before the last two.
        """
        if self.multiply.instruction not in ("pmaddwd", "smull", "smlal"):
            return lane * self.group + byte
        half = byte // 2 if isinstance(byte, int) else T.floordiv(byte, const(2))
        return half * (2 * self.dot.lanes - 2) + lane * 2 + byte

    @property
    def weight_bytes(self) -> int:
        """Length of the packed weights."""
        if self.by_rows:
            return self.padded * GROUP * self.strip_dots
        if self.depthwise:
            return self.blocks * self.segments * self.lanes
        blocks = self.groups * self.blocks
        if self.packed:
            return TABLE_BYTES + blocks * self.segments * self.quad_pairs * GROUP * self.dot.lanes
        return blocks * self.block_bytes

    @property
    def flat(self) -> bool:
        """Pixels of all rows are neighbours in both buffers, so a tile may cross rows."""
        plain = self.window == Window((1, 1)) and self.x.border == self.y.border == (0, 0, 0, 0)
        fits = self.multiply.instruction != "pmaddwd" or self.x.size <= WIDENED
        return plain and not self.depthwise and fits

    @property
    def lines(self) -> tuple[int, int]:
        """Rows of outputs, and neighbouring pixels in each, as a dense kernel walks them."""
        return (1, self.y.height * self.y.width) if self.flat else (self.y.height, self.y.width)

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


def strip_place(channel: Expr, start: Expr, lanes: Expr) -> Expr:
    """`ConvSpec.place` of a channel of the strip of 4 * `lanes` channels from `start` on."""
    inside = channel - start
    vector = T.floordiv(T.floormod(inside, const(16)), const(4))
    return start + vector * lanes + T.floordiv(inside, const(16)) * 4 + T.floormod(inside, const(4))
