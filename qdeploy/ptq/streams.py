"""Channels of activations given like ranges, so that one scale for all channels fits each of them.

A *stream* is a set of activations that share their channels: what sums, pools and piecewise linear functions join, from
the layers that write it to the layers that read it. Multiplying channel c of the whole stream by s_c, in the rows of
every writer and, inversely, in the columns of every reader, changes nothing that the network computes; it trades the
rounding errors of the activations for those of the readers' weights. (Nagel et al. 2019, "Data-free quantization",
equalizes pairs of layers by their weights; Xiao et al. 2023, "SmoothQuant", has the power of the activations' ranges.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from qdeploy.ptq.graph import FloatGraph, run, session
from qdeploy.qdq import attributes

LINEAR = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Dropout", "Flatten")
POWERS = np.linspace(0, 1, 9)  # s_c = (greatest range / range of c)^power
HEADROOM = 2.0  # a channel stays below a Clip's cut so many times: other images have larger values
LEAST = 1e-3  # part of the greatest range that a channel counts at least


@dataclass
class Stream:
    """Values with the same channels on axis 1, the layers that write and read them, and what Clips cut them at."""

    values: list[str] = field(default_factory=list)
    writers: list[NodeProto] = field(default_factory=list)
    readers: list[NodeProto] = field(default_factory=list)
    caps: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """Of one value: least and greatest of each channel, 0 among them, and mean squares; float64 [C]."""

    low: np.ndarray
    high: np.ndarray
    square: np.ndarray


def balance(
    graph: FloatGraph, images: np.ndarray, quantized: Sequence[str], weight_bits: int, activation_bits: int
) -> int:
    """Rescale the channels of every stream in place so that the expected rounding errors are least.

    `quantized` are the activations that get quantizers; weights have a scale for each output channel. Where a Clip
    cuts, a channel is raised no further than to the cut over HEADROOM. Returns the streams changed.
    """
    streams = find_streams(graph)
    seen = _observe(graph, images, sorted({value for stream in streams for value in stream.values}))
    levels = float((1 << activation_bits) - 1), float((1 << (weight_bits - 1)) - 1)
    changed = 0
    for stream in streams:
        rounded = [value for value in stream.values if value in quantized]
        factors = _best_factors(graph, stream, rounded, seen, levels) if rounded else np.ones(1)
        if np.ptp(factors) > 0:
            _rescale(graph, stream, factors.astype(np.float32))
            changed += 1
    return changed


def find_streams(graph: FloatGraph) -> list[Stream]:
    """All streams of which every writer and reader is a layer that can take factors."""
    if any(attribute.HasField("g") or attribute.graphs for node in graph.nodes for attribute in node.attribute):
        return []  # graphs inside nodes read values unseen
    parent = {value: value for value in graph.floats}
    found = {value: Stream([value]) for value in graph.floats}
    fixed = {graph.input, *graph.output_names}
    for node in graph.nodes:
        values, out = [name for name in node.input if name in graph.floats], node.output[0]
        if _takes_factors(graph, node):
            found[values[0]].readers.append(node)
            found[out].writers.append(node)
        elif _joins(graph, node, values):
            if node.op_type == "Clip":
                found[out].caps[out] = float(graph.arrays[node.input[2]].reshape(()))
            for value in values:
                parent[_root(parent, value)] = _root(parent, out)
        else:
            fixed |= {*values, *node.output}
    blocked = {_root(parent, value) for value in fixed if value in parent}
    merged: dict[str, Stream] = {}
    for value, part in found.items():
        if (root := _root(parent, value)) not in blocked:
            whole = merged.setdefault(root, Stream())
            whole.values += part.values
            whole.writers += part.writers
            whole.readers += part.readers
            whole.caps |= part.caps
    return [stream for stream in merged.values() if stream.writers and stream.readers]


def _root(parent: dict[str, str], value: str) -> str:
    while parent[value] != value:
        value = parent[value]
    return value


def _takes_factors(graph: FloatGraph, node: NodeProto) -> bool:
    """True for a convolution, dense or depthwise, and for a Gemm, with stored weight and bias."""
    if node.domain or node.op_type not in ("Conv", "Gemm") or len(node.input) != 3:  # noqa: PLR2004
        return False
    if any(name not in graph.arrays for name in node.input[1:]) or node.output[0] not in graph.floats:
        return False
    shape = graph.floats.get(node.input[0], ())
    return len(shape) > 1 and _groups(node) in (1, shape[1]) and not attributes(node).get("transA", 0)


def _joins(graph: FloatGraph, node: NodeProto, values: list[str]) -> bool:
    """True when the outputs' channels are the inputs', multiplied by the same factors."""
    if node.domain or len(node.output) != 1 or node.output[0] not in graph.floats or not values:
        return False
    shapes = [graph.floats[name] for name in (*values, node.output[0])]
    if any(len(shape) < 2 or shape[1] != shapes[0][1] for shape in shapes):  # noqa: PLR2004
        return False
    if node.op_type == "Add":
        return len(values) == len(node.input) and all(shape == shapes[0] for shape in shapes)
    if node.op_type == "Clip":
        low, high = ([*node.input, "", ""][i] for i in (1, 2))
        return low in graph.arrays and high in graph.arrays and not graph.arrays[low].any()
    whole = node.op_type != "Flatten" or all(size == 1 for size in shapes[0][2:])
    return node.op_type in LINEAR and whole


def _groups(node: NodeProto) -> int:
    return int(attributes(node).get("group", 1))


def _observe(graph: FloatGraph, images: np.ndarray, values: list[str]) -> dict[str, _Seen]:
    """Ranges and mean squares of the channels of `values`."""
    low, high, square = ({value: np.zeros(graph.floats[value][1]) for value in values} for _ in range(3))
    for row in run(session(graph.model(values)), images, values) if values else ():
        for value, array in zip(values, row, strict=True):
            flat = array.reshape(array.shape[1], -1)
            low[value] = np.minimum(low[value], flat.min(1))
            high[value] = np.maximum(high[value], flat.max(1))
            square[value] += np.einsum("cn,cn->c", flat, flat) / flat.shape[1] / len(images)
    return {value: _Seen(low[value], high[value], square[value]) for value in values}


def _best_factors(
    graph: FloatGraph, stream: Stream, rounded: list[str], seen: dict[str, _Seen], levels: tuple[float, float]
) -> np.ndarray:
    """float64 [C]: the factors of least error among POWERS."""
    widths = np.max([seen[value].high - seen[value].low for value in rounded], 0)
    top = float(widths.max())
    if not 0 < top < np.inf:
        return np.ones(len(widths))
    limit = np.full(len(widths), np.inf)
    for value, cap in stream.caps.items():
        limit = np.minimum(limit, np.maximum(1, cap / HEADROOM / np.maximum(seen[value].high, LEAST * top)))
    tried = [np.minimum((top / np.maximum(widths, LEAST * top)) ** power, limit) for power in POWERS]
    errors = [_expected_error(graph, stream, rounded, seen, levels, factors) for factors in tried]
    return tried[int(np.argmin(errors))]


def _expected_error(  # noqa: PLR0913, PLR0917
    graph: FloatGraph, stream: Stream, rounded: list[str], seen: dict[str, _Seen], levels: tuple[float, float],
    factors: np.ndarray,
) -> float:  # fmt: skip
    """Errors of the readers' outputs over the outputs' squares, if all roundings are uniform and independent.

    A step d makes an error of d^2 / 12: of the activations, d is (greatest - least) / levels[0]; of a row of weights,
    its greatest magnitude / levels[1]. A depthwise reader's scales follow the factors.
    """
    total = 0.0
    for node in stream.readers:
        square, taps = seen[node.input[0]].square, _taps(graph, node)
        energy = (taps**2).sum((0, 2))
        error = 0.0
        for value in rounded:
            step = ((seen[value].high * factors).max() - (seen[value].low * factors).min()) / levels[0]
            error += float((energy / factors**2).sum()) * step**2 / 12
        if _groups(node) == 1:
            steps = np.abs(taps / factors[None, :, None]).max((1, 2)) / levels[1]
            error += float((steps**2).sum()) / 12 * float((square * factors**2).sum()) * taps.shape[2]
        total += error / max(float((energy * square).sum()), 1e-30)
    return total


def _taps(graph: FloatGraph, node: NodeProto) -> np.ndarray:
    """float64 [O, C, k]: a reader's weights by input channel; of a depthwise one [1, C, k]."""
    weight = graph.arrays[node.input[1]].astype(np.float64)
    if node.op_type == "Gemm":
        return (weight if attributes(node).get("transB", 0) else weight.T)[:, :, None]
    groups = _groups(node)
    return weight.reshape(1, groups, -1) if groups > 1 else weight.reshape(*weight.shape[:2], -1)


def _rescale(graph: FloatGraph, stream: Stream, factors: np.ndarray) -> None:
    """Multiply the rows and biases of the writers, divide the columns of the readers; in place."""

    def along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
        return values.reshape([-1 if i == axis else 1 for i in range(rank)])

    for node in stream.writers:
        weight, bias = (graph.arrays[name] for name in node.input[1:])
        axis = 1 if node.op_type == "Gemm" and not attributes(node).get("transB", 0) else 0
        graph.arrays[node.input[1]] = weight * along(factors, axis, weight.ndim)
        graph.arrays[node.input[2]] = bias * factors
    for node in stream.readers:
        weight = graph.arrays[node.input[1]]
        if _groups(node) > 1:
            by_row = along(np.repeat(factors, len(weight) // len(factors)), 0, weight.ndim)
        else:
            axis = 0 if node.op_type == "Gemm" and not attributes(node).get("transB", 0) else 1
            by_row = along(factors, axis, weight.ndim)
        graph.arrays[node.input[1]] = weight / by_row
