"""Dense kernels beyond one thread and plain int8 weights: exact under every way to multiply, store and share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels import conv, tiles
from qdeploy.compile.kernels.conv import ConvSpec, conv_kernel
from qdeploy.compile.kernels.dots import GROUP
from qdeploy.compile.kernels.requantize import Fused
from qdeploy.compile.kernels.spec import TABLE_BYTES
from qdeploy.compile.llvm import Dot
from tests.compile.kernels import built, target_of
from tests.compile.test_conv import CODES, check, kernels_of, spec_of

NARROW = np.arange(-64, 65).astype(np.int8)
PLAIN = (0, 0, 0, 0)
SAME = (1, 1, 1, 1)
# channels in, channels out, groups, height, width, window, border of the output
SHAPES = [
    (3, 33, 1, 9, 8, Window((3, 3), (2, 2), (0, 0, 1, 1)), SAME),
    (12, 24, 1, 7, 7, Window((3, 3), (1, 1), SAME), PLAIN),
    (68, 40, 1, 6, 13, Window((1, 1)), PLAIN),
    (24, 36, 3, 6, 6, Window((3, 3), (1, 1), SAME), PLAIN),
    (148, 150, 1, 1, 1, Window((1, 1)), PLAIN),
    (16, 17, 1, 8, 8, Window((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)), PLAIN),
]  # fmt: skip
# the input of a row of outputs is too long to be widened at once; the whole input is, not some rows of it
LONG = [
    (64, 9, 1, 4, 400, Window((3, 3), (1, 1), SAME), PLAIN),
    (32, 16, 1, 11, 250, Window((3, 3), (1, 1), SAME), PLAIN),
    (96, 8, 1, 30, 40, Window((1, 1)), PLAIN),
]


def exact(specs: list[ConvSpec], target: object, allowed: np.ndarray, extremes: tuple[str, ...]) -> None:
    library, rng = kernels_of(dict(enumerate(specs)), target), np.random.default_rng(0)
    for i, spec in enumerate(specs):
        for extreme in extremes:
            check(library, i, spec, extreme, rng, allowed)


@pytest.mark.parametrize("name", ["pmaddwd", "pmaddwd512"])
def test_narrow_weights_do_not_saturate(name: str) -> None:
    target = target_of(name)
    specs = [replace(spec_of(shape, target.dot), narrow=True) for shape in SHAPES]
    assert {spec.multiply.instruction for spec in specs} == {"pmaddubsw"}
    exact(specs, target.tvm, NARROW, ("random", "high", "low", "zero_points"))


@pytest.mark.parametrize(
    ("name", "narrow"), [("vpdpbusd", False), ("vpdpbusd256", False), ("pmaddwd", False), ("pmaddwd", True)]
)
def test_packed_weights(name: str, narrow: bool) -> None:
    target, rng = target_of(name), np.random.default_rng(1)
    specs = [replace(spec_of(shape, target.dot), packed4=True, narrow=narrow) for shape in SHAPES]
    assert [spec.packed for spec in specs] == [False, True, True, True, True, True]
    for spec in specs[1:]:
        plain = replace(spec, packed4=False).weight_bytes
        odd = spec.groups * spec.blocks * spec.segments * (spec.quads % 2) * GROUP * spec.dot.lanes
        assert spec.weight_bytes - TABLE_BYTES == (plain + odd) // 2
    exact(specs, target.tvm, rng.choice(NARROW if narrow else CODES, 16, replace=False), ("random", "zero_points"))


@pytest.mark.parametrize("name", ["vpdpbusd", "amx"])
def test_sums_under_windows_that_are_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "SUMS", 0)
    monkeypatch.setattr(tiles, "SUMS", 0)
    target = target_of(name)
    specs = [spec_of(shape, target.dot) for shape in (SHAPES[1], SHAPES[3], SHAPES[5])]
    exact(specs, target.tvm, CODES, ("zero_points",))


def test_amx_leaves_packed_weights_to_dot_products() -> None:
    spec = spec_of((64, 64, 1, 14, 14, Window((3, 3), (1, 1), SAME), PLAIN), Dot("vpdpbusd", 16, 32, True))
    assert spec.family == "tiles" and replace(spec, packed4=True).family == "dense"


@pytest.mark.parametrize(("name", "threads"), [("vpdpbusd", 2), ("pmaddwd", 3)])
def test_threads_change_no_bit(name: str, threads: int) -> None:
    target = target_of(name)
    specs = [replace(spec_of(shape, target.dot), threads=threads) for shape in (*SHAPES[2:], LONG[1])]
    exact(specs, target.tvm, CODES, ("random", "zero_points"))


@pytest.mark.parametrize(("kind", "shape"), [("table", LONG[1]), ("add", LONG[1]), ("table", SHAPES[4])])
def test_threads_with_what_follows_a_convolution(kind: str, shape: tuple) -> None:
    target, rng = target_of("pmaddwd"), np.random.default_rng(2)
    spec = spec_of(shape, target.dot)
    spec = replace(spec, then=Fused(kind, None if kind == "table" else spec.y))
    functions = {f"conv{n}": conv_kernel(f"conv{n}", replace(spec, threads=n)) for n in (1, 2)}
    library = built(functions, target.tvm)
    arrays = {"x": rng.integers(0, 256, spec.x.size), "w": rng.integers(-128, 128, spec.weight_bytes)}
    arrays |= {"integers": np.zeros(2 * spec.padded + 1), "scale": np.full(spec.padded, 1e-4)}
    arrays |= {"quant": np.array([0.02, 100, 0, 255]), "y": np.zeros(spec.y.size)}
    kinds = dict(x="uint8", w="int8", integers="int32", scale="float32", quant="float32")
    for label, shape, dtype in spec.then.params:
        quantizer = label.startswith("quant")
        arrays[label] = arrays["quant"] if quantizer else rng.integers(0, 256, shape[0])
        kinds[label] = dtype
    values = [arrays[label].astype(dtype) for label, dtype in (kinds | {"y": "uint8"}).items()]
    results = []
    for n in (1, 2):
        tensors = [tvm.runtime.tensor(value) for value in values]
        library[f"conv{n}"](*tensors)
        results.append(tensors[-1].numpy())
    np.testing.assert_array_equal(*results)
    assert len(np.unique(results[0])) > 10


def test_inputs_of_every_length() -> None:
    target = target_of("pmaddwd")
    specs = [spec_of(shape, target.dot) for shape in LONG]
    assert [spec.widens for spec in specs] == [False, True, True]
    assert specs[1].rows_at_once(11) < 11 and not specs[2].flat
    exact(specs, target.tvm, CODES, ("random", "low"))


def test_a_packed_vector_holds_each_byte_once() -> None:
    for dot in (Dot("vpdpbusd", 16, 32), Dot("pmaddwd", 8, 16), Dot("pmaddwd", 4, 16)):
        spec = spec_of(SHAPES[0], dot)
        places = [spec.byte_place(lane, byte) for lane in range(dot.lanes) for byte in range(GROUP)]
        assert sorted(places) == list(range(GROUP * dot.lanes))
