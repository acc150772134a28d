"""Every kernel on emulated ARM processors: the tests of the x86 kernels, on the targets that ship."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.conv import ConvSpec, register_tiles, tile
from qdeploy.compile.kernels.join import join_kernel
from qdeploy.compile.kernels.spec import Choice
from qdeploy.compile.llvm import Dot
from tests.compile import arm, test_conv, test_depthwise, test_dots, test_edges, test_elementwise, test_join
from tests.compile.test_conv import CODES, check, spec_of

WAYS = {"raspberry-pi-4": "smull", "raspberry-pi-5": "sdot", "neoverse-v1": "usmmla"}
EXTREMES = ("random", "high", "low", "zero_points", "steep", "relu")
NO_LEAST = np.arange(-127, 128).astype(np.int8)  # what smlal takes


def exact(specs: list[ConvSpec], name: str, allowed: np.ndarray = CODES) -> None:
    """`specs` with weights out of `allowed`, at the ends of all ranges."""
    target, rng = arm.target_of(name), np.random.default_rng(0)
    library = test_conv.kernels_of(dict(enumerate(specs)), target.tvm)
    for i, spec in enumerate(specs):
        for extreme in EXTREMES:
            check(library, i, spec, extreme, rng, allowed)


@pytest.fixture(autouse=True)
def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of other files build for emulated processors."""
    monkeypatch.setattr(test_conv, "built", arm.built)
    monkeypatch.setattr(test_dots, "target_of", arm.target_of)
    for module in (test_elementwise, test_edges):
        monkeypatch.setattr(module, "resolved", arm.target_of)
        monkeypatch.setattr(module, "build", lambda functions, target: arm.built(functions, target.tvm))


@pytest.mark.parametrize("name", WAYS)
def test_convolutions(name: str) -> None:
    dot = arm.target_of(name).dot
    assert dot.instruction == WAYS[name]
    first, step = {"raspberry-pi-4": (2, 5), "raspberry-pi-5": (0, 2), "neoverse-v1": (2, 3)}[name]
    specs = [spec_of(shape, dot) for shape in (test_conv.SHAPES[12], *test_conv.SHAPES[first::step])]
    assert {"dense", "depthwise"} <= {spec.family for spec in specs}
    exact(specs, name)


@pytest.mark.parametrize("name", WAYS)
def test_depthwise_convolutions(name: str) -> None:
    specs = test_depthwise.specs_of(arm.target_of(name).dot)[:: 3 if name == "raspberry-pi-5" else 7]
    assert any(spec.by_rows for spec in specs) == (name != "raspberry-pi-4")
    exact(specs, name)


def test_two_products_in_16_bits() -> None:
    """smlal: weights of -127 and 127 under the least and the greatest codes."""
    dot = arm.target_of("raspberry-pi-4").dot
    specs = [replace(spec_of(shape, dot), narrow=True) for shape in (*test_dots.SHAPES[:4], test_conv.SHAPES[12])]
    assert {spec.multiply.instruction for spec in specs} == {"smlal"}
    exact(specs, "raspberry-pi-4", NO_LEAST)


@pytest.mark.parametrize("name", WAYS)
def test_packed_weights(name: str) -> None:
    dot, rng = arm.target_of(name).dot, np.random.default_rng(1)
    specs = [replace(spec_of(shape, dot), packed4=True) for shape in test_dots.SHAPES[1:5:2]]
    assert all(spec.packed for spec in specs)
    assert {spec.multiply.instruction for spec in specs} == {
        "usdot" if dot.instruction == "usmmla" else dot.instruction
    }
    exact(specs, name, rng.choice(CODES, 16, replace=False))


@pytest.mark.parametrize("shape", [(3, 2), (1, 8)])
def test_register_tiles(shape: tuple[int, int]) -> None:
    """Odd pairs of windows, one vector of channels, and tails behind each."""
    same = Window((3, 3), (1, 1), (1, 1, 1, 1))
    spec = spec_of((20, 36, 1, 5, 7, same, (0, 0, 0, 0)), arm.target_of("neoverse-v1").dot)
    exact([replace(spec, choice=Choice("dense", *shape))], "neoverse-v1")


def test_sums_under_windows_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    test_dots.test_sums_under_windows_that_are_not_kept("raspberry-pi-5", monkeypatch)


@pytest.mark.parametrize("check_one", [test_elementwise.test_two_operands, test_elementwise.test_concat])
def test_element_wise_kernels(check_one) -> None:
    check_one("raspberry-pi-5")


def test_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_elementwise.LOOKUPS, "raspberry-pi-4", "tbl")
    test_elementwise.test_tables("raspberry-pi-4")


@pytest.mark.parametrize("check_one", [test_edges.test_quantize, test_edges.test_the_way_out, test_edges.test_pools])
def test_edges_and_pools(check_one) -> None:
    check_one("raspberry-pi-5")


def test_joining_planes() -> None:
    target = arm.target_of("raspberry-pi-4")
    kernel = arm.exported({"join": join_kernel("join", target.features)}, target.tvm)["__tvm_ffi_join"]
    for count in (1, 65):
        test_join.test_every_part_of_every_length(kernel, count)


def test_tiles_fit_the_registers() -> None:
    for instruction in (*WAYS.values(), "usdot", "smlal"):
        for shape in test_conv.SHAPES:
            spec = spec_of(shape, Dot(instruction, 4, 32))
            if spec.family == "dense":
                assert tile(spec) == register_tiles(spec)[0]
                for pixels, blocks in register_tiles(spec):
                    assert pixels * blocks + pixels <= 30
