"""Where codes lie in memory: NHWC in one flat buffer, with a border that holds the zero point."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Sides
from qdeploy.compile.kernels.emit import ZERO, Buffer, Expr, cast, const, load, loop, store

SLACK = 64  # a vector load may begin at any code: so many bytes behind the last one may be read, never used


@dataclass(frozen=True)
class Layout:
    """uint8 codes [top + H + bottom][left + W + right][C], then SLACK bytes."""

    channels: int
    height: int
    width: int
    border: Sides = (0, 0, 0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W]"""
        return self.channels, self.height, self.width

    @property
    def single(self) -> bool:
        """It holds one code."""
        return self.shape == (1, 1, 1)

    @property
    def row(self) -> int:
        """Bytes from one row to the next."""
        return (self.border[1] + self.width + self.border[3]) * self.channels

    @property
    def rows(self) -> int:
        """Rows with both borders."""
        return self.border[0] + self.height + self.border[2]

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self.rows * self.row + SLACK

    def at(self, h: Expr, w: Expr) -> Expr:
        """Offset of channel 0 of pixel (h, w)."""
        return (h + self.border[0]) * self.row + (w + self.border[1]) * self.channels


def fill_border(y: Buffer, layout: Layout, quant: Buffer) -> None:
    """Write the zero point all around the pixels."""
    if not any(layout.border):
        return
    whole = T.Bind(cast("int32", load(quant, const(ZERO)), 1))
    zero = T.Bind(cast("uint8", whole, 1))

    def fill(start: Expr, count: int) -> None:
        loop(count, lambda i: store(y, zero, start + i))

    top, left, bottom, right = layout.border
    first, pixels = top * layout.row + left * layout.channels, layout.width * layout.channels
    fill(0, first)
    if left or right:
        # a zero point is below 256, which LLVM cannot know: it would write out all rows of a count that it knows
        rows = const(layout.height - 1) + T.shift_right(whole, const(8))
        with T.serial(0, rows) as h:
            fill(h * layout.row + (first + pixels), (left + right) * layout.channels)
    last = (top + layout.height - 1) * layout.row + left * layout.channels + pixels
    fill(last, right * layout.channels + bottom * layout.row)
