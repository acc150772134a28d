"""`prepare`: one level's ONNX initializers -> what the kernels read. Runs once a level, so it is plain loops.

A packed quantizer is float32 [4]: scale, zero point, lowest and highest code, all in uint8 codes (int8 ones are
shifted by 128). A packed convolution is its weights in kernel order, its integers (bias with the input's zero point
folded in, weight zero points, and at the end 1 if one of those is not 0) and its requantization scales.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.conv import ConvSpec
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.emit import HIGH, LOW, SCALE, ZERO, Buffer, Expr, cast, const, load, loop, prim_func, store

SHIFT = 128  # int8 codes + 128 are uint8 codes


@dataclass(frozen=True)
class Stored:
    """dtype and shape of an initializer."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizerSpec:
    """Which parts a quantizer has."""

    scale: Stored
    zero_point: Stored | None
    clip_min: Stored | None
    clip_max: Stored | None
    low: float | None
    high: float | None


def _inputs(parts: list[tuple[str, Stored | None]]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, part.shape, part.dtype) for name, part in parts if part is not None]


def _shifted(buffer: Buffer, dtype: str, index: Expr) -> Expr:
    """A code as an unsigned one, int32."""
    return cast("int32", load(buffer, index), 1) + const(SHIFT if dtype == "int8" else 0)


def quantizer_kernel(name: str, spec: QuantizerSpec) -> tirx.PrimFunc:
    """(scale, zero point?, clip_min?, clip_max?) -> float32 [4]."""
    parts = [("scale", spec.scale), ("zero", spec.zero_point), ("least", spec.clip_min), ("most", spec.clip_max)]
    params = _inputs(parts)

    def body(*buffers: Buffer) -> None:
        given = dict(zip([p[0] for p in params], buffers, strict=False))
        dtypes = {p[0]: p[2] for p in params}
        out = buffers[-1]

        def code(part: str, default: int) -> Expr:
            if part not in given:
                return const(float(default), "float32")
            return cast("float32", _shifted(given[part], dtypes[part], const(0)), 1)

        def bounded(value: float) -> Expr:
            """The code of a real value, not yet rounded into a bound."""
            step = T.nearbyint(const(value, "float32") / load(out, const(SCALE))) + load(out, const(ZERO))
            return T.Min(T.Max(step, const(0.0, "float32")), const(255.0, "float32"))

        store(out, load(given["scale"], const(0)), const(SCALE))
        store(out, code("zero", 0), const(ZERO))
        store(out, code("least", 0), const(LOW))
        store(out, code("most", 255), const(HIGH))
        if spec.low is not None:
            store(out, T.Max(load(out, const(LOW)), bounded(spec.low)), const(LOW))
        if spec.high is not None:
            store(out, T.Min(load(out, const(HIGH)), bounded(spec.high)), const(HIGH))

    return prim_func(name, [*params, ("out", (4,), "float32")], body)


@dataclass(frozen=True)
class WeightSpec:
    """Geometry and stored parts of one convolution."""

    conv: ConvSpec
    weight: Stored
    scale: Stored
    zero_point: Stored | None
    bias: Stored | None
    bias_scale: Stored | None
    bias_zero_point: Stored | None
    transposed: bool  # weight is [K, O]
    signed: bool  # codes are int8; float32 weights become codes of their zero point's type, uint8 without one


def pack_kernel(name: str, spec: WeightSpec) -> tirx.PrimFunc:
    """(stored parts, input quantizer, output quantizer) -> (weights, integers, scale)."""
    parts = [
        ("weight", spec.weight), ("scale", spec.scale), ("zero", spec.zero_point), ("bias", spec.bias),
        ("bias_scale", spec.bias_scale), ("bias_zero", spec.bias_zero_point),
    ]  # fmt: skip
    params = _inputs([*parts, ("quant_x", Stored("float32", (4,))), ("quant", Stored("float32", (4,)))])
    conv = spec.conv
    outs = [
        ("packed", (conv.weight_bytes,), "int8"),
        ("integers", (2 * conv.padded + 1,), "int32"),
        ("out_scale", (conv.padded,), "float32"),
    ]

    def body(*buffers: Buffer) -> None:
        given = dict(zip([p[0] for p in (*params, *outs)], buffers, strict=True))
        packer = Packer(spec, given)
        (packer.strips if conv.by_rows else packer.depthwise if conv.depthwise else packer.dense)()
        packer.channels()

    return prim_func(name, [*params, *outs], body)


