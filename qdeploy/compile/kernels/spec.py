"""ConvSpec: what a convolution's code depends on, and how its weights lie in memory; no values, no code.

A window is cut into *segments*, runs of bytes that are neighbours in memory (a kernel row where nothing is dilated or
grouped), and a segment into quads of 4 bytes, which the target's dot product multiplies at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.emit import Expr, const
from qdeploy.compile.kernels.layout import SLACK, Layout
from qdeploy.compile.llvm import Dot

TILE_ROWS, TILE_QUADS = 16, 16  # rows and 32-bit columns of an AMX tile


@dataclass(frozen=True)
class ConvSpec:
    """Everything that a convolution's code depends on: geometry and target, no values."""

    x: Layout
    y: Layout
    window: Window
    groups: int
    dot: Dot
    threads: int = 1  # runs of work that are done at once

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
    def tail(self) -> int:
        """Channels of a group's last vector."""
        return self.outputs - (self.blocks - 1) * self.dot.lanes

    @property
    def family(self) -> str:
        """Which kernel computes it."""
        if self.depthwise:
            return "depthwise_rows" if self.by_rows else "depthwise"
        return "tiles" if self.tiled else "dense"

    @property
    def by_rows(self) -> bool:
        """Depthwise with 4 kernel rows in a lane of a dot product (depthwise.rows); its code grows with the kernel."""
        return self.depthwise and self.dot.instruction == "vpdpbusd" and prod(self.window.kernel) <= 25

    @property
    def row_quads(self) -> int:
        """Groups of 4 kernel rows."""
        return -(-self.window.kernel[0] // GROUP)

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
        if not self.by_rows:
            return channel
        start, lanes = self.strip_of(channel)
        inside = channel - start
        vector = T.floordiv(T.floormod(inside, const(16)), const(4))
        return start + vector * lanes + T.floordiv(inside, const(16)) * 4 + T.floormod(inside, const(4))

    @property
    def padded(self) -> int:
        """Length of the per-channel arrays: groups x blocks x lanes, or what the strips cover."""
        if self.by_rows:
            start, lanes = self.strips[-1]
            return start + 4 * lanes
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
    def least_quads(self) -> int:
        """Groups of 4 bytes that a segment needs."""
        return -(-self.taps * self.inputs // GROUP)

    @property
    def tiled(self) -> bool:
        """Multiplied in AMX tiles, where that takes fewer cycles for a pixel of a block than dot products.

        Cycles as measured on Sapphire Rapids, fixed part with requantization first. A tile takes its time whatever the
        part of it that is used, so few pixels, as of a fully connected layer, or few channels make tiles lose.
        """
        if not self.dot.tiles or self.groups > 1:
            return False
        pixels = min(TILE_ROWS, self.y.height * self.y.width if self.flat else self.y.width)
        parts = self.segments * -(-self.least_quads // TILE_QUADS)
        return 5 + 17.5 * parts / pixels < 2.6 + 0.49 * self.segments * self.least_quads

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
        return -(-self.least_quads // self.chunk) * self.chunk if self.tiled else self.least_quads

    @property
    def weight_bytes(self) -> int:
        """Length of the packed weights."""
        if self.by_rows:
            return self.padded * self.row_quads * GROUP * self.window.kernel[1]
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
