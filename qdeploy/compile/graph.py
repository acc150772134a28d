"""The integer graph between ONNX and kernels: frozen values, no ONNX and no TVM.

Every activation is uint8 codes of shape [C, H, W] (int8 codes of a file are shifted by 128 together with their zero
point and bounds, which changes no result). Scales, zero points, bounds, weights and biases appear by the names of
their ONNX initializers: their values belong to a level and arrive at run time. Geometry is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qdeploy.compile.expression import Term

ANY_CODE = 128  # greatest absolute value of int8
Pair = tuple[int, int]
Shape = tuple[int, ...]
Sides = tuple[int, int, int, int]  # top, left, bottom, right

INTEGER = dict.fromkeys(
    ("conv", "max_pool", "mean", "table", "constant", "move", "insert", "shuffle", "codes"), "integer"
)
FLOAT_REASON = {
    "quantize": "its input is float32",
    "dequantize": "read in float32",
    "requantize": "element-wise: defined by float32 steps",
    "add": "element-wise: defined by float32 multiply-adds",
    "sub": "element-wise: defined as a float32 difference",
    "mul": "element-wise: defined by a float32 product",
    "elementwise": "element-wise: defined by float32 steps",
    "average_pool": "defined as a float32 mean",
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
class FloatTensor:
    """A value that no quantizer stands behind: the file's own shape (batch 1) and numpy dtype, float32 but for few."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


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
    """Initializers of a convolution. `order` says how the weight stands in the file:

    conv             [O, I/groups, kh, kw], or [O, K] with K = (input channel, row, column)
    matmul           [K, O]
    transposed conv  [I, O/groups, kh, kw], as ConvTranspose has it: flipped in H and W it is a convolution of the input
                     with zero points inserted between its pixels. Scales and zero points are one, or one for each of O.

    A float32 weight is quantized by `prepare` to int8 (`signed`) or uint8, a float32 bias (no scale) to s_x * s_w.
    Codes are cut to [clip_min, clip_max] where the file has a Clip behind them that may change them. `reach` is the
    greatest absolute value of the codes of the file (ANY_CODE where they are not int8); `few` says that there are at
    most 16 different ones, so that 4 bits can tell them apart.
    """

    weight: str
    signed: bool
    scale: str
    zero_point: str | None
    bias: str | None
    bias_scale: str | None
    bias_zero_point: str | None
    channels: int  # O
    order: str = "conv"
    clip_min: str | None = None
    clip_max: str | None = None
    reach: int = ANY_CODE
    real: bool = False  # float32 in the file
    few: bool = False


@dataclass(frozen=True)
class Table:
    """Real values of a formula that no kernel can compute, for each of the 256 codes of an input on one grid."""

    scale: float
    zero_point: int  # of uint8 codes
    values: tuple[float, ...]  # 256 float32 numbers


