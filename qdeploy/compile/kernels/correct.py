"""What dense convolution kernels do to sums where a level's parameters ask for it, before they are requantized.

For weight zero points, acc - z_w * sum q_x: the sum of the codes under a window is the same for all output channels of
a group, so a kernel computes it once. Then sums that float32 products could carry out of int32 are cut.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels import neon
from qdeploy.compile.kernels.dots import GROUP, call
from qdeploy.compile.kernels.emit import Buffer, Expr, cast, const, load, local, loop, splat, splat_const, store
from qdeploy.compile.kernels.requantize import Operands, bounded, cuts
from qdeploy.compile.kernels.spec import ConvSpec

SUMS = 1 << 16  # windows whose sums a kernel keeps: 256 KiB of stack; with more, it computes each where it is used
DIFFERENCES = {4: "sse2.psad.bw", 8: "avx2.psad.bw", 16: "avx512.psad.bw.512"}  # sums of |a - b| of 8 bytes each
BYTE_SUM = 8


def centred(spec: ConvSpec, o: Operands) -> Expr:
    """Whether any weight zero point is not 0, or a product may leave int32 (pack_weights.py)."""
    return load(o.integers, const(2 * spec.padded)) != const(0)


def window_sum(spec: ConvSpec, x: Buffer, start: Expr) -> Expr:
    """int32 sum of the codes of the window that begins at `start`, as the target multiplies them (Dot.offset)."""
    dot, size = spec.multiply, GROUP * spec.dot.lanes
    lanes, dtype = (dot.lanes, "int32") if dot.neon else (size // BYTE_SUM, "int64")
    zeros = splat_const(0, "uint8", size)
    whole, rest = divmod(spec.taps * spec.inputs, size)
    acc = local(lanes, dtype)
    store(acc, splat_const(0, dtype, lanes), 0, lanes)

    def add(at: Expr, count: int) -> None:
        codes = load(x, at, size)
        if count < size:
            inside = T.Ramp(const(0, "int8"), const(1, "int8"), size) < splat_const(count, "int8", size)
            codes = T.Select(inside, codes, zeros)
        before = load(acc, 0, lanes)
        if dot.neon:
            store(acc, neon.code_sums(before, codes), 0, lanes)
        else:
            sums = call("int64", lanes, DIFFERENCES[spec.dot.lanes], codes, zeros)
            store(acc, before + sums, 0, lanes)

    def segment(s: Expr) -> None:
        at = start + spec.segment_offset(s)
        loop(whole, lambda i: add(at + i * size, size))
        if rest:
            add(at + whole * size, rest)

    loop(spec.segments, segment)
    total = T.call_llvm_pure_intrin(dtype, "llvm.vector.reduce.add", load(acc, 0, lanes))
    return T.Bind(cast("int32", total, 1) - dot.offset * spec.depth)


def correct(
    spec: ConvSpec, acc: list[Buffer], shape: tuple[int, int], first: Expr, sums: Callable[[int], Expr], o: Operands
) -> None:
    """Subtract z_w * sum q_x from a tile where `centred`, and cut it; `acc` is [pixel][block].

    `first`: its first channel among all; `sums(m)` is the sum of the codes under the window of pixel m.
    """
    lanes, (pixels, blocks) = spec.dot.lanes, shape
    with T.If(centred(spec, o)), T.Then():
        zeros = [load(o.integers, spec.padded + first + j * lanes, lanes) for j in range(blocks)]
        limits = [cuts(load(o.scale, first + j * lanes, lanes), lanes) for j in range(blocks)]
        for m in range(pixels):
            total = splat(sums(m), lanes)
            for j in range(blocks):
                part = acc[m * blocks + j]
                store(part, bounded(load(part, 0, lanes) - zeros[j] * total, limits[j], lanes), 0, lanes)
