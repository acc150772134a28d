"""What a float value of a QDQ ONNX file can be while it is read, and window geometry from ONNX attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qdeploy.compile.graph import Op, Operand, Pair, Shuffle, Window

Shape = tuple[int, int, int]  # C, H, W


Dims = tuple[int, ...]  # a value's shape in the file


class Refused(Exception):
    """Why one node has no integer kernel."""


class Impossible(Exception):
    """Why one node can run neither in integers nor in float."""


def three(dims: Dims) -> Shape:
    """[C, H, W] of a value of shape `dims`, its elements in the same order: [1, C, H, W], [1, C, L] as [C, 1, L],
    [1, N] as [N, 1, 1].
    """
    rest = dims[1:] if len(dims) > 1 and dims[0] == 1 else dims
    if len(rest) == 2:
        return rest[0], 1, rest[1]
    if len(rest) > 3:
        return prod(rest[:-2]), rest[-2], rest[-1]
    first, height, width = (*rest, 1, 1, 1)[:3]
    return first, height, width


@dataclass(frozen=True)
class View:
    """The real values of an activation's codes, seen as `dims`: its elements c, h, w in the file's order."""

    operand: Operand
    dims: Dims


@dataclass(frozen=True)
class Result:
    """An operator without its output; real values are cut to [low, high] before they are quantized.

    Element-wise operators (those with a term) may go on into others; all others need a QuantizeLinear behind them.
    `moved` puts their codes into the file's order.
    """

    op: Op
    shape: Shape
    dims: Dims
    low: float | None = None
    high: float | None = None
    moved: Shuffle | None = None


@dataclass(frozen=True)
class Stored:
    """A DequantizeLinear over an initializer: codes, or `real` float32 values with a QuantizeLinear of its own.

    Codes are cut to [clip_min, clip_max]; `turned` says that the file reads the matrix with its axes exchanged.
    """

    codes: str
    scale: str
    zero_point: str | None
    axis: int
    real: bool = False
    clip_min: str | None = None
    clip_max: str | None = None
    turned: bool = False

    @property
    def clipped(self) -> bool:
        """A Clip cuts the codes."""
        return self.clip_min is not None or self.clip_max is not None


@dataclass(frozen=True)
class Real:
    """Values in the file's own type and order: the network's input, and what operators without integer kernels make."""

    name: str
    dims: Dims
    dtype: str = "float32"


Value = View | Result | Stored | Real | None  # None: made by a node that cannot be taken at all


def _numbers(a: Mapping[str, Any], name: str, count: int, default: int, least: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in a.get(name, ())) or (default,) * count
    if len(values) != count or min(values) < least:
        raise Refused(f"{name} {list(values)} is not {count} numbers of at least {least}")
    return values


def window_of(a: Mapping[str, Any], kernel: Pair, size: Pair) -> Window:
    """Window of a Conv or pool over an input of `size`; auto_pad becomes plain padding."""
    given = _numbers(a, "kernel_shape", 2, 1, 1) if "kernel_shape" in a else kernel
    if given != kernel:
        raise Refused(f"kernel_shape {list(given)} is not its weight's {list(kernel)}")
    sh, sw = _numbers(a, "strides", 2, 1, 1)
    dh, dw = _numbers(a, "dilations", 2, 1, 1)
    top, left, bottom, right = _numbers(a, "pads", 4, 0, 0)
    auto = a.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        both = []
        for length, k, s, d in zip(size, kernel, (sh, sw), (dh, dw), strict=True):
            total = max(0, (-(-length // s) - 1) * s + (k - 1) * d + 1 - length)
            small, large = total // 2, total - total // 2
            both.append((small, large) if auto == b"SAME_UPPER" else (large, small))
        (top, bottom), (left, right) = both
    elif auto == b"VALID":
        top = left = bottom = right = 0
    elif auto != b"NOTSET":
        raise Refused(f"auto_pad {auto!r} is unknown")
    return Window(kernel, (sh, sw), (top, left, bottom, right), (dh, dw))


def pool_window(a: Mapping[str, Any], size: Pair) -> tuple[Window, bool]:
    """Window and ceil_mode of MaxPool and AveragePool."""
    kernel = _numbers(a, "kernel_shape", 2, 1, 1)
    window = window_of(a, (kernel[0], kernel[1]), size)
    if any(window.padding[i] >= window.kernel[i % 2] for i in range(4)):
        raise Refused(f"padding {list(window.padding)} is not smaller than the kernel")
    if a.get("storage_order", 0):
        raise Refused("storage_order 1 is not supported")
    return window, bool(a.get("ceil_mode", 0))
