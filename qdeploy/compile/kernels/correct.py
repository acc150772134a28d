"""The correction for weight zero points, which convolution kernels share."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.emit import Buffer, Expr, cast, const, load, local, loop, splat, store
from qdeploy.compile.kernels.requantize import Operands
from qdeploy.compile.kernels.spec import ConvSpec


def correct(spec: ConvSpec, acc: list[Buffer], shape: tuple[int, int], first: Expr, x_at: Expr, o: Operands) -> None:
    """Subtract z_w * sum q_x from a tile where any weight zero point is not 0; `acc` is [pixel][block].

    `x_at` is the tile's first window, at its group's first channel.
    """
    lanes, (pixels, blocks) = spec.dot.lanes, shape
    step = spec.window.stride[1] * spec.x.channels
    with T.If(load(o.integers, const(2 * spec.padded)) != const(0)), T.Then():
        sums = local(pixels, "int32")

        def pixel(m: Expr) -> None:
            store(sums, const(0), m)

            def segment(s: Expr) -> None:
                start = x_at + m * step + spec.segment_offset(s)

                def byte(i: Expr) -> None:
                    store(sums, load(sums, m) + cast("int32", load(o.x, start + i), 1), m)

                loop(spec.taps * spec.inputs, byte)

            loop(spec.segments, segment)

        loop(pixels, pixel)
        for m in range(pixels):
            for j in range(blocks):
                part = acc[m * blocks + j]
                zero = load(o.integers, spec.padded + first + j * lanes, lanes)
                store(part, load(part, 0, lanes) - zero * splat(load(sums, m), lanes), 0, lanes)
