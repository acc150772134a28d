"""A read-only view of a QDQ graph: who makes a value, who reads it, which constant stands behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from qdeploy.qdq import arrays


@dataclass(frozen=True)
class View:
    """`arrays` holds initializers and Constant nodes, `shapes` what shape inference found (0 for a dynamic size)."""

    model: ModelProto
    arrays: dict[str, np.ndarray]
    producer: dict[str, NodeProto]
    readers: dict[str, list[tuple[NodeProto, int]]]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: ModelProto) -> View:
        """Raises onnx's InferenceError or ValueError for shapes or tensors that contradict each other."""
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        shapes = {}
        for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else 0 for d in dims)
        constants = arrays(model)
        producer: dict[str, NodeProto] = {}
        readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    constants[node.output[0]] = numpy_helper.to_array(attribute.t)
            producer |= {name: node for name in node.output}
            for i, name in enumerate(node.input):
                readers.setdefault(name, []).append((node, i))
        return cls(model, constants, producer, readers, shapes)

    def constant(self, node: NodeProto, i: int) -> np.ndarray | None:
        """Input `i` of `node` where it is there and constant."""
        return self.arrays.get(node.input[i]) if i < len(node.input) else None

    def behind_dequantize(self, node: NodeProto, i: int) -> np.ndarray | None:
        """The integers of a constant that input `i` of `node` reads through a DequantizeLinear."""
        source = self.producer.get(node.input[i]) if i < len(node.input) else None
        return self.constant(source, 0) if source is not None and source.op_type == "DequantizeLinear" else None

    def quantizer_of(self, node: NodeProto) -> NodeProto | None:
        """The QuantizeLinear whose codes a DequantizeLinear or Clip reads, through a Clip or not."""
        source = self.producer.get(node.input[0])
        if source is not None and source.op_type == "Clip":
            source = self.producer.get(source.input[0])
        return source if source is not None and source.op_type == "QuantizeLinear" else None


def same_values(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Equal type, shape and numbers; two missing ones are equal."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and np.array_equal(a, b)


def as_numbers(values: object) -> list[float]:
    """An attribute or array (a number, several, or None for none) as a list of numbers."""
    return [] if values is None else [float(value) for value in np.ravel(np.asarray(values))]
