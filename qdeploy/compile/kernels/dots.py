"""A target's byte dot product: 4 unsigned by 4 signed bytes into each 32-bit lane, exactly."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.emit import Expr, const, splat, splat_const, typed
from qdeploy.compile.llvm import Dot

GROUP = 4  # bytes of one 32-bit lane


def dot_weights(dot: Dot, weights: Expr) -> list[Expr]:
    """int8 [lanes * 4] -> what `dot_step` multiplies with, bound once and used for many pixels."""
    n = dot.lanes
    if dot.instruction == "vpdpbusd":
        return [T.Bind(weights)]
    if dot.instruction == "pmaddwd":
        pairs = T.Bind(T.reinterpret(typed("int16", 2 * n), weights))
        eight = splat_const(8, "int16", 2 * n)
        even = T.shift_right(T.shift_left(pairs, eight), eight)
        return [T.Bind(even), T.Bind(T.shift_right(pairs, eight))]
    quads = T.Bind(T.reinterpret(typed("int32", n), weights))
    sign = splat_const(24, "int32", n)
    parts = [T.shift_left(quads, splat_const(24 - 8 * i, "int32", n)) for i in range(GROUP)]
    return [T.Bind(T.shift_right(part, sign)) for part in parts]


def dot_inputs(dot: Dot, codes: Expr) -> list[Expr]:
    """uint8 [4] -> the same four codes in every lane, in the form that `dot_step` multiplies."""
    n = dot.lanes
    if dot.instruction == "none":
        quad = T.Bind(T.reinterpret("int32", codes))
        parts = [T.bitwise_and(T.shift_right(quad, const(8 * i)), const(255)) for i in range(GROUP)]
        return [T.Bind(splat(part, n)) for part in parts]
    quads = T.Bind(T.Broadcast(T.reinterpret("int32", codes), n))
    if dot.instruction == "vpdpbusd":
        return [T.Bind(T.reinterpret(typed("int8", 4 * n), quads))]
    low = splat_const(0x00FF00FF, "int32", n)
    odd = T.bitwise_and(T.shift_right(quads, splat_const(8, "int32", n)), low)
    return [T.Bind(T.reinterpret(typed("int16", 2 * n), part)) for part in (T.bitwise_and(quads, low), odd)]


def dot_step(dot: Dot, acc: Expr, inputs: list[Expr], weights: list[Expr]) -> Expr:
    """int32 [lanes] + the sum over 4 bytes of input * weight; exact."""
    n = dot.lanes
    if dot.instruction == "vpdpbusd":
        return T.call_llvm_pure_intrin(typed("int32", n), f"llvm.x86.avx512.vpdpbusd.{32 * n}", acc, *inputs, *weights)
    if dot.instruction == "pmaddwd":
        name = "llvm.x86.avx512.pmaddw.d.512" if n == 16 else "llvm.x86.avx2.pmadd.wd"
        for x, w in zip(inputs, weights, strict=True):
            acc = acc + T.call_llvm_pure_intrin(typed("int32", n), name, x, w)
        return acc
    for x, w in zip(inputs, weights, strict=True):
        acc = acc + x * w
    return acc
