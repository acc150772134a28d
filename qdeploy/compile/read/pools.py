"""Pools over H and W, and softmax over channels."""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from qdeploy.compile.graph import Op, Window
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Refused, Result, pool_window
from qdeploy.qdq import attributes


def max_pool(reader: Reader, node: NodeProto) -> None:
    """Moves codes."""
    view, (channels, height, width) = reader.image(node)
    if len(node.output) > 1:
        raise Refused("its second output is not supported")
    window, ceil = pool_window(attributes(node), (height, width))
    size = window.output(height, width, ceil)
    if min(size) < 1:
        raise Refused(f"its window does not fit into {height} x {width}")
    reader.put_moved(node, Op("max_pool", "", (view.operand,), "", window), (channels, *size), False)


def global_max_pool(reader: Reader, node: NodeProto) -> None:
    """A MaxPool over the whole image."""
    view, (channels, height, width) = reader.image(node)
    window = Window((height, width))
    reader.put_moved(node, Op("max_pool", "", (view.operand,), "", window), (channels, 1, 1), False)


def average_pool(reader: Reader, node: NodeProto) -> None:
    """AveragePool with and without its padding in the divisor."""
    view, (channels, height, width) = reader.image(node)
    a = attributes(node)
    window, ceil = pool_window(a, (height, width))
    if ceil or window.dilation != (1, 1):
        raise Refused("ceil_mode and dilations are not supported")
    size = window.output(height, width)
    if min(size) < 1:
        raise Refused(f"its window does not fit into {height} x {width}")
    op = Op("average_pool", "", (view.operand,), "", window, count_padding=bool(a.get("count_include_pad", 0)))
    reader.put(node, op, (channels, *size), False)


def global_average_pool(reader: Reader, node: NodeProto) -> None:
    """The mean over H and W."""
    view, (channels, height, width) = reader.image(node)
    op = Op("average_pool", "", (view.operand,), "", Window((height, width)))
    reader.put(node, op, (channels, 1, 1), False)


def reduce_mean(reader: Reader, node: NodeProto) -> None:
    """ReduceMean over H and W, whose axes are kept or not."""
    axes = reader.numbers(node, "axes", 1)
    if axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise Refused("only the mean over H and W (axes 2 and 3) is supported")
    global_average_pool(reader, node)
    result = reader.values[node.output[0]]
    if not attributes(node).get("keepdims", 1) and isinstance(result, Result):
        reader.values[node.output[0]] = replace(result, flat=True)


def softmax(reader: Reader, node: NodeProto) -> None:
    """Softmax over channels; quantized, or in float32 as the network's output."""
    view = reader.view(node.input[0])
    channels, height, width = shape = reader.shape_of(view)
    axis = int(attributes(node).get("axis", -1 if reader.opset >= 13 else 1))
    last = (height, width) == (1, 1) and axis in (1, -1)
    if not (view.flat and last or not view.flat and axis in (1, -3) and reader.opset >= 13):
        raise Refused("only the softmax over channels (axis 1) is supported")
    reader.put(node, Op("softmax", "", (view.operand,), ""), shape, view.flat)
