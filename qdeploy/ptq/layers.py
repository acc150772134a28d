"""Layers with stored weights: their kind, their weight as rows of output channels, the inputs that each row sees."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto

from qdeploy.ptq.graph import FloatGraph
from qdeploy.qdq import attributes

OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized.

    `axis` is that of its weight's output channels, `bias` the stored bias or None; `adds` names the Add that a MatMul's
    bias stands in. `solvable`: rows() and patches() hold for it (not for a transposed convolution).
    """

    name: str
    op: str
    weight: str
    bias: str | None
    axis: int
    groups: int
    input: str
    kind: str
    solvable: bool
    adds: str | None = None


def read_layer(graph: FloatGraph, node: NodeProto) -> Layer | str:
    """The layer that `node` (of OPERATORS) is, or why it stays in float."""
    weight = graph.arrays.get(node.input[1])
    if weight is None:
        return "both operands are activations" if node.op_type == "MatMul" else "its weight is not stored in the file"
    if node.input[0] not in graph.floats:
        return "its input is not a float32 activation of fixed shape"
    a, op = attributes(node), node.op_type
    if op.startswith("Conv") and weight.ndim not in (3, 4):
        return f"only convolutions over one or two axes are supported, this one has {weight.ndim - 2}"
    if not op.startswith("Conv") and weight.ndim != 2:
        return "its weight is no matrix"
    if a.get("transA", 0):
        return "it transposes its input"
    if len(node.input) > 2 and node.input[2] not in graph.arrays:
        return "its bias is not stored in the file"
    groups = int(a.get("group", 1))
    bias = node.input[2] if len(node.input) > 2 else None
    axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}.get(op, 0 if a.get("transB", 0) else 1)
    return Layer(node.name, op, node.input[1], bias, axis, groups, node.input[0], _kind(node, weight, groups),
                 op != "ConvTranspose")  # fmt: skip


def _kind(node: NodeProto, weight: np.ndarray, groups: int) -> str:
    """A layer's type in a report; first and last are the caller's."""
    if not node.op_type.startswith("Conv"):
        return "linear"
    if groups > 1:
        return "depthwise" if weight.shape[1] == 1 else "grouped"
    return "x".join(map(str, weight.shape[2:]))


def rows(layer: Layer, weight: np.ndarray) -> np.ndarray:
    """[O, K]: one row an output channel, its weights in the order of patches().

    A convolution over C/g channels in g groups has K = C/g * kh * kw; a matrix [K, O] is turned.
    """
    if layer.op == "ConvTranspose":  # [C, O/g, kh, kw]: rows are those of a group's outputs, in group order
        inputs = weight.shape[0] // layer.groups
        grouped = weight.reshape(layer.groups, inputs, weight.shape[1], -1)
        return np.ascontiguousarray(grouped.transpose(0, 2, 1, 3)).reshape(layer.groups * weight.shape[1], -1)
    return np.ascontiguousarray(np.moveaxis(weight, layer.axis, 0)).reshape(weight.shape[layer.axis], -1)


def unrows(layer: Layer, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of rows() for a weight of `shape`."""
    if layer.op == "ConvTranspose":
        inputs = shape[0] // layer.groups
        grouped = matrix.reshape(layer.groups, shape[1], inputs, prod(shape[2:])).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(grouped).reshape(shape)
    moved = (shape[layer.axis], *(n for i, n in enumerate(shape) if i != layer.axis))
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(moved), 0, layer.axis))


def patches(
    layer: Layer, node: NodeProto, kernel: tuple[int, ...], x: np.ndarray, count: int, random: np.random.Generator
) -> np.ndarray:
    """[G, n, K]: what each of the G groups' rows is multiplied by, at n <= count random output places of input `x`.

    `x` is [1, C, H, W], [1, C, L] or [..., K]; `kernel` the weight's last axes. Padding is 0.
    """
    if layer.op != "Conv":
        flat = x.reshape(-1, x.shape[-1])
        return flat[_some(len(flat), count, random)][None]
    a, axes = attributes(node), len(kernel)
    strides, dilations = (list(a.get(key, [1] * axes)) for key in ("strides", "dilations"))
    pads = spatial_pads(a, x.shape[2:], kernel, strides, dilations)
    sizes = [
        (x.shape[2 + i] + sum(pads[i]) - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(axes)
    ]
    padded = np.pad(x[0], [(0, 0), *pads]).reshape(x.shape[1], -1)
    width = [x.shape[2 + i] + sum(pads[i]) for i in range(axes)]
    places = np.unravel_index(_some(prod(sizes), count, random), sizes)
    offsets = np.unravel_index(np.arange(prod(kernel)), kernel)
    index = np.zeros((len(places[0]), prod(kernel)), np.int64)
    for i in range(axes):
        index = index * width[i] + places[i][:, None] * strides[i] + offsets[i][None] * dilations[i]
    found = padded[:, index].transpose(1, 0, 2)  # [n, C, kernel]
    return np.ascontiguousarray(found.reshape(len(found), layer.groups, -1).transpose(1, 0, 2))


def _some(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """At most `count` of `total` places, in order."""
    return np.arange(total) if total <= count else np.sort(random.choice(total, count, replace=False))


def spatial_pads(
    a: dict[str, object], size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """Zeros before and behind each axis; auto_pad worked out."""
    auto, axes = a.get("auto_pad", b"NOTSET"), len(kernel)
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        found = []
        for length, k, s, d in zip(size, kernel, strides, dilations, strict=True):
            total = max(0, (-(-length // s) - 1) * s + (k - 1) * d + 1 - length)
            small, large = total // 2, total - total // 2
            found.append((small, large) if auto == b"SAME_UPPER" else (large, small))
        return found
    flat = a.get("pads", [0] * 2 * axes)
    assert isinstance(flat, list)
    return [(int(flat[i]), int(flat[i + axes])) for i in range(axes)]
