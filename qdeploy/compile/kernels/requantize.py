"""The end of every convolution kernel: int32 accumulators -> codes, four vectors at a time.

    min(float32(acc) * scale, highest - zero) -> rne -> pack to 16 bits -> + zero point -> pack to uint8 -> max(lowest)

is docs/integers.md's order with the upper bound taken before rounding: it is an integer, so the result is the same, and
no product is too large for the conversion. Both packings saturate; what saturates lies outside 0..255 and is clamped.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.emit import (
    HIGH,
    LOW,
    ZERO,
    Buffer,
    Expr,
    cast,
    const,
    load,
    quantizer,
    splat,
    store,
    typed,
)

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
    """An output quantizer as scalars, made once a kernel."""

    top: Expr  # float32: highest code - zero point
    zero: Expr  # int16
    low: Expr  # uint8


@dataclass(frozen=True)
class Operands:
    """Buffers of a convolution kernel: codes, packed weights, integers and scales (pack.py), output, its quantizer."""

    x: Buffer
    w: Buffer
    integers: Buffer
    scale: Buffer
    y: Buffer
    limits: Limits


def limits(quant: Buffer) -> Limits:
    """Read a packed quantizer."""
    zero = quantizer(quant, ZERO, 1)
    whole = [cast("int32", load(quant, const(field)), 1) for field in (ZERO, LOW)]
    top = T.Bind(load(quant, const(HIGH)) - zero)
    return Limits(top, T.Bind(cast("int16", whole[0], 1)), T.Bind(cast("uint8", whole[1], 1)))


def call(dtype: str, lanes: int, name: str, *args: Expr) -> Expr:
    """An x86 intrinsic without side effects."""
    return T.call_llvm_pure_intrin(typed(dtype, lanes), f"llvm.x86.{name}", *args)


def rounded(acc: Expr, scale: Expr, bounds: Limits, lanes: int) -> Expr:
    """int32 -> int32 codes less the zero point, cut at the top only."""
    real = T.Min(cast("float32", acc, lanes) * scale, splat(bounds.top, lanes))
    if lanes == 16:  # 4: round as the processor is set, to nearest even
        return call("int32", 16, CONVERT[16], real, splat(const(0), 16), const(-1, "int16"), const(4))
    return call("int32", lanes, CONVERT[lanes], real)


def packed(vectors: list[Expr], bounds: Limits, lanes: int, in_order: bool) -> Expr:
    """4 vectors of `rounded` -> uint8 [4 * lanes], one vector behind the other when `in_order`.

    Otherwise each 16 bytes hold 4 codes of each vector in turn, which is how packing leaves them.
    """
    halves = []
    for i in (0, 2):
        half = call("int16", 2 * lanes, NARROW[lanes], vectors[i], vectors[i + 1])
        offset = splat(bounds.zero, 2 * lanes)
        halves.append(T.call_llvm_pure_intrin(typed("int16", 2 * lanes), "llvm.sadd.sat", half, offset))
    codes = call("uint8", 4 * lanes, BYTES[lanes], *halves)
    codes = T.Max(codes, splat(bounds.low, 4 * lanes))
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
        vectors = [rounded(p.acc, p.scale, o.limits, lanes) for p in part]
        codes = packed(vectors + [vectors[-1]] * (VECTORS - len(part)), o.limits, lanes, True)
        i = 0
        while i < len(part):
            end, count = i + 1, part[i].valid
            while end < len(part) and part[end - 1].valid == lanes and part[end].offset == part[i].offset + count:
                count += part[end].valid
                end += 1
            store_run(o.y, codes, VECTORS * lanes, i * lanes, count, part[i].base + part[i].offset)
            i = end


def finish_strip(acc: list[Expr], scales: list[Expr], valid: int, at: Expr, o: Operands, n: int) -> None:
    """Requantize 4 vectors of `n` interleaved channels (depthwise.rows) and store the first `valid` codes at `at`."""
    vectors = [rounded(a, s, o.limits, n) for a, s in zip(acc, scales, strict=True)]
    store_run(o.y, packed(vectors, o.limits, n, False), VECTORS * n, 0, valid, at)
