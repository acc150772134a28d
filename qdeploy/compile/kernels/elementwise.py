"""Element-wise kernels: terms over real values, tables, concatenation, moves, softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.expression import Term
from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.emit import (
    HIGH,
    LOW,
    QUANT,
    SCALE,
    ZERO,
    Buffer,
    Expr,
    cast,
    chunks,
    const,
    fence,
    load,
    local,
    loop,
    prim_func,
    quantizer,
    real_value,
    splat,
    splat_const,
    store,
    to_codes,
)  # fmt: skip
from qdeploy.compile.kernels.layout import Layout, fill_border

TABLE = ((256,), "uint8")
EXPONENTIALS = ((256,), "float64")


def emit_term(term: Term, operands: Sequence[Expr], lanes: int) -> Expr:
    """A plain term over float32 `operands`; every product is rounded by itself, and nothing is computed twice."""
    known: dict[Term, Expr] = {}

    def value(t: Term) -> Expr:
        if t.op == "operand":
            return operands[int(t.value)]
        if t.op == "constant":
            return splat_const(t.value, "float32", lanes)
        if t not in known:
            a, b = (value(arg) for arg in t.args)
            make: dict[str, Callable[[], Expr]] = {
                "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: fence(a * b, lanes), "div": lambda: a / b,
                "min": lambda: T.Min(a, b), "max": lambda: T.Max(a, b),
            }  # fmt: skip
            known[t] = T.Bind(make[t.op]())
        return known[t]

    return value(term)


def elementwise_kernel(name: str, term: Term, xs: Sequence[Layout], y: Layout, lanes: int) -> tirx.PrimFunc:
    """(codes of every operand, their quantizers, output quantizer) -> codes of the term; operands are broadcast."""
    same = all((x.channels, x.height, x.width) == (y.channels, y.height, y.width) for x in xs)

    def body(*buffers: Buffer) -> None:
        codes, quants, quant, out = buffers[: len(xs)], buffers[len(xs) : -2], buffers[-2], buffers[-1]
        fill_border(out, y, quant)

        def part(at: Callable[[Layout], Expr], target: Expr, n: int) -> None:
            reals = []
            for x, buffer, own in zip(xs, codes, quants, strict=True):
                value = load(buffer, at(x), n) if x.channels == y.channels else splat(load(buffer, at(x)), n)
                reals.append(T.Bind(real_value(value, own, n)))
            real = emit_term(term, reals, n)
            store(out, to_codes(real / quantizer(quant, SCALE, n), quant, n), target, n)

        def row(h: Expr) -> None:
            if same:
                chunks(y.width * y.channels, lanes, lambda i, n: part(lambda x: x.at(h, 0) + i, y.at(h, 0) + i, n))
                return
            loop(y.width, lambda w: chunks(y.channels, lanes, lambda c, n: part(place(h, w, c), y.at(h, w) + c, n)))

        def place(h: Expr, w: Expr, c: Expr) -> Callable[[Layout], Expr]:
            def at(x: Layout) -> Expr:
                return x.at(h if x.height > 1 else 0, w if x.width > 1 else 0) + (c if x.channels > 1 else 0)

            return at

        loop(y.height, row)

    params = [(f"x{i}", (x.size,), "uint8") for i, x in enumerate(xs)]
    params += [(f"quant{i}", *QUANT) for i in range(len(xs))]
    return prim_func(name, [*params, ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


def table_kernel(name: str, x: Layout, y: Layout) -> tirx.PrimFunc:
    """(codes, table, output quantizer) -> the table's entry for each code."""

    def body(source: Buffer, table: Buffer, quant: Buffer, out: Buffer) -> None:
        fill_border(out, y, quant)

        def code(h: Expr, i: Expr) -> None:
            entry = cast("int32", load(source, x.at(h, 0) + i), 1)
            store(out, load(table, entry), y.at(h, 0) + i)

        loop(y.height, lambda h: loop(y.width * y.channels, lambda i: code(h, i)))

    params = [("x", (x.size,), "uint8"), ("table", *TABLE), ("quant", *QUANT), ("y", (y.size,), "uint8")]
    return prim_func(name, params, body)


