"""Depthwise kernels: the sliding window over every kernel size, stride and width of strip, exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.depthwise import uses
from qdeploy.compile.kernels.spec import ConvSpec
from qdeploy.compile.llvm import Dot
from tests.compile.kernels import target_of
from tests.compile.test_conv import CODES, check, kernels_of, spec_of

NARROW = np.arange(-64, 65).astype(np.int8)
PLAIN = (0, 0, 0, 0)


def square(kernel: int, stride: int = 1, dilation: int = 1) -> Window:
    return Window((kernel, kernel), (stride, stride), (kernel // 2,) * 4, (dilation, dilation))


# channels, height, width, window, border of the output
SHAPES = [
    (64, 6, 7, square(3), (1, 1, 1, 1)),  # two rows at once
    (65, 5, 6, square(3), PLAIN),
    (144, 4, 3, square(3), (0, 1, 0, 0)),
    (48, 8, 1, square(3), PLAIN),
    (40, 9, 8, square(3, 2), PLAIN),
    (16, 7, 9, square(3, 3), PLAIN),
    (72, 8, 7, square(5), PLAIN),
    (33, 11, 10, square(5, 2), (2, 2, 2, 2)),
    (20, 13, 12, square(5, 4), PLAIN),
    (24, 11, 12, square(5, 5), PLAIN),
    (24, 9, 8, Window((5, 4), (1, 1), (2, 1, 2, 2)), PLAIN),
    (17, 9, 8, Window((5, 3), (1, 2), (2, 1, 2, 1)), PLAIN),
    (24, 8, 9, Window((4, 4), (1, 1), (2, 2, 1, 1)), PLAIN),
    (24, 9, 5, Window((8, 3), (1, 1), (4, 1, 4, 1)), PLAIN),
    (64, 8, 9, square(3, 1, 2), PLAIN),
    (24, 12, 13, square(5, 1, 2), PLAIN),
    (24, 20, 20, square(3, 1, 6), PLAIN),
    (24, 5, 5, Window((1, 1)), PLAIN),
    (24, 7, 7, Window((1, 1), (2, 2)), PLAIN),
    (24, 5, 5, Window((5, 5)), PLAIN),
]  # fmt: skip


def specs_of(dot: Dot) -> list[ConvSpec]:
    return [spec_of((c, c, c, *rest), dot) for c, *rest in SHAPES]


@pytest.mark.parametrize(
    ("name", "narrow"), [("vpdpbusd", False), ("vpdpbusd256", False), ("pmaddwd", True), ("pmaddwd512", True)]
)
def test_every_window_is_exact(name: str, narrow: bool) -> None:
    target, rng = target_of(name), np.random.default_rng(0)
    specs = [replace(spec, narrow=narrow) for spec in specs_of(target.dot)[:: 1 if name == "vpdpbusd" else 4]]
    assert sum(spec.by_rows for spec in specs) >= len(specs) // 2
    library = kernels_of(dict(enumerate(specs)), target.tvm)
    for i, spec in enumerate(specs):
        for extreme in ("random", "high", "low", "zero_points", "steep", "relu"):
            check(library, i, spec, extreme, rng, NARROW if narrow else CODES)


def test_rows_are_spread_over_threads() -> None:
    target, rng = target_of("vpdpbusd"), np.random.default_rng(0)
    specs = [replace(spec, threads=3) for spec in specs_of(target.dot)[:9:4]]
    library = kernels_of(dict(enumerate(specs)), target.tvm)
    for i, spec in enumerate(specs):
        check(library, i, spec, "random", rng)


def test_dots_hold_every_tap_once_for_each_row_of_outputs() -> None:
    for spec in specs_of(Dot("vpdpbusd", 16, 32)):
        (kh, kw), together = spec.window.kernel, spec.rows_together
        taps = [tap for dot in spec.strip_taps for tap in dot if tap is not None]
        assert sorted(taps) == sorted(list(range(kh * kw)) * together)
    assert spec_of((64, 64, 64, 8, 8, square(3), PLAIN), Dot("vpdpbusd", 16, 32)).rows_together == 2
    five = spec_of((64, 64, 64, 8, 8, square(5), PLAIN), Dot("vpdpbusd", 16, 32))
    assert five.strip_dots == 7  # and not 10: the last row is taken across


def test_a_window_reads_no_columns_but_its_own() -> None:
    for spec in specs_of(Dot("vpdpbusd", 16, 32)):
        stride, extent, dots = spec.window.stride[1], spec.extent, spec.strip_dots // spec.rows_together
        begun, ended = uses(spec, 0, extent - stride), uses(spec, extent - stride, extent)
        for offsets, _ in begun + ended:
            for offset in offsets:
                assert 0 <= offset % spec.x.row <= (extent - 1) * spec.x.channels
        # every pixel meets each dot product once: the first one, and one whose window is all in the steps
        first = [k for _, users in begun + ended for pixel, k in users if pixel == 0]
        later = [k for _, users in ended for _, k in users]
        assert sorted(first) == sorted(later) == list(range(dots))


def test_few_registers_hold_few_pixels() -> None:
    five, narrow = square(5), Dot("pmaddwd", 8, 16)
    assert not replace(spec_of((64, 64, 64, 8, 8, five, PLAIN), narrow), narrow=True).by_rows
    assert replace(spec_of((64, 64, 64, 8, 8, square(5, 2), PLAIN), narrow), narrow=True).by_rows
    assert not spec_of((64, 64, 64, 8, 8, square(3), PLAIN), narrow).by_rows
    assert not spec_of((64, 64, 64, 8, 8, square(7), PLAIN), Dot("vpdpbusd", 16, 32)).by_rows
