"""Vectors of aarch64: what takes another instruction there than on x86. All are of 128 bits, 4 lanes of int32.

Codes are multiplied by signed weights in one of these ways (llvm.Dot):

    sdot           4 products into each lane; codes less 128 (an exclusive or with 128) are signed
    usdot          the same with unsigned codes
    smull          products of 16 bits, pairs of which are added to int32 lanes (sadalp); codes less 128
    smlal          two such products are added up in 16 bits first: exact for weights of -127 .. 127

Codes are loaded 16 at a time; by-lane forms of the instructions take 4 of them for all 4 channels, smull and smlal
twice two of them. `codes` are what `loaded` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.emit import Buffer, Expr, const, load, splat_const, typed
from qdeploy.compile.llvm import Dot

LANES = 4  # of int32 in a vector
BYTES = 16  # in a vector
HALF = 8  # bytes of it


def call(dtype: str, lanes: int, name: str, *args: Expr) -> Expr:
    """A NEON intrinsic without side effects."""
    return T.call_llvm_pure_intrin(typed(dtype, lanes), f"llvm.aarch64.neon.{name}", *args)


def side_by_side(lanes: int, parts: Sequence[Expr]) -> Expr:
    """Vectors of `lanes` elements one behind the other."""
    return T.Shuffle(list(parts), [const(i) for i in range(lanes * len(parts))])


# 8-bit products ------------------------------------------------------------------------------------------------------


def signed(dot: Dot, codes: Expr) -> Expr:
    """uint8 [16] codes as `dot` multiplies them, int8 [16]."""
    if dot.offset:
        codes = T.bitwise_xor(codes, splat_const(dot.offset, "uint8", BYTES))
    return T.reinterpret(typed("int8", BYTES), codes)


def loaded(dot: Dot, x: Buffer, at: Expr) -> Expr:
    """16 codes as `dot` multiplies them."""
    return T.Bind(signed(dot, load(x, at, BYTES)))


def weights_of(dot: Dot, w: Buffer, at: Expr) -> list[Expr]:
    """A packed vector of weights (ConvSpec.byte_place), in halves for smull and smlal."""
    if dot.instruction in ("smull", "smlal"):
        return [load(w, at + i * HALF, HALF) for i in (0, 1)]
    return [load(w, at, BYTES)]


def parts_of(dot: Dot, vector: Expr) -> list[Expr]:
    """The same of a packed vector that is in a register."""
    if dot.instruction not in ("smull", "smlal"):
        return [vector]
    return [T.Shuffle([vector], [const(i * HALF + k) for k in range(HALF)]) for i in (0, 1)]


def lane_products(dot: Dot, acc: Expr, codes: Expr, quad: int, weights: Sequence[Expr]) -> Expr:
    """acc + the products of 4 codes, those from 4 * `quad` on, and a packed vector of weights."""
    if dot.instruction not in ("smull", "smlal"):
        words = T.reinterpret(typed("int32", LANES), codes)
        lane = T.reinterpret(typed("int8", BYTES), T.Shuffle([words], [const(quad)] * LANES))
        return products(dot, acc, lane, weights[0])
    pairs = T.reinterpret(typed("int16", HALF), codes)
    found = []
    for i, part in enumerate(weights):
        lane = T.reinterpret(typed("int8", HALF), T.Shuffle([pairs], [const(2 * quad + i)] * (HALF // 2)))
        found.append(call("int16", HALF, "smull", lane, part))
    for one in [found[0] + found[1]] if dot.instruction == "smlal" else found:
        acc = acc + call("int32", LANES, "saddlp", one)
    return acc


def products(dot: Dot, acc: Expr, codes: Expr, weights: Expr) -> Expr:
    """acc + the sums of 4 products in each lane; not for smull and smlal."""
    both = (codes, weights) if dot.instruction == "usdot" else (weights, codes)  # a lane stands behind whole vectors
    return call("int32", LANES, dot.instruction, acc, *both)


def matrix_products(acc: Expr, codes: Expr, weights: Expr) -> Expr:
    """acc [window][channel] + 8 codes of each of 2 windows by 8 weights of each of 2 channels."""
    return call("int32", LANES, "usmmla", acc, codes, weights)


def code_sums(acc: Expr, codes: Expr) -> Expr:
    """int32 [4] + sums of 4 codes each of 16, uint8."""
    pairs = call("uint16", HALF, "uaddlp", codes)
    return acc + T.reinterpret(typed("int32", LANES), call("uint32", LANES, "uaddlp", pairs))


# Rounding and packing ------------------------------------------------------------------------------------------------


def rounded(real: Expr) -> Expr:
    """float32 -> int32, rounded to nearest even, saturating."""
    return call("int32", LANES, "fcvtns", real)


def to_int16(low: Expr, high: Expr) -> Expr:
    """Two vectors of int32 -> one of int16, saturating."""
    return side_by_side(LANES, [call("int16", LANES, "sqxtn", part) for part in (low, high)])


def to_uint8(low: Expr, high: Expr) -> Expr:
    """Two vectors of int16 -> one of uint8, saturating."""
    return side_by_side(HALF, [call("uint8", HALF, "sqxtun", part) for part in (low, high)])


# Tables --------------------------------------------------------------------------------------------------------------


def looked_up(tables: Sequence[Expr], codes: Expr) -> Expr:
    """uint8 [16] codes -> their entries in a table of 256, `tables`: 16 vectors of 16 entries."""
    found = None
    for part in range(4):  # tbl gives 0 for an index beyond its 64 entries
        index = codes - splat_const(64 * part, "uint8", BYTES) if part else codes
        entries = call("uint8", BYTES, "tbl4", *tables[4 * part : 4 * part + 4], index)
        found = entries if found is None else T.bitwise_or(found, entries)
    return T.Bind(found)


def looked_up_4(table: Expr, indices: Expr) -> Expr:
    """uint8 [16] indices below 16 -> int8 entries of `table`, int8 [16]."""
    return T.Bind(call("int8", BYTES, "tbl1", table, T.reinterpret(typed("int8", BYTES), indices)))
