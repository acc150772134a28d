"""What files say in many ways becomes one: fixed shapes, one image, nothing that can be computed without an input.

The network may be exported for a batch; the integer graph is that of one image. What mixes the images of a batch is
found by comparing the shapes of every value for the file's batch and for one image, and by a list of operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdeploy.compile.graph import FloatTensor
from qdeploy.errors import CompileError
from qdeploy.qdq import arrays, attributes

MAX_FOLDED = 4096  # elements of a tensor that is computed here: it becomes code
LARGE = 4096  # elements of an initializer whose values no shape depends on
ROUNDS = 8  # of folding and shape inference: each opens one nested shape computation
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
VENDOR = "com.microsoft"  # its Q and DQ are ONNX's, for more types

# Operators that keep a batch's images apart when no axis that they name is the first.
PER_IMAGE = frozenset((
    "Abs", "Acos", "Acosh", "Add", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "BatchNormalization", "Cast",
    "Ceil", "Celu", "Clip", "Concat", "Conv", "ConvTranspose", "Cos", "Cosh", "DepthToSpace", "DequantizeLinear",
    "Div", "Dropout", "Elu", "Erf", "Exp", "Flatten", "Floor", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
    "HardSigmoid", "HardSwish", "Hardmax", "Identity", "InstanceNormalization", "LRN", "LeakyRelu", "Log",
    "LogSoftmax", "MatMul", "Max", "MaxPool", "Min", "Mish", "Mul", "Neg", "PRelu", "Pad", "Pow", "QuantizeLinear",
    "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Resize", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Sinh", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt",
    "Squeeze", "Sub", "Tan", "Tanh", "ThresholdedRelu", "Transpose", "Unsqueeze", "Upsample",
))  # fmt: skip

BROADCAST = frozenset(("Add", "Div", "Gemm", "MatMul", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"))


@dataclass(frozen=True)
class Normal:
    """A model of one image: `batch` is the file's, `types` has every value whose shape and type are known.

    `computed` are initializers that the file does not hold, so nobody can give them to `prepare`.
    """

    model: ModelProto
    batch: int
    types: dict[str, FloatTensor]
    computed: frozenset[str]


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME=1,3,224,224 -> name and sizes; raises CompileError."""
    name, equals, sizes = text.rpartition("=")
    numbers = sizes.split(",")
    if not name or not equals or not all(number.strip().isdecimal() for number in numbers):
        raise CompileError(f"--shape {text!r} is not NAME=SIZE,SIZE,...: write for instance input=1,3,224,224")
    return name, tuple(int(number) for number in numbers)


def normalize(model: ModelProto, shape: tuple[str, tuple[int, ...]] | None = None) -> Normal:
    """A canonical model for one image; `shape` is an input's name and its sizes, where the file leaves some open.

    Raises CompileError for open sizes, several inputs, what mixes the images of a batch, and files without quantizers.
    """
    out = ModelProto()
    out.CopyFrom(model)
    _one_domain(out)
    if not any(node.op_type in QUANTIZERS for node in out.graph.node):
        raise CompileError(
            "the model cannot be compiled: nothing in it is quantized: put QuantizeLinear and DequantizeLinear around "
            "its layers, as quantizers do"
        )
    batch = _fix_input(out, shape)
    literal = _per_image(out, batch)
    types = _plain_pools(out, fold(out))
    if batch > 1:
        _check_apart(out, literal, batch, types)
    computed = {tensor.name for tensor in out.graph.initializer} - {tensor.name for tensor in model.graph.initializer}
    return Normal(out, batch, types, frozenset(computed))


def _fix_input(model: ModelProto, shape: tuple[str, tuple[int, ...]] | None) -> int:
    """Give the one input fixed sizes with batch 1; returns the batch."""
    inputs = list(model.graph.input)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise CompileError(f"the model cannot be compiled: it has {len(inputs)} inputs ({names}), it needs exactly one")
    name, kind = inputs[0].name, inputs[0].type.tensor_type
    dims: list[int | str] = [
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"dimension {i}"
        for i, d in enumerate(kind.shape.dim)
    ]
    if shape is not None:
        dims = _given(name, dims, kind.HasField("shape"), shape)
    if kind.elem_type != TensorProto.FLOAT or not dims:
        raise CompileError(
            f"the model cannot be compiled: input {name} is not float32 with a batch and at least one axis"
        )
    sizes = [1 if i == 0 and isinstance(d, str) else d for i, d in enumerate(dims)]  # an open batch means one image
    if open_sizes := [d for d in sizes if isinstance(d, str)]:
        example = ",".join("1" if i == 0 else "SIZE" if isinstance(d, str) else str(d) for i, d in enumerate(dims))
        raise CompileError(
            f"the model cannot be compiled: input {name} leaves {', '.join(open_sizes)} open: fix it with "
            f"--shape {name}={example}"
        )
    fixed = [d for d in sizes if isinstance(d, int)]
    if min(fixed) < 1:
        raise CompileError(f"the model cannot be compiled: input {name} has shape {fixed}")
    _set_shape(kind, [1, *fixed[1:]])
    return fixed[0]


