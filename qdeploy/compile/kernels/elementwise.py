"""Element-wise kernels: terms over real values, tables, concatenation, moves, softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.expression import Term, operand
from qdeploy.compile.graph import Window, swapped
from qdeploy.compile.kernels.emit import (
    HIGH,
    LOW,
    QUANT,
    SCALE,
    ZERO,
    Buffer,
    Expr,
    cast,
    centred,
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
from qdeploy.compile.kernels.lookup import TABLE, look_up, table_vectors
from qdeploy.compile.kernels.requantize import (
    LEAST,
    VECTORS,
    Limits,
    add,
    add_parameters,
    cover,
    limits,
    own_code,
    own_codes,
    own_limits,
    packed,
    store_run,
    to_integers,
)
from qdeploy.compile.llvm import Dot

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


@dataclass(frozen=True)
class ElementSpec:
    """An element-wise operator: add, mul (docs/integers.md) or `term` over real values; operands are broadcast.

    `signed`: which operands, and last the output, are int8 in the file.
    """

    kind: str
    term: Term
    xs: tuple[Layout, ...]
    y: Layout
    signed: tuple[bool, ...]
    dot: Dot


def elementwise_kernel(name: str, spec: ElementSpec) -> tirx.PrimFunc:
    """(codes of every operand, their quantizers, output quantizer) -> codes."""
    xs, y, count = spec.xs, spec.y, len(spec.xs)

    def body(*buffers: Buffer) -> None:
        codes, quants, quant, out = buffers[:count], buffers[count:-2], buffers[-2], buffers[-1]
        fill_border(out, y, quant)
        compute = computation(spec, quants, quant)
        if all(x.single or x.shape == y.shape for x in xs):
            by_rows(spec, codes, out, compute)
        elif all((x.height, x.width) in ((1, 1), (y.height, y.width)) for x in xs):
            by_channels(spec, codes, out, compute)
        else:
            by_pixels(spec, codes, out, compute)

    params = [(f"x{i}", (x.size,), "uint8") for i, x in enumerate(xs)]
    params += [(f"quant{i}", *QUANT) for i in range(count)]
    return prim_func(name, [*params, ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


@dataclass(frozen=True)
class Computation:
    """How vectors of codes become codes: `enter`(operand, codes, lanes), then `value`(what entered, lanes)."""

    enter: Callable[[int, Expr, int], Expr]
    value: Callable[[Sequence[Expr], int], Expr]
    limits: Limits


def computation(spec: ElementSpec, quants: Sequence[Buffer], quant: Buffer) -> Computation:
    """The arithmetic of `spec`; its scalars are made here, once a kernel. The last step is rounding within limits."""
    if spec.kind == "add":
        order = [1, 0] if swapped(spec.xs[0].shape, spec.xs[1].shape) else [0, 1]
        signed = [spec.signed[i] for i in (*order, 2)]
        p = add_parameters([*(quants[i] for i in order), quant], signed, spec.dot)
        return Computation(
            lambda i, codes, n: own_codes(codes, spec.signed[i], n),
            lambda values, n: add(values[order[0]], values[order[1]], p, n),
            p.limits,
        )
    if spec.kind == "mul":
        product = load(quants[0], const(SCALE)) * load(quants[1], const(SCALE))
        ratio = T.Bind(product / load(quant, const(SCALE)))
        zero = T.Bind(own_code(quant, ZERO, spec.signed[2]))
        return Computation(
            lambda i, codes, n: centred(codes, quants[i], n),
            lambda values, n: fence(values[0] * values[1] * splat(ratio, n), n) + splat(zero, n),
            own_limits(quant, spec.signed[2], spec.dot),
        )
    return Computation(
        lambda i, codes, n: T.Bind(real_value(codes, quants[i], n)),
        lambda values, n: emit_term(spec.term, values, n) / quantizer(quant, SCALE, n),
        limits(quant, spec.dot),
    )


def put(compute: Computation, values: Sequence[Sequence[Expr]], out: Buffer, at: Expr, valid: int, n: int) -> None:
    """Round, pack and store 4 vectors of n codes."""
    vectors = [to_integers(compute.value(part, n), compute.limits, n) for part in values]
    store_run(out, packed(vectors, compute.limits, n, True), VECTORS * n, 0, valid, at)


def by_rows(spec: ElementSpec, codes: Sequence[Buffer], out: Buffer, compute: Computation) -> None:
    """Operands that have the output's pixels and channels, or one value."""
    lanes, y = spec.dot.lanes, spec.y
    single = {i: T.Bind(compute.enter(i, load(codes[i], x.at(0, 0)), 1)) for i, x in enumerate(spec.xs) if x.single}
    whole = all(x == y or x.single for x in spec.xs) and y.border[1] == y.border[3] == 0

    def row(h: Expr) -> None:
        def run(i: Expr, n: int, valid: int) -> None:
            def value(k: int, x: Layout, part: int) -> Expr:
                if k in single:
                    return splat(single[k], n)
                return compute.enter(k, load(codes[k], x.at(h, 0) + i + part * n, n), n)

            values = [[value(k, x, part) for k, x in enumerate(spec.xs)] for part in range(VECTORS)]
            put(compute, values, out, y.at(h, 0) + i, valid, n)

        cover(y.width * y.channels * (y.height if whole else 1), lanes, LEAST, run)

    loop(1 if whole else y.height, row)


