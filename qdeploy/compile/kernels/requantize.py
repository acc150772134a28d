"""The end of kernels: int32 accumulators or float32 values -> codes, four vectors at a time.

    min(value, highest - zero) -> rne -> pack to 16 bits -> + zero point -> pack to uint8 -> max(lowest)

is docs/integers.md's order with the upper bound taken before rounding: it is an integer, so the result is the same, and
no value is too large for the conversion. Both packings saturate; what saturates lies outside 0..255 and is clamped.

A convolution's products float32(acc) * scale need no bound of float32: `prepare` finds out whether one may leave int32
(pack_weights.py), and only then are sums cut first (`bounded`). The upper bound is taken last, of 64 bytes at once.

A convolution may go on from there (graph.Then): its codes are looked up in a table, or another tensor is added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import neon
from qdeploy.compile.kernels.emit import (
    HIGH,
    LOW,
    QUANT,
    SCALE,
    ZERO,
    Buffer,
    Expr,
    cast,
    const,
    fence,
    load,
    loop,
    quantizer,
    splat,
    store,
    typed,
)
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.kernels.lookup import TABLE, look_up_part, table_vectors
from qdeploy.compile.llvm import Dot

SHIFT = 128  # int8 codes + 128 are uint8 codes
MAGIC = 1.5 * 2**23  # floats near it are whole numbers
MOST_SCALE = 512.0  # a larger scale of a convolution changes no code: from 512 on, every sum but 0 saturates
LEAST = 4  # lanes of the narrowest vectors
VECTORS = 4  # vectors of int32 that become one vector of bytes
# lanes of int32 -> intrinsics: float32 to int32 (rne), int32 to int16, int16 to uint8, both saturating, dwords permuted
CONVERT = {4: "sse2.cvtps2dq", 8: "avx.cvt.ps2dq.256", 16: "avx512.mask.cvtps2dq.512"}
NARROW = {4: "sse2.packssdw.128", 8: "avx2.packssdw", 16: "avx512.packssdw.512"}
BYTES = {4: "sse2.packuswb.128", 8: "avx2.packuswb", 16: "avx512.packuswb.512"}
PERMUTE = {8: "avx2.permd", 16: "avx512.permvar.si.512"}


@dataclass(frozen=True)
class Piece:
    """One vector of accumulators: its first `valid` codes belong at `base` + `offset` (known when compiling)."""

    acc: Expr
    scale: Expr
    valid: int
    base: Expr
    offset: int


@dataclass(frozen=True)
class Limits:
    """An output quantizer as scalars, made once a kernel; `neon`: by which instructions codes are packed."""

    neon: bool
    top: Expr  # float32: highest code - zero point
    zero: Expr  # int16
    low: Expr  # uint8
    high: Expr  # uint8


@dataclass(frozen=True)
class Fused:
    """What a convolution does to its codes (graph.Then): look them up in a table, or add the codes of `other`.

    `first`: the convolution is the operand a of the sum; `signed`: which of a, b and the sum are int8 in the file.
    """

    kind: str  # table or add
    other: Layout | None = None
    first: bool = True
    signed: tuple[bool, bool, bool] = (False, False, False)

    @property
    def params(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Kernel parameters behind the convolution's own quantizer: the last one is the stored codes' quantizer."""
        if self.other is None:
            return [("table", *TABLE), ("quant_y", *QUANT)]
        return [("other", (self.other.size,), "uint8"), ("quant_a", *QUANT), ("quant_b", *QUANT), ("quant_y", *QUANT)]


@dataclass(frozen=True)
class Sum:
    """A sum that is made before the codes are stored."""

    other: Buffer  # codes
    x: Layout  # theirs
    y: Layout
    signed: bool  # they are int8 in the file
    first: bool  # the convolution is operand a
    parameters: AddParameters
    magic: Expr  # float32: MAGIC less the convolution's zero point, and its lowest code, as the file counts codes
    low: Expr

    def at(self, place: Expr) -> Expr:
        """Where the other operand of the code at `place` of the output is."""
        x, y = self.x, self.y
        if x.row == y.row:
            return place + (x.at(0, 0) - y.at(0, 0))
        row = T.floordiv(place, const(y.row)) - y.border[0]
        return place + (row * (x.row - y.row) + (x.at(0, 0) - y.at(0, 0)))


