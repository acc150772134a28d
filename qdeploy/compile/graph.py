"""The integer graph between ONNX and kernels: frozen values, no ONNX and no TVM.

Every activation is uint8 codes of shape [C, H, W] (int8 codes of a file are shifted by 128 together with their zero
point and bounds, which changes no result). Scales, zero points, bounds, weights and biases appear by the names of
their ONNX initializers: their values belong to a level and arrive at run time. Geometry is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.compile.expression import Term

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]  # top, left, bottom, right

INTEGER = dict.fromkeys(("conv", "max_pool", "average_pool", "table", "constant", "move"), "integer")
FLOAT_REASON = {
    "quantize": "the input is float32",
    "requantize": "element-wise: defined by float32 steps",
    "add": "element-wise: defined as a float32 sum",
    "sub": "element-wise: defined as a float32 difference",
    "mul": "element-wise: defined as a float32 product",
    "elementwise": "element-wise: defined by float32 steps",
    "concat": "its parts are requantized: defined by float32 steps",
    "softmax": "its sum has no integer form",
}


@dataclass(frozen=True)
class Quantizer:
    """Real value = (code - zero_point) * scale; names of initializers, None where the file has none.

    Codes are cut to [clip_min, clip_max] (integer Clip behind the quantizer) and to the codes of the real values
    `low` and `high` (a Relu has low = 0), which the file holds as constants.
    """

    scale: str
    zero_point: str | None
    signed: bool
    clip_min: str | None = None
    clip_max: str | None = None
    low: float | None = None
    high: float | None = None

    @property
    def grid(self) -> Quantizer:
        """Scale and zero point alone: what a reader of the codes needs."""
        return Quantizer(self.scale, self.zero_point, self.signed)


@dataclass(frozen=True)
class Tensor:
    """An activation, [C, H, W]."""

    name: str
    shape: tuple[int, int, int]
    quantizer: Quantizer


@dataclass(frozen=True)
class Operand:
    """A tensor as one reader sees it; `grid` is that of the reader's DequantizeLinear."""

    tensor: str
    grid: Quantizer


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pool over [H, W]."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    def output(self, height: int, width: int, ceil: bool = False) -> Pair:
        """Output height and width; ONNX's formula, values below 1 mean that the window does not fit."""
        sizes = []
        for axis, size in enumerate((height, width)):
            reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            free = size + self.padding[axis] + self.padding[axis + 2] - reach
            stride = self.stride[axis]
            out = (-(-free // stride) if ceil else free // stride) + 1
            if ceil and (out - 1) * stride >= size + self.padding[axis]:
                out -= 1  # the last window would start behind the input
            sizes.append(out)
        return sizes[0], sizes[1]


@dataclass(frozen=True)
class Weights:
    """Initializers of a convolution: weight [O, I/groups, kh, kw] or [O, K], or [K, O] when `transposed`.

    A float32 weight is quantized by `prepare` to int8 (`signed`) or uint8, a float32 bias (no scale) to s_x * s_w.
    """

    weight: str
    signed: bool
    scale: str
    zero_point: str | None
    bias: str | None
    bias_scale: str | None
    bias_zero_point: str | None
    channels: int  # O
    transposed: bool = False


@dataclass(frozen=True)
class Table:
    """Real values of a formula that no kernel can compute, for each of the 256 codes of an input on one grid."""

    scale: float
    zero_point: int  # of uint8 codes
    values: tuple[float, ...]  # 256 float32 numbers


@dataclass(frozen=True)
class Op:
    """One operator.

    quantize (of the network's input), conv, max_pool, average_pool, softmax (over all channels of one pixel), concat
    (over channels), move, constant (codes `stored` in the file); and element-wise ones, which are `term` over the
    inputs' real values, broadcast to the output: requantize (the input itself), add, sub and mul (of two inputs), table
    (anything over one input, by `table` where its term is not plain) and elementwise (anything else).

    A fully connected layer is a convolution whose kernel is its whole input. average_pool divides by the window's
    size, without its padding unless `count_padding`. move gives output pixel (h, w) the code at floor((h - top) /
    stride_h), floor((w - left) / stride_w) of its window, and the zero point where that lies outside the input.
    """

    kind: str
    name: str
    inputs: tuple[Operand, ...]
    output: str
    window: Window = Window((1, 1))
    groups: int = 1
    weights: Weights | None = None
    count_padding: bool = False
    term: Term | None = None
    table: Table | None = None
    stored: str | None = None


@dataclass(frozen=True)
class Param:
    """A numeric initializer: dtype as numpy calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Operators in order; `output` is dequantized at the end. Shapes are the file's, batch included."""

    input: str
    input_shape: tuple[int, ...]
    output_name: str
    output_shape: tuple[int, ...]
    output: Operand
    ops: tuple[Op, ...]
    tensors: dict[str, Tensor]
    params: tuple[Param, ...]  # in order of first use
    softmax: bool = False  # the float output is the softmax over `output`'s channels

    def borders(self) -> dict[str, Sides]:
        """Border that each tensor carries so that its convolutions can read their padding from it."""
        found: dict[str, Sides] = dict.fromkeys(self.tensors, (0, 0, 0, 0))
        for op in self.ops:
            if op.kind == "conv":
                name = op.inputs[0].tensor
                a, b = found[name], op.window.padding
                found[name] = (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
        return found
