"""QDQ ONNX files as bytes: one canonical form, where every initializer lies in it, and what a graph digest covers.

Levels of a ladder are canonical files of equal length that differ only inside `raw_data_ranges`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from qdeploy.errors import ModelError
from qdeploy.files import read_bytes

GRAPH_NAME = "main"
IR_VERSION = 8  # the least that we write: initializers need not be graph inputs
MAX_MODEL_BYTES = 2**31 - 1  # what protobuf can carry

# tensor fields that hold values in another form than raw_data
_VALUE_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_CONSTANTS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


# Reading -------------------------------------------------------------------------------------------------------------


def load_model(path: Path) -> tuple[bytes, ModelProto]:
    """The bytes of an ONNX file and its model, checked by onnx.checker.

    Raises ModelError when the file is missing, larger than 2 GiB, truncated, not ONNX, or keeps data in other files.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as e:
        raise ModelError(f"cannot read the ONNX model {path}: {e.strerror or e}") from e
    if size > MAX_MODEL_BYTES:
        raise ModelError(f"{path} has {size} bytes: an ONNX file above 2 GiB cannot be read")
    data = read_bytes(path, "the ONNX model", ModelError)
    return data, parse_model(data, str(path))


def parse_model(data: bytes, what: str = "the model") -> ModelProto:
    """Bytes -> checked model; raises ModelError that names `what`."""
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as e:
        raise ModelError(f"{what} is not an ONNX file, or a damaged one: export it again") from e
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"{what} is not an ONNX model: it has no graph")
    if outside := external_tensors(model):
        names = ", ".join(outside[:3])
        raise ModelError(f"{what} keeps tensors in other files ({names}): save it with all data inside")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"{what} is not a valid ONNX model: {reason}") from e
    return model


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and every graph inside its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers and attributes, in all graphs and functions."""
    bodies: list[Iterable[NodeProto]] = [function.node for function in model.functions]
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        bodies.append(graph.node)
    for nodes in bodies:
        for attribute in (a for node in nodes for a in node.attribute):
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t


def external_tensors(model: ModelProto) -> list[str]:
    """Names of the tensors whose data is in another file."""
    return [t.name for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL or t.external_data]


def arrays(model: ModelProto) -> dict[str, np.ndarray]:
    """Every initializer of the main graph as an array."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# Canonical bytes -----------------------------------------------------------------------------------------------------


def canonical_bytes(model: ModelProto) -> bytes:
    """The one serialised form of a model; equal models that other tools wrote in different ways become equal bytes.

    Initializers hold raw_data only and are sorted by name; Constant nodes become initializers; attributes and opset
    imports are sorted; nodes keep their (topological) order; documentation, metadata, producer, shapes of intermediate
    values and initializers listed as inputs go; the graph is called "main". Applying it twice changes nothing.
    Raises ModelError for external, sparse, string or malformed tensors and for fields that this onnx does not know.
    """
    if outside := external_tensors(model):
        raise ModelError(f"tensor {outside[0]} lies in another file: save the model with all data inside")
    known = ModelProto()
    known.CopyFrom(model)
    known.DiscardUnknownFields()
    if known.ByteSize() != model.ByteSize():
        raise ModelError("the model has fields that this version of onnx does not know: save it with an older version")
    out = ModelProto()
    out.ir_version = max(IR_VERSION, model.ir_version)
    _set_opsets(out, model)
    out.functions.extend(model.functions)
    source = model.graph
    if source.sparse_initializer:
        raise ModelError("the model has sparse initializers: make them dense")
    initializers = [_raw_tensor(tensor, tensor.name) for tensor in source.initializer]
    for node in source.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            initializers.append(_constant(node))
        else:
            out.graph.node.append(_plain_node(node))
    counts = Counter(tensor.name for tensor in initializers)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ModelError(f"two initializers are called {min(twice)!r}")
    out.graph.name = GRAPH_NAME
    out.graph.initializer.extend(sorted(initializers, key=lambda tensor: tensor.name))
    out.graph.input.extend(value for value in source.input if value.name not in counts)
    out.graph.output.extend(source.output)
    for value in (*out.graph.input, *out.graph.output):
        value.ClearField("doc_string")
        del value.metadata_props[:]
    return out.SerializeToString(deterministic=True)


