"""Pools over H and W, and softmax over channels."""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from qdeploy.compile.graph import Op, Window
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Refused, pool_window
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
    reader.put_moved(node, Op("max_pool", "", (view.operand,), "", window), (channels, *size), (1, channels, *size))


def global_max_pool(reader: Reader, node: NodeProto) -> None:
    """A MaxPool over the whole image."""
    view, (channels, height, width) = reader.image(node)
    window = Window((height, width))
    reader.put_moved(node, Op("max_pool", "", (view.operand,), "", window), (channels, 1, 1), (1, channels, 1, 1))


def average_pool(reader: Reader, node: NodeProto) -> None:
    """AveragePool with and without its padding in the divisor."""
    view, (channels, height, width) = reader.image(node)
    a = attributes(node)
    window, ceil = pool_window(a, (height, width))
    if window.dilation != (1, 1):
        raise Refused("dilations are not supported")
    size = window.output(height, width, ceil)
    if ceil and a.get("count_include_pad", 0) and size != window.output(height, width):
        raise Refused("ceil_mode with count_include_pad is not supported")
    if min(size) < 1:
        raise Refused(f"its window does not fit into {height} x {width}")
    op = Op("average_pool", "", (view.operand,), "", window, count_padding=bool(a.get("count_include_pad", 0)))
    reader.put(node, op, (channels, *size), (1, channels, *size))


def global_average_pool(reader: Reader, node: NodeProto) -> None:
    """The mean over H and W."""
    _mean(reader, node, True)


def reduce_mean(reader: Reader, node: NodeProto) -> None:
    """ReduceMean over all axes behind channels, which are kept or not."""
    axes = reader.numbers(node, "axes", 1)
    rank = len(reader.view(node.input[0]).dims)
    if axes is None or rank < 3 or sorted(axis % rank for axis in axes) != list(range(2, rank)):
        raise Refused("only the mean over H and W (axes 2 and 3) is supported")
    _mean(reader, node, bool(attributes(node).get("keepdims", 1)))


def _mean(reader: Reader, node: NodeProto, keep: bool) -> None:
    view = reader.shaped(reader.view(node.input[0]))
    if len(view.dims) not in (3, 4) or view.dims[0] != 1:
        raise Refused(f"its input {list(view.dims)} is not [1, C, H, W]")
    channels, height, width = reader.shape_of(view)
    op = Op("mean", "", (view.operand,), "", Window((height, width)))
    kept = (1,) * (len(view.dims) - 2) if keep else ()
    reader.put(node, op, (channels, 1, 1), (1, channels, *kept))


def softmax(reader: Reader, node: NodeProto) -> None:
    """Softmax over channels; quantized, or in float32 as the network's output."""
    view = reader.view(node.input[0])
    rank = len(view.dims)
    axis = int(attributes(node).get("axis", -1 if reader.opset >= 13 else 1))
    rest = prod(view.dims[2:])  # older ones are over all axes from `axis` on
    if rank < 2 or view.dims[0] != 1 or axis % rank != 1 or (reader.opset < 13 and rest > 1):
        raise Refused("only the softmax over channels (axis 1) is supported")
    if reader.shape_of(view)[0] != view.dims[1]:
        view = reader.shaped(view)
    if reader.shape_of(view)[0] != view.dims[1]:
        raise Refused(f"its input {list(view.dims)} has more axes than [1, C, H, W]")
    reader.put(node, Op("softmax", "", (view.operand,), ""), reader.shape_of(view), view.dims)
