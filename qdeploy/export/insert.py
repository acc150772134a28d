"""QuantizeLinear, Clip and DequantizeLinear behind every tensor of the float graph (docs/handovers.md, QDQ ONNX)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from qdeploy.errors import ModelError
from qdeploy.export.float_graph import INPUT, IR_VERSION, OUTPUT, RELU_SUFFIX, graph_value, opset
from qdeploy.frozen import KEEPS_CODES, FrozenNet, Node


@dataclass
class Graph:
    """Nodes and initializers of the QDQ graph while it grows."""

    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, np.ndarray] = field(default_factory=dict)

    def node(self, op: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        """Append a node; returns its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output

    def store(self, name: str, array: np.ndarray) -> str:
        """Add an initializer; a name that is taken raises."""
        if name in self.initializers:
            raise ModelError(f"two tensors of the model would be called {name}: rename a node or a tensor")
        self.initializers[name] = array
        return name


def codes_name(tensor: str) -> str:
    """Name of the uint8 value that holds the codes of an activation tensor."""
    return f"{tensor}.codes"


def insert_qdq(net: FrozenNet, float_nodes: Mapping[str, NodeProto]) -> ModelProto:
    """The QDQ model of `net`; operators are taken by name from the simplified float graph.

    Raises ModelError when two nodes or values would share a name, or a tensor that moves codes has its own quantizer.
    """
    graph = Graph()
    owner = {net.input: net.input}  # tensor -> the tensor whose quantizer initializers it uses
    _store_quantizer(graph, net, net.input)
    _quantize(graph, net, net.input, INPUT, net.input)
    for node in net.nodes:
        owner[node.output] = node.output
        if node.op in KEEPS_CODES:
            owner[node.output] = owner[node.inputs[0]]
            if net.activations[node.output].quantizer != net.activations[node.inputs[0]].quantizer:
                raise ModelError(f"node {node.name}: {node.op} moves codes, so its tensors need one quantizer")
        else:
            _store_quantizer(graph, net, node.output)
        value = _operator(graph, net, node, float_nodes)
        _quantize(graph, net, node.output, value, owner[node.output])
    return _model(net, graph)


def _store_quantizer(graph: Graph, net: FrozenNet, name: str) -> None:
    q = net.activations[name].quantizer
    graph.store(f"{name}.scale", np.array(q.scale, np.float32))
    graph.store(f"{name}.zero_point", np.array(q.zero_point, np.uint8))
    if q.clip:
        graph.store(f"{name}.clip_min", np.array(q.lo, np.uint8))
        graph.store(f"{name}.clip_max", np.array(q.hi, np.uint8))


def _real(net: FrozenNet, name: str) -> str:
    """Name of the dequantized value of a tensor."""
    return OUTPUT if name == net.output else f"{name}.values"


def _quantize(graph: Graph, net: FrozenNet, name: str, value: str, owner: str) -> None:
    """QuantizeLinear -> [Clip] -> DequantizeLinear behind the float `value` of tensor `name`."""
    clip = net.activations[name].quantizer.clip
    parameters = [f"{owner}.scale", f"{owner}.zero_point"]
    codes = codes_name(name)
    first = f"{name}.unclipped" if clip else codes
    graph.node("QuantizeLinear", [value, *parameters], first, f"{name}.quantize")
    if clip:
        graph.node("Clip", [first, f"{owner}.clip_min", f"{owner}.clip_max"], codes, f"{name}.clip")
    graph.node("DequantizeLinear", [codes, *parameters], _real(net, name), f"{name}.dequantize")


def _operator(graph: Graph, net: FrozenNet, node: Node, float_nodes: Mapping[str, NodeProto]) -> str:
    """The float operator of `node` and its Relu; returns the value to quantize."""
    value = _real(net, node.inputs[0])
    if node.op != "requantize":
        inputs = [_real(net, name) for name in node.inputs]
        if node.op in ("conv", "linear"):
            inputs += _parameters(graph, net, node)
        operator = NodeProto()
        operator.CopyFrom(float_nodes[node.name])
        del operator.input[:], operator.output[:]
        operator.input.extend(inputs)
        value = f"{node.output}.before_relu" if node.relu else f"{node.output}.real"
        operator.output.append(value)
        graph.nodes.append(operator)
    if node.relu:
        value = graph.node("Relu", [value], f"{node.output}.real", node.name + RELU_SUFFIX)
    return value


def _parameters(graph: Graph, net: FrozenNet, node: Node) -> list[str]:
    """Initializers of a conv or linear node and the values that its DequantizeLinears make of them."""
    weight, scale, bias = (net.tensors[f"{node.name}.{role}"] for role in ("weight", "weight_scale", "bias"))
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ModelError(f"node {node.name}: weight scales must be positive and finite")
    input_scale = np.float32(net.activations[node.inputs[0]].quantizer.scale)
    w = graph.store(f"{node.name}.weight", weight)
    s = graph.store(f"{node.name}.weight_scale", scale)
    zero_point = net.tensors.get(f"{node.name}.weight_zero_point", np.int8(0))  # absent: symmetric weights
    z = graph.store(f"{node.name}.weight_zero_point", np.full(len(scale), zero_point, np.int8))
    b = graph.store(f"{node.name}.bias", bias)
    bs = graph.store(f"{node.name}.bias_scale", input_scale * scale)
    return [
        graph.node("DequantizeLinear", [w, s, z], f"{w}.values", f"{w}.dequantize", axis=0),
        graph.node("DequantizeLinear", [b, bs], f"{b}.values", f"{b}.dequantize", axis=0),
    ]


def _model(net: FrozenNet, graph: Graph) -> ModelProto:
    """Everything as one ModelProto, names checked."""
    values = [INPUT, *graph.initializers, *(name for node in graph.nodes for name in node.output)]
    for names, what in ((values, "values"), ([node.name for node in graph.nodes], "nodes")):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ModelError(f"two {what} of the model would be called {min(twice)}: rename a node or a tensor")
    proto = helper.make_graph(
        graph.nodes, "main", [graph_value(INPUT, net.activations[net.input].shape)],
        [graph_value(OUTPUT, net.activations[net.output].shape)],
        [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in graph.initializers.items()],
    )  # fmt: skip
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset(net))], ir_version=IR_VERSION)