def _set_opsets(out: ModelProto, model: ModelProto) -> None:
    """Sorted imports, only of domains that a node uses; the default domain always and under one name."""
    used = {""}
    bodies = [*(graph.node for graph in _graphs(model.graph)), *(function.node for function in model.functions)]
    for nodes in bodies:
        used |= {_domain(node.domain) for node in nodes}
    versions = {_domain(entry.domain): entry.version for entry in model.opset_import}
    if "" not in versions:
        raise ModelError("the model does not say which ONNX opset it uses")
    for domain in sorted(used & set(versions)):
        out.opset_import.add(domain=domain, version=versions[domain])


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _plain_node(node: NodeProto) -> NodeProto:
    """A copy without prose, attributes sorted."""
    out = NodeProto()
    out.CopyFrom(node)
    out.ClearField("doc_string")
    del out.metadata_props[:]
    out.domain = _domain(node.domain)
    if not out.domain:
        out.ClearField("domain")
    del out.attribute[:]
    for attribute in sorted(node.attribute, key=lambda a: a.name):
        out.attribute.add().CopyFrom(attribute)
        out.attribute[-1].ClearField("doc_string")
    return out


def _raw_tensor(tensor: TensorProto, name: str) -> TensorProto:
    """The same values under `name` as raw_data."""
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        raise ModelError(f"initializer {name} is of type {TensorProto.DataType.Name(tensor.data_type)}: use numbers")
    try:
        array = numpy_helper.to_array(tensor)
        out = numpy_helper.from_array(array, name)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ModelError(f"initializer {name} is malformed: {e}") from e
    if out.data_type != tensor.data_type or list(out.dims) != list(tensor.dims):
        raise ModelError(f"initializer {name} changes its type when it is written again")
    return out


def _constant(node: NodeProto) -> TensorProto:
    """The initializer that stands for a Constant node."""
    name = node.output[0]
    if len(node.attribute) != 1:
        raise ModelError(f"Constant {name} needs exactly one attribute")
    attribute = node.attribute[0]
    if attribute.name == "value":
        return _raw_tensor(attribute.t, name)
    if attribute.name not in _CONSTANTS:
        raise ModelError(f"Constant {name} holds {attribute.name}: only numbers can be stored")
    value = onnx.helper.get_attribute_value(attribute)
    return numpy_helper.from_array(np.asarray(value, _CONSTANTS[attribute.name]), name)


# Where the raw data lies ---------------------------------------------------------------------------------------------

