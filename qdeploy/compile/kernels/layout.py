"""Where codes lie in memory: NHWC in one flat buffer, with a border that holds the zero point."""

from __future__ import annotations

from dataclasses import dataclass

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
    zero = cast("uint8", cast("int32", load(quant, const(ZERO)), 1), 1)

    def fill(start: Expr, count: int) -> None:
        loop(count, lambda i: store(y, zero, start + i))

    top, left, _, right = layout.border
    fill(0, top * layout.row)
    fill((top + layout.height) * layout.row, (layout.rows - top - layout.height) * layout.row)
    if left or right:
        sides = (left * layout.channels, right * layout.channels)

        def row(h: Expr) -> None:
            start = (h + top) * layout.row
            fill(start, sides[0])
            fill(start + layout.row - sides[1], sides[1])

        loop(layout.height, row)
