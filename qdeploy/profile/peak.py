"""What this machine can do at most, measured: multiply-adds of a target's byte dot product, bytes from memory.

A share of a data sheet's peak would need the clock that the processor keeps under these instructions, which virtual
machines do not tell; a register tile whose data lies in the first-level cache shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.dots import GROUP, dot_inputs, dot_step, dot_weights, steps
from qdeploy.compile.kernels.emit import const, load, local, loop, prim_func, splat_const, store
from qdeploy.compile.kernels.spec import TILE_QUADS, TILE_ROWS
from qdeploy.compile.kernels.tiles import LANES, ROW, WEIGHTS, WINDOWS, configure
from qdeploy.compile.kernels.tiles import call as amx
from qdeploy.compile.llvm import Dot, choose_dot, resolve
from qdeploy.errors import CompileError
from qdeploy.target import Target

DEPTH = 128  # groups of 4 bytes that a tile sums, so that 4 blocks of weights stay in a first-level cache
FIXED_DEPTH = 1024  # the same where operands stay in registers
SECONDS = 0.05  # for each figure
SIZES = (1 << 18, 1 << 20, 1 << 23, 1 << 26)  # bytes touched by a copy: from the second-level cache to beyond all


@dataclass(frozen=True)
class Peak:
    """Operations (two a multiply-add) a second, and bytes a second by copies that touch each of SIZES."""

    operations: float
    bytes: tuple[float, ...]

    def bandwidth(self, size: int) -> float:
        """Bytes a second for a kernel that touches `size` bytes: of the next larger of SIZES."""
        return next((rate for most, rate in zip(SIZES, self.bytes, strict=True) if size <= most), self.bytes[-1])


def fastest(run: Callable[[], Any]) -> float:
    """Least seconds of a call within SECONDS."""
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def copy_rate(size: int) -> float:
    """Bytes read and written a second by a copy that touches `size` bytes."""
    source, target = np.ones(size // 2, np.uint8), np.zeros(size // 2, np.uint8)
    return size / fastest(lambda: np.copyto(target, source))


def instructions(dot: Dot) -> list[Dot]:
    """What kernels of a target may multiply with: beside its own instruction the one for weights of 7 bits."""
    narrow = [replace(dot, instruction="pmaddubsw")] if dot.instruction == "pmaddwd" and dot.lanes > GROUP else []
    return [dot, *narrow]


def tiles(dot: Dot) -> list[tuple[int, int]]:
    """(pixels, blocks) of register tiles worth trying; each leaves registers for weights and inputs."""
    found = []
    for blocks in (1, 2, 3, 4):
        pixels = (dot.registers - blocks - 2) // blocks
        if pixels > 0:
            found.append((min(pixels, 12), blocks))
    return found


def depth(dot: Dot) -> tuple[int, int]:
    """(turns of the inner loop, how far its operands move in each).

    LLVM moves loads whose address stays out of the loop; it would move a multiply apart from its addition as well, so
    only the instruction that does both may stay.
    """
    return (FIXED_DEPTH, 0) if dot.instruction == "vpdpbusd" else (DEPTH, 1)


def tile_kernel(dot: Dot, pixels: int, blocks: int, turns: int) -> tuple[Any, tuple[int, int, int]]:
    """(codes, weights) -> sums, and their sizes: `turns` times a tile of `pixels` x `blocks` vectors."""
    lanes, (rounds, move) = dot.lanes, depth(dot)
    vector, length = GROUP * lanes, rounds * move + 1
    sizes = (pixels * length * GROUP, blocks * length * vector, turns * pixels * blocks * lanes)

    def body(x: Any, w: Any, y: Any) -> None:
        def turn(t: Any) -> None:
            acc = [local(lanes, "int32") for _ in range(pixels * blocks)]
            for part in acc:
                store(part, splat_const(0, "int32", lanes), 0, lanes)

            def step(k: Any) -> None:
                at = k * move
                for part in range(steps(dot)):
                    weights = [dot_weights(dot, w, (at * blocks + j) * vector, part) for j in range(blocks)]
                    for m in range(pixels):
                        inputs = dot_inputs(dot, x, (m * length + at) * GROUP, part)
                        for j in range(blocks):
                            sums = acc[m * blocks + j]
                            store(sums, dot_step(dot, load(sums, 0, lanes), [inputs], [weights[j]]), 0, lanes)

            loop(rounds, step)
            for i, part in enumerate(acc):
                store(y, load(part, 0, lanes), (t * len(acc) + i) * lanes, lanes)

        loop(turns, turn)

    names = zip("xwy", sizes, ("uint8", "int8", "int32"), strict=True)
    return prim_func("peak", [(name, (size,), dtype) for name, size, dtype in names], body), sizes


def amx_kernel(turns: int) -> Any:
    """(codes [1024], weights [1024]) -> sums [4 * 256]: `turns` times 4 products of whole tiles (kernels/tiles.py)."""
    size = TILE_ROWS * ROW

    def body(x: Any, w: Any, y: Any) -> None:
        configure(TILE_ROWS, TILE_QUADS)
        for tile in range(WINDOWS):
            amx("tilezero", const(tile, "int8"))
        for i in (0, 1):
            amx("tileloadd64", const(WINDOWS + i, "int8"), T.address_of(x[0]), const(ROW, "int64"))
            amx("tileloadd64", const(WEIGHTS + i, "int8"), T.address_of(w[0]), const(ROW, "int64"))

        def step(_: Any) -> None:
            for tile in range(WINDOWS):
                amx("tdpbusd", *(const(t, "int8") for t in (tile, WINDOWS + tile // 2, WEIGHTS + tile % 2)))

        loop(turns, step)
        for tile in range(WINDOWS):
            amx("tilestored64", const(tile, "int8"), T.address_of(y[tile * LANES * LANES]), const(ROW, "int64"))
        amx("tilerelease")

    return prim_func(
        "peak", [("x", (size,), "uint8"), ("w", (size,), "int8"), ("y", (WINDOWS * LANES * LANES,), "int32")], body
    )


def built(function: Any, target: Any) -> Callable[..., Any]:
    """A compiled TIR function, called on tensors."""
    import tvm

    try:
        with target:
            return tvm.compile(tvm.IRModule({"peak": function}), target=target)["peak"]
    except (RuntimeError, ValueError) as e:
        raise CompileError(f"TVM cannot compile the kernel that measures this machine's peak: {e}") from e


def timed(function: Any, target: Any, sizes: tuple[int, int, int]) -> float:
    """Least seconds of a kernel (codes, weights) -> sums of these sizes."""
    import tvm

    random = np.random.default_rng(0)
    arrays = (
        random.integers(0, 256, sizes[0], np.uint8),
        random.integers(-64, 65, sizes[1], np.int8),
        np.zeros(sizes[2], np.int32),
    )
    return fastest(partial(built(function, target), *(tvm.runtime.tensor(array) for array in arrays)))


def dot_rate(dot: Dot, target: Any) -> float:
    """Operations a second of the best register tile of `dot`, code for `target` (tvm.target.Target)."""
    turns, best = 8, 0.0
    for one in instructions(dot):
        for pixels, blocks in tiles(one):
            function, sizes = tile_kernel(one, pixels, blocks, turns)
            best = max(best, 2 * GROUP * sizes[2] * depth(one)[0] / timed(function, target, sizes))
    if dot.tiles:
        count = WINDOWS * LANES * LANES
        seconds = timed(amx_kernel(FIXED_DEPTH), target, (TILE_ROWS * ROW, TILE_ROWS * ROW, count))
        best = max(best, 2 * ROW * count * FIXED_DEPTH / seconds)
    return best


@cache
def measured_peak(features: tuple[str, ...]) -> Peak:
    """This machine under a target's instruction sets (LLVM's names, as artifact.json has them).

    Tiles need a process that asked Linux for them, as one that loaded an artifact with tiles did.
    """
    dot = choose_dot(set(features))
    target = resolve(Target("peak", "x86_64", "llvm", "x86-64", features))
    return Peak(dot_rate(dot, target.tvm), tuple(copy_rate(size) for size in SIZES))