@dataclass(frozen=True)
class Operands:
    """Buffers of a convolution kernel: codes, packed weights, integers and scales (pack.py), output, its quantizer.

    `dot` and `tables`, or `sum`, are what is done to the codes (graph.Then).
    """

    x: Buffer
    w: Buffer
    integers: Buffer
    scale: Buffer
    y: Buffer
    limits: Limits
    dot: Dot | None = None
    tables: Sequence[Expr] = ()
    sum: Sum | None = None

    def fused(self, then: Fused, dot: Dot, y: Layout, quant: Buffer, given: Sequence[Buffer]) -> Operands:
        """These with `then`; `quant` is the convolution's own quantizer, `given` the buffers of `then.params`."""
        if then.other is None:
            return replace(self, dot=dot, tables=table_vectors(dot, given[0]))
        signed = then.signed[0 if then.first else 1]
        zero, low = (T.Bind(own_code(quant, field, signed)) for field in (ZERO, LOW))
        magic = T.Bind(const(MAGIC, "float32") - zero)
        parameters = add_parameters(given[1:], then.signed, dot)
        other_signed = then.signed[1 if then.first else 0]
        return replace(
            self, sum=Sum(given[0], then.other, y, other_signed, then.first, parameters, magic, low)
        )  # fmt: skip


def limits(quant: Buffer, dot: Dot) -> Limits:
    """Read a packed quantizer."""
    zero = quantizer(quant, ZERO, 1)
    whole = cast("int32", load(quant, const(ZERO)), 1)
    top = T.Bind(load(quant, const(HIGH)) - zero)
    return Limits(dot.neon, top, T.Bind(cast("int16", whole, 1)), _code(quant, LOW), _code(quant, HIGH))


def own_limits(quant: Buffer, signed: bool, dot: Dot) -> Limits:
    """Bounds for float32 codes as the file counts them, zero point included: int8 ones are 128 less than ours."""
    top, zero = T.Bind(own_code(quant, HIGH, signed)), const(SHIFT if signed else 0, "int16")
    return Limits(dot.neon, top, zero, _code(quant, LOW), _code(quant, HIGH))


def _code(quant: Buffer, field: int) -> Expr:
    """LOW or HIGH of a packed quantizer, uint8."""
    return T.Bind(cast("uint8", cast("int32", load(quant, const(field)), 1), 1))


def own_code(quant: Buffer, field: int, signed: bool) -> Expr:
    """ZERO, LOW or HIGH of a packed quantizer as the file counts codes, float32."""
    code = load(quant, const(field))
    return code - const(float(SHIFT), "float32") if signed else code


# Sums and products ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AddParameters:
    """Scalars of a sum, made once a kernel: fma(a, ratio_a, fma(b, ratio_b, offset)), then rounded within `limits`."""

    ratio_a: Expr
    ratio_b: Expr
    offset: Expr
    limits: Limits


def fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """float32 a * b + c, rounded once."""
    return T.call_llvm_pure_intrin(typed("float32", lanes), "llvm.fma", a, b, c)


def add_parameters(quants: Sequence[Buffer], signed: Sequence[bool], dot: Dot) -> AddParameters:
    """docs/integers.md, Add: quantizers of a, which is added last, of b and of the sum; which ones are int8."""
    quant_a, quant_b, quant = quants
    scale = load(quant, const(SCALE))
    ratio_a, ratio_b = (T.Bind(load(q, const(SCALE)) / scale) for q in (quant_a, quant_b))
    zero_a, zero_b, zero = (own_code(q, ZERO, is_signed) for q, is_signed in zip(quants, signed, strict=True))
    offset = T.Bind(zero - fma(ratio_a, zero_a, fence(ratio_b * zero_b, 1), 1))
    return AddParameters(ratio_a, ratio_b, offset, own_limits(quant, signed[2], dot))


def own_codes(codes: Expr, signed: bool, lanes: int) -> Expr:
    """uint8 codes -> float32 codes as the file counts them."""
    if signed:
        flipped = T.bitwise_xor(codes, splat(const(SHIFT, "uint8"), lanes))
        codes = T.reinterpret(typed("int8", lanes), flipped)
    return cast("float32", cast("int32", codes, lanes), lanes)