def by_channels(spec: ElementSpec, codes: Sequence[Buffer], out: Buffer, compute: Computation) -> None:
    """Operands of one pixel, which are loaded once for all pixels, and others with all of them."""
    y = spec.y

    def run(c: Expr, n: int, valid: int) -> None:
        def enter(k: int, x: Layout, at: Expr) -> list[Expr]:
            if x.channels == 1:
                return [splat(compute.enter(k, load(codes[k], at), 1), n)] * VECTORS
            return [compute.enter(k, load(codes[k], at + c + part * n, n), n) for part in range(VECTORS)]

        fixed = {
            k: [T.Bind(value) for value in enter(k, x, x.at(0, 0))]
            for k, x in enumerate(spec.xs)
            if (x.height, x.width) == (1, 1)
        }

        def pixel(h: Expr, w: Expr) -> None:
            entered = [fixed[k] if k in fixed else enter(k, x, x.at(h, w)) for k, x in enumerate(spec.xs)]
            put(compute, list(zip(*entered, strict=True)), out, y.at(h, w) + c, valid, n)

        loop(y.height, lambda h: loop(y.width, lambda w: pixel(h, w)))

    cover(y.channels, spec.dot.lanes, LEAST, run)


def by_pixels(spec: ElementSpec, codes: Sequence[Buffer], out: Buffer, compute: Computation) -> None:
    """Any operands."""
    y = spec.y

    def pixel(h: Expr, w: Expr) -> None:
        def run(c: Expr, n: int, valid: int) -> None:
            def value(k: int, x: Layout, part: int) -> Expr:
                at = x.at(h if x.height > 1 else 0, w if x.width > 1 else 0)
                if x.channels == 1:
                    return splat(compute.enter(k, load(codes[k], at), 1), n)
                return compute.enter(k, load(codes[k], at + c + part * n, n), n)

            values = [[value(k, x, part) for k, x in enumerate(spec.xs)] for part in range(VECTORS)]
            put(compute, values, out, y.at(h, w) + c, valid, n)

        cover(y.channels, spec.dot.lanes, LEAST, run)

    loop(y.height, lambda h: loop(y.width, lambda w: pixel(h, w)))


def table_kernel(name: str, x: Layout, y: Layout, dot: Dot) -> tirx.PrimFunc:
    """(codes, table, output quantizer) -> the table's entry for each code."""
    whole = x == y and y.border[1] == y.border[3] == 0
    rows, count = (1, y.height * y.width * y.channels) if whole else (y.height, y.width * y.channels)

    def body(source: Buffer, table: Buffer, quant: Buffer, out: Buffer) -> None:
        fill_border(out, y, quant)
        tables = table_vectors(dot, table)

        def run(h: Expr, i: Expr, n: int, valid: int) -> None:
            codes = load(source, x.at(h, 0) + i, VECTORS * n)
            store_run(out, look_up(dot, tables, codes), VECTORS * n, 0, valid, y.at(h, 0) + i)

        def code(h: Expr, i: Expr) -> None:
            entry = cast("int32", load(source, x.at(h, 0) + i), 1)
            store(out, load(table, entry), y.at(h, 0) + i)

        if tables:
            loop(rows, lambda h: cover(count, dot.lanes, dot.lanes, lambda i, n, valid: run(h, i, n, valid)))
        else:
            loop(rows, lambda h: loop(count, lambda i: code(h, i)))

    params = [("x", (x.size,), "uint8"), ("table", *TABLE), ("quant", *QUANT), ("y", (y.size,), "uint8")]
    return prim_func(name, params, body)


def concat_kernel(name: str, xs: Sequence[Layout], same: Sequence[bool], y: Layout, dot: Dot) -> tirx.PrimFunc:
    """(codes of every part, their quantizers, output quantizer) -> codes side by side in channels.

    A part on the output's own grid (`same`) is cut to its bounds, which is what requantization would do.
    """
    parts = [sum(x.channels for x in xs[:i]) for i in range(len(xs))]

    def body(*buffers: Buffer) -> None:
        codes, quants, quant, out = buffers[: len(xs)], buffers[len(xs) : -2], buffers[-2], buffers[-1]
        fill_border(out, y, quant)
        for i, (x, start) in enumerate(zip(xs, parts, strict=True)):
            spec = ElementSpec("requantize", operand(0), (x,), y, (False, False), dot)
            one_part(spec, quants[i], codes[i], same[i], start, quant, out)

    params = [(f"x{i}", (x.size,), "uint8") for i, x in enumerate(xs)]
    params += [(f"quant{i}", *QUANT) for i in range(len(xs))]
    return prim_func(name, [*params, ("quant", *QUANT), ("y", (y.size,), "uint8")], body)


def one_part(
    spec: ElementSpec, own: Buffer, codes: Buffer, same: bool, start: int, quant: Buffer, out: Buffer
) -> None:  # fmt: skip
    """Write one part of a concatenation, `start` channels behind the first."""
    (x,), y = spec.xs, spec.y
    compute = computation(spec, [own], quant)

    def pixel(h: Expr, w: Expr) -> None:
        def run(c: Expr, n: int, valid: int) -> None:
            if same:
                size = VECTORS * n
                vector = load(codes, x.at(h, w) + c, size)
                vector = T.Bind(T.Min(T.Max(vector, bound(quant, LOW, size)), bound(quant, HIGH, size)))
                store_run(out, vector, size, 0, valid, y.at(h, w) + (c + start))
                return
            values = [[compute.enter(0, load(codes, x.at(h, w) + c + part * n, n), n)] for part in range(VECTORS)]
            put(compute, values, out, y.at(h, w) + (c + start), valid, n)

        cover(x.channels, spec.dot.lanes, LEAST, run)

    loop(x.height, lambda h: loop(x.width, lambda w: pixel(h, w)))


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
