"""256-entry tables of codes, looked up for a whole vector of codes at once where the target can (Dot.lookup)."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import neon
from qdeploy.compile.kernels.emit import Buffer, Expr, const, load, splat_const, typed
from qdeploy.compile.llvm import Dot

ENTRIES = 256
TABLE = ((ENTRIES,), "uint8")
PARTS = 16  # a shuffle of bytes chooses among 16
SHUFFLE = {4: "ssse3.pshuf.b.128", 8: "avx2.pshuf.b", 16: "avx512.pshuf.b.512"}


def table_vectors(dot: Dot, table: Buffer) -> list[Expr]:
    """What `look_up` reads in place of `table`, made once a kernel; nothing where the target looks up one by one.

    vpermi2b: the table in 4 vectors of 64 bytes. pshufb: 16 vectors, each a part of 16 entries in every 128 bits; all
    but the first of each half hold the difference (exclusive or) to the part before. tbl: 16 vectors as they are.
    """
    if dot.lookup == "tbl":
        return [T.Bind(load(table, const(16 * i), 16)) for i in range(PARTS)]
    if dot.lookup == "vpermi2b":
        return [T.Bind(load(table, const(64 * i), 64)) for i in range(4)]
    if dot.lookup != "pshufb":
        return []
    size, found = 4 * dot.lanes, []
    before = None
    for part in range(PARTS):
        entries = T.Bind(load(table, const(16 * part), 16))
        value = entries if before is None or part == PARTS // 2 else T.bitwise_xor(entries, before)
        found.append(T.Bind(side_by_side(value, size // 16, size)))
        before = entries
    return found


def side_by_side(vector: Expr, times: int, size: int) -> Expr:
    """A vector of `size` elements that repeats `vector`."""
    return vector if times == 1 else T.Shuffle([vector] * times, [const(i) for i in range(size)])


def look_up(dot: Dot, tables: Sequence[Expr], codes: Expr) -> Expr:
    """uint8 [4 * dot.lanes] codes -> their entries; not for targets that look up one by one."""
    if dot.lookup == "tbl":
        return neon.looked_up(tables, codes)
    size = 4 * dot.lanes
    high = splat_const(128, "uint8", size)
    if dot.lookup == "vpermi2b":
        kind, index = typed("int8", size), T.reinterpret(typed("int8", size), codes)
        halves = []
        for low, top in ((0, 1), (2, 3)):
            parts = [T.reinterpret(kind, tables[i]) for i in (low, top)]
            found = T.call_llvm_pure_intrin(
                kind, "llvm.x86.avx512.vpermi2var.qi.512", parts[0], index, parts[1]
            )  # fmt: skip
            halves.append(T.reinterpret(typed("uint8", size), found))
        return T.Bind(T.Select(codes < high, halves[0], halves[1]))
    # a shuffle gives 0 where bit 7 of its index is set: in every half of the codes, part i changes codes from 16 i on
    kind, found = typed("int8", size), []
    for half in (0, 1):
        index = codes if half == 0 else T.bitwise_xor(codes, high)
        index = T.Bind(T.reinterpret(kind, index))
        for part in range(PARTS // 2):
            step = splat_const(16 * part, "int8", size)
            at = T.call_llvm_pure_intrin(kind, "llvm.ssub.sat", index, step) if part else index
            table = T.reinterpret(kind, tables[half * (PARTS // 2) + part])
            found.append(T.call_llvm_pure_intrin(kind, f"llvm.x86.{SHUFFLE[dot.lanes]}", table, at))
    while len(found) > 1:  # as a tree: short ways from codes to entries
        found = [T.bitwise_xor(a, b) for a, b in zip(found[::2], found[1::2], strict=True)]
    return T.Bind(T.reinterpret(typed("uint8", size), found[0]))


def look_up_part(dot: Dot, tables: Sequence[Expr], codes: Expr, size: int) -> Expr:
    """As `look_up`, for a vector of `size` codes, which may be shorter."""
    full = 4 * dot.lanes
    if size == full:
        return look_up(dot, tables, codes)
    wide = T.Bind(side_by_side(codes, full // size, full))
    return T.Bind(T.Shuffle([look_up(dot, tables, wide)], [const(i) for i in range(size)]))
