"""Tables of chains: several element-wise operators over one activation become one table of 256 codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from qdeploy.compile.kernels.elementwise import ElementSpec, by_rows, computation
from qdeploy.compile.kernels.emit import QUANT, Buffer, cast, load, local, loop, prim_func, store
from qdeploy.compile.kernels.layout import Layout
from qdeploy.compile.kernels.lookup import ENTRIES, TABLE

CODES = Layout(ENTRIES, 1, 1)  # every code once


@dataclass(frozen=True)
class Link:
    """One operator of a chain. `reads`: 0 is the chain's input, i the result of link i - 1; `element` None: a table."""

    reads: tuple[int, ...]
    element: ElementSpec | None = None


def chain_kernel(name: str, links: Sequence[Link]) -> tirx.PrimFunc:
    """(of each link its table, or the quantizers of its operands and its output) -> table of the whole chain.

    The links run as the kernels of their operators would, on all 256 codes.
    """
    params = []
    for i, link in enumerate(links):
        count = 0 if link.element is None else len(link.reads) + 1
        params += [(f"link{i}_quant{k}", *QUANT) for k in range(count)] if count else [(f"link{i}_table", *TABLE)]

    def body(*buffers: Buffer) -> None:
        given = list(buffers)
        codes = [local(CODES.size, "uint8")]
        loop(ENTRIES, lambda i: store(codes[0], cast("uint8", i, 1), i))
        for link in links:
            last = len(codes) == len(links)
            out = buffers[-1] if last else local(CODES.size, "uint8")
            if link.element is None:
                look_up(given.pop(0), codes[link.reads[0]], out)
            else:
                quants = [given.pop(0) for _ in range(len(link.reads) + 1)]
                compute = computation(link.element, quants[:-1], quants[-1])
                by_rows(link.element, [codes[i] for i in link.reads], out, compute)
            codes.append(out)

    return prim_func(name, [*params, ("table", *TABLE)], body)


def look_up(table: Buffer, codes: Buffer, out: Buffer) -> None:
    """A table of a table, one by one."""
    loop(ENTRIES, lambda i: store(out, load(table, cast("int32", load(codes, i), 1)), i))