def _given(
    name: str, dims: list[int | str], ranked: bool, shape: tuple[str, tuple[int, ...]]
) -> list[int | str]:  # fmt: skip
    """Sizes of `shape`, which may fix what is open and change the batch."""
    if shape[0] != name:
        raise CompileError(f"--shape names the input {shape[0]}: the model's is {name}")
    if ranked and len(dims) != len(shape[1]):
        raise CompileError(f"--shape {name} has {len(shape[1])} sizes: the model's input has {len(dims)}")
    for i, (old, new) in enumerate(zip(dims, shape[1], strict=False)):
        if new < 1 or (i > 0 and isinstance(old, int) and old != new):
            raise CompileError(f"--shape {name} says {new} for axis {i}: the model says {old}")
    return list(shape[1])


def _set_shape(kind: Any, sizes: Iterable[int]) -> None:
    kind.ClearField("shape")
    for size in sizes:
        kind.shape.dim.add().dim_value = size


def _one_domain(model: ModelProto) -> None:
    """QuantizeLinear and DequantizeLinear of the vendor's domain become ONNX's."""
    for node in model.graph.node:
        if node.domain == VENDOR and node.op_type in QUANTIZERS:
            node.ClearField("domain")


# Batches -------------------------------------------------------------------------------------------------------------


def _per_image(model: ModelProto, batch: int) -> dict[str, str]:
    """Make Reshapes that spell the batch out say 1; returns {name of the new shape: that of the file's}."""
    if batch == 1:
        return {}
    stored, literal = arrays(model), {}
    for i, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or len(node.input) < 2 or node.input[0] in stored or node.input[1] not in stored:
            continue
        target = stored[node.input[1]]
        if target.ndim == 1 and target.size and target[0] == batch:
            name = f"{node.input[1]}.one.{i}"
            literal[name] = node.input[1]
            model.graph.initializer.append(numpy_helper.from_array(np.concatenate([[1], target[1:]]), name))
            node.input[1] = name
    return literal


def _check_apart(model: ModelProto, literal: dict[str, str], batch: int, types: dict[str, FloatTensor]) -> None:
    """Raise CompileError unless every value of `batch` images is that of one image, `batch` times."""
    whole = ModelProto()
    whole.CopyFrom(model)
    kind = whole.graph.input[0].type.tensor_type
    _set_shape(kind, [batch, *types[whole.graph.input[0].name].shape[1:]])
    stored = arrays(model)
    del whole.graph.initializer[:]
    back = {name: np.concatenate([[batch], stored[name][1:]]) for name in literal}
    whole.graph.initializer.extend(numpy_helper.from_array({**stored, **back}[name], name) for name in stored)
    found = infer(whole)
    made = {model.graph.input[0].name}
    for node in model.graph.node:
        if not made.intersection(node.input):
            continue
        read = [types[name] for name in node.input if name in made and name in types]
        made.update(node.output)
        for name in filter(None, node.output):
            one, many = types.get(name), found.get(name)
            apart = one is not None and many is not None and many.shape == (batch, *one.shape[1:])
            if one is not None and node.op_type in BROADCAST:  # else images lie along another axis of the result
                apart = apart and all(len(kind.shape) == len(one.shape) for kind in read)
            if not (apart and one is not None and one.shape[:1] == (1,) and _keeps_apart(node, stored, one)):
                raise CompileError(
                    f"the model cannot be compiled: {node.op_type} {node.name or name} may mix the {batch} images of "
                    f"its batch: compile it for one with --shape {model.graph.input[0].name}=1,..."
                )


def _keeps_apart(node: NodeProto, stored: dict[str, np.ndarray], out: FloatTensor) -> bool:
    """True when `node`'s operator and axes leave the first axis alone."""
    op, a = node.op_type, attributes(node)
    if op not in PER_IMAGE or node.domain:
        return False
    if op == "Transpose":
        return bool(a.get("perm", [1])[0] == 0)
    axes = [] if op in QUANTIZERS else [a.get("axis", 0 if op == "Split" else 1), *a.get("axes", ())]
    reduces = op.startswith("Reduce")
    place = 1 if reduces else {"Slice": 3, "Squeeze": 1, "Unsqueeze": 1, "Pad": 3}.get(op, len(node.input))
    if place < len(node.input) and node.input[place]:
        if node.input[place] not in stored:
            return False
        axes += stored[node.input[place]].reshape(-1).tolist()
    elif (reduces or op in ("Slice", "Squeeze")) and not a.get("axes"):
        return False  # all axes
    rank = len(out.shape) + (len(axes) - 1 if op == "Squeeze" or (reduces and not a.get("keepdims", 1)) else 0)
    return all(int(axis) % max(1, rank) != 0 for axis in axes)


# Constants and shapes ------------------------------------------------------------------------------------------------


