"""Program: which kernels a compiled model calls, in which order, on which bytes (lower.py makes it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdeploy.compile.graph import Graph
from qdeploy.compile.kernels.spec import ConvSpec

ALIGNMENT = 64  # bytes: every packed tensor and every activation begins at a multiple of it


@dataclass(frozen=True)
class Place:
    """Where an argument of a kernel lies.

    area      at
    params    number of the parameter (an ONNX initializer) among `Graph.params`
    packed    offset in bytes in the buffer of packed parameters
    values    name of an activation: its offset in the arena comes from the memory plan
    input     0: the image that is computed now
    output    0: that image's result
    number    the argument itself, an int32
    """

    area: str
    at: int | str = 0


@dataclass(frozen=True)
class Call:
    """One kernel call: `args` are pointers, outputs last; `bytes` are those of all its buffers (0 for weights)."""

    kernel: str
    args: tuple[Place, ...]
    bytes: int
    op: str = ""  # output of the operator that it computes; empty in `prepare` and on the way out
    failure: str = ""  # what to say when it fails, where that is more than the kernel's name


@dataclass(frozen=True)
class Program:
    """All calls of a model for one target: `graph` as it was lowered; `values`: bytes of each activation."""

    graph: Graph
    kernels: dict[str, Any]  # name -> tirx.PrimFunc over buffers
    prepare: tuple[Call, ...]
    body: tuple[Call, ...]  # one image
    way_out: tuple[Call, ...]  # its float32 output
    codes_out: tuple[Call, ...]  # the codes before that; none where the output has none
    values: dict[str, int]
    packed_bytes: int
    convolutions: dict[str, ConvSpec]  # by the operator's output

    def lives(self) -> dict[str, tuple[int, int]]:
        """First and last call that touches each activation, as positions in `body` + the way out."""
        found: dict[str, tuple[int, int]] = {}
        calls = [(i, call) for i, call in enumerate(self.body)]
        calls += [(len(self.body), call) for call in (*self.way_out, *self.codes_out)]
        for i, call in calls:
            for place in call.args:
                if place.area == "values":
                    first, _ = found.get(str(place.at), (i, i))
                    found[str(place.at)] = (first, i)
        return found


def aligned(size: int) -> int:
    """`size` bytes filled up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