def add(a: Expr, b: Expr, p: AddParameters, lanes: int) -> Expr:
    """The sum as a float32 code that is not rounded yet; a and b are float32 codes as the file counts them."""
    inner = fma(b, splat(p.ratio_b, lanes), splat(p.offset, lanes), lanes)
    return fma(a, splat(p.ratio_a, lanes), inner, lanes)


# Rounding and packing ------------------------------------------------------------------------------------------------


def call(dtype: str, lanes: int, name: str, *args: Expr) -> Expr:
    """An x86 intrinsic without side effects."""
    return T.call_llvm_pure_intrin(typed(dtype, lanes), f"llvm.x86.{name}", *args)


def to_integers(real: Expr, bounds: Limits, lanes: int) -> Expr:
    """float32 in units of the output's scale -> int32, rounded to nearest even, cut at the top only."""
    return rounded(T.Min(real, splat(bounds.top, lanes)), bounds, lanes)


def rounded(real: Expr, bounds: Limits, lanes: int) -> Expr:
    """float32 that int32 can hold, or is negative -> int32, rounded to nearest even."""
    if bounds.neon:
        return neon.rounded(real)
    if lanes == 16:  # 4: round as the processor is set, to nearest even
        return call("int32", 16, CONVERT[16], real, splat(const(0), 16), const(-1, "int16"), const(4))
    return call("int32", lanes, CONVERT[lanes], real)


def cuts(scale: Expr, lanes: int) -> Expr:
    """How far from 0 sums may be so that no product with `scale` (at most MOST_SCALE) leaves int32: int32.

    What `bounded` cuts saturates anyway.
    """
    reach, far = T.Bind(splat(const(MOST_SCALE, "float32"), lanes) / scale), splat(const(2.0**30, "float32"), lanes)
    cut = cast("int32", T.Min(reach, far), lanes) + splat(const(1), lanes)
    return T.Bind(T.Select(reach < far, cut, splat(const(2**31 - 1), lanes)))


def bounded(acc: Expr, cut: Expr, lanes: int) -> Expr:
    """Sums no farther from 0 than `cut`."""
    return T.Max(T.Min(acc, cut), splat(const(0), lanes) - cut)


def packed(vectors: list[Expr], bounds: Limits, lanes: int, in_order: bool, cut: bool = False) -> Expr:
    """4 vectors of whole numbers less the zero point -> uint8 [4 * lanes], one vector behind the other when `in_order`.

    Otherwise each 16 bytes hold 4 codes of each vector in turn, which is how packing leaves them. `cut`: the vectors
    are not cut at the top yet.
    """
    halves = []
    for i in (0, 2):
        both = vectors[i], vectors[i + 1]
        half = neon.to_int16(*both) if bounds.neon else call("int16", 2 * lanes, NARROW[lanes], *both)
        offset = splat(bounds.zero, 2 * lanes)
        halves.append(T.call_llvm_pure_intrin(typed("int16", 2 * lanes), "llvm.sadd.sat", half, offset))
    codes = neon.to_uint8(*halves) if bounds.neon else call("uint8", 4 * lanes, BYTES[lanes], *halves)
    codes = T.Max(codes, splat(bounds.low, 4 * lanes))
    if cut:
        codes = T.Min(codes, splat(bounds.high, 4 * lanes))
    if in_order and lanes in PERMUTE:
        # dword i of the result is dword (i mod q) * 4 + i / q, q = lanes / 4: the permutation takes i * 4 modulo lanes
        quarter = splat(const({8: 1, 16: 2}[lanes]), lanes)
        index = T.Ramp(const(0), const(4), lanes) + T.shift_right(T.Ramp(const(0), const(1), lanes), quarter)
        dwords = T.reinterpret(typed("int32", lanes), codes)
        codes = T.reinterpret(typed("uint8", 4 * lanes), call("int32", lanes, PERMUTE[lanes], dwords, index))
    return T.Bind(codes)


def store_run(y: Buffer, codes: Expr, lanes: int, first: int, count: int, offset: Expr) -> None:
    """Store codes[first : first + count] of a vector of `lanes`, in as few stores of a power of two as there can be."""
    done = 0
    while done < count:
        at = first + done
        size = min(1 << ((count - done).bit_length() - 1), at & -at or lanes)
        store(y, codes if size == lanes else _part(codes, lanes, at, size), offset + done, size)
        done += size


