"""Calls of a CUDA program: launches of kernels on the GPU, and float kernels that run on the host."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qdeploy.compile.program import Call, Place

NOTHING = Place("nothing")  # a null pointer
POINTER = 8  # bytes


@dataclass(frozen=True)
class Launch(Call):
    """A kernel on the GPU: its arguments are one struct, pointers first (`args`), then int32 `numbers`."""

    numbers: tuple[int, ...] = ()
    grid: tuple[int, int, int] = (1, 1, 1)
    block: int = 128

    @property
    def blob(self) -> bytes:
        """The struct, pointers 0."""
        data = struct.pack(f"<{len(self.args)}q{len(self.numbers)}i", *[0] * len(self.args), *self.numbers)
        return data + bytes(-len(data) % POINTER)


@dataclass(frozen=True)
class HostCall(Call):
    """A float kernel on the host: activations `reads` are copied there before, `writes` back to the GPU behind it."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def covering(count: int, block: int = 128) -> tuple[int, int, int]:
    """A grid of blocks in which `count` threads have a number."""
    return (-(-count // block), 1, 1)
