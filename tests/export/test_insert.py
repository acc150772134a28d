"""The QDQ graph: its names, its nodes, and that odd networks still give the graph that was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from qdeploy.errors import ModelError
from qdeploy.export.float_graph import float_graph, simplified
from qdeploy.export.insert import insert_qdq
from qdeploy.export.parity import measure, parity
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet, Node, Quantizer, Tensor
from qdeploy.qdq import arrays, attributes, parse_model
from tests.nets_frozen import Builder, random_frozen, random_images


def builder(channels: int = 4, size: int = 6) -> Builder:
    return Builder(np.random.default_rng(0), random_images(0, 2, (channels, size, size)))


def finish(b: Builder, x: str) -> FrozenNet:
    x = b.flatten("flatten", b.pool("pool", x))
    return b.net(b.layer("fc", x, (3, b.golden[x].shape[1]), 8, 8)).check()


def test_the_table_of_names_types_and_shapes() -> None:
    net = random_frozen(0, blocks=1, width=8)
    model = parse_model(qdq_bytes(net))
    stored = arrays(model)
    kinds = {
        "weight": (np.int8, None), "weight_scale": (np.float32, 1), "weight_zero_point": (np.int8, 1),
        "bias": (np.int32, 1), "bias_scale": (np.float32, 1), "scale": (np.float32, 0), "zero_point": (np.uint8, 0),
        "clip_min": (np.uint8, 0), "clip_max": (np.uint8, 0),
    }  # fmt: skip
    for name, array in stored.items():
        dtype, rank = kinds[name.rsplit(".", 1)[1]]
        assert array.dtype == dtype and (rank is None or array.ndim == rank), name
    for name, tensor in net.activations.items():
        q = tensor.quantizer
        if name == "flatten.out":  # moves codes: the pool's quantizer
            assert f"{name}.scale" not in stored
            continue
        assert stored[f"{name}.scale"] == np.float32(q.scale) and stored[f"{name}.zero_point"] == q.zero_point
        assert (f"{name}.clip_max" in stored) == q.clip
    for name in net.weights:
        x = next(node.inputs[0] for node in net.nodes if node.name == name)
        unit = np.float32(net.activations[x].quantizer.scale) * net.tensors[f"{name}.weight_scale"]
        np.testing.assert_array_equal(stored[f"{name}.bias_scale"], unit)
    assert model.opset_import[0].version == 13 and model.ir_version == 8
    value = model.graph.input[0]
    assert value.name == "input" and [d.dim_value for d in value.type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert model.graph.output[0].name == "output"


def test_attributes_of_a_convolution_arrive() -> None:
    b = builder()
    options = {"stride": [2, 1], "padding": [2, 0, 1, 3], "dilation": [1, 2], "groups": 2}
    net = finish(b, b.layer("c", "image", (6, 2, 3, 2), 8, 8, **options))
    node = next(n for n in parse_model(qdq_bytes(net)).graph.node if n.op_type == "Conv")
    expected = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [2, 0, 1, 3], "dilations": [1, 2], "group": 2}
    assert attributes(node) == expected
    assert parity(qdq_bytes(net), net).largest_step == 0


def test_stock_session_fuses_every_operator(tmp_path: Path) -> None:
    net = random_frozen(1, blocks=2, depthwise=True, max_pool=True, width=8, size=16)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(qdq_bytes(net), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    wanted = Counter(node.op for node in net.nodes)
    assert kinds["QLinearConv"] == wanted["conv"] and kinds["QGemm"] == wanted["linear"]
    assert kinds["QLinearAdd"] == wanted["add"] and kinds["QLinearGlobalAveragePool"] == 1
    assert not kinds.keys() & {"Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "Relu", "GlobalAveragePool"}


def test_equal_weights_are_not_merged() -> None:
    b = builder()
    x = b.layer("a", "image", (4, 4, 3, 3), 8, 8)
    y = b.layer("b", "image", (4, 4, 3, 3), 8, 8)
    for role in ("weight", "weight_scale", "bias"):
        b.tensors[f"b.{role}"] = b.tensors[f"a.{role}"]
    b.golden[y], b.activations[y] = b.golden[x], replace(b.activations[x], name=y)
    net = finish(b, b.add("sum", x, y))
    names = [node.name for node in parse_model(qdq_bytes(net)).graph.node if node.op_type == "Conv"]
    assert names == ["a", "b"]
    assert parity(qdq_bytes(net), net).largest_step == 0


def test_odd_but_legal_graphs() -> None:
    b = builder()
    x = b.layer("c", "image", (4, 4, 1, 1), 4, 4, 3, True, True, padding=[0, 0, 0, 0])
    x = b.max_pool("p", b.max_pool("p0", x))  # clipped codes through two pools
    x = b.emit(Node("again", "requantize", (x,), "again.out", True), Quantizer(0.25, 7, 0, 100, True))
    x = b.add("twice", x, x)
    x = b.requantize("r2", b.requantize("r1", x, 5), 3)
    x = b.flatten("f2", b.flatten("f1", b.pool("pool", x)))
    x = b.layer("hidden", x, (5, 4), 4, 4, relu=True)
    net = b.net(b.requantize("last", b.layer("fc", x, (3, 5), 8, 8), 6)).check()
    result = measure(qdq_bytes(net), net)
    assert result.problems() == [] and result.unexplained == 0
    kinds = Counter(node.op_type for node in parse_model(qdq_bytes(net)).graph.node)
    assert kinds["MaxPool"] == 2 and kinds["Flatten"] == 2 and kinds["Relu"] == 4


def test_onnxsim_keeps_every_node_by_name() -> None:
    net = random_frozen(2, blocks=2)
    kept = simplified(float_graph(net))
    for node in net.nodes:
        assert (node.op == "requantize") == (node.name not in kept)


def test_moved_codes_need_one_quantizer() -> None:
    net = random_frozen(3, blocks=1)
    activations = dict(net.activations)
    activations["flatten.out"] = Tensor("flatten.out", activations["flatten.out"].shape, Quantizer(1.0, 3))
    with pytest.raises(ModelError, match="flatten moves codes"):
        qdq_bytes(replace(net, activations=activations))


def test_clashing_names_raise() -> None:
    b = builder()
    x = b.layer("a", "image", (4, 4, 3, 3), 8, 8)
    b.emit(Node("b", "requantize", (x,), "a.weight"), Quantizer(1.0, 0))  # its values would be called like a's weight's
    with pytest.raises(ModelError, match=r"a\.weight\.values"):
        qdq_bytes(finish(b, "a.weight"))


def test_illegal_weight_scale_raises() -> None:
    net = random_frozen(4, blocks=1)
    scale = net.tensors["fc.weight_scale"].copy()
    scale[0] = np.nan
    broken = replace(net, tensors=dict(net.tensors) | {"fc.weight_scale": scale})
    with pytest.raises(ModelError, match="fc: weight scales"):
        insert_qdq(broken, simplified(float_graph(net)))


@pytest.mark.parametrize(("name", "value"), [("stride", "x"), ("padding", [1]), ("groups", 0), ("dilation", [0, 0])])
def test_nonsense_attributes_are_model_errors(name: str, value: object) -> None:
    net = random_frozen(5, blocks=1)
    nodes = list(net.nodes)
    nodes[0] = replace(nodes[0], attributes=dict(nodes[0].attributes) | {name: value})
    with pytest.raises(ModelError):
        qdq_bytes(replace(net, nodes=tuple(nodes)))
