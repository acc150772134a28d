"""Conv, ConvTranspose, Gemm and MatMul: weights and bias behind DequantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from onnx import NodeProto

from qdeploy.compile.graph import ANY_CODE, Op, Operand, Pair, Shuffle, Tensor, Weights, Window
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Refused, Result, Stored, View, window_of
from qdeploy.qdq import attributes

FEW = 16  # different weight codes: 4 bits tell them apart


def conv(reader: Reader, node: NodeProto) -> None:
    """Conv over H and W or over L, grouped and dilated ones included."""
    view, a = _input(reader, node)
    found = weights(reader, node, 0, "conv")
    channels, height, width = reader.shape_of(view)
    shape = reader.arrays[found.weight].shape
    if len(shape) != len(view.dims):
        raise Refused(f"its weight has {len(shape)} axes, its input {len(view.dims)}")
    groups = int(a.get("group", 1))
    if groups < 1 or shape[1] * groups != channels or shape[0] % groups:
        raise Refused(f"weight {list(shape)} in {groups} groups does not fit {channels} channels")
    window = window_of(a, _pair(shape[2:], 1), (height, width))
    size = window.output(height, width)
    if min(size) < 1:
        raise Refused(f"its window does not fit into {height} x {width}")
    op = Op("conv", "", (view.operand,), "", window, groups, found)
    reader.put(node, op, (shape[0], *size), (1, shape[0], *size[4 - len(shape) :]))


def conv_transpose(reader: Reader, node: NodeProto) -> None:
    """ConvTranspose: a convolution of the input with zero points between its pixels."""
    view, a = _input(reader, node)
    groups = int(a.get("group", 1))
    found = weights(reader, node, 1, "transposed conv", groups)
    channels, height, width = reader.shape_of(view)
    shape = reader.arrays[found.weight].shape
    if len(shape) != len(view.dims) or groups < 1 or shape[0] != channels or channels % groups:
        raise Refused(f"weight {list(shape)} in {groups} groups does not fit an input of {list(view.dims)}")
    kernel = _pair(shape[2:], 1)
    extra = a.pop("output_padding", None) or [0] * (len(shape) - 2)
    if a.pop("output_shape", None) or a.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise Refused("output_shape and auto_pad are not supported: export it with pads")
    forward = window_of(a, kernel, (height, width))
    (sh, sw), (dh, dw), (top, left, bottom, right) = forward.stride, forward.dilation, forward.padding
    below, behind = _pair(extra, 0)
    reach = ((kernel[0] - 1) * dh, (kernel[1] - 1) * dw)
    sides = (reach[0] - top, reach[1] - left, reach[0] - bottom + below, reach[1] - right + behind)
    wide = (
        (height - 1) * sh + 1 + sides[0] + sides[2],
        (width - 1) * sw + 1 + sides[1] + sides[3],
    )
    size = (wide[0] - reach[0], wide[1] - reach[1])
    if min(size) < 1:
        raise Refused(f"its padding leaves nothing of {height} x {width}")
    name = f"{node.output[0]}.spread"
    spread = Op("insert", name, (view.operand,), name, Window((1, 1), (sh, sw), sides))
    reader.emit(spread, Tensor(name, (channels, *wide), view.operand.grid))
    window = Window(kernel, dilation=(dh, dw))
    op = Op("conv", "", (Operand(name, view.operand.grid),), "", window, groups, found)
    reader.put(node, op, (found.channels, *size), (1, found.channels, *size[4 - len(shape) :]))


def _input(reader: Reader, node: NodeProto) -> tuple[View, dict[str, Any]]:
    """The first input as a tensor [C, H, W], and the attributes for it; L is W."""
    view, a = reader.view(node.input[0]), attributes(node)
    if len(view.dims) not in (3, 4) or view.dims[0] != 1:
        raise Refused(f"its input {list(view.dims)} is not [1, C, H, W] or [1, C, L]")
    if len(view.dims) == 3:
        for name, neutral in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("output_padding", 0)):
            if len(a.get(name, ())) == 1:
                a[name] = [neutral, *a[name]]
        if len(a.get("pads", ())) == 2:
            a["pads"] = [0, a["pads"][0], 0, a["pads"][1]]
    return reader.shaped(view), a


def _pair(sizes: Sequence[int], neutral: int) -> Pair:
    """Sizes over H and W of sizes over H and W or over L."""
    height, width = (neutral, *sizes)[-2:]
    return int(height), int(width)


def gemm(reader: Reader, node: NodeProto) -> None:
    """Gemm of an activation and a stored matrix."""
    a = attributes(node)
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
        raise Refused("only alpha = beta = 1 and transA = 0 are supported")
    _linear(reader, node, bool(a.get("transB", 0)))


def matmul(reader: Reader, node: NodeProto) -> None:
    """MatMul of an activation and a stored matrix."""
    _linear(reader, node, False)


def _linear(reader: Reader, node: NodeProto, transposed: bool) -> None:
    view, stored = reader.view(node.input[0]), reader.values.get(node.input[1])
    turned = isinstance(stored, Stored) and stored.turned
    by_channel = transposed != turned  # the file has [O, K]
    found = weights(reader, node, 0 if by_channel else 1, "conv" if by_channel else "matmul")
    shape, source = reader.arrays[found.weight].shape, reader.shape_of(view)
    if len(shape) != 2 or view.dims[-1] != shape[1 if by_channel else 0]:
        raise Refused(f"weight {list(shape)} does not fit an input of {list(view.dims)}")
    if prod(view.dims[:-1]) == 1:
        window = Window((source[1], source[2]))
        op = Op("conv", "", (view.operand,), "", window, 1, found)
        reader.put(node, op, (found.channels, 1, 1), (*view.dims[:-1], found.channels))
        return
    rows, depth = prod(view.dims[:-1]), view.dims[-1]
    name = f"{view.operand.tensor}.columns.{depth}"
    columns = reader.shuffled(view, Shuffle((depth, rows), (1, depth)), (1, depth, rows), name)
    op = Op("conv", "", (columns.operand,), "", Window((1, 1)), 1, found)
    back = Shuffle((rows, found.channels), (1, rows))
    reader.put(node, op, (found.channels, 1, rows), (*view.dims[:-1], found.channels), back)


def weights(reader: Reader, node: NodeProto, axis: int, order: str, groups: int = 1) -> Weights:
    """Weight and bias of a layer whose weight has its output channels (of each group) along `axis`."""
    stored = reader.values.get(node.input[1])
    if not isinstance(stored, Stored):
        raise Refused(f"weight {node.input[1]} is not an initializer behind DequantizeLinear")
    if stored.real:
        weight = reader.real(stored.codes, "weight")
    else:
        weight = reader.param(stored.codes, (np.int8, np.uint8), "weight")
    shape = reader.arrays[weight].shape
    if len(shape) not in (2, 3, 4):
        raise Refused(f"weight {weight} has {len(shape)} axes")
    channels = shape[axis] * groups
    _per_channel(reader, stored, len(shape), axis, channels, (np.int8, np.uint8))
    kind = reader.arrays[weight].dtype
    if stored.real:  # ONNX's default is uint8
        kind = np.dtype(np.uint8) if stored.zero_point is None else reader.arrays[stored.zero_point].dtype
    if stored.zero_point is not None and reader.arrays[stored.zero_point].dtype != kind:
        raise Refused(f"zero point {stored.zero_point} is not of its weight's type")
    bias = _bias(reader, node.input[2] if len(node.input) > 2 else "", channels)
    if bias[0] is not None and reader.arrays[bias[0]].shape[-1:] != (channels,):  # Gemm's may be one number a row
        raise Refused(f"bias {bias[0]} {list(reader.arrays[bias[0]].shape)} is not one number an output channel")
    clips, codes = _clips(reader, stored), reader.arrays[weight]
    reach = int(np.abs(codes.astype(np.int16)).max(initial=0)) if codes.dtype == np.int8 else ANY_CODE
    few = not stored.real and np.unique(codes).size <= FEW
    return Weights(
        weight, kind == np.int8, stored.scale, stored.zero_point, *bias, channels, order, *clips, reach, stored.real,
        few,
    )  # fmt: skip


def _clips(reader: Reader, stored: Stored) -> tuple[str | None, str | None]:
    """Names of the bounds of a Clip behind stored codes; none where it changes nothing.

    Codes that a Clip reads, and its bounds, are the same at every level, but for those behind a QuantizeLinear.
    """
    bounds = (stored.clip_min, stored.clip_max)
    if not stored.real:
        low, high = (None if name is None else reader.arrays[name].reshape(()) for name in bounds)
        codes = reader.arrays[stored.codes]
        if not ((low is not None and (codes < low).any()) or (high is not None and (codes > high).any())):
            return None, None
    return bounds


def _bias(reader: Reader, name: str, channels: int) -> tuple[str | None, str | None, str | None]:
    """Names of a bias' codes, scale and zero point; a float32 one has no scale."""
    if not name:
        return None, None, None
    bias = reader.values.get(name)
    if isinstance(bias, Stored) and not bias.real:
        stored = reader.param(bias.codes, (np.int32,), "bias")
        _per_channel(reader, bias, 1, 0, channels, (np.int32,))
    elif name in reader.arrays:
        bias, stored = None, reader.real(name, "bias")
    else:
        raise Refused(f"bias {name} is neither int32 behind DequantizeLinear nor float32")
    if reader.arrays[stored].size != channels:
        raise Refused(f"bias {stored} has shape {list(reader.arrays[stored].shape)}, not [{channels}]")
    return stored, bias.scale if bias else None, bias.zero_point if bias else None


