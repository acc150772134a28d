"""`prepare` of weights: one level's codes, scales and biases -> what convolution kernels read.

A packed convolution is its weights in kernel order (spec.py), its integers int32 [2 * padded + 1] (bias with the
input's zero point folded in, weight zero points, and at the end 1 if one of those is not 0 or a sum times its scale may
leave int32) and its requantization scales float32 [padded], MOST_SCALE at most. Lanes of padding hold 0.

One kernel serves every convolution with the same `PackCode`; geometry arrives as int32 arguments (`WeightSpec.sizes`):
prepare's code would otherwise be a large part of a library. Weights are walked in the order in which they are written,
the lanes of a vector innermost, so that reads are a few parallel streams whatever the order in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.emit import QUANT, SCALE, ZERO, Buffer, Expr, cast, const, load, local, loop, store
from qdeploy.compile.kernels.pack import SHIFT, Stored
from qdeploy.compile.kernels.requantize import MOST_SCALE
from qdeploy.compile.kernels.spec import TABLE_BYTES, ConvSpec, strip_place

# int32 arguments: counts of [group][output][input][segment][tap]; quads of a packed segment; and where in the file a
# weight stands: start + group * group_step + output * output_step + input * input_step + kernel position * step
SIZES = (
    "groups", "outputs", "inputs", "segments", "taps", "quads",
    "start", "group_step", "output_step", "input_step", "step",
)  # fmt: skip
# of strips: `taps` is the whole kernel; the last four are first channel and lanes of the strips of narrow vectors
STRIP_SIZES = (
    "outputs", "padded", "taps", "start", "output_step", "step", "first_1", "lanes_1", "first_2", "lanes_2",
)  # fmt: skip
CODES = 16  # different codes of a packed weight


@dataclass(frozen=True)
class Part:
    """A stored part of a convolution: its dtype, and whether it has a value for `each` output channel or just one."""

    dtype: str
    each: bool


@dataclass(frozen=True)
class PackCode:
    """All that the code of `weights_kernel` depends on.

    `dots` are ConvSpec.strip_taps of a convolution in strips. For others, byte k of lane i stands at i * order[0] +
    k % 2 * order[1] + k // 2 * order[2] of a vector of lanes * group bytes. `offset`: what kernels subtract from codes.
    """

    dtype: str
    signed: bool
    lanes: int
    group: int
    order: tuple[int, int, int]
    offset: int
    narrow: int  # codes farther from 0 are refused; 0: none are
    indices: bool  # 4-bit indices into a table
    dots: tuple[tuple[int | None, ...], ...] | None
    scale: Part
    zero: Part | None
    bias: Part | None
    bias_scale: Part | None
    bias_zero: Part | None


@dataclass(frozen=True)
class WeightSpec:
    """Geometry and stored parts of one convolution; `order` and `signed` as in graph.Weights."""

    conv: ConvSpec
    weight: Stored
    scale: Stored
    zero_point: Stored | None
    bias: Stored | None
    bias_scale: Stored | None
    bias_zero_point: Stored | None
    order: str
    signed: bool

    @property
    def code(self) -> PackCode:
        """What tells its kernel from others."""
        conv = self.conv

        def part(stored: Stored | None) -> Part | None:
            return None if stored is None else Part(stored.dtype, prod(stored.shape) > 1)

        scale = part(self.scale)
        assert scale is not None
        order = (1, 0, 0) if conv.depthwise else (conv.byte_place(1, 0), conv.byte_place(0, 1), conv.byte_place(0, 2))
        return PackCode(
            self.weight.dtype, self.signed, conv.dot.lanes if conv.by_rows else conv.lanes,
            1 if conv.depthwise else conv.group, order,
            conv.multiply.offset, conv.dot.reach if conv.narrow else 0, conv.packed,
            tuple(map(tuple, conv.strip_taps)) if conv.by_rows else None,
            scale, part(self.zero_point), part(self.bias), part(self.bias_scale), part(self.bias_zero_point),
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernel's int32 arguments, as SIZES or STRIP_SIZES name them."""
        conv, taps = self.conv, prod(self.conv.window.kernel)
        start, step = (taps - 1, -1) if self.order == "transposed conv" else (0, 1)
        if conv.by_rows:
            full, padded = conv.dot.lanes, conv.padded
            narrow = [strip for strip in conv.strips if strip[1] < full]
            first, second = [*narrow, (padded, full), (padded, full)][:2]
            return (conv.outputs, padded, taps, start, taps, step, *first, *second)
        if conv.depthwise:  # one channel a group: the groups are the lanes
            return (1, conv.outputs, 1, taps, 1, 1, start, 0, taps, 0, step)
        inputs, outputs = conv.inputs, conv.outputs
        steps = {
            "conv": (outputs * inputs * taps, inputs * taps, taps, 1),
            "matmul": (0, 1, taps * outputs, outputs),
            "transposed conv": (inputs * outputs * taps, taps, outputs * taps, -1),
        }[self.order]
        quads = conv.quads * GROUP // conv.group
        return (conv.groups, outputs, inputs, conv.segments, conv.taps, quads, start, *steps)

    def failure(self, weight: str) -> str:
        """What to say where the kernel refuses initializer `weight`; empty where it takes any."""
        needs, remedies = [], []
        if self.code.narrow:
            needs.append(f"codes in -{self.code.narrow} .. {self.code.narrow}")
            remedies.append("--constant")
        if self.code.indices:
            needs.append(f"at most {CODES} different codes")
            remedies.append("--weights packed")
        if not needs:
            return ""
        needed, without = " and ".join(needs), " and ".join(remedies)
        return f"weight {weight} must have {needed}, as in the compiled model: compile this level, without {without}"