def fold(model: ModelProto) -> dict[str, FloatTensor]:
    """Replace what needs no input by initializers, in place; returns the types of all values.

    Nodes that read quantized parameters stay: their values belong to a level.
    """
    opset = opset_of(model)
    for _ in range(ROUNDS):
        types = infer(model)
        stored = arrays(model)
        aliases: dict[str, str] = {}
        kept: list[NodeProto] = []
        made: dict[str, np.ndarray] = {}
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = aliases.get(name, name)
            if node.op_type == "Identity" and not node.domain and node.input[0] in stored:
                aliases[node.output[0]] = node.input[0]
                continue
            values = _value(node, stored, types, opset)
            if values is None:
                kept.append(node)
                continue
            stored.update(values)
            made.update(values)
        if not made and not aliases:
            return types
        outputs = {value.name for value in model.graph.output}
        if constant := outputs & (set(made) | set(aliases)):
            raise CompileError(f"the model cannot be compiled: output {min(constant)} does not depend on the input")
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in made.items())
        del model.graph.value_info[:]
    return infer(model)


def _plain_pools(model: ModelProto, types: dict[str, FloatTensor]) -> dict[str, FloatTensor]:
    """Write the windows that ceil_mode adds as padding, in place; returns the types of all values, which may change.

    ONNX leaves out a window that starts behind the input, its shape inference counts it.
    """
    for node in model.graph.node:
        a = attributes(node)
        source = types.get(node.input[0]) if node.op_type in ("MaxPool", "AveragePool") else None
        if source is None or not a.get("ceil_mode", 0) or a.get("auto_pad", b"NOTSET") != b"NOTSET":
            continue
        size = source.shape[2:]
        rank = len(size)
        kernel, pads = a.get("kernel_shape", []), list(a.get("pads", [0] * 2 * rank))
        strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
        if (
            not (len(kernel) == len(strides) == len(dilations) == rank and len(pads) == 2 * rank)
            or min(strides, default=1) < 1
        ):
            continue  # malformed: refused where it is read
        for i in range(rank):
            reach = (kernel[i] - 1) * dilations[i] + 1
            windows = -(-(size[i] + pads[i] + pads[i + rank] - reach) // strides[i]) + 1
            windows -= (windows - 1) * strides[i] >= size[i] + pads[i]
            pads[i + rank] = max(pads[i + rank], (windows - 1) * strides[i] + reach - size[i] - pads[i])
        if a.get("count_include_pad", 0) and pads != list(a.get("pads", [0] * 2 * rank)):
            continue  # padding that ceil_mode adds does not count
        kept = [x for x in node.attribute if x.name not in ("ceil_mode", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads)])
        types = infer(model)
    return types


def _value(
    node: NodeProto, stored: dict[str, np.ndarray], types: dict[str, FloatTensor], opset: int
) -> dict[str, np.ndarray] | None:
    """Outputs of a node that needs no input of the network; None for all others."""
    if node.domain or node.op_type in QUANTIZERS or any(a.HasField("g") for a in node.attribute):
        return None
    if node.op_type == "Shape" and node.input[0] in types:
        sizes = np.array(types[node.input[0]].shape, np.int64)
        a = attributes(node)
        return {node.output[0]: sizes[a.get("start", 0) : a.get("end", len(sizes))]}
    if not node.input or any(name and name not in stored for name in node.input):
        return None
    if node.op_type == "Clip" and stored[node.input[0]].dtype in (np.int8, np.uint8):
        return None  # codes of a weight: they stay its parameters
    for name in node.output:
        if name in types and int(np.prod(types[name].shape)) > MAX_FOLDED:
            return None
    return _run(node, {name: stored[name] for name in node.input if name}, opset)


def _run(node: NodeProto, feeds: dict[str, np.ndarray], opset: int) -> dict[str, np.ndarray] | None:
    """The node's values as ONNX's reference evaluator has them; None where it cannot."""
    from onnx.reference import ReferenceEvaluator

    kinds = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()
    ]
    results = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name]
    model = helper.make_model(
        helper.make_graph([node], "one", kinds, results), opset_imports=[helper.make_opsetid("", opset)]
    )
    try:
        values = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # the evaluator's operators raise whatever numpy raises; the node stays as it is
        return None
    found = dict(zip((value.name for value in results), map(np.asarray, values), strict=True))
    return found if all(value.dtype.kind in "biuf" for value in found.values()) else None


def infer(model: ModelProto) -> dict[str, FloatTensor]:
    """Types of all values whose shapes are fixed: inputs, initializers and what shape inference finds."""
    small = ModelProto()
    small.CopyFrom(model)
    del small.graph.initializer[:]
    del small.graph.value_info[:]
    for value in small.graph.output:
        value.type.tensor_type.ClearField("shape")  # files hold shapes of other batches here
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= LARGE:
            small.graph.initializer.append(tensor)
        else:  # only its type matters
            small.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(small, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as e:
        raise CompileError(f"the model's shapes contradict each other: {str(e).strip().splitlines()[0]}") from e
    graph = inferred.graph
    found = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        kind = value.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
        if value.type.HasField("tensor_type") and kind.HasField("shape") and -1 not in sizes and kind.elem_type:
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            found[value.name] = FloatTensor(value.name, tuple(sizes), dtype)
    for tensor in model.graph.initializer:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        found[tensor.name] = FloatTensor(tensor.name, tuple(tensor.dims), dtype)
    return found


def opset_of(model: ModelProto) -> int:
    """Version of the default operator set."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
