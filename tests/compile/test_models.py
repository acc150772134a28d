"""Whole small models: what the file says, run by ONNX Runtime, against the integer graph and the compiled artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.compile.read.handlers import read_graph
from qdeploy.errors import CompileError, DeviceError, QDeployError
from qdeploy.qdq import arrays, canonical_bytes, parse_model
from tests.compile.models import TARGET, compiled_difference, read_difference
from tests.qdq_models import Net

Make = Callable[[Net], str]


def const(net: Net, *values: float) -> str:
    """An int64 vector."""
    return net.store(f"n{len(net.initializers)}", np.array(values, np.int64))


def conv(net: Net, x: str, *shape: int, **attributes: object) -> str:
    return net.node("Conv", x, *net.weight(*shape), **attributes)


def _float_in_the_middle(net: Net) -> str:
    """An activation that is read in codes and in float, and an island between quantizers."""
    x = net.q(conv(net, net.q("x"), 6, 4, 3, 3, pads=[1, 1, 1, 1]))
    island = net.q(net.node("LogSoftmax", x))
    y = net.q(conv(net, x, 6, 6, 1, 1))
    return net.q(net.node("Add", net.node("LogSoftmax", y), net.node("LogSoftmax", island)))


def _read_twice(net: Net) -> str:
    """A convolution whose result is quantized and goes on in float."""
    y = conv(net, net.q("x"), 5, 4, 3, 3)
    return net.q(net.node("Mul", net.node("Tanh", y), net.q(y)))


def _shuffled_channels(net: Net) -> str:
    x = net.node("Reshape", net.q("x"), const(net, 1, 2, 2, 6, 6))
    x = net.node("Reshape", net.node("Transpose", x, perm=[0, 2, 1, 3, 4]), const(net, 1, 4, 6, 6))
    return net.q(conv(net, net.q(x), 3, 4, 3, 3))


def _tokens(net: Net) -> str:
    """Rows of a matrix, each through a fully connected layer, as in a transformer."""
    x = net.node("Transpose", net.node("Reshape", net.q("x"), const(net, 1, 4, 36)), perm=[0, 2, 1])
    x = net.node("MatMul", x, *net.weight(4, 9, axis=1, bias=False))
    x = net.q(net.node("Add", net.store("b", np.linspace(-1, 1, 9, dtype=np.float32)), x))
    y = net.q(net.node("Softmax", x, axis=-1))
    return net.q(net.node("Mul", x, y))


def _shape_chain(net: Net) -> str:
    """What torch's exporter writes for x.view(x.size(0), -1)."""
    x = net.q(net.node("MaxPool", net.q("x"), kernel_shape=[2, 2], strides=[2, 2]))
    size = net.node("Gather", net.node("Shape", x), net.store("zero", np.int64(0)), axis=0)
    rows = net.node("Unsqueeze", size, const(net, 0))
    x = net.node("Reshape", x, net.node("Concat", rows, const(net, -1), axis=0))
    return net.q(net.node("Gemm", x, *net.weight(36, 5, axis=1)))


def _parts(net: Net) -> str:
    """Split over channels, a strided slice over pixels, and both again in one."""
    split = net.q("x")
    net.nodes.append(helper.make_node("Split", [split], ["p0", "p1"], "split", axis=1))
    x = net.q(net.node("Concat", "p1", net.q(net.node("Relu", "p0")), axis=1))
    x = net.node("Slice", x, const(net, 5, 0), const(net, -100, 6), const(net, 2, 3), const(net, -2, 1))
    return net.q(conv(net, net.q(x), 3, 4, 3, 3))


