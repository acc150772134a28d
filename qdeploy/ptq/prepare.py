"""A float ONNX file of any exporter -> FloatGraph: checked, fixed in shape, simplified once, batch norms folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from qdeploy.errors import DeviceError, ModelError
from qdeploy.ptq.fold import fold_affine, plain_layers
from qdeploy.ptq.graph import FloatGraph, run, session
from qdeploy.qdq import load_model

MIN_OPSET = 13  # per-channel quantizers
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
SAME = 1e-3  # of the greatest output: what simplifying may change

Shape = tuple[int, ...]


def prepare(
    path: Path, shape: tuple[str, Shape] | None = None, echo: Callable[[str], None] | None = None
) -> FloatGraph:
    """Read a float32 ONNX file; `shape` (input name, sizes) fixes sizes that the file leaves open.

    An open batch becomes 1. Opsets before 13 are converted. Raises ModelError for a damaged or quantized model, one
    that holds NaN or infinity, open shapes, several inputs, and what the converter or onnxsim refuses.
    """
    say = echo or (lambda text: None)
    model = load_model(Path(path))[1]
    _check_float(model)
    _fix_input(model, shape)
    model = _modern(model, say)
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    _check_finite(given, model.graph.node)  # under the file's names, before simplifying makes others
    graph = _graph_of(_simplified(model))
    _check_float32(graph)
    _check_finite(graph.used_arrays(), graph.nodes)
    graph.infer()
    plain_layers(graph)
    folded = fold_affine(graph)
    if folded:
        say(f"folded {folded} batch norms and per-channel operators")
    graph.infer()
    _check_same(model, graph)
    return graph


def _check_float(model: ModelProto) -> None:
    for node in model.graph.node:
        op = node.op_type
        if op in QUANTIZED or op.startswith("QLinear") or op.endswith("Integer") or op == "MatMulNBits":
            raise ModelError(
                f"the model is quantized already ({op} {node.name}): give the float model it was made from"
            )


def _fix_input(model: ModelProto, shape: tuple[str, Shape] | None) -> None:
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        raise ModelError(f"the model has {len(inputs)} inputs: networks with exactly one can be quantized")
    name, kind = inputs[0].name, inputs[0].type.tensor_type
    if kind.elem_type != TensorProto.FLOAT:
        raise ModelError(
            f"input {name} is {TensorProto.DataType.Name(kind.elem_type)}: only float32 networks can be quantized"
        )
    dims = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
    if shape is not None:
        if (
            shape[0] != name
            or len(shape[1]) != len(dims)
            or any(a not in (0, b) for a, b in zip(dims, shape[1], strict=False))
        ):
            given, own = ",".join(map(str, shape[1])), ",".join(str(d) if d else "?" for d in dims)
            raise ModelError(f"--shape {shape[0]}={given} does not fit the model's input {name} [{own}]")
        dims = list(shape[1])
    if len(dims) < 2 or any(d < 1 for d in dims[1:]):
        open_form = ",".join(["1", *(str(d) if d else "SIZE" for d in dims[1:])]) if dims else "1,3,224,224"
        raise ModelError(f"input {name} has a dynamic shape: fix it with --shape {name}={open_form}")
    kind.ClearField("shape")
    for size in (1, *dims[1:]):
        kind.shape.dim.add().dim_value = size
    del model.graph.value_info[:]  # they may hold other sizes
    for value in model.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            dimension.Clear()


def _modern(model: ModelProto, say: Callable[[str], None]) -> ModelProto:
    """Functions inlined, opset at least 13."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opset = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)
    if opset >= MIN_OPSET:
        return model
    try:
        converted = onnx.version_converter.convert_version(model, MIN_OPSET)
    except Exception as e:  # the converter raises bare RuntimeErrors of many kinds
        reason = str(e).strip().splitlines()[0]
        raise ModelError(
            f"opset {opset} is too old and cannot be converted ({reason}): export it with opset {MIN_OPSET} or later"
        ) from e
    say(f"converted from opset {opset} to {MIN_OPSET}")
    return converted


def _simplified(model: ModelProto) -> ModelProto:
    """One pass of onnxsim: constants folded, shapes known, what does nothing removed."""
    try:
        import onnxsim
    except ImportError as e:
        raise DeviceError("quantizing needs the package onnxsim: install qdeploy with its build dependencies") from e
    try:
        simple: ModelProto = onnxsim.simplify(model)[0]
    except Exception as e:  # the extension raises bare RuntimeErrors of many kinds
        raise ModelError(f"onnxsim refuses the network: {str(e).strip().splitlines()[0]}") from e
    return simple


def _graph_of(model: ModelProto) -> FloatGraph:
    """The parts of a model; Constant nodes become stored arrays, nodes without a name get one."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes, names = [], set()
    for i, node in enumerate(model.graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            continue
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{i}"
        names.add(node.name)
        nodes.append(node)
    value = next(v for v in model.graph.input if v.name not in arrays)
    shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    versions = [(entry.domain, entry.version) for entry in model.opset_import]
    opset = next(version for domain, version in versions if domain in ("", "ai.onnx"))
    others = [(domain, version) for domain, version in versions if domain not in ("", "ai.onnx")]
    outputs = list(model.graph.output)
    if not nodes:
        raise ModelError("nothing of the model depends on its input")
    return FloatGraph(nodes, arrays, value.name, shape, outputs, opset, others, model.ir_version, {})


def _check_float32(graph: FloatGraph) -> None:
    for name, array in graph.used_arrays().items():
        if array.dtype.kind == "f" and array.dtype != np.float32:
            raise ModelError(f"tensor {name} is {array.dtype}: convert the model to float32 first")


def _check_finite(arrays: Mapping[str, np.ndarray], nodes: Sequence[NodeProto]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            continue
        bounds = all(node.op_type in ("Clip", "Pad") for node in nodes if name in node.input)
        if not np.isfinite(array).all() and not (bounds and not np.isnan(array).any()):
            raise ModelError(f"tensor {name} holds NaN or infinity: the training diverged, or the file is damaged")


def _check_same(model: ModelProto, graph: FloatGraph) -> None:
    """Raise ModelError when preparing changed what the network computes on noise."""
    noise = np.random.default_rng(0).random(graph.shape, np.float32)
    names = graph.output_names
    before, after = (next(run(session(one), noise, names)) for one in (model, graph.model()))
    for name, a, b in zip(names, before, after, strict=True):
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=SAME * (1e-6 + float(np.abs(a).max(initial=0)))):
            raise ModelError(f"simplifying changed output {name}: give a model that onnxsim leaves alike")


def parse_shape(text: str) -> tuple[str, Shape]:
    """NAME=1,3,224,224 -> name and sizes; raises ModelError."""
    name, _, sizes = text.rpartition("=")
    numbers = sizes.split(",")
    if not name or not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise ModelError(f"--shape {text!r} is not NAME=SIZE,SIZE,...: write for instance input=1,3,224,224")
    return name, tuple(int(number) for number in numbers)
