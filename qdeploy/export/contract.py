"""What a legal QDQ ONNX model is, and every breach of it.

A legal model is one that `bundle` and `compile` can take and that ONNX Runtime runs with integer kernels:

* **File.** Opset 13 or later of the standard domain alone, no control flow, functions, sparse or external data.
* **Interface.** One float32 input and one float32 output, all shapes fixed, batch 1.
* **Activations** are 8-bit codes, uint8 or int8: `QuantizeLinear -> [Clip] -> DequantizeLinear` with one scalar scale
  (float32, positive, finite) and one scalar zero point, the same values on both sides. The Clip is an integer one, of
  the codes' type, with two scalar bounds around the zero point.
* **Operators**: Conv (2-D), Gemm, MatMul (by a constant), Add, Mul, HardSwish, HardSigmoid, MaxPool, GlobalAveragePool,
  ReduceMean over height and width, Flatten, Reshape to [1, n], Relu. Each reads dequantized activations and has one
  reader: a QuantizeLinear, or a Relu and then one. That holds for a convolution before an Add too. MaxPool, Flatten and
  Reshape move codes: their output has their input's quantizer. The output of the model comes from a DequantizeLinear.
* **Weights** are int8 behind a DequantizeLinear with one scale an output channel (or one in all), positive and finite,
  and one zero point a tensor: 0, or another number in an asymmetric model.
* **Biases** are int32 behind a DequantizeLinear of scale exactly float32(input scale * weight scale), zero point 0.

Our own exports also keep docs/handovers.md: opset 13 (14 with HardSwish), ir_version 8, canonical bytes, and the names
of its table.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from qdeploy.errors import ModelError
from qdeploy.export.float_graph import HARD_SWISH_OPSET, INPUT, IR_VERSION, OPSET, OUTPUT
from qdeploy.export.view import View, as_numbers, same_values
from qdeploy.qdq import attributes, canonical_bytes, external_tensors, has_only_raw_data, numeric_roles

MIN_OPSET = 13
MOVES_CODES = ("MaxPool", "Flatten", "Reshape")
WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
OF_TWO = ("Add", "Mul")
OPERATORS = (
    *WITH_WEIGHTS, *OF_TWO, "HardSwish", "HardSigmoid", "GlobalAveragePool", "ReduceMean", *MOVES_CODES, "Relu",
)  # fmt: skip
CODE_TYPES = (np.dtype(np.uint8), np.dtype(np.int8))


def check(model: ModelProto, own: bool = False) -> None:
    """Raise ModelError that lists every breach; `own` adds the rules for our own exports."""
    if found := breaches(model, own):
        raise ModelError(f"the model breaks the QDQ contract in {len(found)} places: " + "; ".join(found))


def breaches(model: ModelProto, own: bool = False) -> list[str]:
    """Every breach of the contract in a model that onnx.checker accepts; an empty list for a legal one."""
    kinds = {node.op_type for node in model.graph.node}
    if not {"QuantizeLinear", "DequantizeLinear"} <= kinds:
        return ["it is not a QDQ model: it has no QuantizeLinear and DequantizeLinear; quantize it first"]
    found = _file(model)
    if external_tensors(model):
        return found
    try:
        view = View.of(model)
    except (ValueError, TypeError, KeyError, onnx.shape_inference.InferenceError) as e:
        return [*found, f"its tensors or shapes are inconsistent: {str(e).strip().splitlines()[0]}"]
    found += _interface(view)
    for node in model.graph.node:
        found += _node(view, node)
    return found + (_own(model, view) if own else [])


# The file and its interface ------------------------------------------------------------------------------------------


def _file(model: ModelProto) -> list[str]:
    found = []
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if opset < MIN_OPSET:
        found.append(f"opset {opset}: per-channel quantizers need {MIN_OPSET} or later")
    found += [f"tensor {name} lies in another file" for name in external_tensors(model)]
    if model.functions:
        found.append("it has model-local functions: inline them")
    if model.graph.sparse_initializer:
        found.append("it has sparse initializers: make them dense")
    return found


def _interface(view: View) -> list[str]:
    found = []
    graph = view.model.graph
    inputs = [value for value in graph.input if value.name not in view.arrays]
    for what, values in (("input", inputs), ("output", list(graph.output))):
        if len(values) != 1:
            found.append(f"{len(values)} {what}s: exactly one is supported")
        found += [text for value in values for text in _fixed(what, value)]
    for value in graph.output:
        node = view.producer.get(value.name)
        if node is None or node.op_type != "DequantizeLinear":
            found.append(f"output {value.name} does not come from a DequantizeLinear: quantize the last operator")
    return found


def _fixed(what: str, value: ValueInfoProto) -> list[str]:
    kind = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
    found = []
    if kind.elem_type != TensorProto.FLOAT:
        found.append(f"{what} {value.name} is not float32")
    if not dims or min(dims) < 1:
        found.append(f"{what} {value.name} has a dynamic shape: fix every dimension, batch 1")
    elif dims[0] != 1:
        found.append(f"{what} {value.name} has batch {dims[0]}: batch 1 is supported")
    return found


# Nodes ---------------------------------------------------------------------------------------------------------------


def _node(view: View, node: NodeProto) -> list[str]:
    """Breaches at one node, each starting with what it is called."""
    rules = {"QuantizeLinear": _quantize, "DequantizeLinear": _dequantize, "Clip": _clip, "Constant": _nothing}
    if node.domain not in ("", "ai.onnx"):
        found = [f"operator {node.op_type} of domain {node.domain} is not standard ONNX"]
    elif node.op_type in rules:
        found = rules[node.op_type](view, node)
    elif node.op_type in OPERATORS:
        found = _operator(view, node)
    else:
        found = [f"operator {node.op_type} is not supported: the supported ones are {', '.join(OPERATORS)}"]
    name = node.name or (node.output[0] if node.output else "?")
    return [f"{node.op_type} {name}: {text}" for text in found]


def _nothing(view: View, node: NodeProto) -> list[str]:
    return []


def _quantize(view: View, node: NodeProto) -> list[str]:
    found = _activation_quantizer(view, node)
    if node.input[0] in view.arrays:
        found.append("it quantizes a constant: store the integers")
    for reader, _ in view.readers.get(node.output[0], []):
        if reader.op_type not in ("Clip", "DequantizeLinear"):
            found.append(f"its codes are read by a {reader.op_type}, not by a DequantizeLinear")
    return found


def _activation_quantizer(view: View, node: NodeProto) -> list[str]:
    """Scale and zero point of a quantizer of activations."""
    found = []
    scale, zero = view.constant(node, 1), view.constant(node, 2)
    if scale is None:
        return ["its scale is not an initializer"]
    if scale.ndim:
        found.append(f"its scale has shape {list(scale.shape)}: activations have one scalar")
    found += _positive(scale)
    if zero is None:
        return [*found, "it has no zero point initializer: write one, even where it is 0"]
    if zero.ndim:
        found.append(f"its zero point has shape {list(zero.shape)}: activations have one scalar")
    if zero.dtype not in CODE_TYPES:
        found.append(f"its codes are {zero.dtype}: 8 bits are supported, uint8 or int8")
    return found


def _positive(scale: np.ndarray) -> list[str]:
    if scale.dtype != np.float32:
        return [f"its scale is {scale.dtype}, not float32"]
    good = np.isfinite(scale).all() and (scale > 0).all()
    return [] if good else ["its scale is not positive and finite"]


def _dequantize(view: View, node: NodeProto) -> list[str]:
    if node.input[0] in view.arrays:
        strange = [r.op_type for r, i in view.readers.get(node.output[0], []) if r.op_type not in WITH_WEIGHTS or not i]
        return [f"its constant is read by a {strange[0]}: only weights and biases may be constants"] if strange else []
    source = view.quantizer_of(node)
    if source is None:
        return ["it reads neither an initializer nor the codes of a QuantizeLinear"]
    found = []
    for i, what in ((1, "scale"), (2, "zero point")):
        if not same_values(view.constant(node, i), view.constant(source, i)):
            found.append(f"its {what} is not that of the QuantizeLinear before it")
    return found


def _clip(view: View, node: NodeProto) -> list[str]:
    source = view.producer.get(node.input[0])
    if source is None or source.op_type != "QuantizeLinear":
        return ["it is a float Clip: clip the codes behind the QuantizeLinear instead, or fold it into their range"]
    bounds = [view.constant(node, i) for i in (1, 2)]
    zero = view.constant(source, 2)
    low, high = bounds
    if low is None or high is None or zero is None:
        return ["an integer Clip needs both bounds as initializers"]
    if any(bound.ndim or bound.dtype != zero.dtype for bound in (low, high)):
        return [f"its bounds are not {zero.dtype} scalars like the codes"]
    found = []
    if zero.ndim == 0 and not low <= zero <= high:
        found.append(f"its bounds {low}..{high} do not hold the zero point {zero}")
    if any(reader.op_type != "DequantizeLinear" for reader, _ in view.readers.get(node.output[0], [])):
        found.append("its codes are not read by a DequantizeLinear")
    return found


def _operator(view: View, node: NodeProto) -> list[str]:
    found = _output(view, node)
    data = node.input[:2] if node.op_type in OF_TWO else node.input[:1]
    for name in data:
        source = view.producer.get(name)
        if node.op_type == "Relu" and source is not None and source.op_type in OPERATORS and source.op_type != "Relu":
            continue
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] in view.arrays:
            found.append(f"its input {name} is a float tensor: it must come from a DequantizeLinear")
    rules = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul, "MaxPool": _max_pool, "ReduceMean": _mean}
    if node.op_type in rules:
        found += rules[node.op_type](view, node)
    if node.op_type == "Reshape" and (len(view.shapes.get(node.output[0], ())) != 2 or view.constant(node, 1) is None):
        found.append("only a constant reshape to [1, n] is supported")
    if node.op_type in MOVES_CODES:
        found += _moves_codes(view, node)
    return found


def _output(view: View, node: NodeProto) -> list[str]:
    """One reader: QuantizeLinear, or Relu for anything but a Relu."""
    found = []
    if len(node.output) != 1:
        found.append("it has more than one output")
    shape = view.shapes.get(node.output[0], ())
    if not shape or min(shape) < 1:
        found.append("the shape of its output is not fixed")
    readers = [reader.op_type for reader, _ in view.readers.get(node.output[0], [])]
    allowed = ("QuantizeLinear",) if node.op_type == "Relu" else ("QuantizeLinear", "Relu")
    if not readers:
        found.append("no QuantizeLinear reads its output")
    elif any(reader not in allowed for reader in readers):
        others = sorted({reader for reader in readers if reader not in allowed})
        found.append(f"its float output goes to {', '.join(others)}: put a QuantizeLinear behind it")
    elif len(readers) > 1:
        found.append(f"its float output is read {len(readers)} times: quantize it once")
    return found


def _moves_codes(view: View, node: NodeProto) -> list[str]:
    source = view.producer.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return []
    targets = [reader for reader, _ in view.readers.get(node.output[0], []) if reader.op_type == "QuantizeLinear"]
    for target in targets:
        if not all(same_values(view.constant(source, i), view.constant(target, i)) for i in (1, 2)):
            return ["its output has another quantizer than its input: it moves codes, so both need the same one"]
    return []


def _explicit_padding(node: NodeProto) -> list[str]:
    mode = attributes(node).get("auto_pad", b"NOTSET")
    return [] if mode in (b"NOTSET", "NOTSET") else ["it pads automatically: write the padding out"]


def _conv(view: View, node: NodeProto) -> list[str]:
    weight = view.behind_dequantize(node, 1)
    if weight is not None and weight.ndim != 4:
        return ["only 2-D convolutions are supported"]
    found = _explicit_padding(node)
    groups, shape = attributes(node).get("group", 1), view.shapes.get(node.input[0], ())
    if weight is not None and len(shape) == len(weight.shape):
        outputs, per_group = weight.shape[:2]
        if groups < 1 or per_group * groups != shape[1] or outputs % groups:
            found.append(f"{shape[1]} channels in {groups} groups do not fit its weight {list(weight.shape)}")
    return found + _parameters(view, node, 0)


def _gemm(view: View, node: NodeProto) -> list[str]:
    values = attributes(node)
    found = []
    if values.get("transA", 0) or any(as_numbers(values.get(k, 1.0)) != [1.0] for k in ("alpha", "beta")):
        found.append("only alpha = beta = 1 without transA is supported")
    return found + _parameters(view, node, 0 if values.get("transB", 0) else 1)


def _matmul(view: View, node: NodeProto) -> list[str]:
    weight = view.behind_dequantize(node, 1)
    if weight is not None and weight.ndim != 2:
        return ["only a matrix [inputs, outputs] is supported as its weight"]
    return _parameters(view, node, 1)


def _max_pool(view: View, node: NodeProto) -> list[str]:
    values = attributes(node)
    found = _explicit_padding(node)
    if len(view.shapes.get(node.input[0], ())) != 4:
        found.append("only 2-D pooling is supported")
    dilated = any(d != 1 for d in as_numbers(values.get("dilations")))
    if values.get("ceil_mode", 0) or values.get("storage_order", 0) or dilated:
        found.append("ceil_mode, storage_order and dilations are not supported")
    return found


def _mean(view: View, node: NodeProto) -> list[str]:
    rank = len(view.shapes.get(node.input[0], ()))
    axes = view.constant(node, 1) if len(node.input) > 1 else attributes(node).get("axes")
    if rank != 4 or sorted(int(axis) % 4 for axis in as_numbers(axes)) != [2, 3]:
        return ["only the mean over height and width is supported"]
    return []


# Weights and biases --------------------------------------------------------------------------------------------------


def _parameters(view: View, node: NodeProto, axis: int) -> list[str]:
    """Weight and bias of a Conv, Gemm or MatMul whose weight has its output channels on `axis`."""
    weight = view.behind_dequantize(node, 1)
    if weight is None:
        return ["its weight is not an initializer behind a DequantizeLinear: it would run in float"]
    dequantize = view.producer[node.input[1]]
    scale, zero = view.constant(dequantize, 1), view.constant(dequantize, 2)
    found = []
    if weight.dtype != np.int8:
        found.append(f"its weight is {weight.dtype}: the container is int8")
    if scale is None or zero is None:
        return [*found, "its weight has no scale or no zero point initializer"]
    channels = weight.shape[axis]
    found += [text.replace("its scale", "its weight scale") for text in _positive(scale)]
    if scale.shape not in ((), (1,), (channels,)):
        found.append(f"its weight scale has shape {list(scale.shape)}: one number or {channels} are needed")
    values = attributes(dequantize)
    along = as_numbers(values.get("axis", 1))[0] % weight.ndim
    if scale.size > 1 and along != axis:
        found.append(f"its weight scale runs along axis {along:.0f}: output channels are axis {axis}")
    if values.get("block_size", 0):
        found.append("its weight is quantized in blocks")
    if zero.shape != scale.shape or len(np.unique(zero)) > 1:
        found.append("its weight has more than one zero point: one a tensor is supported")
    if len(node.input) > 2 and node.input[2]:
        found += _bias(view, node, scale, channels)
    return found


def _bias(view: View, node: NodeProto, weight_scale: np.ndarray, channels: int) -> list[str]:
    bias = view.behind_dequantize(node, 2)
    if bias is None:
        return ["its bias is a float tensor: store int32 behind a DequantizeLinear"]
    dequantize = view.producer[node.input[2]]
    scale, zero = view.constant(dequantize, 1), view.constant(dequantize, 2)
    found = []
    if bias.dtype != np.int32 or bias.shape != (channels,):
        found.append(f"its bias is {bias.dtype} {list(bias.shape)}: int32 [{channels}] is needed")
    if zero is not None and np.any(zero):
        found.append("its bias has a zero point other than 0")
    source = view.producer.get(node.input[0])
    input_scale = view.constant(source, 1) if source is not None and source.op_type == "DequantizeLinear" else None
    if scale is None or scale.shape not in ((), (1,), (channels,)):
        found.append("its bias scale is not one number or one an output channel")
    elif input_scale is not None and input_scale.size == 1 and weight_scale.size in (1, channels):
        wanted = np.broadcast_to(input_scale.reshape(()) * weight_scale.ravel(), (channels,)).astype(np.float32)
        if not np.array_equal(np.broadcast_to(scale.ravel(), (channels,)), wanted):
            found.append("its bias scale is not float32(input scale * weight scale)")
    return found


# Our own exports -----------------------------------------------------------------------------------------------------


def _own(model: ModelProto, view: View) -> list[str]:
    """Names, roles and bytes of docs/handovers.md."""
    found = []
    opsets = [(entry.domain, entry.version) for entry in model.opset_import]
    opset = HARD_SWISH_OPSET if any(node.op_type == "HardSwish" for node in model.graph.node) else OPSET
    if opsets != [("", opset)] or model.ir_version != IR_VERSION:
        found.append(f"it is not opset {opset} and ir_version {IR_VERSION}")
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    if names != [INPUT, OUTPUT]:
        found.append(f"its input and output are called {', '.join(names)}, not {INPUT} and {OUTPUT}")
    roles = numeric_roles(model)
    for name in view.arrays:
        role = roles.get(name, "structure")
        if name.rsplit(".", 1)[-1] != role:
            found.append(f"initializer {name} has the role {role}")
    for node in model.graph.node:
        if node.op_type in WITH_WEIGHTS and view.producer[node.input[1]].input[0] != f"{node.name}.weight":
            found.append(f"the weight of {node.name} has another name than {node.name}.weight")
    if not all(has_only_raw_data(tensor) for tensor in model.graph.initializer):
        found.append("an initializer holds other than raw_data")
    if canonical_bytes(model) != model.SerializeToString(deterministic=True):
        found.append("its bytes are not canonical")
    return found
