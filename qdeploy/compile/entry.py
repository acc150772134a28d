"""The functions that an artifact exports: TIR that calls one kernel after another on raw pointers.

    prepare(pointers, packed)                     int64 [params]: addresses of the parameters, in `Graph.params`' order
    prepare_part(pointers, packed, part)          int32 [2]: only `prepare`'s calls from the first number to the second
    prepare_reads(reads)                          int32 [params * 2]: the first and last call that reads each; -1: none
    main(input, packed, arena, output)            float32 images -> float32
    codes(input, packed, arena, codes)            the same up to the codes before the last Dequantize
    profile(input, packed, arena, output, ticks)  as main; int64 [calls]: nanoseconds in each kernel

`packed` and `arena` are uint8 buffers. TVM checks the few arguments of these functions; kernels check none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from qdeploy.compile.graph import Graph
from qdeploy.compile.kernels.emit import Buffer, Expr, const, load, local, loop, prim_func, store
from qdeploy.compile.plan import Plan
from qdeploy.compile.program import ALIGNMENT, Call, Place, Program

MONOTONIC = 1  # Linux's number of the clock that only runs forward
BILLION = 1_000_000_000
Pointer = Callable[[Place], Expr]


def emit_call(call: Call, pointer: Pointer) -> None:
    """Call a kernel; one that fails (it cannot start threads, it refuses a parameter) ends the function."""
    code = T.Bind(T.call_extern("int32", call.kernel, *(pointer(place) for place in call.args)))
    with T.Assert(code == const(0), call.failure or f"{call.kernel} failed"):
        pass


def address(buffer: Buffer, offset: Expr) -> Expr:
    """Pointer to an element."""
    return T.address_of(buffer[offset])


def prepare_functions(graph: Graph, program: Program) -> dict[str, tirx.PrimFunc]:
    """`prepare` whole and in parts, so that not all parameters need to be in memory at once; and who reads them when.

    Addresses instead of buffers, because hundreds of checked arguments take a minute to compile.
    """

    def pointer(pointers: Buffer, packed: Buffer, place: Place) -> Expr:
        if place.area == "params":
            return T.reinterpret("handle", load(pointers, const(int(place.at))))
        if place.area == "number":
            return const(int(place.at))
        return address(packed, const(int(place.at)))

    def whole(pointers: Buffer, packed: Buffer) -> None:
        for call in program.prepare:
            emit_call(call, lambda place: pointer(pointers, packed, place))

    def part(pointers: Buffer, packed: Buffer, bounds: Buffer) -> None:
        for k, call in enumerate(program.prepare):
            with T.If(T.And(load(bounds, const(0)) <= k, load(bounds, const(1)) > k)), T.Then():
                emit_call(call, lambda place: pointer(pointers, packed, place))

    def reads(table: Buffer) -> None:
        for param in range(len(graph.params)):
            users = [k for k, call in enumerate(program.prepare) if Place("params", param) in call.args] or [-1]
            store(table, const(users[0]), const(2 * param))
            store(table, const(users[-1]), const(2 * param + 1))

    params = [("pointers", (len(graph.params),), "int64"), ("packed", (program.packed_bytes,), "uint8")]
    return {
        "prepare": prim_func("prepare", params, whole),
        "prepare_part": prim_func("prepare_part", [*params, ("part", (2,), "int32")], part),
        "prepare_reads": prim_func("prepare_reads", [("reads", (2 * len(graph.params),), "int32")], reads),
    }


def network_function(
    name: str, graph: Graph, program: Program, plan: Plan, out: Sequence[Call], dtype: str
) -> tirx.PrimFunc:
    """`main`, `codes` (whose way out is `out`, to `dtype`) or, with a clock read around each call, `profile`."""
    batch, calls = graph.input_shape[0], [*program.body, *out]
    step_in, step_out = prod(graph.input_shape) // batch, prod(graph.output_shape) // batch

    def body(x: Buffer, packed: Buffer, arena: Buffer, y: Buffer, *ticks: Buffer) -> None:
        flat_x, flat_y = (buffer for buffer in (x, y))
        clock = [local(2, "int64") for _ in ticks]

        def image(i: Expr) -> None:
            def pointer(place: Place) -> Expr:
                if place.area == "input":
                    return address(flat_x, i * step_in)
                if place.area == "output":
                    return address(flat_y, i * step_out)
                if place.area == "packed":
                    return address(packed, const(int(place.at)))
                return address(arena, const(plan.offsets[str(place.at)]))

            before = now(clock[0]) if ticks else None
            for k, call in enumerate(calls):
                emit_call(call, pointer)
                if ticks:
                    after = now(clock[0])
                    store(ticks[0], load(ticks[0], const(k)) + (after - before), const(k))
                    before = after

        if ticks:
            loop(len(calls), lambda k: store(ticks[0], const(0, "int64"), k))
        loop(batch, image)

    params: list[tuple[str, tuple[int, ...], str]] = [
        ("input", graph.input_shape, "float32"), ("packed", (program.packed_bytes,), "uint8"),
        ("arena", (arena_bytes(plan),), "uint8"), ("output", graph.output_shape, dtype),
    ]  # fmt: skip
    if name == "profile":
        params.append(("ticks", (len(calls),), "int64"))
    return prim_func(name, params, body)


def now(clock: Buffer) -> Expr:
    """Nanoseconds of the monotonic clock; `clock` is a struct timespec."""
    T.evaluate(T.call_extern("int32", "clock_gettime", const(MONOTONIC), address(clock, const(0))))
    return T.Bind(load(clock, const(0)) * const(BILLION, "int64") + load(clock, const(1)))


def arena_bytes(plan: Plan) -> int:
    """Bytes of the arena; a network that only passes codes on has one too."""
    return max(plan.bytes, ALIGNMENT)


def entry_functions(graph: Graph, program: Program, plan: Plan) -> dict[str, Any]:
    """All exported functions by name."""
    functions = {
        **prepare_functions(graph, program),
        "main": network_function("main", graph, program, plan, program.way_out, "float32"),
        "profile": network_function("profile", graph, program, plan, program.way_out, "float32"),
    }
    if coded := graph.coded:
        functions["codes"] = network_function("codes", graph, program, plan, program.codes_out, coded)
    return functions
