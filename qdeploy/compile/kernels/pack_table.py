"""`prepare` for everything but quantizers and weights: 256-entry tables, stored activations, exponentials."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.expression import Term
from qdeploy.compile.graph import Table
from qdeploy.compile.kernels.elementwise import EXPONENTIALS, emit_term
from qdeploy.compile.kernels.emit import (
    QUANT,
    SCALE,
    ZERO,
    Buffer,
    Expr,
    cast,
    const,
    load,
    local,
    loop,
    prim_func,
    real_value,
    store,
    to_codes,
)
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.kernels.lookup import TABLE
from qdeploy.compile.kernels.pack import SHIFT

EXP_TERMS, EXP_HALVINGS, EXP_LIMIT = 20, 8, 256.0  # exp(-t) as a series for t <= 1


def table_pack_kernel(name: str, term: Term, table: Table | None, what: str) -> tirx.PrimFunc:
    """(input quantizer, output quantizer) -> uint8 [256]: the output code of every input code.

    Where the real values were computed at compile time, parameters with another input grid are refused by `what`.
    """

    def body(quant_x: Buffer, quant: Buffer, out: Buffer) -> None:
        reals = local(256, "float32")
        if table is None:

            def entry(i: Expr) -> None:
                store(reals, emit_term(term, [T.Bind(real_value(i, quant_x, 1))], 1), i)

            loop(256, entry)
        else:
            for field, value in ((SCALE, table.scale), (ZERO, float(table.zero_point))):
                with T.Assert(load(quant_x, const(field)) == const(value, "float32"), what):
                    pass
            for i, value in enumerate(table.values):
                store(reals, const(value, "float32"), i)
        loop(256, lambda i: store(out, to_codes(load(reals, i) / load(quant, const(SCALE)), quant, 1), i))

    return prim_func(name, [("quant_x", *QUANT), ("quant", *QUANT), ("table", *TABLE)], body)


@dataclass(frozen=True)
class StoredSpec:
    """A tensor of the file that takes part as an activation."""

    dtype: str
    shape: tuple[int, ...]
    layout: Layout


def stored_kernel(name: str, spec: StoredSpec) -> tirx.PrimFunc:
    """Codes as the file has them, [C, H, W] -> uint8 codes in `layout`, which has no border."""
    layout = spec.layout

    def body(source: Buffer, out: Buffer) -> None:
        def one(c: Expr, h: Expr, w: Expr) -> None:
            code = cast("int32", load(source, (c * layout.height + h) * layout.width + w), 1)
            code = code + const(SHIFT if spec.dtype == "int8" else 0)
            store(out, cast("uint8", code, 1), layout.at(h, w) + c)

        loop(
            layout.channels,
            lambda c: loop(layout.height, lambda h: loop(layout.width, lambda w: one(c, h, w))),
        )

    return prim_func(name, [("stored", spec.shape, spec.dtype), ("y", (layout.size,), "uint8")], body)


def exponentials_kernel(name: str) -> tirx.PrimFunc:
    """(quantizer) -> float64 [256]: exp(-d * scale) for d = 0 .. 255, from + - * / alone (docs/integers.md)."""

    def body(quant: Buffer, out: Buffer) -> None:
        limit = const(EXP_LIMIT, "float64")
        t = T.Bind(T.Min(cast("float64", load(quant, const(SCALE)), 1), limit) / const(2.0**EXP_HALVINGS, "float64"))
        value = local(1, "float64")
        store(value, const(1.0, "float64"), 0)
        for n in range(EXP_TERMS, 0, -1):
            product = t * load(value, 0)
            store(value, const(1.0, "float64") - product / const(float(n), "float64"), 0)
        for _ in range(EXP_HALVINGS):
            store(value, load(value, 0) * load(value, 0), 0)
        store(out, const(1.0, "float64"), 0)
        loop(255, lambda i: store(out, load(out, i) * load(value, 0), i + 1))

    return prim_func(name, [("quant", *QUANT), ("exponentials", *EXPONENTIALS)], body)
