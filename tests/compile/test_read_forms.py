"""QDQ models in the forms of other quantizers: onnxruntime.quantization, Brevitas, AIMET, torch's exporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx import TensorProto as TP

from qdeploy.compile.graph import Graph
from qdeploy.qdq import canonical_bytes, parse_model
from tests.compile.models import compiled_difference, read_difference, unoptimized
from tests.qdq_models import Net


def float_model(opset: int = 13) -> ModelProto:
    """Convolutions, a residual sum, hard-swish and two fully connected layers, with seeded weights."""
    rng = np.random.default_rng(0)
    stored: dict[str, np.ndarray] = {}
    nodes: list[Any] = []

    def layer(op: str, x: str, *shape: int, **attributes: Any) -> str:
        n = len(nodes)
        stored[f"w{n}"] = rng.normal(0, 0.3, shape).astype(np.float32)
        stored[f"b{n}"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
        return node(op, x, f"w{n}", f"b{n}", **attributes)

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"y{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], f"{op}{len(nodes)}", **attributes))
        return name

    x = node("Relu", layer("Conv", "x", 8, 3, 3, 3, pads=[1, 1, 1, 1], strides=[2, 2]))
    y = node("HardSwish", layer("Conv", x, 8, 1, 3, 3, group=8, pads=[1, 1, 1, 1])) if opset > 13 else x
    x = node("Add", x, layer("Conv", y, 8, 8, 1, 1))
    x = node("Flatten", node("GlobalAveragePool", x))
    layer("Gemm", node("Relu", layer("Gemm", x, 12, 8, transB=1)), 5, 12, transB=1)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TP.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TP.FLOAT, [1, 5])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def by_onnxruntime(folder: Path, opset: int = 13, prepare: bool = False, **options: Any) -> ModelProto:
    """`float_model` through static quantization."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            images = [rng.normal(0, 4, (1, 3, 12, 12)).astype(np.float32) for _ in range(3)]
            self.images: Iterator[dict[str, np.ndarray]] = iter([{"x": image} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    source = folder / "f.onnx"
    onnx.save(float_model(opset), source)
    if prepare:
        quant_pre_process(source, folder / "p.onnx", skip_symbolic_shape=True)
        source = folder / "p.onnx"
    quantize_static(source, folder / "q.onnx", Noise(), quant_format=QuantFormat.QDQ, **options)
    return parse_model(canonical_bytes(onnx.load(folder / "q.onnx")))


def floats(graph: Graph) -> set[str]:
    """Operators that run in float regions."""
    return {kind for op in graph.ops if op.region is not None for kind, _, _ in op.region.nodes}


def last_step(model: ModelProto) -> float:
    """Scale of the last QuantizeLinear."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    name = [node for node in model.graph.node if node.op_type == "QuantizeLinear"][-1].input[1]
    return float(stored[name].reshape(()))


STATIC: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "per channel": {"per_channel": True},
    "int8": {"activation_type": "QInt8", "weight_type": "QInt8"},
    "symmetric": {"activation_type": "QInt8", "extra_options": {"ActivationSymmetric": True}},
    "uint8 weights": {"activation_type": "QUInt8", "weight_type": "QUInt8", "per_channel": True},
    "reduced": {"per_channel": True, "reduce_range": True},
    "pre-processed": {"prepare": True, "opset": 17},
    "opset 21": {"opset": 21, "per_channel": True},
    "vendor": {"extra_options": {"UseQDQContribOps": True}},
    "weights with nodes": {"extra_options": {"AddQDQPairToWeight": True}},
    "own pairs": {"extra_options": {"DedicatedQDQPair": True}},
}


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_quantization(name: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    options = {k: getattr(QuantType, v) if k.endswith("_type") else v for k, v in STATIC[name].items()}
    model = by_onnxruntime(tmp_path, **options)
    graph, found = read_difference(model, last_step(model))
    assert not floats(graph)
    assert found.worst < 2.01 and found.share < 0.2, found  # one step in the middle may be two at the end


@pytest.mark.filterwarnings("ignore")
def test_sixteen_bit_activations_run_in_float(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    model = by_onnxruntime(tmp_path, opset=21, activation_type=QuantType.QInt16, weight_type=QuantType.QInt8)
    graph, found = read_difference(model, last_step(model))
    assert {"QuantizeLinear", "Conv", "Gemm"} <= floats(graph) and {op.kind for op in graph.ops} == {"float"}
    assert found.worst < 3.01, found
    folder = tmp_path / "compiled"
    folder.mkdir()
    _, found = compiled_difference(model, last_step(model), folder)
    assert found.worst < 3.01, found


class Form(Net):
    """A Net whose parameters are written as another tool would."""

    def fresh(self, array: Any) -> str:
        """A parameter of its own, as a Constant node."""
        name = f"c{len(self.nodes)}"
        self.nodes.append(
            helper.make_node("Constant", [], [name], f"k{name}", value=numpy_helper.from_array(np.asarray(array)))
        )
        return name

    def qcdq(self, x: str, scale: Any, zero: Any, low: Any = None, high: Any = None, **axis: int) -> str:
        """QuantizeLinear, Clip where there are bounds, DequantizeLinear, nothing shared between them."""
        x = self.node("QuantizeLinear", x, self.fresh(scale), self.fresh(zero), **axis)
        if low is not None:
            x = self.node("Clip", x, self.fresh(low), self.fresh(high))
        return self.node("DequantizeLinear", x, self.fresh(scale), self.fresh(zero), **axis)


def brevitas(net: Form) -> str:
    """int8 weights cut to 4 bits before DequantizeLinear, 5-bit activations, float32 biases."""
    rng = np.random.default_rng(0)
    x = net.qcdq("x", np.float32(0.1), np.int8(0), np.int8(-128), np.int8(127))
    codes = net.store("w", rng.integers(-9, 10, (6, 4, 3, 3)).astype(np.int8))
    scale = rng.uniform(0.05, 0.1, 6).astype(np.float32)
    w = net.node("Clip", codes, net.fresh(np.int8(-7)), net.fresh(np.int8(7)))
    w = net.node("DequantizeLinear", w, net.fresh(scale), net.fresh(np.zeros(6, np.int8)), axis=0)
    bias = net.store("b", rng.normal(0, 0.3, 6).astype(np.float32))
    x = net.node("Relu", net.node("Conv", x, w, bias, pads=[1, 1, 1, 1]))
    x = net.qcdq(x, np.float32(0.2), np.uint8(0), np.uint8(0), np.uint8(31))
    w = net.store("v", rng.normal(0, 1, (5, 6, 1, 1)).astype(np.float32))
    w = net.qcdq(w, np.float32([0.11, 0.12, 0.13, 0.14, 0.15]), np.zeros(5, np.int8), np.int8(-7), np.int8(7), axis=0)
    return net.qcdq(net.node("Conv", x, w), np.float32(0.1), np.int8(0))


def aimet(net: Form) -> str:
    """float32 weights with Q and DQ in the graph, asymmetric uint8 activations, float32 biases."""
    rng = np.random.default_rng(1)
    x = net.qcdq("x", np.float32(0.1), np.uint8(119))
    w = net.store("w", rng.normal(0, 0.5, (6, 4, 3, 3)).astype(np.float32))
    w = net.qcdq(w, rng.uniform(0.01, 0.02, 6).astype(np.float32), np.zeros(6, np.int8), axis=0)
    bias = net.store("b", rng.normal(0, 0.3, 6).astype(np.float32))
    x = net.qcdq(net.node("Conv", x, w, bias), np.float32(0.13), np.uint8(101))
    w = net.store("v", rng.normal(0, 0.3, (7, 96)).astype(np.float32))
    w = net.qcdq(w, rng.uniform(0.01, 0.02, 7).astype(np.float32), np.zeros(7, np.int8), axis=0)
    x = net.node("MatMul", net.node("Flatten", x), net.node("Transpose", w, perm=[1, 0]))
    return net.qcdq(x, np.float32(0.1), np.uint8(117))


def chains(net: Form) -> str:
    """Identities around everything, parameters of shape [1]."""

    def same(name: str) -> str:
        return net.node("Identity", net.node("Identity", name))

    scale, zero = same(net.fresh(np.float32([0.1]))), same(net.store("zz", np.uint8([9])))
    x = same(net.node("QuantizeLinear", same("x"), scale, zero))
    x = same(net.node("DequantizeLinear", x, scale, zero))
    weight, bias = net.weight(5, 4, 3, 3)
    x = same(net.node("QuantizeLinear", same(net.node("Conv", x, same(weight), same(bias))), scale, zero))
    return net.node("DequantizeLinear", x, scale, zero)


def vendor(net: Form) -> str:
    """QuantizeLinear and DequantizeLinear of the domain com.microsoft."""
    x = net.q(net.node("Conv", net.q("x"), *net.weight(5, 4, 3, 3)))
    for node in net.nodes:
        if "Quant" in node.op_type or "Dequant" in node.op_type:
            node.domain = "com.microsoft"
    return x


def float_constants(net: Form) -> str:
    """float32 constants behind a QuantizeLinear of their own, as onnxruntime.quantization leaves Constant nodes."""
    each = net.store("each", np.linspace(-2, 2, 4, dtype=np.float32).reshape(4, 1, 1))
    scalar = net.qcdq(net.fresh(np.float32(0.7)), np.float32(0.003), np.uint8(3))
    x = net.qcdq(net.node("Mul", net.q("x"), scalar), np.float32(0.1), np.uint8(99))
    x = net.node("Add", x, net.qcdq(each, np.float32(0.017), np.int8(-4)))
    return net.qcdq(x, np.float32(0.0737), np.uint8(101))


def computed(net: Form) -> str:
    """Parameters that the file computes: they cannot change from level to level, and nobody can give them."""
    scale = net.node("Mul", net.fresh(np.float32(0.05)), net.fresh(np.float32(2)))
    x = net.node("DequantizeLinear", net.node("QuantizeLinear", "x", scale, "z"), scale, "z")
    factors = net.node("Mul", net.store("f", np.linspace(-1, 1, 144, dtype=np.float32)), net.fresh(np.float32(2)))
    x = net.node("Mul", x, net.node("Reshape", factors, net.fresh(np.array([1, 4, 6, 6]))))
    return net.q(x)


def test_computed_parameters_run_in_float(tmp_path: Path) -> None:
    net = Form()
    model = net.model(computed(net))
    _, found = compiled_difference(model, 0.1, tmp_path, unoptimized)
    assert found.worst < 1.01


FORMS: list[Callable[[Form], str]] = [brevitas, aimet, chains, vendor, float_constants]


@pytest.mark.parametrize("make", FORMS)
def test_other_tools(make: Callable[[Form], str], tmp_path: Path) -> None:
    net = Form()
    model = net.model(make(net), 2 if make is aimet else 4)
    graph, found = read_difference(model, 0.1)
    assert not floats(graph) and not any(op.kind == "requantize" for op in graph.ops)
    assert found.worst < 2.01 and found.share < 0.05, found  # a coarse step in the middle may be two at the end
    _, found = compiled_difference(model, 0.1, tmp_path)
    assert found.worst == 0


def test_a_clip_that_changes_no_stored_code_is_dropped() -> None:
    net = Form()
    w = net.node(
        "Clip", net.store("w", np.full((2, 4, 1, 1), 7, np.int8)), net.fresh(np.int8(-7)), net.fresh(np.int8(7))
    )
    w = net.node("DequantizeLinear", w, net.fresh(np.float32(0.1)), net.fresh(np.int8(0)))
    graph, _ = read_difference(net.model(net.q(net.node("Conv", net.q("x"), w))), 0.1)
    weights = graph.ops[1].weights
    assert weights is not None and (weights.clip_min, weights.clip_max) == (None, None)


@pytest.mark.parametrize("opset", range(10, 22))
def test_opsets(opset: int) -> None:
    net = Net()
    weight = net.store("w", np.random.default_rng(0).integers(-64, 65, (5, 4, 3, 3)).astype(np.int8))
    weight = net.node("DequantizeLinear", weight, net.store("ws", np.float32(0.01)), net.store("wz", np.int8(0)))
    x = net.q(net.node("Relu", net.node("Conv", net.q("x"), weight)))
    axes = net.store("axes", np.array([2, 3])) if opset >= 18 else ""
    x = net.q(net.node("ReduceMean", x, *([axes] if axes else []), **({} if axes else {"axes": [2, 3]}), keepdims=0))
    graph, found = read_difference(net.model(x, None, opset), 0.1)
    assert [op.kind for op in graph.ops] == ["quantize", "conv", "mean"]
    assert found.worst < 1.01