_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9  # field numbers: ModelProto, GraphProto, TensorProto, TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Value and the offset behind it."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ModelError("the ONNX file is damaged: a number runs past its end")


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, offset, end) of every field of the message in data[start:end]."""
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        field, wire = key >> 3, key & 7
        begin = at
        if wire == _VARINT:
            _, at = _varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            length, begin = _varint(data, at, end)
            at = begin + length
        else:
            raise ModelError(f"the ONNX file is damaged: wire type {wire}")
        if field == 0 or at > end:
            raise ModelError("the ONNX file is damaged: a field runs past its end")
        yield field, wire, begin, at


def _submessages(data: bytes, start: int, end: int, number: int) -> list[tuple[int, int]]:
    """(offset, end) of the length-delimited fields `number` of one message."""
    found = []
    for field, wire, begin, stop in _fields(data, start, end):
        if field == number:
            if wire != _BYTES:
                raise ModelError(f"the ONNX file is damaged: field {number} has wire type {wire}")
            found.append((begin, stop))
    return found


def raw_data_ranges(data: bytes) -> dict[str, tuple[int, int]]:
    """{initializer: (offset, length)} of its raw_data in the serialised file, in file order.

    Raises ModelError when the bytes are not one well-formed model, when two initializers share a name or when one
    has not exactly one name and one raw_data (`canonical_bytes` writes it so).
    """
    graphs = _submessages(data, 0, len(data), _GRAPH)
    if len(graphs) != 1:
        raise ModelError(f"the ONNX file has {len(graphs)} graphs where one belongs")
    ranges: dict[str, tuple[int, int]] = {}
    for start, end in _submessages(data, *graphs[0], _INITIALIZER):
        names = _submessages(data, start, end, _NAME)
        raw = _submessages(data, start, end, _RAW_DATA)
        if len(names) != 1 or len(raw) != 1:
            raise ModelError("an initializer has no name or no raw_data: write the model with canonical_bytes")
        try:
            name = data[slice(*names[0])].decode("utf-8")
        except UnicodeDecodeError as e:
            raise ModelError("the ONNX file is damaged: an initializer's name is not UTF-8") from e
        if name in ranges:
            raise ModelError(f"two initializers are called {name!r}")
        ranges[name] = (raw[0][0], raw[0][1] - raw[0][0])
    return ranges


# Roles and the graph digest ------------------------------------------------------------------------------------------


def numeric_roles(model: ModelProto) -> dict[str, str]:
    """{initializer: role} for every initializer of numeric role, the part of a model in which levels may differ.

    Roles: weight, weight_scale, weight_zero_point, bias, bias_scale, bias_zero_point (read through a DequantizeLinear
    by Conv, Gemm or MatMul), constant, constant_scale, constant_zero_point (by anything else), scale, zero_point (of
    activations), clip_min, clip_max (of the Clip behind a QuantizeLinear). An initializer that is also read in any
    other way is structure and is left out; one that serves several numeric roles has the role of its first reader.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    readers: dict[str, list[tuple[NodeProto, int]]] = {}
    quantized = set()
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, i))
        if node.op_type == "QuantizeLinear":
            quantized.update(node.output)
    roles: dict[str, str] = {}
    outputs = {value.name for value in model.graph.output}
    for name in sorted(stored & set(readers)):
        found = [_role(node, i, stored, quantized, readers) for node, i in readers[name]]
        if found[0] is not None and None not in found and name not in outputs:
            roles[name] = found[0]
    return roles


def _role(
    node: NodeProto, i: int, stored: set[str], quantized: set[str], readers: dict[str, list[tuple[NodeProto, int]]]
) -> str | None:
    """Role of input `i` of `node`, None for structure."""
    if node.op_type == "QuantizeLinear":
        return {1: "scale", 2: "zero_point"}.get(i)
    if node.op_type == "Clip":
        return {1: "clip_min", 2: "clip_max"}.get(i) if node.input[0] in quantized else None
    if node.op_type != "DequantizeLinear":
        return None
    kind = ""
    if node.input[0] in stored:
        kind = "constant"
        for reader, place in readers.get(node.output[0], []):
            if reader.op_type in ("Conv", "Gemm", "MatMul"):
                kind = "bias" if place == 2 else "weight"
                break
    suffix = ("", "scale", "zero_point")[i]
    return "_".join(part for part in (kind, suffix) if part)


def graph_digest(data: bytes) -> str:
    """Hex SHA-256 of the model's canonical bytes with every initializer of numeric role zeroed.

    Equal for all levels of a ladder; ties a compiled artifact to the ladders that it can run.
    """
    model = parse_model(data)
    canonical = bytearray(canonical_bytes(model))
    roles = numeric_roles(_unchecked(bytes(canonical)))
    for name, (offset, length) in raw_data_ranges(bytes(canonical)).items():
        if name in roles:
            canonical[offset : offset + length] = bytes(length)
    return hashlib.sha256(canonical).hexdigest()


def _unchecked(data: bytes) -> ModelProto:
    model = ModelProto()
    model.ParseFromString(data)
    return model


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type != AttributeProto.GRAPH}


def has_only_raw_data(tensor: TensorProto) -> bool:
    """True when the values of `tensor` stand in raw_data and nowhere else."""
    return tensor.HasField("raw_data") and not any(len(getattr(tensor, field)) for field in _VALUE_FIELDS)
