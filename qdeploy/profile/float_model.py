"""QDQ ONNX -> the float network that it stands for, to time: what would fp32 cost?

QuantizeLinear and DequantizeLinear between operators go, stored weights become float32, and a Relu that quantization
had folded into a zero point at the end of the range comes back, since a float network has to compute it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qdeploy.qdq import arrays, attributes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

FOLDED = ("Conv", "Gemm", "MatMul", "Add")  # operators that tools fold a Relu into


def dequantized(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int) -> np.ndarray:
    """float32 (codes - zero) * scale; `scale` is one value or one for each index of `axis`."""

    def along(values: np.ndarray) -> np.ndarray:
        shape = [1] * codes.ndim
        if values.size > 1:
            shape[axis % codes.ndim] = -1
        return values.reshape(shape)

    wide = codes.astype(np.int64) - (0 if zero is None else along(zero.astype(np.int64)))
    return wide.astype(np.float32) * along(scale)


def _relu_folded(maker: NodeProto | None, node: NodeProto, stored: dict[str, np.ndarray]) -> bool:
    """True when the grid of QuantizeLinear `node` has no negative values though what it reads can be negative."""
    if maker is None or maker.op_type not in FOLDED:
        return False
    zero = stored.get(node.input[2]) if len(node.input) > 2 else None
    return zero is None or int(zero.reshape(-1)[0]) == int(np.iinfo(zero.dtype).min)


def float_model(model: ModelProto) -> ModelProto:
    """A new model of the same inputs and outputs, float32 throughout; `model` is not changed."""
    from onnx import ModelProto, helper, numpy_helper

    stored = arrays(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    same: dict[str, str] = {}  # value of the QDQ file -> value of the float one
    nodes, constants = [], {}
    for node in model.graph.node:
        inputs = [same.get(name, name) for name in node.input]
        source = node.input[0] if node.input else ""
        if node.op_type == "DequantizeLinear" and source in stored:
            zero = stored[node.input[2]] if len(node.input) > 2 and node.input[2] else None
            axis = attributes(node).get("axis", 1)
            constants[node.output[0]] = dequantized(stored[source], stored[node.input[1]], zero, int(axis))
        elif node.op_type == "QuantizeLinear" and _relu_folded(makers.get(source), node, stored):
            nodes.append(helper.make_node("Relu", inputs[:1], [node.output[0]]))
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") or _integer_clip(node, makers):
            same[node.output[0]] = inputs[0]
        else:
            copy = type(node)()
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend(inputs)
            nodes.append(copy)
    outputs = [value.name for value in model.graph.output]
    nodes += [helper.make_node("Identity", [same[name]], [name]) for name in outputs if name in same]
    used = {name for node in nodes for name in node.input}
    kept = [value for value in model.graph.initializer if value.name in used]
    kept += [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    made = ModelProto()
    made.CopyFrom(model)
    for field in ("node", "initializer", "value_info"):
        made.graph.ClearField(field)
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(kept)
    return made


def _integer_clip(node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    """A Clip of codes: it bounds a quantizer and has no place in a float network."""
    maker = makers.get(node.input[0]) if node.op_type == "Clip" else None
    return maker is not None and maker.op_type == "QuantizeLinear"