def _part(codes: Expr, lanes: int, at: int, size: int) -> Expr:
    """codes[at : at + size], `at` a multiple of `size`, a power of two. Up to 8 bytes are taken as one integer:

    LLVM 22 does not come to an end over some shuffles of that size.
    """
    if size > 8:
        return T.Shuffle([codes], [const(at + i) for i in range(size)])
    if size == 1:
        return T.Shuffle([codes], [const(at)])
    whole = T.reinterpret(typed(f"int{8 * size}", lanes // size), codes)
    return T.reinterpret(typed("uint8", size), T.Shuffle([whole], [const(at // size)]))


def finish(pieces: list[Piece], o: Operands, lanes: int) -> None:
    """Requantize and store; neighbours in `pieces` that are neighbours in memory are stored together."""
    for start in range(0, len(pieces), VECTORS):
        part = pieces[start : start + VECTORS]
        codes = finished(part + [part[-1]] * (VECTORS - len(part)), o, lanes)
        i = 0
        while i < len(part):
            end, count = i + 1, part[i].valid
            while end < len(part) and part[end - 1].valid == lanes and part[end].offset == part[i].offset + count:
                count += part[end].valid
                end += 1
            store_run(o.y, codes, VECTORS * lanes, i * lanes, count, part[i].base + part[i].offset)
            i = end


def finished(pieces: list[Piece], o: Operands, lanes: int) -> Expr:
    """The codes of 4 vectors, after what the convolution does to them."""
    bounds = o.limits
    if o.sum is None:
        vectors = [rounded(cast("float32", p.acc, lanes) * p.scale, bounds, lanes) for p in pieces]
    else:
        bounds = o.sum.parameters.limits
        vectors = [to_integers(summed(p, o.sum, o.limits, lanes), bounds, lanes) for p in pieces]
    codes = packed(vectors, bounds, lanes, True, cut=o.sum is None)
    return codes if o.dot is None else look_up_part(o.dot, o.tables, codes, VECTORS * lanes)


def summed(piece: Piece, s: Sum, bounds: Limits, lanes: int) -> Expr:
    """The sum of a convolution's codes and the other operand as a float32 code that is not rounded yet.

    Its own codes stay in float32: adding MAGIC rounds to nearest even, and what is too low for that to be exact stays
    below the lowest code.
    """
    real = T.Min(cast("float32", piece.acc, lanes) * piece.scale, splat(bounds.top, lanes))
    steps = real + splat(const(MAGIC, "float32"), lanes)
    own = T.Bind(T.Max(steps - splat(s.magic, lanes), splat(s.low, lanes)))
    other = own_codes(load(s.other, s.at(piece.base + piece.offset), lanes), s.signed, lanes)
    return add(own, other, s.parameters, lanes) if s.first else add(other, own, s.parameters, lanes)


def finish_strip(acc: list[Expr], scales: list[Expr], valid: int, at: Expr, o: Operands, n: int) -> None:
    """Requantize 4 vectors of `n` interleaved channels (depthwise.rows) and store the first `valid` codes at `at`."""
    vectors = [rounded(cast("float32", a, n) * s, o.limits, n) for a, s in zip(acc, scales, strict=True)]
    codes = packed(vectors, o.limits, n, False, cut=True)
    if o.dot is not None:
        codes = look_up_part(o.dot, o.tables, codes, VECTORS * n)
    store_run(o.y, codes, VECTORS * n, 0, valid, at)


# Runs of codes -------------------------------------------------------------------------------------------------------


def cover(count: int, lanes: int, least: int, body: Callable[[Expr, int, int], None]) -> None:
    """Cover `count` codes by vectors of 4 * n: body(first code, n, how many of them are valid).

    n is `lanes`, for the last vector also less, down to `least`. The last vector is moved back so that it is full,
    unless there are fewer codes than it holds: codes may be made twice.
    """
    size = VECTORS * lanes
    loop(count // size, lambda i: body(i * size, lanes, size))
    if rest := count % size:
        n = lanes
        while n > least and VECTORS * (n // 2) >= rest:
            n //= 2
        body(max(0, count - VECTORS * n), n, min(count, VECTORS * n))