def concat_kernel(name: str, xs: Sequence[Layout], same: Sequence[bool], y: Layout, lanes: int) -> tirx.PrimFunc:
    """(codes of every part, their quantizers, output quantizer) -> codes side by side in channels.

    A part on the output's own grid (`same`) is cut to its bounds, which is what requantization would do.
    """

    def body(*buffers: Buffer) -> None:
        codes, quants, quant, out = buffers[: len(xs)], buffers[len(xs) : -2], buffers[-2], buffers[-1]
        fill_border(out, y, quant)
        start = 0
        for x, own, given, equal in zip(xs, quants, codes, same, strict=True):
            one_part(x, own, given, equal, start, quant, out)
            start += x.channels

    def one_part(
        x: Layout, own: Buffer, given: Buffer, equal: bool, start: int, quant: Buffer, out: Buffer
    ) -> None:  # fmt: skip
        def part(h: Expr, w: Expr, c: Expr, n: int) -> None:
            value = load(given, x.at(h, w) + c, n)
            if equal:
                value = T.Min(T.Max(value, bound(quant, LOW, n)), bound(quant, HIGH, n))
            else:
                value = to_codes(real_value(value, own, n) / quantizer(quant, SCALE, n), quant, n)
            store(out, value, y.at(h, w) + (c + start), n)

        def pixel(h: Expr, w: Expr) -> None:
            chunks(x.channels, lanes, lambda c, n: part(h, w, c, n))

        loop(y.height, lambda h: loop(y.width, lambda w: pixel(h, w)))

    params = [(f"x{i}", (x.size,), "uint8") for i, x in enumerate(xs)]
    params += [(f"quant{i}", *QUANT) for i in range(len(xs))]
    return prim_func(name, [*params, ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


def bound(quant: Buffer, field: int, lanes: int) -> Expr:
    """LOW, HIGH or ZERO of a packed quantizer as a code in every lane."""
    return splat(cast("uint8", cast("int32", load(quant, const(field)), 1), 1), lanes)


def move_kernel(name: str, x: Layout, y: Layout, window: Window, lanes: int) -> tirx.PrimFunc:
    """(codes, output quantizer) -> codes moved by the window's padding, repeated by its stride, zero point around."""
    (down, across), (top, left) = window.stride, window.padding[:2]

    def body(source: Buffer, quant: Buffer, out: Buffer) -> None:
        fill_border(out, y, quant)

        def pixel(h: Expr, w: Expr) -> None:
            row, column = T.floordiv(h - const(top), const(down)), T.floordiv(w - const(left), const(across))
            inside = T.And(
                T.And(row >= const(0), row < const(x.height)), T.And(column >= const(0), column < const(x.width))
            )

            def copy(c: Expr, n: int) -> None:
                store(out, load(source, x.at(row, column) + c, n), y.at(h, w) + c, n)

            with T.If(inside):
                with T.Then():
                    chunks(y.channels, lanes, copy)
                with T.Else():
                    chunks(y.channels, lanes, lambda c, n: store(out, bound(quant, ZERO, n), y.at(h, w) + c, n))

        def line(h: Expr) -> None:
            with T.serial(0, y.width) as w:
                pixel(h, w)

        with T.serial(0, y.height) as h:
            line(h)

    return prim_func(name, [("x", (x.size,), "uint8"), ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


# Softmax -------------------------------------------------------------------------------------------------------------


def softmax_kernel(name: str, x: Layout, y: Layout | None, shape: tuple[int, ...]) -> tirx.PrimFunc:
    """(codes, exponentials of their scale, output quantizer) -> codes, or float32 NCHW `shape` where `y` is None."""

    def body(source: Buffer, exponentials: Buffer, *rest: Buffer) -> None:
        quant, out = rest[0], rest[-1]
        if y is not None:
            fill_border(out, y, quant)

        def pixel(h: Expr, w: Expr) -> None:
            most, total = local(1, "int32"), local(1, "float64")
            store(most, const(0), 0)
            store(total, const(0.0, "float64"), 0)

            def code(c: Expr) -> Expr:
                return cast("int32", load(source, x.at(h, w) + c), 1)

            def part(c: Expr) -> Expr:
                return load(exponentials, load(most, 0) - code(c))

            def end(c: Expr) -> None:
                real = cast("float32", part(c) / load(total, 0), 1)
                if y is None:
                    store(out, real, (c * x.height + h) * x.width + w)
                else:
                    store(out, to_codes(real / quantizer(quant, SCALE, 1), quant, 1), y.at(h, w) + c)

            loop(x.channels, lambda c: store(most, T.Max(load(most, 0), code(c)), 0))
            loop(x.channels, lambda c: store(total, load(total, 0) + part(c), 0))
            loop(x.channels, end)

        loop(x.height, lambda h: loop(x.width, lambda w: pixel(h, w)))

    params = [("x", (x.size,), "uint8"), ("exponentials", *EXPONENTIALS)]
    if y is None:
        return prim_func(name, [*params, ("y", shape, "float32")], body)
    return prim_func(name, [*params, ("quant", *QUANT), ("y", (y.size,), "uint8")], body)