class Packer:
    """Writes the body of one `pack_kernel`; `given` maps parts to buffers."""

    def __init__(self, spec: WeightSpec, given: dict[str, Buffer]) -> None:
        self.spec, self.conv, self.given = spec, spec.conv, given
        kh, kw = self.conv.window.kernel
        self.depth = self.conv.inputs * kh * kw  # weights of one output channel
        self.total = self.conv.y.channels
        self.offset = 0 if spec.signed else SHIFT  # uint8 weights - 128 are int8 ones

    def code(self, channel: Expr, index: Expr) -> Expr:
        """Weight `index` of output `channel`, int32 in -128..127."""
        at = index * self.total + channel if self.spec.transposed else channel * self.depth + index
        stored = load(self.given["weight"], at)
        if self.spec.weight.dtype == "float32":
            stored = T.nearbyint(stored / self.value("scale", channel))
            if self.spec.zero_point is not None:
                stored = stored + cast("float32", self.value("zero", channel), 1)
            low = float(self.offset - SHIFT)
            stored = T.Min(T.Max(stored, const(low, "float32")), const(low + 255, "float32"))
        return cast("int32", stored, 1) - const(self.offset)

    def value(self, part: str, channel: Expr) -> Expr:
        """A part that is one value or one a channel."""
        stored = getattr(self.spec, {"zero": "zero_point", "bias_zero": "bias_zero_point"}.get(part, part))
        size = 1
        for n in stored.shape:
            size *= n
        return load(self.given[part], const(0) if size == 1 else channel)

    def zero(self, channel: Expr) -> Expr:
        """Weight zero point of `channel` in the packed codes."""
        if self.spec.zero_point is None:
            return const(-self.offset)
        return cast("int32", self.value("zero", channel), 1) - const(self.offset)

    def depthwise(self) -> None:
        """[block][tap][lane]"""
        conv, lanes = self.conv, self.conv.dot.lanes

        def one(b: Expr, t: Expr, i: Expr) -> None:
            channel = b * lanes + i
            code = T.if_then_else(channel < const(self.total), cast("int8", self.code(channel, t), 1), const(0, "int8"))
            store(self.given["packed"], code, (b * conv.segments + t) * lanes + i)

        loop(conv.blocks, lambda b: loop(conv.segments, lambda t: loop(lanes, lambda i: one(b, t, i))))

    def strips(self) -> None:
        """[strip][4 kernel rows][kernel column][vector][lane][row]; ConvSpec.place says which channel a lane holds."""
        conv, (kh, kw) = self.conv, self.conv.window.kernel
        with T.serial(0, conv.padded) as i, T.serial(0, conv.row_quads * GROUP) as r, T.serial(0, kw) as t:
            start, lanes = conv.strip_of(i)
            inside = T.And(i < const(self.total), r < const(kh))
            code = T.if_then_else(inside, cast("int8", self.code(i, r * kw + t), 1), const(0, "int8"))
            column = T.floordiv(r, const(GROUP)) * kw + t
            place = start * (conv.row_quads * kw) + column * (GROUP * lanes) + conv.place(i) - start
            store(self.given["packed"], code, place * GROUP + T.floormod(r, const(GROUP)))

    def dense(self) -> None:
        """[group][block][segment][4 bytes][lane][byte]"""
        conv, lanes = self.conv, self.conv.dot.lanes
        taps = conv.window.kernel[0] * conv.window.kernel[1]

        def one(g: Expr, b: Expr, s: Expr, q: Expr, i: Expr, k: Expr) -> None:
            lane, byte = b * lanes + i, q * GROUP + k
            tap = s * conv.taps + T.floordiv(byte, conv.inputs)
            index = T.floormod(byte, conv.inputs) * taps + tap
            inside = T.And(lane < const(conv.outputs), byte < const(conv.taps * conv.inputs))
            code = cast("int8", self.code(g * conv.outputs + lane, index), 1)
            at = ((((g * conv.blocks + b) * conv.segments + s) * conv.quads + q) * lanes + i) * GROUP + k
            store(self.given["packed"], T.if_then_else(inside, code, const(0, "int8")), at)

        def nest(extents: tuple[int, ...], found: tuple[Expr, ...]) -> None:
            if extents:
                with T.serial(0, extents[0]) as i:
                    nest(extents[1:], (*found, i))
            else:
                one(*found)

        nest((conv.groups, conv.blocks, conv.segments, conv.quads, lanes, GROUP), ())

    def channels(self) -> None:
        """Integers and scales of every channel; padding lanes get 0."""
        conv, given = self.conv, self.given
        groups = 1 if conv.depthwise else conv.groups
        integers, lanes = given["integers"], conv.padded // groups
        store(integers, const(0), const(2 * conv.padded))

        def lane(g: Expr, i: Expr) -> None:
            at, channel = g * lanes + conv.place(i), g * conv.outputs + i
            store(integers, const(0), at)
            store(integers, const(0), conv.padded + at)
            store(given["out_scale"], const(0.0, "float32"), at)
            with T.If(i < const(conv.outputs)), T.Then():
                self.channel(at, channel)

        with T.serial(0, groups) as g, T.serial(0, lanes) as i:
            lane(g, i)

    def channel(self, at: Expr, channel: Expr) -> None:
        """One output channel's bias', zero point and scale."""
        given, integers = self.given, self.given["integers"]
        unit = load(given["quant_x"], const(SCALE)) * self.value("scale", channel)
        store(given["out_scale"], unit / load(given["quant"], const(SCALE)), at)
        store(integers, self.bias(channel, unit), at)
        zero_x = cast("int32", load(given["quant_x"], const(ZERO)), 1)

        def weight(k: Expr) -> None:
            centred = self.code(channel, k) - self.zero(channel)
            store(integers, load(integers, at) - zero_x * centred, at)

        loop(self.depth, weight)
        store(integers, self.zero(channel), self.conv.padded + at)
        with T.If(self.zero(channel) != const(0)), T.Then():
            store(integers, const(1), const(2 * self.conv.padded))

    def bias(self, channel: Expr, unit: Expr) -> Expr:
        """int32 bias in units of s_x * s_w; one in another unit or in float32 is converted, rounded to the nearest."""
        if self.spec.bias is None:
            return const(0)
        value = load(self.given["bias"], channel)
        limit = float(2**31 - 1)

        def rounded(real: Expr) -> Expr:
            real = T.Min(T.Max(T.nearbyint(real), const(-limit, "float64")), const(limit, "float64"))
            return cast("int32", real, 1)

        if self.spec.bias_scale is None:
            return rounded(cast("float64", value, 1) / cast("float64", unit, 1))
        if self.spec.bias_zero_point is not None:
            value = value - self.value("bias_zero", channel)
        own = self.value("bias_scale", channel)
        ratio = cast("float64", own, 1) / cast("float64", unit, 1)
        return T.if_then_else(own == unit, value, rounded(cast("float64", value, 1) * ratio))