@dataclass(frozen=True)
class Shuffle:
    """A copy of codes in another order, over both tensors' elements in the order c, h, w.

    Element (i_0, i_1, ...) of the output, seen as an array of shape `sizes`, is element offset + sum i_k * steps_k of
    the input.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class RealParam:
    """float32 values of an initializer that a float region reads: itself, or (codes - zero point) * scale.

    Scale and zero point are one value, or one for each place of the initializer's `axis`. A `turned` matrix is read
    with its axes exchanged.
    """

    name: str  # of the value in the region
    stored: str
    scale: str | None = None
    zero_point: str | None = None
    axis: int = 0
    turned: bool = False


@dataclass(frozen=True)
class Region:
    """Connected operators without an integer kernel: an ONNX model that TVM compiles in float (floating.py).

    The model's inputs are `inputs` (float tensors, or the network's input), then the names of `params`.
    """

    model: bytes
    inputs: tuple[str, ...]
    params: tuple[RealParam, ...]
    outputs: tuple[str, ...]
    nodes: tuple[tuple[str, str, str], ...]  # operator, name, why it has no integer kernel


@dataclass(frozen=True)
class Op:
    """One operator.

    quantize (of the float tensor `source`, by default the network's input), conv, max_pool, average_pool, mean (of all
    pixels), softmax (over all channels of one pixel), concat (over channels), move, insert, shuffle, constant (codes
    `stored` in the file), dequantize and codes (to float tensor `output`: real values, or codes in the file's own
    dtype), float (a region of operators without integer kernels; `output` is its first output); and element-wise ones,
    which are `term` over the inputs' real values, broadcast to the output: requantize (the input itself), add, sub and
    mul (of two inputs), table (anything over one input, by `table` where its term is not plain) and elementwise
    (anything else).

    A fully connected layer is a convolution whose kernel is its whole input. average_pool divides by the window's
    size, without its padding unless `count_padding`. move gives output pixel (h, w) the code at floor((h - top) /
    stride_h), floor((w - left) / stride_w) of its window, and the zero point where that lies outside the input. insert
    does so only where both divisions are exact, and gives the zero point elsewhere.

    After fusion (fuse.py) a table may stand for several operators, `steps`, over tensors that are not in memory, and a
    convolution may have an operator `then`.
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
    source: str | None = None
    shuffle: Shuffle | None = None
    region: Region | None = None
    steps: tuple[Op, ...] = ()
    then: Then | None = None

    @property
    def own(self) -> str:
        """The tensor of the codes that it computes itself: `output`, or what `then` reads."""
        return self.output if self.then is None else self.then.tensor

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors and float tensors that it reads; a region names the network's input too."""
        if self.region is not None:
            return self.region.inputs
        if self.kind == "quantize":
            return () if self.source is None else (self.source,)
        return tuple(operand.tensor for operand in self.inputs)

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the tensors or float tensors that it makes."""
        return self.region.outputs if self.region is not None else (self.output,)


@dataclass(frozen=True)
class Then:
    """An operator that a convolution applies to its codes before it stores them: their table, or a sum with them.

    The other operand of a sum is the convolution's last input. `tensor` is the convolution's own codes: a tensor with
    a quantizer, but not in memory.
    """

    tensor: str
    op: Op


def swapped(a: Shape, b: Shape) -> bool:
    """True where a sum adds its first operand to its second: the first, [C, H, W], is broadcast along the last axis.

    The last axis is the last one along which any of them has more than one place.
    """
    for size_a, size_b in zip(reversed(a), reversed(b), strict=True):
        if size_a != size_b or size_a > 1:
            return size_a == 1
    return False


@dataclass(frozen=True)
class Param:
    """A numeric initializer: dtype as numpy calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Operators in order. `output` is dequantized at the end; a name is that of the float tensor to return as it is.

    Shapes are the file's, batch included; operators work on one image of it.
    """

    input: str
    input_shape: tuple[int, ...]
    output_name: str
    output_shape: tuple[int, ...]
    output: Operand | str
    ops: tuple[Op, ...]
    tensors: dict[str, Tensor]
    params: tuple[Param, ...]  # in order of first use
    softmax: bool = False  # the float output is the softmax over `output`'s channels
    floats: dict[str, FloatTensor] = field(default_factory=dict)
    equal: tuple[tuple[str, str], ...] = ()  # parameters whose values must be the same at every level

    @property
    def coded(self) -> str | None:
        """dtype of the output's codes in the file; None where the output is a float tensor."""
        if isinstance(self.output, str):
            return None
        return "int8" if self.output.grid.signed else "uint8"

    @property
    def result(self) -> str:
        """Name of the tensor or float tensor that is the output, before the way out."""
        return self.output if isinstance(self.output, str) else self.output.tensor

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, of a float tensor or of the input (one image)."""
        if name == self.input:
            return (1, *self.input_shape[1:])
        return self.tensors[name].shape if name in self.tensors else self.floats[name].shape

    def borders(self) -> dict[str, Sides]:
        """Border that each tensor carries so that its convolutions can read their padding from it."""
        found: dict[str, Sides] = dict.fromkeys(self.tensors, (0, 0, 0, 0))
        for op in self.ops:
            if op.kind == "conv":
                name = op.inputs[0].tensor
                a, b = found[name], op.window.padding
                found[name] = (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
        return found
