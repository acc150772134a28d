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
    assert linear.weights is not None and linear.weights.order == "matmul" and linear.window.kernel == (6, 6)
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
        net, kind = Net(), "average_pool" if op == "AveragePool" else "mean"
        assert kinds(net.model(net.q(net.node(op, net.q("x"), **attributes)), 4)) == ["quantize", kind]


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


# a network, and why one of its operators runs in float
FLOAT: list[tuple[Callable[[Net], str], str]] = [
    (lambda net: net.q(net.node("LogSoftmax", net.q("x"))), "LogSoftmax: this operator has no integer kernel"),
    (lambda net: net.node("Relu", net.q("x")), "Relu: it is the network's output, without a quantizer"),
    (lambda net: net.q(net.node("Relu", "x")), "Relu: input x is not an activation: put QuantizeLinear and Deq"),
    (_unquantized_add, "Add: input v5 of conv5 is not quantized: put QuantizeLinear behind it"),
    (_unquantized_add, "Conv: Add add6 reads it in float"),
    (_float_weight, "Conv: weight w is not an initializer behind DequantizeLinear"),
    (_wrong_bias, "Conv: bias v4 is neither int32 behind DequantizeLinear nor float32"),
    (_per_channel_activation, "QuantizeLinear: scale s4 has 4 values: activations are quantized per tensor"),
    (_per_channel_activation, "DequantizeLinear: its input is neither an initializer nor the output of"),
    (_wrong_axis, "Conv: scale ws2 is neither one value nor one for each of 4 output"),
    (lambda net: net.q(net.node("Mul", net.q("x"), net.node("Sigmoid", _pooled(net, 6)))), "Mul: it is a"),
    (lambda net: net.q(net.node("Mul", net.q("x"), net.store("c", np.ones(6, np.float32)))), "Mul: constant c is"),
    (lambda net: net.q(net.node("Div", net.q("x"), net.store("c", np.float32(0)))), "Div: it divides"),
    (lambda net: net.q(net.node("Log", net.q("x"))), "Log: some of its values are not finite"),
    (lambda net: net.q(net.node("ReduceMean", net.node("Sigmoid", net.q("x")), axes=[2, 3])), "ReduceMean: input v3"),
    (lambda net: net.q(net.node("Softmax", net.q("x"), axis=2)), "Softmax: only the"),
    (lambda net: net.q(net.node("Concat", net.q("x"), net.q("x"), axis=2)), "Concat: only concatenation"),
    (lambda net: net.q(net.node("Pad", net.q("x"), net.store("n", np.array([0, 1] * 4)))), "Pad: pads [0, 1, 0"),
    (lambda net: net.q(net.node("Resize", net.q("x"), "", net.store("n", np.float32([1, 1, 1.5, 2])))), "Resize: fa"),
    (lambda net: net.q(net.node("ReduceMean", net.q("x"), axes=[1])), "ReduceMean: only the mean over H and W"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FLOAT)
def test_what_runs_in_float(make: Callable[[Net], str], message: str) -> None:
    net = Net()
    graph = read_graph(net.model(make(net), None))
    reasons = [f"{kind}: {why}" for op in graph.ops if op.region for kind, _, why in op.region.nodes]
    assert any(reason.startswith(message) for reason in reasons), reasons
    assert graph.ops[0].kind == "quantize" or graph.ops[0].region is not None


IMPOSSIBLE: list[tuple[Callable[[Net], str], str]] = [
    (lambda net: net.q(net.node("Foo", net.q("x"), domain="shop")), "operators of shop have no float one either"),
    (lambda net: net.q(net.node("Compress", net.q("x"), net.node("Cast", "x", to=9))), "is not fixed by the file"),
    (lambda net: "x", "output x is no result of the network"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), IMPOSSIBLE)
def test_what_is_refused(make: Callable[[Net], str], message: str) -> None:
    net = Net()
    out = make(net)
    net.q("x")
    model = net.model(out)
    with pytest.raises(CompileError, match="the model cannot be compiled") as caught:
        read_graph(model)
    assert message in str(caught.value)


def test_all_problems_are_listed_once() -> None:
    net = Net()
    x = net.q(net.node("Foo", net.q("x"), domain="shop"))
    x = net.q(net.node("Conv", x, *net.weight(4, 4, 1, 1)))
    x = net.q(net.node("Bar", net.q("x"), domain="shop"))
    with pytest.raises(CompileError) as caught:
        read_graph(net.model(x, opset=14))
    assert str(caught.value).count("no integer kernel") == 2
    assert "Conv" not in str(caught.value) and "output" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 4, None, 6), (None, 4, None, None)])
