"""Rewrites of the float graph that leave its function alone: batch norms into layers, weight ranges made even."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from qdeploy.ptq.graph import FloatGraph
from qdeploy.qdq import attributes

WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
Affine = tuple[str, np.ndarray, np.ndarray]  # value, scale, shift: float64 of size 1 or [C]


def plain_layers(graph: FloatGraph) -> None:
    """Give every layer arrays of its own and a bias [O]; a matrix product of two axes becomes a Gemm; in place."""
    for node in graph.nodes:
        if node.op_type == "MatMul" and node.input[1] in graph.arrays and len(graph.floats.get(node.input[0], ())) == 2:
            if graph.arrays[node.input[1]].ndim != 2:
                continue
            node.op_type = "Gemm"
        if node.op_type not in (*WITH_BIAS, "MatMul") or len(node.input) < 2 or node.input[1] not in graph.arrays:
            continue
        a = attributes(node)
        weight = graph.arrays[node.input[1]]
        if node.op_type == "Gemm":
            weight = weight * np.float32(a.get("alpha", 1.0))
        node.input[1] = f"{node.name}.float_weight"
        graph.arrays[node.input[1]] = np.array(weight, np.float32)
        if node.op_type == "MatMul":
            continue
        outputs = _channels(node, weight)
        bias = np.zeros(outputs, np.float32)
        if len(node.input) > 2 and node.input[2]:
            if node.input[2] not in graph.arrays:
                continue
            bias = np.broadcast_to(graph.arrays[node.input[2]] * np.float32(a.get("beta", 1.0)), (1, outputs))[0]
        del node.input[2:]
        node.input.append(f"{node.name}.float_bias")
        graph.arrays[node.input[2]] = np.array(bias, np.float32)
        kept = [attribute for attribute in node.attribute if attribute.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)


def _channels(node: NodeProto, weight: np.ndarray) -> int:
    """Output channels of a layer."""
    a = attributes(node)
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1] * a.get("group", 1))
    return int(weight.shape[0 if node.op_type == "Conv" or a.get("transB", 0) else 1])


def fold_affine(graph: FloatGraph) -> int:
    """Fold `x * scale + shift` per channel into the layer before it, or make it a depthwise 1x1 convolution; in place.

    Returns how many were folded or replaced. Scalars that follow no layer, and what is not over channels, stay.
    """
    count, again = 0, True
    while again:
        again = False
        makers, readers = graph.makers(), graph.readers()
        for place, node in enumerate(graph.nodes):
            found = _affine(graph, node)
            if found is None:
                continue
            value, scale, shift = found
            layer = makers.get(value)
            alone = len(readers[value]) == 1 and value not in graph.output_names
            if layer is not None and alone and layer.op_type in WITH_BIAS and len(layer.input) == 3:
                if not _fold(graph, layer, scale, shift):
                    continue
                layer.output[0] = node.output[0]
                del graph.nodes[place]
            elif max(scale.size, shift.size) > 1 and len(graph.floats[value]) in (3, 4):
                graph.nodes[place] = _depthwise(graph, node, value, scale, shift)
            else:
                continue
            count, again = count + 1, True
            break
    return count


def _affine(graph: FloatGraph, node: NodeProto) -> Affine | None:
    """`node` as value * scale + shift over channels; None for anything else."""
    if node.domain not in ("", "ai.onnx") or not node.input or node.input[0] not in (*graph.floats, *graph.arrays):
        return None
    if node.op_type == "BatchNormalization":
        stored = [graph.arrays.get(name) for name in node.input[1:]]
        if any(array is None for array in stored) or len([n for n in node.output if n]) > 1:
            return None
        gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in stored)
        scale = gamma / np.sqrt(variance + attributes(node).get("epsilon", 1e-5))
        return node.input[0], scale, beta - mean * scale
    if node.op_type not in ("Mul", "Add", "Sub", "Div"):
        return None
    value, other = node.input
    if other not in graph.arrays and node.op_type in ("Mul", "Add"):
        value, other = other, value
    if other not in graph.arrays or value not in graph.floats:
        return None
    number = _over_channels(graph.arrays[other], graph.floats[value])
    if number is None or (node.op_type == "Div" and not np.all(number)):
        return None
    zero, one = np.zeros(1), np.ones(1)
    return {
        "Mul": (value, number, zero),
        "Div": (value, 1 / number if node.op_type == "Div" else one, zero),
        "Add": (value, one, number),
        "Sub": (value, one, -number),
    }[node.op_type]


def _over_channels(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A stored operand as float64 of size 1 or [C] where it changes over channels (axis 1) alone."""
    if array.dtype != np.float32 or array.ndim > len(shape):
        return None
    aligned = (1,) * (len(shape) - array.ndim) + array.shape
    if any(n != 1 for i, n in enumerate(aligned) if i != 1) or aligned[1] not in (1, shape[1]):
        return None
    return array.reshape(-1).astype(np.float64)


