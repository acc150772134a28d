"""FrozenNet -> the float ONNX graph that it approximates: real weights, no quantizers; then one pass of onnxsim."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from qdeploy.errors import DeviceError, ModelError
from qdeploy.frozen import FrozenNet, Node

OPSET, IR_VERSION = 13, 8
HARD_SWISH_OPSET = 14  # the first that has the operator HardSwish
INPUT, OUTPUT = "input", "output"
RELU_SUFFIX = ".relu"


def graph_value(name: str, shape: tuple[int, ...]) -> ValueInfoProto:
    """float32 [1, *shape]: what enters and leaves a model."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *shape])


def operator(node: Node, inputs: list[str], output: str, kernel: tuple[int, ...]) -> NodeProto:
    """The ONNX node of one FrozenNet node; `kernel` is the weight's shape for conv, empty else."""
    a = node.attributes
    if node.op == "conv":
        return helper.make_node(
            "Conv", inputs, [output], node.name, kernel_shape=kernel[2:], strides=a["stride"], pads=a["padding"],
            dilations=a["dilation"], group=a["groups"],
        )  # fmt: skip
    if node.op == "linear":
        return helper.make_node("Gemm", inputs, [output], node.name, transB=1)
    if node.op == "max_pool":
        return helper.make_node(
            "MaxPool", inputs, [output], node.name, kernel_shape=a["kernel"], strides=a["stride"], pads=a["padding"]
        )
    if node.op == "flatten":
        return helper.make_node("Flatten", inputs, [output], node.name, axis=1)
    if node.op == "hard_sigmoid":
        return helper.make_node("HardSigmoid", inputs, [output], node.name, alpha=1 / 6, beta=0.5)
    kinds = {"add": "Add", "mul": "Mul", "hard_swish": "HardSwish", "global_average_pool": "GlobalAveragePool"}
    if node.op not in kinds:
        raise ModelError(f"node {node.name}: operator {node.op} cannot be exported")
    return helper.make_node(kinds[node.op], inputs, [output], node.name)


def opset(net: FrozenNet) -> int:
    """The ONNX opset that a network needs."""
    return HARD_SWISH_OPSET if any(node.op == "hard_swish" for node in net.nodes) else OPSET


def float_graph(net: FrozenNet) -> ModelProto:
    """Conv, Gemm, Add, Mul, HardSwish, HardSigmoid, pools, Flatten and Relu with the network's real weights.

    A `requantize` node is no operator here: readers of its output read its input.
    """
    value = {net.input: INPUT}
    nodes, initializers = [], []
    for node in net.nodes:
        inputs = [value[name] for name in node.inputs]
        result = value[node.output] = OUTPUT if node.output == net.output else f"{node.output}.real"
        shape: tuple[int, ...] = ()
        if node.op in ("conv", "linear"):
            weight, bias = real_parameters(net, node)
            shape = weight.shape
            for role, array in (("weight", weight), ("bias", bias)):
                initializers.append(numpy_helper.from_array(array, f"{node.name}.{role}"))
                inputs.append(f"{node.name}.{role}")
        before = f"{result}.before_relu" if node.relu else result
        if node.op == "requantize":
            before = inputs[0]
            if not node.relu and node.output != net.output:
                value[node.output] = before
            elif not node.relu:
                nodes.append(helper.make_node("Identity", inputs, [result], node.name))
        else:
            nodes.append(operator(node, inputs, before, shape))
        if node.relu:
            nodes.append(helper.make_node("Relu", [before], [result], node.name + RELU_SUFFIX))
    graph = helper.make_graph(
        nodes, "main", [graph_value(INPUT, net.activations[net.input].shape)],
        [graph_value(OUTPUT, net.activations[net.output].shape)], initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset(net))], ir_version=IR_VERSION)


def real_parameters(net: FrozenNet, node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Float32 weight and bias of a conv or linear node."""
    scale = net.tensors[f"{node.name}.weight_scale"]
    weight, bias = (net.tensors[f"{node.name}.{role}"].astype(np.float32) for role in ("weight", "bias"))
    unit = np.float32(net.activations[node.inputs[0]].quantizer.scale) * scale
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * unit


def simplified(model: ModelProto) -> dict[str, NodeProto]:
    """One pass of onnxsim (shape inference, constant folding) over a float graph; {node name: node} of the result.

    Its graph rewrites stay off: a quantizer will stand behind every operator, so none may be fused, and merging equal
    nodes or initializers would depend on a level's values. Raises ModelError when a node did not survive.
    """
    try:
        import onnxsim
    except ImportError as e:
        raise DeviceError("export needs the package onnxsim: install qdeploy with its build dependencies") from e
    try:
        result, _ = onnxsim.simplify(model, perform_optimization=False, certify=False)
    except Exception as e:  # the extension raises bare RuntimeErrors of many kinds
        raise ModelError(f"onnxsim refuses the network: {e}") from e
    found = {node.name: node for node in result.graph.node}
    for node in model.graph.node:
        if node.name not in found or found[node.name].op_type != node.op_type:
            raise ModelError(f"onnxsim changed node {node.name} ({node.op_type}): quantizers have no place there")
    return found