def _transposed(net: Net, groups: int = 1, **attributes: object) -> str:
    rng = np.random.default_rng(0)
    w = net.store("w", rng.integers(-64, 65, (4, 6 // groups, 3, 2)).astype(np.int8))
    w = net.node("DequantizeLinear", w, net.store("ws", np.float32(0.013)), net.store("wz", np.int8(0)))
    return net.q(net.node("ConvTranspose", net.q("x"), w, group=groups, **attributes))


MODELS: dict[str, tuple[Make, list[str]]] = {
    "island": (_float_in_the_middle, ["conv", "float", "quantize", "conv", "float"]),
    "read twice": (_read_twice, ["conv", "float"]),
    "shuffled": (_shuffled_channels, ["shuffle", "conv"]),
    "tokens": (_tokens, ["shuffle", "conv", "shuffle", "float", "mul"]),
    "shapes": (_shape_chain, ["max_pool", "conv"]),
    "parts": (_parts, ["shuffle", "concat", "shuffle", "conv"]),
    "transposed": (lambda net: _transposed(net, strides=[2, 3], pads=[1, 0, 2, 1], output_padding=[1, 0]), ["insert"]),
    "groups": (lambda net: _transposed(net, 2, dilations=[2, 1], strides=[1, 2]), ["insert", "conv"]),
    "float weight": (
        lambda net: net.q(
            net.node("Conv", net.q("x"), net.store("w", np.linspace(-1, 1, 108, dtype=np.float32).reshape(3, 4, 3, 3)))
        ),
        ["float"],
    ),
    "float ends": (lambda net: net.node("LogSoftmax", conv(net, net.node("LogSoftmax", "x"), 3, 4, 3, 3)), ["float"]),
    "turned": (
        lambda net: net.node(
            "Gemm", net.node("MatMul", net.node("Flatten", "x"),
            net.node("Transpose", net.weight(5, 144, bias=False)[0])), *net.weight(7, 5), transB=1),
        ["float"],
    ),
    "half-way": (lambda net: conv(net, net.q("x"), 3, 4, 3, 3), ["dequantize", "float"]),
    "depth": (
        lambda net: net.q(conv(net, net.q(net.node("DepthToSpace", net.q("x"), blocksize=2)), 3, 1, 3, 3)),
        ["shuffle", "conv"],
    ),
    "space": (lambda net: net.q(net.node("SpaceToDepth", net.q("x"), blocksize=3)), ["shuffle"]),
    "crd": (lambda net: net.q(net.node("DepthToSpace", net.q("x"), blocksize=2, mode="CRD")), ["shuffle"]),
    "permuted": (lambda net: net.q(net.node("Transpose", net.q("x"), perm=[0, 3, 1, 2])), ["shuffle"]),
    "ceil": (
        lambda net: net.q(
            net.node("AveragePool", net.q("x"), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
            net.store("s2", np.float32(0.0737)),
        ),
        ["average_pool"],
    ),
    "gather": (lambda net: net.q(net.node("Gather", net.q("x"), const(net, 2, 1), axis=1)), ["shuffle"]),
    "one row": (
        lambda net: net.q(net.node("Gather", net.q("x"), net.store("i", np.int64(-1)), axis=2)),
        ["shuffle"],
    ),
    "any order": (lambda net: net.q(net.node("Gather", net.q("x"), const(net, 2, 1, 3), axis=1)), ["float"]),
    "broadcast": (
        lambda net: net.q(net.node("Add", net.q("x"), net.node("Reshape", net.q("x"), const(net, 1, 4, 6, 6)))),
        ["add"],
    ),
    "resized": (
        lambda net: net.q(
            net.node("Resize", net.q("x"), "", net.store("f", np.float32([1, 1, 2, 1.5])), mode="linear")
        ),
        ["float"],
    ),
    "normalized": (
        lambda net: net.q(net.node("LRN", net.q("x"), size=3)),
        ["float"],
    ),
    "reduced": (lambda net: net.q(net.node("ReduceMean", net.q("x"), axes=[1], keepdims=1)), ["float"]),
}  # fmt: skip


def made(name: str) -> tuple:
    net = Net()
    out = MODELS[name][0](net)
    return net.model(out, None), MODELS[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_graphs_compute_what_the_file_says(name: str) -> None:
    model, kinds = made(name)
    graph, found = read_difference(model, 0.1)
    assert set(kinds) <= {op.kind for op in graph.ops}
    assert found.worst <= 1.01 and found.share < 0.05, found


COMPILED = (
    "island", "read twice", "shuffled", "tokens", "parts", "transposed", "groups", "float ends", "half-way", "turned",
    "depth", "permuted", "ceil", "resized",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_equal_their_graphs(name: str, tmp_path: Path) -> None:
    model, _ = made(name)
    head, found = compiled_difference(model, 0.1, tmp_path)
    rows = head["variants"][0]["kernels"]
    floats = [row for row in rows if row["operator"] == "float"]
    assert all(row["nodes"] and all(node["reason"] for node in row["nodes"]) for row in floats)
    if floats:  # sums in another order than the evaluator's
        assert found.worst <= 1.01 and found.share < 0.02, found
    else:
        assert found.worst == 0, found


def test_a_batch_runs_image_by_image(tmp_path: Path) -> None:
    net = Net((3, 4, 6, 6))
    x = net.q(conv(net, net.q("x"), 5, 4, 3, 3))
    x = net.node("LogSoftmax", net.node("Reshape", x, const(net, 3, 80)))
    model = net.model(net.q(net.node("Gemm", net.q(x), *net.weight(80, 7, axis=1))), 2)
    graph, found = read_difference(model, 0.1)
    assert graph.output_shape == (3, 7) and found.worst <= 1.01
    head, found = compiled_difference(model, 0.1, tmp_path)
    assert head["inputs"][0]["shape"] == [3, 4, 6, 6] and found.worst <= 1.01


def test_codes_of_a_float_output_are_refused(tmp_path: Path) -> None:
    model, _ = made("half-way")
    compiled_difference(model, 0.1, tmp_path)
    artifact = load_artifact(tmp_path / "artifact")
    with pytest.raises(DeviceError, match="not quantized, so it has no codes: use run"):
        artifact.codes(np.zeros((1, 4, 6, 6), np.float32), artifact.prepare(arrays(model)))


def test_parameters_that_stop_being_equal_are_refused(tmp_path: Path) -> None:
    net = Net()
    x = net.node("QuantizeLinear", "x", "s", "z")
    x = net.node("DequantizeLinear", x, net.store("s_too", np.float32(0.1)), "z")
    model = net.model(net.q(net.node("Relu", x)))
    compiled_difference(model, 0.1, tmp_path)
    values = arrays(model) | {"s_too": np.array(0.2, np.float32)}
    with pytest.raises(DeviceError, match="s_too and s have other values: they must be equal at every level"):
        load_artifact(tmp_path / "artifact").prepare(values)


def test_what_tvm_cannot_import_is_named(tmp_path: Path) -> None:
    net = Net()
    model = net.model(net.q(net.node("Det", net.q("x"))), 2)
    (tmp_path / "m.onnx").write_bytes(canonical_bytes(model))
    with pytest.raises(CompileError, match="Det det3 .this operator has no integer kernel.* in float either"):
        compile_model(tmp_path / "m.onnx", TARGET, tmp_path / "artifact")


# Random networks -----------------------------------------------------------------------------------------------------


class Grown:
    """A random network: each step takes one of the activations so far, [1, C, H, W]."""

    def __init__(self, seed: int) -> None:
        self.rng, self.net = np.random.default_rng(seed), Net(zero=self.pick_type(seed))
        self.net.store("s2", np.float32(0.0737))
        self.net.store("s3", np.float32(0.0519))
        self.shapes = {self.net.q("x"): (4, 6, 6)}
        for _ in range(int(self.rng.integers(2, 7))):
            self.grow()

    @staticmethod
    def pick_type(seed: int) -> type:
        return np.int8 if seed % 3 == 0 else np.uint8

    def pick(self, *options: object) -> object:
        return options[int(self.rng.integers(len(options)))]

    def grow(self) -> None:
        net, (x, (c, h, w)) = self.net, self.pick(*self.shapes.items())
        kind = self.pick("conv", "depthwise", "pool", "add", "unary", "float", "concat", "turn", "cut", "pad")
        shape = (c, h, w)
        if kind == "conv" and min(h, w) > 2:
            wide = int(self.rng.integers(1, 9))
            y, shape = conv(net, x, wide, c, 3, 3, pads=[1, 0, 1, 2]), (wide, h, w)
        elif kind == "depthwise":
            y = conv(net, x, c, 1, 3, 3, group=c, pads=[1] * 4)
        elif kind == "pool" and min(h, w) > 2:
            name = str(self.pick("MaxPool", "AveragePool"))
            y = net.node(name, x, kernel_shape=[3, 3], strides=[2, 1], pads=[1, 1, 1, 1], ceil_mode=int(h % 2))
            shape = (c, -(-(h - 1) // 2) + 1 if h % 2 else (h - 1) // 2 + 1, w)
        elif kind == "add":
            y = net.node(str(self.pick("Add", "Sub", "Mul", "Max")), x, net.q(net.node("Relu", x), "s3"))
        elif kind == "float":
            y = net.node("LogSoftmax", x)
        elif kind == "concat":
            y, shape = net.node("Concat", x, x, axis=1), (2 * c, h, w)
        elif kind == "turn":
            y, shape = net.node("Transpose", x, perm=[0, 3, 1, 2]), (w, c, h)
        elif kind == "cut" and c > 1:
            y = net.node("Slice", x, const(net, 1), const(net, c), const(net, 1), const(net, 2))
            shape = (c // 2, h, w)
        elif kind == "pad":
            y, shape = net.node("Pad", x, const(net, 0, 0, 1, 0, 0, 0, 0, 2)), (c, h + 1, w + 2)
        else:
            y = net.node(str(self.pick("Sigmoid", "HardSwish", "Relu", "Tanh", "Sin", "Floor", "Softsign", "Selu")), x)
        if self.rng.random() < 0.85:
            y = net.q(y, str(self.pick("s2", "s3")))
        self.shapes[y] = shape


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_random_networks(seed: int) -> None:
    """Every operator against ONNX Runtime: one step in the middle may be several where signals are amplified."""
    grown = Grown(seed)
    out, shape = list(grown.shapes.items())[-1]
    graph, found = read_difference(grown.net.model(out, None, 14), 0.0519)
    assert graph.output_shape == (1, *shape)
    assert found.share < 0.1, found


@settings(max_examples=40)
@given(st.integers(0, 10**6))
@example(29795)  # a pool whose kernel has more axes than its input
def test_damaged_models_are_refused_or_compiled(seed: int) -> None:
    """A node that loses or swaps its inputs, an attribute that changes: an error that says so, or a graph."""
    rng = np.random.default_rng(seed)
    model = made(str(rng.choice(list(MODELS))))[0]
    for _ in range(int(rng.integers(1, 3))):
        node = model.graph.node[int(rng.integers(len(model.graph.node)))]
        how = rng.integers(4) if node.input else 0
        if how == 0 and node.attribute:
            attribute = node.attribute[int(rng.integers(len(node.attribute)))]
            attribute.i, attribute.ints[:] = int(rng.integers(-3, 9)), [int(i) for i in rng.integers(-2, 5, 4)]
        elif how == 1:
            node.input[int(rng.integers(len(node.input)))] = str(
                rng.choice([*model.graph.node[0].output, "s", "z", ""])
            )
        elif how == 2:
            del node.input[-1]
        else:
            node.op_type = str(rng.choice(["Relu", "Conv", "Concat", "Softmax", "Reshape", "Split", "MaxPool"]))
    try:
        graph = read_graph(parse_model(model.SerializeToString()))
    except QDeployError as e:
        assert str(e)
    else:
        assert graph.ops
