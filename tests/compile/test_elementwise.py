"""Element-wise kernels and tables of every instruction set against numpy, with borders, tails and broadcasts."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from qdeploy.compile.expression import Term, evaluate, operand
from qdeploy.compile.graph import swapped
from qdeploy.compile.kernels.elementwise import ElementSpec, concat_kernel, elementwise_kernel, table_kernel
from qdeploy.compile.kernels.layout import SLACK, Layout
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.integer import added, multiplied
from qdeploy.target import Target, missing_features
from tests.compile.kernels import Kernels, built
from tests.compile.test_fuse import CPUS

F = np.float32
LOOKUPS = {"amx": "vpermi2b", "avx512": "pshufb", "avx2": "pshufb", "sse2": "none"}
WIDTHS = ("amx", "avx2", "sse2")  # vectors of 64, 32 and 16 bytes
SIZES = [(1, 1, 1), (3, 2, 5), (19, 6, 5), (70, 3, 2), (4, 1, 7)]  # [C, H, W]
BORDER = (1, 0, 2, 1)
DIFFERENCE = Term("sub", (operand(0), operand(1)))


def resolved(cpu: str) -> Resolved:
    found = resolve(Target("test", "x86_64", "llvm", *CPUS[cpu]))
    if lacking := missing_features(found.features):
        pytest.skip(f"this machine has no {', '.join(lacking)}")
    return found


def build(functions: dict, target: Resolved) -> Kernels:
    return built(functions, target.tvm)


def planes(buffer: np.ndarray, layout: Layout) -> np.ndarray:
    """[C, H, W] of a buffer."""
    top, left, _, _ = layout.border
    rows = buffer[: layout.size - SLACK].reshape(layout.rows, -1, layout.channels)
    return rows[top : top + layout.height, left : left + layout.width].transpose(2, 0, 1)


def codes_of(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, layout.size).astype(np.uint8)


def run(function: object, layout: Layout, *arrays: np.ndarray) -> np.ndarray:
    """Output planes; the border has to hold the zero point, the last quantizer's second number."""
    out = tvm.runtime.tensor(np.zeros(layout.size, np.uint8))
    function(*(tvm.runtime.tensor(array) for array in arrays), out)
    found = planes(out.numpy(), layout)
    whole = Layout(layout.channels, layout.rows, layout.row // layout.channels)
    assert (planes(out.numpy(), whole) == arrays[-1][1]).sum() >= whole.size - SLACK - found.size
    return found


def pairs() -> list[tuple[Layout, Layout, Layout]]:
    """Operands and output: of one shape, with borders, and broadcast in every way."""
    found = []
    for c, h, w in SIZES:
        plain, bordered = Layout(c, h, w), Layout(c, h, w, BORDER)
        found += [(plain, plain, plain), (bordered, plain, bordered), (plain, Layout(1, 1, 1), bordered)]
        found += [(Layout(c, 1, 1), plain, plain), (plain, Layout(c, 1, 1), plain)]
    c, h, w = SIZES[2]
    full = Layout(c, h, w)
    found += [(other, full, full) for other in (Layout(1, h, w), Layout(c, h, 1), Layout(1, 1, w), Layout(c, 1, w))]
    return [*found, (Layout(c, h, 1), Layout(1, 1, w), full)]


def expected(spec: ElementSpec, codes: list[np.ndarray], quants: list[np.ndarray]) -> np.ndarray:
    """docs/integers.md"""
    shifts = [128 if signed else 0 for signed in spec.signed]
    own = [code.astype(np.int32) - shift for code, shift in zip(codes, shifts, strict=False)]
    grids = [(q[0], int(q[1]) - shift) for q, shift in zip(quants, shifts, strict=True)]
    if spec.kind == "add":
        order = (1, 0) if swapped(codes[0].shape, codes[1].shape) else (0, 1)
        real = added(*(own[i] for i in order), *(grids[i] for i in order), grids[2]) + F(shifts[2])
    elif spec.kind == "mul":
        real = multiplied(own[0], own[1], *grids) + F(shifts[2])
    else:
        reals = [(code.astype(F) - F(q[1])) * q[0] for code, q in zip(codes, quants, strict=False)]
        real = np.rint(evaluate(spec.term, reals) / quants[2][0]) + quants[2][1]
    return np.clip(np.rint(real), quants[2][2], quants[2][3])


@pytest.mark.parametrize("cpu", WIDTHS)
def test_two_operands(cpu: str) -> None:
    """add, mul and a general term; scales in whole ratios, extremes, and results far outside of the codes."""
    target, rng = resolved(cpu), np.random.default_rng(0)
    specs = [
        ElementSpec(kind, DIFFERENCE, layouts[:2], layouts[2], signed, target.dot)
        for i, layouts in enumerate(pairs())
        for kind, signed in (("add", (i % 2 == 0,) * 3), ("mul", (i % 3 == 0,) * 3), ("elementwise", (False,) * 3))
        if kind == "add" or i % 3 == (kind == "mul") or i >= len(SIZES) * 5  # in all ways of broadcasting
    ]
    library = build({f"k{i}": elementwise_kernel(f"k{i}", spec) for i, spec in enumerate(specs)}, target)
    for i, spec in enumerate(specs):
        for scales in ((0.5, 1.5, 1.0), (0.013, 0.21, 0.087), (300.0, 2.0, 0.001)):
            codes = [codes_of(layout, rng) for layout in spec.xs]
            zeros = rng.integers(0, 256, 3)
            low, high = sorted(rng.integers(0, 256, 2)) if i % 2 else (0, 255)
            quants = [np.array([s, z, low, high], F) for s, z in zip(scales, zeros, strict=True)]
            got = run(library[f"k{i}"], spec.y, *codes, *quants)
            values = [planes(code, layout) for code, layout in zip(codes, spec.xs, strict=True)]
            np.testing.assert_array_equal(got, expected(spec, values, quants))


@pytest.mark.parametrize("cpu", CPUS)
def test_tables(cpu: str) -> None:
    """Every code through a table, for every length of a tail."""
    target, rng = resolved(cpu), np.random.default_rng(1)
    assert target.dot.lookup == LOOKUPS[cpu]
    layouts = [(Layout(1, 16, 16), Layout(1, 16, 16)), (Layout(7, 5, 9, BORDER), Layout(7, 5, 9))]
    layouts += [(Layout(n, 1, 1), Layout(n, 1, 1, BORDER)) for n in (1, 5, 16, 63, 64, 65, 100, 129)]
    library = build(
        {f"k{i}": table_kernel(f"k{i}", x, y, target.dot) for i, (x, y) in enumerate(layouts)}, target
    )  # fmt: skip
    for i, (x, y) in enumerate(layouts):
        codes = codes_of(x, rng)
        codes[: min(256, x.size)] = np.arange(min(256, x.size))
        table = rng.integers(0, 256, 256).astype(np.uint8)
        got = run(library[f"k{i}"], y, codes, table, np.array([1, 9, 0, 255], F))
        np.testing.assert_array_equal(got, table[planes(codes, x)])


@pytest.mark.parametrize("cpu", WIDTHS)
def test_concat(cpu: str) -> None:
    target, rng = resolved(cpu), np.random.default_rng(2)
    xs = [Layout(c, 3, 4, BORDER if c % 2 else (0, 0, 0, 0)) for c in (1, 70, 19, 64)]
    same, y = [True, False, True, False], Layout(154, 3, 4, BORDER)
    library = build({"k": concat_kernel("k", xs, same, y, target.dot)}, target)
    codes = [codes_of(x, rng) for x in xs]
    quant = np.array([0.07, 100, 20, 230], F)
    quants = [quant if equal else np.array([0.021, 77, 0, 255], F) for equal in same]
    got = run(library["k"], y, *codes, *quants, quant)
    reals = [(planes(c, x).astype(F) - q[1]) * q[0] for c, x, q in zip(codes, xs, quants, strict=True)]
    want = np.clip(np.rint(np.concatenate(reals) / quant[0]) + quant[1], quant[2], quant[3])
    np.testing.assert_array_equal(got, want)
