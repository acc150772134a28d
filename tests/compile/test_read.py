"""Which files become integer graphs, and that everything else is refused by name, all at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from qdeploy.compile.graph import Window
from qdeploy.compile.read.handlers import read_graph
from qdeploy.errors import CompileError
from qdeploy.export.write import qdq_bytes
from qdeploy.qdq import parse_model
from tests.nets_frozen import random_frozen
from tests.qdq_models import Net


def kinds(model: ModelProto) -> list[str]:
    return [op.kind for op in read_graph(model).ops]


def test_our_own_models_are_read() -> None:
    net = random_frozen(0, depthwise=True, max_pool=True)
    graph = read_graph(parse_model(qdq_bytes(net)))
    assert len(graph.ops) == len(net.nodes)  # one more for the input, one less for flatten, which moves nothing
    assert graph.input_shape == (1, 3, 8, 8) and graph.output_shape == (1, 10)
    names = {p.name for p in graph.params}
    assert {"stem.weight", "stem.bias", "image.scale", "block0.in.out.clip_max"} <= names
    clipped = graph.tensors["block0.in.out.unclipped"].quantizer
    assert (clipped.clip_min, clipped.clip_max) == ("block0.in.out.clip_min", "block0.in.out.clip_max")


def test_a_relu_is_a_bound_and_flatten_feeds_a_linear_layer() -> None:
    net = Net()
    x = net.q("x")
    x = net.q(net.node("Relu", net.node("Conv", x, *net.weight(5, 4, 3, 3), pads=[1, 0, 1, 2])))
    x = net.q(net.node("Gemm", net.node("Flatten", x), *net.weight(180, 7, axis=1)))
    graph = read_graph(net.model(x, 2))
    conv, linear = graph.ops[1:]
    assert conv.window == Window((3, 3), (1, 1), (1, 0, 1, 2))
    assert graph.tensors[conv.output].quantizer.low == 0.0 and graph.tensors[conv.output].shape == (5, 6, 6)
    assert linear.weights is not None and linear.weights.transposed and linear.window.kernel == (6, 6)
    assert graph.borders()[conv.inputs[0].tensor] == (1, 0, 1, 2)


def test_codes_that_only_move_cost_nothing() -> None:
    net = Net()
    x = net.q(net.node("Identity", net.q(net.node("Reshape", net.q("x"), net.store("to", np.array([1, -1]))))))
    graph = read_graph(net.model(x, 2))
    assert [op.kind for op in graph.ops] == ["quantize"] and graph.output_shape == (1, 144)


def test_max_pool_without_a_quantizer_and_a_second_width() -> None:
    net = Net()
    x = net.node("MaxPool", net.q("x"), kernel_shape=[2, 2], strides=[2, 2])
    net.store("s2", np.float32(0.2))
    x = net.q(net.node("Add", net.q(x, "s2"), net.q(x, "s2")), "s2")
    assert kinds(net.model(x)) == ["quantize", "max_pool", "requantize", "requantize", "add"]


def test_pools_and_means() -> None:
    for op, attributes in (
        ("GlobalAveragePool", {}),
        ("ReduceMean", {"axes": [2, 3]}),
        ("ReduceMean", {"axes": [-1, -2], "keepdims": 0}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ):
        net = Net()
        assert kinds(net.model(net.q(net.node(op, net.q("x"), **attributes)), 4)) == ["quantize", "average_pool"]


def test_dead_branches_are_dropped() -> None:
    net = Net()
    x = net.q("x")
    net.q(net.node("Relu", x))
    assert kinds(net.model(x)) == ["quantize"]


def _unquantized_add(net: Net) -> str:
    x = net.q("x")
    y = net.node("Conv", x, *net.weight(4, 4, 1, 1))
    return net.q(net.node("Add", y, x))


def _float_weight(net: Net) -> str:
    return net.q(net.node("Conv", net.q("x"), net.store("w", np.zeros((4, 4, 1, 1), np.float32))))


def _wrong_bias(net: Net) -> str:
    x = net.q("x")
    return net.q(net.node("Conv", x, *net.weight(4, 4, 1, 1, bias=False), net.node("Relu", x)))


def _per_channel_activation(net: Net) -> str:
    return net.q("x", net.store("s4", np.ones(4, np.float32)), net.store("z4", np.zeros(4, np.uint8)))


def _wrong_axis(net: Net) -> str:
    w = net.weight(4, 4, 1, 1, bias=False)
    net.nodes[-1].attribute[0].i = 1
    return net.q(net.node("Conv", net.q("x"), *w))


def _pooled(net: Net, size: int = 3) -> str:
    """The input at 3 x 3, or as it is through a second quantizer."""
    s2 = net.store("s2", np.float32(0.2))
    x = net.q("x", s2)
    return x if size == 6 else net.q(net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), s2)


REFUSED: list[tuple[Callable[[Net], str], str]] = [
    (lambda net: net.q(net.node("Sin", net.q("x"))), "Sin sin3: this operator has no integer kernel"),
    (lambda net: net.node("Relu", net.q("x")), "output v3 is not quantized: put"),
    (lambda net: net.q(net.node("Relu", "x")), "put QuantizeLinear and DequantizeLinear before it"),
    (_unquantized_add, "input v5 of conv5 is not quantized: put QuantizeLinear behind it"),
    (_float_weight, "weight w is not an initializer behind DequantizeLinear"),
    (_wrong_bias, "bias v4 is neither int32 behind DequantizeLinear nor float32"),
    (_per_channel_activation, "activations are quantized per tensor"),
    (_wrong_axis, "is neither one value nor one for each of 4 output channels"),
    (lambda net: net.q(net.node("Add", net.q("x"), net.q(net.node("Flatten", net.q("x"))))), "mixes [1, N] and [1, C,"),
    (lambda net: net.q(net.node("Add", net.q("x"), _pooled(net))), "[1, 4, 6, 6] and [1, 4, 3, 3] do not broadcast"),
    (lambda net: net.q(net.node("Mul", net.q("x"), net.node("Sigmoid", _pooled(net, 6)))), "several activations"),
    (lambda net: net.q(net.node("Mul", net.q("x"), net.store("c", np.ones(4, np.float32)))), "store it behind Deq"),
    (lambda net: net.q(net.node("Div", net.q("x"), net.store("c", np.float32(0)))), "divides by 0"),
    (lambda net: net.q(net.node("Log", net.q("x"))), "values that are not finite"),
    (lambda net: net.q(net.node("ReduceMean", net.node("Sigmoid", net.q("x")), axes=[2, 3])), "of sigmoid3 is not"),
    (lambda net: net.q(net.node("Softmax", net.q("x"), axis=2)), "only the softmax over channels"),
    (lambda net: net.q(net.node("Concat", net.q("x"), net.q("x"), axis=2)), "only concatenation over channels"),
    (lambda net: net.q(net.node("Reshape", net.q("x"), net.store("n", np.array([1, 6, 6, 4])))), "[1, N] and back"),
    (lambda net: net.q(net.node("Pad", net.q("x"), net.store("n", np.array([0, 1] * 4)))), "pad more than H and W"),
    (lambda net: net.q(net.node("Resize", net.q("x"), "", net.store("n", np.float32([1, 1, 1.5, 2])))), "not whole"),
    (lambda net: net.q(net.node("Transpose", net.q("x"), perm=[0, 2, 3, 1])), "no integer kernel"),
    (lambda net: net.q(net.node("Conv", net.q("x"), *net.weight(4, 4, 9, 9))), "does not fit into 6 x 6"),
    (lambda net: net.q(net.node("Conv", net.q("x"), *net.weight(4, 3, 1, 1))), "does not fit 4 channels"),
    (lambda net: net.q(net.node("MatMul", net.q("x"), *net.weight(6, 6, axis=1, bias=False))), "flatten it"),
    (lambda net: net.q(net.node("ReduceMean", net.q("x"), axes=[1])), "only the mean over H and W"),
    (lambda net: net.q(net.node("AveragePool", net.q("x"), kernel_shape=[2, 2], ceil_mode=1)), "ceil_mode"),
    (lambda net: net.q(net.node("MaxPool", net.q("x"), kernel_shape=[1, 1], pads=[1, 1, 1, 1])), "smaller than the"),
    (lambda net: net.q(net.node("Flatten", net.q("x"), axis=2)), "only axis 1"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_refused(make: Callable[[Net], str], message: str) -> None:
    net = Net()
    out = make(net)
    with pytest.raises(CompileError, match="the model cannot be compiled") as caught:
        read_graph(net.model(out))
    assert message in str(caught.value)


def test_all_problems_are_listed_once() -> None:
    net = Net()
    x = net.q(net.node("Sin", net.q("x")))
    x = net.q(net.node("Conv", x, *net.weight(4, 4, 1, 1)))
    x = net.q(net.node("Cos", net.q("x")))
    with pytest.raises(CompileError) as caught:
        read_graph(net.model(x, opset=14))
    assert str(caught.value).count("no integer kernel") == 2
    assert "Conv" not in str(caught.value) and "output" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 4, 6), (1, 4, None, 6)])
def test_only_fixed_shapes_of_batch_one(shape: tuple) -> None:
    net = Net(shape)
    with pytest.raises(CompileError, match="the model cannot be compiled: input x"):
        read_graph(net.model(net.q("x")))


def test_a_shared_initializer_that_is_also_structure_is_refused() -> None:
    net = Net()
    x = net.node("Clip", net.q("x"), "s")  # the scale as a float bound
    with pytest.raises(CompileError, match="scale s is also used in another way"):
        read_graph(net.model(net.q(x)))
