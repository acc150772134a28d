"""The contract: own and foreign models pass, and each breach is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from qdeploy.errors import ModelError
from qdeploy.export.contract import breaches, check
from qdeploy.export.write import qdq_bytes
from qdeploy.qdq import canonical_bytes, load_model, numeric_roles, parse_model, raw_data_ranges
from tests.nets_frozen import random_frozen


@pytest.fixture(scope="module")
def data() -> bytes:
    return qdq_bytes(random_frozen(0, blocks=1, width=4, size=8, images=1, max_pool=True))


@pytest.fixture
def model(data: bytes) -> ModelProto:
    return parse_model(data)


def node(model: ModelProto, name: str) -> NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def put(model: ModelProto, name: str, array: np.ndarray) -> None:
    """Replace or add an initializer."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            return
    model.graph.initializer.append(numpy_helper.from_array(array, name))


def get(model: ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def change(name: str, to: Callable[[np.ndarray], np.ndarray]) -> Callable[[ModelProto], None]:
    return lambda model: put(model, name, np.asarray(to(get(model, name))))


def attribute(name: str, key: str, value: object) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        target = node(model, name)
        kept = [a for a in target.attribute if a.name != key]
        del target.attribute[:]
        target.attribute.extend([*kept, helper.make_attribute(key, value)])

    return edit


def rewire(name: str, place: int, value: str) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        node(model, name).input[place] = value

    return edit


def float_weight(model: ModelProto) -> None:
    put(model, "w", get(model, "stem.weight").astype(np.float32))
    node(model, "stem").input[1] = "w"


def float_bias(model: ModelProto) -> None:
    put(model, "b", get(model, "stem.bias").astype(np.float32))
    node(model, "stem").input[2] = "b"


def no_quantizer_before_add(model: ModelProto) -> None:
    node(model, "block0.add").input[1] = "block0.conv2.out.real"


def dynamic_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"


def batch_two(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def float_clip(model: ModelProto) -> None:
    put(model, "six", np.array(6, np.float32))
    put(model, "none", np.array(0, np.float32))
    relu = node(model, "stem.relu")
    relu.op_type = "Clip"
    relu.input.extend(["none", "six"])


def sixteen_bits(model: ModelProto) -> None:
    model.opset_import[0].version = 21
    put(model, "fc.out.zero_point", np.array(0, np.uint16))


def foreign_operator(model: ModelProto) -> None:
    node(model, "stem.relu").op_type = "HardSwish"
    model.opset_import[0].version = 14


def no_final_dequantize(model: ModelProto) -> None:
    model.graph.output[0].name = "fc.out.real"


def raw_float_output(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("fc.out.real", TensorProto.FLOAT, [1, 10]))


def external(model: ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="w.bin")


BREACHES = {
    "opset 12": lambda m: setattr(m.opset_import[0], "version", 12),
    "another file": external,
    "dynamic shape": dynamic_batch,
    "batch 2": batch_two,
    "exactly one": raw_float_output,
    "does not come from a DequantizeLinear": no_final_dequantize,
    "stem: its weight is not an initializer behind": float_weight,
    "stem: its bias is a float tensor": float_bias,
    "goes to Add: put a QuantizeLinear": no_quantizer_before_add,
    "block0.add: its input block0.conv2.out.real is a float": no_quantizer_before_add,
    "float Clip": float_clip,
    "HardSwish": foreign_operator,
    "uint16": sixteen_bits,
    "fc.out.quantize: its scale is not positive": change("fc.out.scale", lambda s: -s),
    "fc.out.dequantize: its scale is not that": rewire("fc.out.dequantize", 1, "stem.out.scale"),
    "its scale has shape [1]": change("stem.out.scale", lambda s: s.reshape(1)),
    "weight scale is not positive": change("stem.weight_scale", lambda s: s * np.float32(np.inf)),
    "weight scale has shape [3]": change("stem.weight_scale", lambda s: s[:3]),
    "runs along axis 1": attribute("stem.weight.dequantize", "axis", 1),
    "more than one zero point": change("stem.weight_zero_point", lambda z: np.arange(len(z), dtype=np.int8)),
    "weight is uint8": lambda m: (
        change("fc.weight", lambda w: w.view(np.uint8))(m),
        change("fc.weight_zero_point", lambda z: z.view(np.uint8))(m),
    ),
    "bias scale is not float32": change("stem.bias_scale", lambda s: np.nextafter(s, np.float32(1))),
    "do not hold the zero point": change("block0.in.out.clip_min", lambda c: np.array(255, np.uint8)),
    "needs both bounds": rewire("block0.in.out.clip", 2, ""),
    "moves codes": rewire("flatten.out.quantize", 1, "stem.out.scale"),
    "ceil_mode": attribute("max_pool", "ceil_mode", 1),
    "pads automatically": attribute("block0.conv1", "auto_pad", "SAME_UPPER"),
    "channels in 3 groups": attribute("block0.conv1", "group", 3),
    "alpha": attribute("fc", "alpha", 2.0),
    "no zero point initializer": lambda m: node(m, "stem.out.quantize").input.pop(),
}


@pytest.mark.parametrize(("reason", "edit"), BREACHES.items(), ids=BREACHES.keys())
def test_each_breach_is_named(model: ModelProto, reason: str, edit: Callable[[ModelProto], object]) -> None:
    assert breaches(model, own=True) == []
    edit(model)
    found = breaches(model)
    assert any(reason in text for text in found), found


def test_every_breach_is_listed(model: ModelProto) -> None:
    for reason in ("dynamic shape", "fc.out.quantize: its scale is not positive", "bias scale is not float32", "alpha"):
        BREACHES[reason](model)  # type: ignore[no-untyped-call]
    found = breaches(model)
    for reason in ("dynamic shape", "its scale is not positive", "bias scale is not float32", "alpha"):
        assert any(reason in text for text in found), reason
    with pytest.raises(ModelError, match="dynamic shape.*alpha"):
        check(model)


def test_inconsistent_shapes_are_a_breach(model: ModelProto) -> None:
    put(model, "fc.weight", np.zeros((10, 3), np.int8))
    assert any("inconsistent" in text for text in breaches(model))


def test_own_names_are_held(model: ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "fc.weight":
            tensor.name = "fc.w"
    node(model, "fc.weight.dequantize").input[0] = "fc.w"
    model.producer_name = "someone"
    assert breaches(model) == []
    found = breaches(model, own=True)
    assert any("fc.w has the role weight" in text for text in found)
    assert any("not canonical" in text for text in found)


def test_an_asymmetric_weight_is_legal(model: ModelProto) -> None:
    change("stem.weight_zero_point", lambda z: np.full_like(z, 3))(model)
    assert breaches(model) == []


# Foreign models ------------------------------------------------------------------------------------------------------


class Reader(CalibrationDataReader):
    """Eight random images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images: Iterator[dict[str, np.ndarray]] = iter(
            [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(8)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.images, None)


def float_model() -> ModelProto:
    """conv, relu, max pool, grouped conv, add, relu, global average pool, flatten, gemm."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 4, 3, 3), "b2": (8,), "w3": (10, 8), "b3": (10,)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("MaxPool", ["r1"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p", "w2", "b2"], ["c2"], "conv2", kernel_shape=[3, 3], pads=[1] * 4, group=2),
        helper.make_node("Add", ["p", "c2"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["g"], "gap"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(rng.normal(0, 0.2, s).astype(np.float32), name) for name, s in shapes.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def quantized(folder: Path, per_channel: bool, activations: QuantType, weights: QuantType) -> ModelProto:
    onnx.save(float_model(), folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "q.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        activation_type=activations, weight_type=weights,
    )  # fmt: skip
    return load_model(folder / "q.onnx")[1]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("activations", [QuantType.QUInt8, QuantType.QInt8])
def test_models_of_onnx_runtimes_quantizer_pass(tmp_path: Path, per_channel: bool, activations: QuantType) -> None:
    model = quantized(tmp_path, per_channel, activations, QuantType.QInt8)
    assert breaches(model) == []
    data = canonical_bytes(model)
    assert breaches(parse_model(data)) == [] and canonical_bytes(parse_model(data)) == data
    assert set(raw_data_ranges(data)) == set(numeric_roles(parse_model(data)))
    assert breaches(model, own=True)


def test_foreign_uint8_weights_are_refused(tmp_path: Path) -> None:
    found = breaches(quantized(tmp_path, True, QuantType.QUInt8, QuantType.QUInt8))
    assert len(found) == 3 and all("weight is uint8" in text for text in found)


def test_a_float_model_is_told_so() -> None:
    assert breaches(float_model()) == [
        "it is not a QDQ model: it has no QuantizeLinear and DequantizeLinear; quantize it first"
    ]


def test_partly_quantized_model_names_each_float_operator(tmp_path: Path) -> None:
    onnx.save(float_model(), tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "q.onnx", Reader(), nodes_to_exclude=["conv2"])
    found = breaches(load_model(tmp_path / "q.onnx")[1])
    assert any("conv2: its weight is not an initializer behind" in text for text in found)
