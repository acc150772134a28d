"""Conv, Gemm and MatMul: weights and bias behind DequantizeLinear."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from qdeploy.compile.graph import Op, Weights, Window
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Refused, Stored, window_of
from qdeploy.qdq import attributes


def conv(reader: Reader, node: NodeProto) -> None:
    """Conv over H and W, grouped and dilated ones included."""
    view, (channels, height, width) = reader.image(node)
    a, found = attributes(node), weights(reader, node, 0)
    shape = reader.arrays[found.weight].shape
    if len(shape) != 4:
        raise Refused(f"its weight has {len(shape)} axes: only convolutions over H, W are supported")
    groups = int(a.get("group", 1))
    if groups < 1 or shape[1] * groups != channels or shape[0] % groups:
        raise Refused(f"weight {list(shape)} in {groups} groups does not fit {channels} channels")
    window = window_of(a, (shape[2], shape[3]), (height, width))
    size = window.output(height, width)
    if min(size) < 1:
        raise Refused(f"its window does not fit into {height} x {width}")
    reader.put(node, Op("conv", "", (view.operand,), "", window, groups, found), (shape[0], *size), False)


def gemm(reader: Reader, node: NodeProto) -> None:
    """Gemm of an activation and a stored matrix."""
    a = attributes(node)
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
        raise Refused("only alpha = beta = 1 and transA = 0 are supported")
    _linear(reader, node, 0 if a.get("transB", 0) else 1)


def matmul(reader: Reader, node: NodeProto) -> None:
    """MatMul of an activation and a stored matrix."""
    _linear(reader, node, 1)


def _linear(reader: Reader, node: NodeProto, axis: int) -> None:
    view = reader.view(node.input[0])
    found = weights(reader, node, axis)
    shape = reader.arrays[found.weight].shape
    source = reader.tensors[view.operand.tensor].shape
    if not view.flat or len(shape) != 2 or shape[1 - axis] != int(np.prod(source)):
        raise Refused(f"weight {list(shape)} does not fit an input of {[1, *source]}: flatten it to [1, N]")
    window = Window((source[1], source[2]))
    reader.put(node, Op("conv", "", (view.operand,), "", window, 1, found), (found.channels, 1, 1), True)


def weights(reader: Reader, node: NodeProto, axis: int) -> Weights:
    """Weight and bias of Conv (axis 0), Gemm or MatMul (axis of its output channels)."""
    stored = reader.values.get(node.input[1])
    if not isinstance(stored, Stored):
        raise Refused(f"weight {node.input[1]} is not an initializer behind DequantizeLinear")
    if stored.real:
        weight = reader.real(stored.codes, "weight")
    else:
        weight = reader.param(stored.codes, (np.int8, np.uint8), "weight")
    shape = reader.arrays[weight].shape
    if len(shape) not in (2, 4):
        raise Refused(f"weight {weight} has {len(shape)} axes")
    channels = shape[axis]
    _per_channel(reader, stored, len(shape), axis, channels, (np.int8, np.uint8))
    kind = reader.arrays[weight].dtype
    if stored.real:  # ONNX's default is uint8
        kind = np.dtype(np.uint8) if stored.zero_point is None else reader.arrays[stored.zero_point].dtype
    if stored.zero_point is not None and reader.arrays[stored.zero_point].dtype != kind:
        raise Refused(f"zero point {stored.zero_point} is not of its weight's type")
    bias = _bias(reader, node, channels)
    return Weights(weight, kind == np.int8, stored.scale, stored.zero_point, *bias, channels, axis == 1)


def _bias(reader: Reader, node: NodeProto, channels: int) -> tuple[str | None, str | None, str | None]:
    """Names of a bias' codes, scale and zero point; a float32 one has no scale."""
    if len(node.input) < 3 or not node.input[2]:
        return None, None, None
    bias = reader.values.get(node.input[2])
    if isinstance(bias, Stored) and not bias.real:
        name = reader.param(bias.codes, (np.int32,), "bias")
        _per_channel(reader, bias, 1, 0, channels, (np.int32,))
    elif node.input[2] in reader.arrays:
        bias, name = None, reader.real(node.input[2], "bias")
    else:
        raise Refused(f"bias {node.input[2]} is neither int32 behind DequantizeLinear nor float32")
    if reader.arrays[name].shape != (channels,):
        raise Refused(f"bias {name} has shape {list(reader.arrays[name].shape)}, not [{channels}]")
    return name, bias.scale if bias else None, bias.zero_point if bias else None


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
