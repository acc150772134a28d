"""Byte dot products: 4 unsigned by 4 signed bytes into each 32-bit lane, exactly.

A quad is multiplied in `steps` parts: vpdpbusd and pmaddubsw take it whole, pmaddwd two bytes at a time, widened to 16
bits. pmaddubsw adds two products in 16 bits, which is exact for weights of -64 .. 64 only (ConvSpec.narrow). Those of
aarch64 are in neon.py.
"""

from __future__ import annotations

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import neon
from qdeploy.compile.kernels.emit import Buffer, Expr, cast, const, fence, load, splat, splat_const, typed
from qdeploy.compile.llvm import Dot

GROUP = 4  # bytes of one 32-bit lane
# 32-bit lanes -> intrinsics: pairs of 16 bits into 32-bit lanes, pairs of bytes into 16-bit lanes, a table of 16 bytes
PAIRS = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}
BYTES = {4: "ssse3.pmadd.ub.sw.128", 8: "avx2.pmadd.ub.sw", 16: "avx512.pmaddubs.w.512"}
TABLE = {8: "avx2.pshuf.b", 16: "avx512.pshuf.b.512"}


def call(dtype: str, lanes: int, name: str, *args: Expr) -> Expr:
    """An x86 intrinsic without side effects."""
    return T.call_llvm_pure_intrin(typed(dtype, lanes), f"llvm.x86.{name}", *args)


def steps(dot: Dot) -> int:
    """Parts of a quad that are multiplied one after the other."""
    return 2 if dot.instruction == "pmaddwd" else 1


def dot_weights(dot: Dot, weights: Buffer, at: Expr, part: int) -> Expr:
    """One part of the packed vector (ConvSpec.byte_place) that begins at `at`, as `dot_step` multiplies it."""
    size = GROUP * dot.lanes // steps(dot)
    return widened_part(dot, load(weights, at + part * size, size))


def part_of(dot: Dot, vector: Expr, part: int) -> Expr:
    """One part of a packed vector that is in a register."""
    size = GROUP * dot.lanes // steps(dot)
    return vector if steps(dot) == 1 else T.Shuffle([vector], [const(part * size + i) for i in range(size)])


def widened_part(dot: Dot, part: Expr) -> Expr:
    """int8 weights of a part -> what `dot_step` multiplies."""
    return T.Bind(cast("int16", part, 2 * dot.lanes) if dot.instruction == "pmaddwd" else part)


def dot_inputs(dot: Dot, x: Buffer, at: Expr, part: int) -> Expr:
    """One part of the four codes (uint8, or int16 for pmaddwd alone) at `at`, in every lane."""
    n = dot.lanes
    if dot.instruction == "pmaddwd":
        pair = T.reinterpret("int32", cast("int16", load(x, at + 2 * part, 2), 2))
        return T.Bind(T.reinterpret(typed("int16", 2 * n), splat(pair, n)))
    return T.Bind(T.reinterpret(typed("int8", GROUP * n), splat(T.reinterpret("int32", load(x, at, GROUP)), n)))


def dot_step(dot: Dot, acc: Expr, inputs: list[Expr], weights: list[Expr]) -> Expr:
    """int32 [lanes] + the sum of the products of some parts."""
    for x, w in zip(inputs, weights, strict=True):
        acc = _step(dot, acc, x, w)
    return acc


def _step(dot: Dot, acc: Expr, x: Expr, w: Expr) -> Expr:
    n = dot.lanes
    if dot.neon:
        return neon.products(dot, acc, x, w)
    if dot.instruction == "vpdpbusd":
        return call("int32", n, f"avx512.vpdpbusd.{32 * n}", acc, x, w)
    if dot.instruction == "pmaddubsw":
        pairs = call("int16", 2 * n, BYTES[n], x, w)
        products = call("int32", n, PAIRS[n], pairs, splat_const(1, "int16", 2 * n))
    else:
        products = call("int32", n, PAIRS[n], x, w)
    # LLVM would add up products of several steps first, and run out of registers for them: the fence, which is no
    # instruction, keeps each sum as it is written
    return T.reinterpret(typed("int32", n), fence(T.reinterpret(typed("float32", n), acc + products), n))


def looked_up(dot: Dot, table: Expr, indices: Expr, high: bool) -> Expr:
    """uint8 [4 * lanes] with 4-bit indices in its low or high halves -> int8 codes of `table`."""
    n = GROUP * dot.lanes
    index = T.shift_right(indices, splat_const(4, "uint8", n)) if high else indices
    if dot.neon:
        return neon.looked_up_4(table, index if high else T.bitwise_and(index, splat_const(15, "uint8", n)))
    index = T.bitwise_and(index, splat_const(15, "uint8", n))
    return T.Bind(call("int8", n, TABLE[dot.lanes], table, index))
