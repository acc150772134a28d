"""Short names for writing TIR by hand: vectors, loops, functions, and the way from real values to codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

Expr = Any  # a TIR expression or a Python int
Buffer = Any
QUANT = ((4,), "float32")  # a packed quantizer: shape and type of the argument that kernels read


def const(value: float, dtype: str = "int32") -> Expr:
    """A typed constant."""
    return tirx.const(value, dtype)


def splat(value: Expr, lanes: int) -> Expr:
    """`value` in every lane; a scalar stays one."""
    return value if lanes == 1 else T.Broadcast(value, lanes)


def splat_const(value: float, dtype: str, lanes: int) -> Expr:
    """A constant in every lane."""
    return splat(const(value, dtype), lanes)


def typed(dtype: str, lanes: int) -> str:
    """Name of a vector type; one lane is a scalar."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def cast(dtype: str, value: Expr, lanes: int) -> Expr:
    """Lane-wise conversion."""
    return T.Cast(typed(dtype, lanes), value)


def load(buffer: Buffer, offset: Expr, lanes: int = 1) -> Expr:
    """`lanes` consecutive elements."""
    return T.BufferLoad(buffer, [offset if lanes == 1 else T.Ramp(offset, 1, lanes)])


def store(buffer: Buffer, value: Expr, offset: Expr, lanes: int = 1) -> None:
    """Write `lanes` consecutive elements."""
    T.buffer_store(buffer, value, [offset if lanes == 1 else T.Ramp(offset, 1, lanes)])


def local(count: int, dtype: str) -> Buffer:
    """A buffer on the stack, which LLVM keeps in registers where it can; TVM would otherwise take it from the heap."""
    return T.alloc_buffer((count,), dtype, scope="local", annotations={"disable_lower_builtin": True})


def loop(count: int, body: Callable[[Expr], None]) -> None:
    """`body(i)` for i below `count`; no loop where there is but one turn."""
    if count == 1:
        body(0)
    elif count > 1:
        with T.serial(0, count) as i:
            body(i)


def spread(count: int, threads: int, body: Callable[[Expr], None]) -> None:
    """`body(i)` for i below `count`, in `threads` runs of neighbours at once; they must not write the same bytes."""
    if min(threads, count) < 2:
        loop(count, body)
        return
    size = -(-count // threads)
    with T.parallel(0, -(-count // size)) as t, T.serial(0, T.Min(const(size), count - t * size)) as i:
        body(t * size + i)


def chunks(count: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """Cover `count` elements: body(offset, lanes) for whole vectors, then body(offset, 1) for the rest."""
    whole = count // lanes * lanes
    loop(count // lanes, lambda i: body(i * lanes, lanes))
    loop(count - whole, lambda i: body(i + whole, 1))


def fence(value: Expr, lanes: int) -> Expr:
    """`value` rounded to float32 as it is: LLVM may not fuse its multiply into a following add."""
    return T.call_llvm_pure_intrin(typed("float32", lanes), "llvm.arithmetic.fence", value)


def prim_func(
    name: str, params: Sequence[tuple[str, tuple[int, ...], str]], body: Callable[..., None]
) -> tirx.PrimFunc:
    """A function over the buffers (name, shape, dtype); `body` gets each of them flattened to one axis."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        buffers = [T.arg(label, T.Buffer(shape, dtype)) for label, shape, dtype in params]
        flat = [
            buffer if len(shape) == 1 else T.decl_buffer((prod(shape),), dtype, data=buffer.data)
            for buffer, (_, shape, dtype) in zip(buffers, params, strict=True)
        ]
        body(*flat)
    return builder.get()


def on_pointers(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """`function` with a raw pointer for each buffer, checking nothing; it returns 0, or -1 where it asserts in vain.

    Parameters that are numbers stay as they are.
    """
    params, views = [], []
    for param in function.params:
        if isinstance(param.ty, PrimType):
            params.append(param)
        else:
            params.append(tirx.Var(param.name, PointerType(PrimType(str(param.ty.dtype)))))
            views.append(tirx.DeclBuffer(param, data=params[-1]))
    body = tirx.SeqStmt([*views, function.body, tirx.stmt.Return(const(0))])
    return tirx.PrimFunc(params, body, PrimType("int32"), function.attrs)


# Requantization ------------------------------------------------------------------------------------------------------

SCALE, ZERO, LOW, HIGH = range(4)  # a packed quantizer: float32 [4]


def quantizer(buffer: Buffer, field: int, lanes: int) -> Expr:
    """One field of a packed quantizer in every lane."""
    return splat(load(buffer, const(field)), lanes)


def to_codes(real: Expr, quant: Buffer, lanes: int) -> Expr:
    """float32 in units of the output's scale -> codes: round half to even, add the zero point, clamp, to uint8."""
    value = T.nearbyint(real) + quantizer(quant, ZERO, lanes)
    value = T.Min(T.Max(value, quantizer(quant, LOW, lanes)), quantizer(quant, HIGH, lanes))
    return cast("uint8", cast("int32", value, lanes), lanes)


def centred(codes: Expr, quant: Buffer, lanes: int) -> Expr:
    """uint8 codes -> code - zero point, exact in float32."""
    return cast("float32", cast("int32", codes, lanes), lanes) - quantizer(quant, ZERO, lanes)


def real_value(codes: Expr, quant: Buffer, lanes: int) -> Expr:
    """uint8 codes -> float32 real values."""
    return fence(centred(codes, quant, lanes) * quantizer(quant, SCALE, lanes), lanes)