def add_bias(reader: Reader, node: NodeProto) -> bool:
    """An Add behind a layer without bias that is one: a stored number for each output channel."""
    for name, other in (node.input, node.input[::-1]):
        value = reader.values.get(name)
        if not isinstance(value, Result) or value.op.weights is None or value.op.weights.bias is not None:
            continue
        stored = reader.values.get(other)
        codes = stored.codes if isinstance(stored, Stored) else other
        if codes not in reader.arrays or (value.low, value.high) != (None, None):
            continue
        weights, dims = value.op.weights, value.dims
        last = value.moved is not None or value.shape[1:] == (1, 1)
        axis = len(dims) - 1 if last else 1
        shape = reader.arrays[codes].shape
        aligned = (1,) * (len(dims) - len(shape)) + shape
        if aligned != tuple(n if i == axis else 1 for i, n in enumerate(dims)) or dims[axis] != weights.channels:
            continue
        if not last and dims[0] != 1:  # a Reshape has put the channels elsewhere
            continue
        bias, scale, zero = _bias(reader, other, weights.channels)
        op = replace(value.op, weights=replace(weights, bias=bias, bias_scale=scale, bias_zero_point=zero))
        reader.values[node.output[0]] = replace(value, op=op)
        return True
    return False


def _per_channel(reader: Reader, stored: Stored, rank: int, axis: int, channels: int, dtypes: tuple[type, ...]) -> None:
    """Scale and zero point of a stored tensor: one value, or one a channel along `axis`."""
    names: list[tuple[str, tuple[type, ...], str]] = [(stored.scale, (np.float32,), "scale")]
    if stored.zero_point is not None:
        names.append((stored.zero_point, dtypes, "zero point"))
    for name, kinds, what in names:
        reader.param(name, kinds, what)
        size = reader.arrays[name].size
        if size != 1 and (reader.arrays[name].shape != (channels,) or stored.axis % rank != axis):
            raise Refused(f"{what} {name} is neither one value nor one for each of {channels} output channels")