def weights_kernel(name: str, code: PackCode) -> tirx.PrimFunc:
    """(sizes..., stored parts that exist..., input quantizer, output quantizer) -> (weights, integers, scale).

    All buffers are flat. Stored parts: weight, scale, zero point, bias, bias scale, bias zero point. It fails (an
    assertion) where narrow weights are not narrow, or packed ones have more than 16 different codes.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        labels = SIZES if code.dots is None else STRIP_SIZES
        packer = Packer(code, {label: T.arg(label, T.int32()) for label in labels})
        packer.arguments()
        packer.body()
    return builder.get()


class Packer:
    """Writes the body of one `weights_kernel`."""

    def __init__(self, code: PackCode, sizes: dict[str, Expr]) -> None:
        self.code, self.sizes = code, sizes
        self.offset = 0 if code.signed else SHIFT  # uint8 weights - 128 are int8 ones
        self.vector = code.lanes * code.group
        self.given: dict[str, Buffer] = {}
        n = sizes
        if code.dots is not None:
            self.channels, self.depth, self.lanes = n["outputs"], n["taps"], n["padded"]
            self.bytes = n["padded"] * (GROUP * len(code.dots))
            return
        self.channels, self.depth = n["groups"] * n["outputs"], n["inputs"] * n["segments"] * n["taps"]
        self.blocks = T.floordiv(n["outputs"] + (code.lanes - 1), const(code.lanes))
        self.lanes = n["groups"] * self.blocks * code.lanes
        self.quads = T.shift_right(n["quads"] + 1, const(1)) if code.indices else n["quads"]
        runs = n["groups"] * self.blocks * n["segments"] * self.quads
        self.bytes = runs * self.vector + (TABLE_BYTES if code.indices else 0)

    def arguments(self) -> None:
        """Declare the buffers; their shapes follow from the sizes."""
        code = self.code
        self._buffer("weight", code.dtype, self.channels * self.depth)
        parts = {
            "scale": code.scale, "zero": code.zero, "bias": code.bias,
            "bias_scale": code.bias_scale, "bias_zero": code.bias_zero,
        }  # fmt: skip
        for label, part in parts.items():
            if part is not None:
                self._buffer(label, part.dtype, self.channels if part.each else const(1))
        self._buffer("quant_x", QUANT[1], const(QUANT[0][0]))
        self._buffer("quant", QUANT[1], const(QUANT[0][0]))
        self._buffer("packed", "int8", self.bytes)
        self._buffer("integers", "int32", self.lanes * 2 + 1)
        self._buffer("out_scale", "float32", self.lanes)

    def _buffer(self, label: str, dtype: str, size: Expr) -> None:
        self.given[label] = T.arg(label, T.Buffer((size,), dtype))

    def body(self) -> None:
        """Zeros everywhere, then weights and their sums, then what each channel needs."""
        sizes = {"packed": self.bytes, "integers": self.lanes * 2 + 1, "out_scale": self.lanes}
        for label, size in sizes.items():
            with T.serial(0, size) as i:
                store(self.given[label], const(0, str(self.given[label].dtype)), i)
        different, widest = local(1, "int32"), local(1, "int32")
        store(different, const(0), 0)
        store(widest, const(0), 0)
        if self.code.dots is not None:
            self.strips(widest, self.code.dots)
        elif self.code.indices:
            places = local(1 << 8, "int32")
            self.table(places, different)
            self.dense(places, widest)
        else:
            self.dense(None, widest)
        self.per_channel()
        for found, most, what in ((widest, self.code.narrow, "narrow"), (different, CODES, "few")):
            with T.Assert(load(found, 0) <= const(most), f"the weights are not {what}"):
                pass

    # weights

    def value(self, part: str, channel: Expr) -> Expr:
        """A part that is one value or one a channel."""
        found = getattr(self.code, part)
        return load(self.given[part], channel if found.each else const(0))

    def weight(self, index: Expr, channel: Expr) -> Expr:
        """A stored weight of output `channel` as an int32 code in -128 .. 127."""
        stored = load(self.given["weight"], index)
        if self.code.dtype == "float32":
            stored = T.nearbyint(stored / self.value("scale", channel))
            if self.code.zero is not None:
                stored = stored + cast("float32", self.value("zero", channel), 1)
            low = float(self.offset - SHIFT)
            stored = T.Min(T.Max(stored, const(low, "float32")), const(low + 255, "float32"))
        return T.Bind(cast("int32", stored, 1) - const(self.offset))

    def walk(self, visit: Callable[[Expr, Expr], Callable[[Expr, Expr, Expr], None]]) -> None:
        """visit(run, byte)(lane, at, code) for all weights but those of strips.

        `run` numbers the packed segments [group][block][segment], `byte` is the weight's place in one, `at` that of
        its channel in the per-channel arrays.
        """
        n, lanes = self.sizes, self.code.lanes
        with T.serial(0, n["groups"]) as g, T.serial(0, self.blocks) as b:
            valid = T.Bind(T.Min(const(lanes), n["outputs"] - b * lanes))
            first = T.Bind((g * self.blocks + b) * lanes)
            origin = T.Bind(n["start"] + g * n["group_step"] + b * lanes * n["output_step"])
            with T.serial(0, n["segments"]) as s, T.serial(0, n["taps"]) as t, T.serial(0, n["inputs"]) as c:
                source = T.Bind(origin + (s * n["taps"] + t) * n["step"] + c * n["input_step"])
                put = visit((g * self.blocks + b) * n["segments"] + s, t * n["inputs"] + c)
                with T.serial(0, valid) as i:
                    channel = g * n["outputs"] + b * lanes + i
                    put(i, first + i, self.weight(source + i * n["output_step"], channel))

    def table(self, places: Buffer, count: Buffer) -> None:
        """Write the table of the `count` codes that appear, ascending, and where it holds each code to `places`."""
        packed = self.given["packed"]
        loop(1 << 8, lambda v: store(places, const(0), v))
        self.walk(lambda run, byte: lambda lane, at, code: store(places, const(1), code + SHIFT))
        with T.serial(0, 1 << 8) as v, T.If(load(places, v) != const(0)), T.Then():
            place = T.Bind(T.Min(load(count, 0), const(CODES - 1)))
            store(places, place, v)
            for copy in range(TABLE_BYTES // CODES):
                store(packed, cast("int8", v - SHIFT, 1), place + copy * CODES)
            store(count, load(count, 0) + 1, 0)

    def dense(self, places: Buffer | None, widest: Buffer) -> None:
        """[group][block][segment][quad or pair of quads][byte]; depthwise: [block][kernel position][lane]."""
        code, packed = self.code, self.given["packed"]

        def visit(run: Expr, byte: Expr) -> Callable[[Expr, Expr, Expr], None]:
            quad, k = byte, byte
            if code.group > 1:
                quad = T.shift_right(byte, const(code.group.bit_length() - 1))
                k = T.bitwise_and(byte, const(code.group - 1))
            row = quad if places is None else T.shift_right(quad, const(1))
            inside = T.bitwise_and(k, const(1)) * code.order[1] + T.shift_right(k, const(1)) * code.order[2]
            start = T.Bind((run * self.quads + row) * self.vector + inside)
            if places is None:
                return lambda lane, at, value: put(at, value, start + lane * code.order[0], value)
            shift = T.Bind(T.bitwise_and(quad, const(1)) * 4)

            def put_index(lane: Expr, at: Expr, value: Expr) -> None:
                target = TABLE_BYTES + start + lane * code.order[0]
                held = cast("int32", load(packed, target), 1)
                put(at, value, target, T.bitwise_or(held, T.shift_left(load(places, value + SHIFT), shift)))

            return put_index

        def put(at: Expr, value: Expr, target: Expr, byte: Expr) -> None:
            store(packed, cast("int8", byte, 1), target)
            self.count(at, value, widest)

        self.walk(visit)

    def strip_of(self, channel: Expr) -> tuple[Expr, Expr, Expr]:
        """First channel and lanes of the strip of `channel` (ConvSpec.strip_of for any sizes), and its place in it."""
        n, full = self.sizes, self.code.lanes
        found = local(2, "int32")  # values from memory: TVM's passes take long over what follows from a choice
        store(found, T.floordiv(channel, const(4 * full)) * (4 * full), 0)
        store(found, const(full), 1)
        for i in (1, 2):
            with T.If(channel >= n[f"first_{i}"]), T.Then():
                store(found, n[f"first_{i}"], 0)
                store(found, n[f"lanes_{i}"], 1)
        start, lanes = T.Bind(load(found, 0)), T.Bind(load(found, 1))
        return start, lanes, T.Bind(strip_place(channel, start, lanes))

    def strips(self, widest: Buffer, dots: tuple[tuple[int | None, ...], ...]) -> None:
        """[strip][dot][vector][lane][tap]"""
        n, packed = self.sizes, self.given["packed"]
        with T.serial(0, n["outputs"]) as i:
            start, lanes, at = self.strip_of(i)
            first, origin = T.Bind(start * (len(dots) - 1) + at), T.Bind(n["start"] + i * n["output_step"])
            for k, taps in enumerate(dots):
                for byte, tap in enumerate(taps):
                    if tap is not None:
                        value = self.weight(origin + n["step"] * tap, i)
                        store(packed, cast("int8", value, 1), (first + lanes * (GROUP * k)) * GROUP + byte)
            with T.serial(0, n["taps"]) as t:
                self.count(at, self.weight(origin + n["step"] * t, i), widest)

    def count(self, at: Expr, value: Expr, widest: Buffer) -> None:
        """Add a weight to the sum of its channel, which stands where its bias will be."""
        integers = self.given["integers"]
        store(integers, load(integers, at) + value, at)
        if self.code.narrow:
            store(widest, T.Max(load(widest, 0), T.Max(value, const(0) - value)), 0)

    # channels

    def per_channel(self) -> None:
        """Integers and scales of every channel."""
        n = self.sizes
        if self.code.dots is not None:
            with T.serial(0, n["outputs"]) as i:
                self.channel(self.strip_of(i)[2], i)
        else:
            with T.serial(0, n["groups"]) as g, T.serial(0, n["outputs"]) as i:
                self.channel(T.Bind(g * self.blocks * self.code.lanes + i), T.Bind(g * n["outputs"] + i))

    def zero(self, channel: Expr) -> Expr:
        """Weight zero point of `channel` in the packed codes."""
        if self.code.zero is None:
            return const(-self.offset)
        return T.Bind(cast("int32", self.value("zero", channel), 1) - const(self.offset))

    def channel(self, at: Expr, channel: Expr) -> None:
        """One output channel's bias', zero point and scale; its sum of weights is in the bias' place."""
        given, integers = self.given, self.given["integers"]
        unit = T.Bind(load(given["quant_x"], const(SCALE)) * self.value("scale", channel))
        scale = T.Bind(T.Min(unit / load(given["quant"], const(SCALE)), const(MOST_SCALE, "float32")))
        store(given["out_scale"], scale, at)
        zero = self.zero(channel)
        zero_x = cast("int32", load(given["quant_x"], const(ZERO)), 1) - self.code.offset
        centred = load(integers, at) - zero * self.depth
        bias = T.Bind(self.bias(channel, unit) - zero_x * centred)
        store(integers, bias, at)
        store(integers, zero, self.lanes + at)
        # no sum is farther from 0; half of int32 is room enough for the rounding of these float32 numbers
        farthest = cast("float32", self.depth, 1) * const(255.0 * 128, "float32") + T.abs(cast("float32", bias, 1))
        far = farthest * scale > const(2.0**30, "float32")
        with T.If(T.Or(zero != const(0), far)), T.Then():
            store(integers, const(1), self.lanes * 2)

    def bias(self, channel: Expr, unit: Expr) -> Expr:
        """int32 bias in units of s_x * s_w; one in another unit or in float32 is converted, rounded to the nearest."""
        code = self.code
        if code.bias is None:
            return const(0)
        value = self.value("bias", channel)
        limit = float(2**31 - 1)

        def rounded(real: Expr) -> Expr:
            real = T.Min(T.Max(T.nearbyint(real), const(-limit, "float64")), const(limit, "float64"))
            return cast("int32", real, 1)

        if code.bias_scale is None:
            return rounded(cast("float64", value, 1) / cast("float64", unit, 1))
        if code.bias_zero is not None:
            value = value - self.value("bias_zero", channel)
        own = self.value("bias_scale", channel)
        ratio = cast("float64", own, 1) / cast("float64", unit, 1)
        return T.if_then_else(own == unit, value, rounded(cast("float64", value, 1) * ratio))
