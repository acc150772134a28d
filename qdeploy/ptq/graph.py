"""A float ONNX graph while it is prepared for quantizers, and how it is run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from qdeploy.errors import ModelError

Shape = tuple[int, ...]
KNOWN_LIMITS = {
    "Relu": (0.0, np.inf), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0),
}  # fmt: skip


@dataclass
class FloatGraph:
    """One float32 input of fixed shape with batch 1; `nodes` in topological order with distinct names.

    `outputs` and `arrays` are the file's; `floats` holds the shapes of all float32 values that are not stored.
    """

    nodes: list[NodeProto]
    arrays: dict[str, np.ndarray]
    input: str
    shape: Shape
    outputs: list[ValueInfoProto]
    opset: int
    domains: list[tuple[str, int]]
    ir_version: int
    floats: dict[str, Shape]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs."""
        return [value.name for value in self.outputs]

    def makers(self) -> dict[str, NodeProto]:
        """Value -> the node that makes it."""
        return {name: node for node in self.nodes for name in node.output if name}

    def readers(self) -> dict[str, list[NodeProto]]:
        """Value -> the nodes that read it, one entry a use."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def model(self, extra: Sequence[str] = (), editable: Iterable[str] = ()) -> ModelProto:
        """The graph as a model: `extra` values are outputs too, the stored `editable` ones inputs with a default."""
        have = set(self.output_names)
        outputs = [
            *self.outputs,
            *(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in extra if n not in have),
        ]
        inputs = [helper.make_tensor_value_info(self.input, TensorProto.FLOAT, self.shape)]
        for name in editable:
            kind = helper.np_dtype_to_tensor_dtype(self.arrays[name].dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, self.arrays[name].shape))
        stored = [numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in self.used_arrays().items()]
        graph = helper.make_graph(self.nodes, "main", inputs, outputs, stored)
        opsets = [helper.make_opsetid(domain, version) for domain, version in (("", self.opset), *self.domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)

    def used_arrays(self) -> dict[str, np.ndarray]:
        """The stored arrays that a node or an output reads; graphs inside nodes may read any."""
        if any(a.HasField("g") or a.graphs for node in self.nodes for a in node.attribute):
            return self.arrays
        used = {name for node in self.nodes for name in node.input} | set(self.output_names)
        return {name: array for name, array in self.arrays.items() if name in used}

    def infer(self) -> None:
        """Fill `floats`; raises ModelError when shapes contradict each other or stay open."""
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model(), data_prop=True).graph
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as e:
            raise ModelError(f"the model's shapes contradict each other: {str(e).strip().splitlines()[0]}") from e
        self.floats = {}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            kind = value.type.tensor_type
            if value.name not in self.arrays and kind.elem_type == TensorProto.FLOAT and kind.HasField("shape"):
                sizes = tuple(d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim)
                if all(sizes):
                    self.floats[value.name] = sizes


def session(model: ModelProto) -> Any:
    """An ONNX Runtime session on one thread, so that equal input gives equal bits; raises ModelError."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")  # no 16-bit saturation on old processors
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # the extension raises classes of its own
        raise ModelError(f"ONNX Runtime cannot run the model: {str(e).strip().splitlines()[0]}") from e


def run(runner: Any, images: np.ndarray, names: Sequence[str], **more: np.ndarray) -> Iterator[list[np.ndarray]]:
    """The values `names` for one image after the other; `more` are further inputs. Raises ModelError."""
    source = next(entry.name for entry in runner.get_inputs() if entry.name not in more)
    for image in images:
        try:
            yield runner.run(list(names), {source: image[None], **more})
        except Exception as e:
            raise ModelError(f"ONNX Runtime cannot run the model: {str(e).strip().splitlines()[0]}") from e


def outputs_of(model: ModelProto, images: np.ndarray, name: str) -> np.ndarray:
    """Output `name` of every image, stacked: float32 [n, ...] without the batch axis."""
    return np.concatenate([values[0] for values in run(session(model), images, [name])])


def limits(graph: FloatGraph, node: NodeProto) -> tuple[float, float]:
    """What the node's output can never be below and above."""
    if node.op_type in KNOWN_LIMITS:
        return KNOWN_LIMITS[node.op_type]
    ends = [-np.inf, np.inf]
    for i in (1, 2) if node.op_type == "Clip" else ():
        if len(node.input) > i and node.input[i] in graph.arrays:
            ends[i - 1] = float(graph.arrays[node.input[i]].reshape(()))
    return ends[0], ends[1]
