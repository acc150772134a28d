"""Models that are legal ONNX and unusual: compiled they equal ONNX Runtime, or are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto
from onnx import TensorProto as TP

from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator
from qdeploy.errors import CompileError
from qdeploy.qdq import arrays
from tests.compile.models import compiled_difference, read_difference, unoptimized
from tests.qdq_models import Net

Build = Callable[[Net, str], str]
STEP = 0.1


def model(shape: tuple[int, ...], build: Build, rank: int = 4, opset: int = 13) -> ModelProto:
    """`build` takes a net and the name of its quantized input, and returns the output's name."""
    net = Net(shape)
    return net.model(build(net, net.q("x")), rank, opset)


def ceil_pool(op: str, kernel: list[int], strides: list[int]) -> Build:
    def build(net: Net, x: str) -> str:
        return net.node("Softplus", net.q(net.node(op, x, kernel_shape=kernel, strides=strides, ceil_mode=1)))

    return build


def scalar_of_rank(net: Net, x: str) -> str:
    half = net.store("half", np.full((1, 1, 1, 1), 0.5, np.float32))
    return net.node("Softmax", net.q(net.node("Mul", x, half)), axis=1)


def number_a_row(net: Net, x: str) -> str:
    rows = net.node("Reshape", x, net.store("to", np.array([4, 6])))
    bias = net.store("bias", np.array([[-9], [-3], [3], [9]], np.float32))
    return net.q(net.node("Gemm", rows, *net.weight(4, 6, bias=False), bias, transB=1))


def softmax_of_five(net: Net, x: str) -> str:
    return net.q(net.node("Softmax", net.node("Reshape", x, net.store("to", np.array([1, 2, 8, 6, 1]))), axis=1))


def channels_elsewhere(net: Net, x: str) -> str:
    y = net.node("Conv", x, *net.weight(4, 4, 1, 1, bias=False))
    y = net.node("Reshape", y, net.store("to", np.array([4, 4, 4])))
    return net.q(net.node("Add", y, net.store("bias", np.array([[-9], [-3], [3], [9]], np.float32))))


@pytest.mark.parametrize(
    ("shape", "build", "rank"),
    [
        ((1, 4, 15, 3), ceil_pool("MaxPool", [2, 3], [3, 1]), 4),  # a window that starts behind the input
        ((1, 4, 7, 7), ceil_pool("MaxPool", [2, 2], [3, 3]), 4),
        ((1, 8, 3, 8), ceil_pool("AveragePool", [3, 4], [2, 3]), 4),
        ((1, 4, 6), number_a_row, 2),  # as many rows as channels
        ((1, 12, 8, 1), softmax_of_five, 5),
        ((1, 4, 4, 4), channels_elsewhere, 3),
        ((1, 4, 6), scalar_of_rank, 4),
    ],
)
def test_equals_onnx_runtime(shape: tuple[int, ...], build: Build, rank: int, tmp_path: Path) -> None:
    found = model(shape, build, rank)
    assert compiled_difference(found, STEP, tmp_path, unoptimized)[1].worst < 1.01


def keep_aspect_ratio(net: Net, x: str) -> str:
    sizes = net.store("sizes", np.array([1, 4, 8, 12]))
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return net.q(net.node("Resize", x, "", "", sizes, **how, keep_aspect_ratio_policy="not_larger"))


def gather(op: str, indices: np.ndarray, **attributes: int) -> Build:
    def build(net: Net, x: str) -> str:
        return net.q(net.node(op, x, net.store("at", indices), **attributes))

    return build


def computed_indices(net: Net, x: str) -> str:
    table, big = net.store("table", np.arange(100, dtype=np.float32)), net.store("big", np.float32(1e8))
    return net.q(net.node("Gather", table, net.node("Cast", net.node("Mul", x, big), to=TP.INT64), axis=0))


def mixes_images(net: Net, x: str) -> str:
    return net.q(net.node("Add", net.node("Reshape", x, net.store("to", np.array([3, 13, 3, 1]))), x))


@pytest.mark.parametrize(
    ("shape", "build", "rank", "opset", "reason"),
    [
        ((1, 4, 4, 4), keep_aspect_ratio, 4, 18, "keep_aspect_ratio|TVM makes"),
        ((1, 4, 6), gather("Gather", np.array([0, 10**9]), axis=1), 3, 13, "outside"),
        ((1, 4, 6), gather("Gather", np.array([0, -(10**9)]), axis=1), 3, 13, "outside"),
        ((1, 4, 6), gather("GatherND", np.array([[0, 10**9, 0]])), 1, 13, "outside"),
        ((1, 4, 6), gather("GatherElements", np.full((1, 4, 6), 10**9), axis=1), 3, 13, "outside"),
        ((1, 4, 6), computed_indices, 3, 13, "nothing can check them"),
        ((3, 39), mixes_images, 4, 13, "may mix the 3 images"),
    ],
)
def test_is_refused_in_one_line(
    shape: tuple[int, ...], build: Build, rank: int, opset: int, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CompileError, match=reason) as error:
        compiled_difference(model(shape, build, rank, opset), STEP, tmp_path)
    assert "\n" not in str(error.value)


def test_indices_inside_the_data_still_compile(tmp_path: Path) -> None:
    found = model((1, 4, 6), gather("GatherElements", np.full((1, 4, 6), -4), axis=1), 3)
    assert compiled_difference(found, STEP, tmp_path, unoptimized)[1].worst < 1.01


@pytest.mark.parametrize("shape", [(1, 5), (5,)])
def test_the_reference_takes_biases_of_any_rank(shape: tuple[int, ...]) -> None:
    def build(net: Net, x: str) -> str:
        rows = net.node("Reshape", x, net.store("to", np.array([1, 6])))
        bias = net.store("bias", np.linspace(-2, 2, 5, dtype=np.float32).reshape(shape))
        return net.q(net.node("Gemm", rows, *net.weight(5, 6, bias=False), bias, transB=1))

    found = model((1, 6), build, 2)
    assert read_difference(found, STEP)[1].worst < 1.01
    Evaluator(read_graph(found), arrays(found))


def test_a_formula_of_thousands_of_operators_is_no_kernel() -> None:
    graph = read_graph(model((1, 4, 6, 6), lambda net, x: net.q(net.node("Max", *[x] * 3000))))
    assert any("too many operators" in reason for op in graph.ops if op.region for _, _, reason in op.region.nodes)