def test_open_sizes_are_refused_with_the_flag_to_give(shape: tuple) -> None:
    net = Net(shape)
    model = net.model(net.q("x"))
    with pytest.raises(CompileError, match=r"input x leaves .*dimension 2.* open: fix it with --shape x=1,4,SIZE,"):
        read_graph(model)
    assert read_graph(model, ("x", (1, 4, 5, 6))).input_shape == (1, 4, 5, 6)
    assert read_graph(model, ("x", (3, 4, 5, 6))).output_shape == (3, 4, 5, 6)
    for given, message in ((("y", (1, 4, 5, 6)), "names the input y"), (("x", (1, 4)), "2 sizes"), (
        ("x", (1, 3, 5, 6)), "says 3 for axis 1: the model says 4"), (("x", (1, 4, 0, 6)), "says 0")):  # fmt: skip
        with pytest.raises(CompileError, match=message):
            read_graph(model, given)


def test_a_batch_is_compiled_for_one_image() -> None:
    net = Net((3, 4, 6, 6))
    x = net.q(net.node("Conv", net.q("x"), *net.weight(5, 4, 3, 3)))
    x = net.q(net.node("Gemm", net.node("Reshape", x, net.store("n", np.array([3, 80]))), *net.weight(80, 7, axis=1)))
    graph = read_graph(net.model(x, 2))
    assert graph.input_shape == (3, 4, 6, 6) and graph.output_shape == (3, 7)
    assert graph.tensors[graph.ops[1].output].shape == (5, 4, 4)


MIXED: list[Callable[[Net], str]] = [
    lambda net: net.q(net.node("ReduceMean", net.q("x"), axes=[0], keepdims=1)),
    lambda net: net.q(net.node("Softmax", net.q("x"), axis=0)),
    lambda net: net.q(net.node("Transpose", net.q("x"), perm=[1, 0, 2, 3])),
    lambda net: net.q(net.node("Gather", net.q("x"), net.store("n", np.array([1, 0, 2])), axis=0)),
    lambda net: net.q(net.node("Reshape", net.q("x"), net.store("n", np.array([1, -1])))),
    lambda net: net.q(net.node("CumSum", net.q("x"), net.store("n", np.int64(0)))),
    lambda net: net.q(net.node("Slice", net.q("x"), *(net.store(n, np.array(v)) for n, v in (
        ("a", [2]), ("b", [-9]), ("c", [0]), ("d", [-1]))))),
]  # fmt: skip


@pytest.mark.parametrize("make", MIXED)
def test_what_mixes_the_images_of_a_batch_is_refused(make: Callable[[Net], str]) -> None:
    net = Net((3, 4, 6, 6))
    with pytest.raises(CompileError, match="may mix the 3 images of its batch: compile it for one with --shape x=1,"):
        read_graph(net.model(make(net), None))


def test_an_initializer_that_is_also_structure_is_the_same_at_every_level() -> None:
    net = Net()
    x = net.node("Clip", net.q("x"), "s")  # the scale as a float bound
    graph = read_graph(net.model(net.q(x)))
    assert graph.tensors[graph.output.tensor].quantizer.low == np.float32(0.1)


def test_repeated_parameters_must_be_equal_at_every_level() -> None:
    net = Net()
    x = net.node("QuantizeLinear", "x", "s", "z")
    x = net.node("DequantizeLinear", x, net.store("s_too", np.float32(0.1)), "z")
    graph = read_graph(net.model(net.q(net.node("Conv", x, *net.weight(4, 4, 3, 3), pads=[1, 1, 1, 1]))))
    assert graph.equal == (("s_too", "s"),) and graph.ops[1].inputs[0].grid.scale == "s"


def test_the_reach_of_weights_is_what_the_file_proves() -> None:
    for most in (127, 128):
        net = Net()
        weight = net.weight(4, 4, 1, 1)
        codes = next(array for name, array in net.initializers.items() if name.startswith("w2"))
        codes[0, 0] = -most
        op = read_graph(net.model(net.q(net.node("Conv", net.q("x"), *weight)))).ops[1]
        assert op.weights is not None and op.weights.reach == most


def test_a_float_model_is_refused() -> None:
    net = Net()
    with pytest.raises(CompileError, match="nothing in it is quantized: put QuantizeLinear and DequantizeLinear"):
        read_graph(net.model(net.node("Relu", "x")))
