"""What this machine can do at most, measured: multiply-adds of a target's byte dot product, bytes from memory.

A share of a data sheet's peak would need the clock that the processor keeps under these instructions, which virtual
machines do not tell; a register tile whose data lies in the first-level cache shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from qdeploy.compile.kernels.dots import GROUP, dot_inputs, dot_step, dot_weights
from qdeploy.compile.kernels.emit import (
    load,
    local,
    loop,
    prim_func,
    splat_const,
    store,
)  # fmt: skip
from qdeploy.compile.llvm import Dot, choose_dot, resolve
from qdeploy.errors import CompileError
from qdeploy.target import HOST, Target

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


def tiles(dot: Dot) -> list[tuple[int, int]]:
    """(pixels, blocks) of register tiles worth trying; each leaves registers for weights and inputs."""
    parts = {"vpdpbusd": 1, "pmaddwd": 2, "none": 4}.get(dot.instruction)
    if parts is None:
        raise CompileError(f"no kernel measures the peak of {dot.instruction}: profile without the layers")
    found = []
    for blocks in (1, 2, 3, 4):
        pixels = (dot.registers - parts * blocks - parts - 1) // blocks
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
    lanes, (steps, move) = dot.lanes, depth(dot)
    vector, length = GROUP * lanes, steps * move + 1
    sizes = (pixels * length * GROUP, blocks * length * vector, turns * pixels * blocks * lanes)

    def body(x: Any, w: Any, y: Any) -> None:
        def turn(t: Any) -> None:
            acc = [local(lanes, "int32") for _ in range(pixels * blocks)]
            for part in acc:
                store(part, splat_const(0, "int32", lanes), 0, lanes)

            def step(k: Any) -> None:
                at = k * move
                weights = [dot_weights(dot, load(w, (at * blocks + j) * vector, vector)) for j in range(blocks)]
                for m in range(pixels):
                    inputs = dot_inputs(dot, load(x, (m * length + at) * GROUP, GROUP))
                    for j in range(blocks):
                        part = acc[m * blocks + j]
                        store(part, dot_step(dot, load(part, 0, lanes), inputs, weights[j]), 0, lanes)

            loop(steps, step)
            for i, part in enumerate(acc):
                store(y, load(part, 0, lanes), (t * len(acc) + i) * lanes, lanes)

        loop(turns, turn)

    names = zip("xwy", sizes, ("uint8", "int8", "int32"), strict=True)
    return prim_func("peak", [(name, (size,), dtype) for name, size, dtype in names], body), sizes


def built(function: Any, target: Any) -> Callable[..., Any]:
    """A compiled TIR function, called on tensors."""
    import tvm

    try:
        with target:
            return tvm.compile(tvm.IRModule({"peak": function}), target=target)["peak"]
    except (RuntimeError, ValueError) as e:
        raise CompileError(f"TVM cannot compile the kernel that measures this machine's peak: {e}") from e


def dot_rate(dot: Dot, target: Any) -> float:
    """Operations a second of the best register tile of `dot`, code for `target` (tvm.target.Target)."""
    import tvm

    random, turns, best = np.random.default_rng(0), 8, 0.0
    for pixels, blocks in tiles(dot):
        function, sizes = tile_kernel(dot, pixels, blocks, turns)
        kernel = built(function, target)
        arrays = (
            random.integers(0, 256, sizes[0], np.uint8),
            random.integers(-127, 128, sizes[1], np.int8),
            np.zeros(sizes[2], np.int32),
        )
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        seconds = fastest(partial(kernel, *tensors))
        best = max(best, 2 * GROUP * sizes[2] * depth(dot)[0] / seconds)
    return best


@cache
def measured_peak(features: tuple[str, ...]) -> Peak:
    """This machine under a target's instruction sets (LLVM's names, as artifact.json has them)."""
    dot = choose_dot(set(features))
    host = resolve(Target("peak", "x86_64", "llvm", HOST))
    return Peak(dot_rate(dot, host.tvm), tuple(copy_rate(size) for size in SIZES))