def _fold(graph: FloatGraph, layer: NodeProto, scale: np.ndarray, shift: np.ndarray) -> bool:
    """Put the operator into weight and bias; False where their channels do not fit."""
    weight, bias = (graph.arrays[name] for name in layer.input[1:])
    if max(scale.size, shift.size) not in (1, bias.size):
        return False
    a = attributes(layer)
    per_channel = np.broadcast_to(scale, bias.shape)
    if layer.op_type == "ConvTranspose":
        groups = int(a.get("group", 1))
        inputs = weight.shape[0] // groups
        factor = np.repeat(per_channel.reshape(groups, 1, -1), inputs, 1).reshape(weight.shape[0], -1)
        factor = factor.reshape(*factor.shape, *[1] * (weight.ndim - 2))
    elif layer.op_type == "Gemm" and not a.get("transB", 0):
        factor = per_channel[None]
    else:
        factor = per_channel.reshape(-1, *[1] * (weight.ndim - 1))
    graph.arrays[layer.input[1]] = (weight * factor).astype(np.float32)
    graph.arrays[layer.input[2]] = (bias * per_channel + shift).astype(np.float32)
    return True


def _depthwise(graph: FloatGraph, node: NodeProto, value: str, scale: np.ndarray, shift: np.ndarray) -> NodeProto:
    """The same as a convolution of one weight a channel, which has an integer kernel."""
    shape = graph.floats[value]
    channels, rank = shape[1], len(shape) - 2
    names = [f"{node.name}.float_weight", f"{node.name}.float_bias"]
    for name, numbers, form in zip(names, (scale, shift), ((channels, 1, *[1] * rank), (channels,)), strict=True):
        graph.arrays[name] = np.array(np.broadcast_to(numbers, channels).reshape(form), np.float32)
    return helper.make_node(
        "Conv", [value, *names], list(node.output)[:1], node.name, group=channels, kernel_shape=[1] * rank
    )


# Cross-layer equalization --------------------------------------------------------------------------------------------

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "Identity", "Dropout")  # f(s x) = s f(x) for s > 0
ROUNDS = 20
EVEN = 1e-3  # largest change of a factor that ends the rounds


def equalize(graph: FloatGraph) -> int:
    """Make weight ranges of neighbouring layers alike, channel by channel, in place (Nagel et al. 2019, eq. 11).

    A pair is a layer whose output only a Conv or Gemm reads, with nothing but positively homogeneous operators
    between; its factors are sqrt(r1 / r2). A Relu6 between forbids it: it would cut elsewhere. Returns the pairs.
    """
    pairs = _pairs(graph)
    for _ in range(ROUNDS if pairs else 0):
        if max(_even_out(graph, first, second) for first, second in pairs) < EVEN:
            break
    return len(pairs)


def _pairs(graph: FloatGraph) -> list[tuple[NodeProto, NodeProto]]:
    readers, found = graph.readers(), []
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) != 3 or node.input[1] not in graph.arrays:
            continue
        value, after = node.output[0], None
        while value not in graph.output_names and len(readers.get(value, ())) == 1:
            after = readers[value][0]
            uniform = after.op_type != "PRelu" or graph.arrays.get(after.input[1], np.zeros(0)).size == 1
            if after.op_type not in HOMOGENEOUS or len(after.output) > 1 or not uniform:
                break
            value = after.output[0]
        if after is None or after.op_type not in ("Conv", "Gemm") or after.input[0] != value or len(after.input) != 3:
            continue
        weight = graph.arrays.get(after.input[1])
        channels = graph.arrays[node.input[2]].size
        group = int(attributes(after).get("group", 1))
        flat = after.op_type == "Conv" or len(graph.floats.get(node.output[0], ())) == 2
        if weight is not None and flat and (group == 1 or group == channels == weight.shape[0]):
            found.append((node, after))
    return found


def _even_out(graph: FloatGraph, first: NodeProto, second: NodeProto) -> float:
    """One step for one pair; returns the largest relative change."""
    one, two = graph.arrays[first.input[1]], graph.arrays[second.input[1]]
    out = 1 if first.op_type == "Gemm" and not attributes(first).get("transB", 0) else 0
    depthwise = int(attributes(second).get("group", 1)) > 1
    inner = 0 if depthwise or (second.op_type == "Gemm" and not attributes(second).get("transB", 0)) else 1
    if one.shape[out] != two.shape[inner]:
        return 0.0
    r1, r2 = _ranges(one, out), _ranges(two, inner)
    alive = (r1 > 0) & (r2 > 0)
    factor = np.where(alive, np.sqrt(np.where(alive, r1, 1) / np.where(alive, r2, 1)), 1).astype(np.float32)
    graph.arrays[first.input[1]] = one / _along(factor, out, one.ndim)
    graph.arrays[first.input[2]] = graph.arrays[first.input[2]] / factor
    graph.arrays[second.input[1]] = two * _along(factor, inner, two.ndim)
    return float(np.abs(factor - 1).max(initial=0))


def _ranges(weight: np.ndarray, axis: int) -> np.ndarray:
    """Greatest magnitude of each place of `axis`."""
    found: np.ndarray = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(1)
    return found


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])
