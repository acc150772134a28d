"""Which files become integer graphs, and that everything else is refused by name, all at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx import TensorProto as TP

from qdeploy.compile.graph import Window
from qdeploy.compile.read import read_graph
from qdeploy.errors import CompileError
from qdeploy.export.write import qdq_bytes
from qdeploy.qdq import canonical_bytes, parse_model
from tests.nets_frozen import random_frozen


class Net:
    """A QDQ model by hand: activations have the quantizer `s`, `z` unless said otherwise."""

    def __init__(self, shape: tuple[int, ...] = (1, 4, 6, 6), zero: type = np.uint8) -> None:
        self.shape, self.nodes, self.count = shape, [], 0
        self.initializers = {"s": np.float32(0.1), "z": zero(3)}

    def store(self, name: str, array: np.ndarray) -> str:
        self.initializers[name] = np.asarray(array)
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(op, inputs, [f"v{self.count}"], f"{op.lower()}{self.count}", **attributes))
        return f"v{self.count}"

    def q(self, value: str, s: str = "s", z: str = "z") -> str:
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, s, z), s, z)

    def weight(self, *shape: int, axis: int = 0, bias: bool = True) -> list[str]:
        n = len(self.initializers)
        rng = np.random.default_rng(n)
        channels = shape[axis]
        w = self.store(f"w{n}", rng.integers(-64, 65, shape).astype(np.int8))
        s = self.store(f"ws{n}", rng.uniform(0.01, 0.02, channels).astype(np.float32))
        out = [self.node("DequantizeLinear", w, s, self.store(f"wz{n}", np.zeros(channels, np.int8)), axis=axis)]
        if bias:
            b = self.store(f"b{n}", rng.integers(-99, 99, channels).astype(np.int32))
            bs = self.store(f"bs{n}", np.float32(0.1) * self.initializers[s])
            out.append(self.node("DequantizeLinear", b, bs, axis=0))
        return out

    def model(self, output: str, rank: int = 4, opset: int = 13) -> ModelProto:
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TP.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TP.FLOAT, [None] * rank)],
            [numpy_helper.from_array(np.asarray(a), name) for name, a in self.initializers.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return parse_model(canonical_bytes(model))


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


def _float_bias(net: Net) -> str:
    return net.q(
        net.node("Conv", net.q("x"), *net.weight(4, 4, 1, 1, bias=False), net.store("b", np.zeros(4, np.float32)))
    )


def _per_channel_activation(net: Net) -> str:
    return net.q("x", net.store("s4", np.ones(4, np.float32)), net.store("z4", np.zeros(4, np.uint8)))


def _wrong_axis(net: Net) -> str:
    w = net.weight(4, 4, 1, 1, bias=False)
    net.nodes[-1].attribute[0].i = 1
    return net.q(net.node("Conv", net.q("x"), *w))


REFUSED: list[tuple[Callable[[Net], str], str]] = [
    (lambda net: net.q(net.node("Sigmoid", net.q("x"))), "Sigmoid sigmoid3: this operator has no integer kernel"),
    (lambda net: net.node("Relu", net.q("x")), "output v3 is not quantized: put"),
    (lambda net: net.q(net.node("Relu", "x")), "put QuantizeLinear and DequantizeLinear before it"),
    (_unquantized_add, "input v5 of conv5 is not quantized: put QuantizeLinear behind it"),
    (_float_weight, "weight w is not an initializer behind DequantizeLinear"),
    (_float_bias, "bias b is not an int32 initializer"),
    (_per_channel_activation, "activations are quantized per tensor"),
    (_wrong_axis, "is neither one value nor one for each of 4 output channels"),
    (lambda net: net.q(net.node("Add", net.q("x"), net.q(net.node("GlobalAveragePool", net.q("x"))))), "equal shapes"),
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
    x = net.q(net.node("Sigmoid", net.q("x")))
    x = net.q(net.node("Conv", x, *net.weight(4, 4, 1, 1)))
    x = net.q(net.node("HardSwish", net.q("x")))
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
