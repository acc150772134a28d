"""What only renames axes, concatenation, padding, nearest resize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
from onnx import NodeProto

from qdeploy.compile.graph import Op, Window
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Refused, Result, View, three
from qdeploy.qdq import attributes


def _activation(reader: Reader, node: NodeProto) -> View | Result:
    """The first input."""
    value = reader.values.get(node.input[0])
    if not isinstance(value, View | Result):
        raise Refused("its input is not an activation")
    return value


def _renamed(reader: Reader, node: NodeProto, dims: Sequence[int]) -> None:
    """The first input seen as `dims`: no code moves until an operator needs it in a tensor of that shape."""
    reader.values[node.output[0]] = replace(_activation(reader, node), dims=tuple(dims))


def flatten(reader: Reader, node: NodeProto) -> None:
    """Flatten to a matrix."""
    dims = _activation(reader, node).dims
    axis = int(attributes(node).get("axis", 1))
    if not -len(dims) <= axis <= len(dims):
        raise Refused(f"axis {axis} is none of {list(dims)}")
    axis += len(dims) if axis < 0 else 0
    _renamed(reader, node, (prod(dims[:axis]), prod(dims[axis:])))


def reshape(reader: Reader, node: NodeProto) -> None:
    """Reshape; 0 copies a size and -1 takes what is left."""
    dims = _activation(reader, node).dims
    target = reader.numbers(node, "shape", 1)
    if target is None or attributes(node).get("allowzero", 0):
        raise Refused("its shape is not stored in the file, or has allowzero")
    if (
        any(n == 0 and i >= len(dims) for i, n in enumerate(target))
        or target.count(-1) > 1
        or min(target, default=0) < -1
    ):
        raise Refused(f"its shape {target} is malformed")
    sizes = [dims[i] if n == 0 else n for i, n in enumerate(target)]
    if -1 in sizes:
        sizes[sizes.index(-1)] = prod(dims) // max(1, -prod(sizes))
    if prod(sizes) != prod(dims):
        raise Refused(f"{list(dims)} does not fit into {target}")
    _renamed(reader, node, sizes)


def squeeze(reader: Reader, node: NodeProto) -> None:
    """Squeeze of named axes."""
    dims = _activation(reader, node).dims
    axes = reader.numbers(node, "axes", 1)
    if axes is None or any(not -len(dims) <= axis < len(dims) or dims[axis] != 1 for axis in axes):
        raise Refused("only named axes of size 1 can go")
    gone = {axis % len(dims) for axis in axes}
    _renamed(reader, node, [n for i, n in enumerate(dims) if i not in gone])


def unsqueeze(reader: Reader, node: NodeProto) -> None:
    """Unsqueeze: axes of size 1."""
    dims = _activation(reader, node).dims
    axes = reader.numbers(node, "axes", 1) or []
    rank = len(dims) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(dims)
    if len(new) < len(axes):
        raise Refused(f"axes {axes} are not different ones")
    _renamed(reader, node, [1 if i in new else next(rest) for i in range(rank)])


def identity(reader: Reader, node: NodeProto) -> None:
    """Another name; Dropout of inference is nothing else."""
    source, out = node.input[0], node.output[0]
    if len(node.output) > 1:
        raise Refused("its second output is not supported")
    if source in reader.codes:
        reader.codes[out], reader.dims[out] = reader.codes[source], reader.dims[source]
    elif source in reader.quantized:
        reader.quantized[out] = reader.quantized[source]
    elif source in reader.values:
        reader.values[out] = reader.values[source]
    else:
        raise Refused("its input is not an activation")


def concat(reader: Reader, node: NodeProto) -> None:
    """Concat over channels; each part is requantized to the quantizer behind it."""
    views = [reader.view(name) for name in node.input]
    rank, axis = len(views[0].dims), int(attributes(node).get("axis", 0))
    if any(len(view.dims) != rank or view.dims[0] != 1 for view in views) or axis not in (1, 1 - rank) or rank > 4:
        raise Refused("only concatenation over channels (axis 1) is supported")
    if any(view.dims[2:] != views[0].dims[2:] for view in views):
        raise Refused(f"{', '.join(str(list(view.dims)) for view in views)} do not fit together")
    views = [reader.shaped(view) for view in views]
    channels = sum(view.dims[1] for view in views)
    dims = (1, channels, *views[0].dims[2:])
    reader.put(node, Op("concat", "", tuple(view.operand for view in views), ""), three(dims), dims)


def pad(reader: Reader, node: NodeProto) -> None:
    """Pad of H and W with the real value 0, or a crop where a pad is negative."""
    view, (channels, height, width) = reader.image(node)
    if attributes(node).get("mode", b"constant") != b"constant":
        raise Refused("only mode constant is supported")
    pads = reader.numbers(node, "pads", 1)
    if len(node.input) > 3 and node.input[3]:
        raise Refused("axes are not supported")
    if pads is None or len(pads) != 8 or any(pads[i] for i in (0, 1, 4, 5)):
        raise Refused(f"pads {pads} are not stored in the file or pad more than H and W")
    if not _is_zero(reader, node):
        raise Refused("only padding with 0 is supported")
    top, left, bottom, right = pads[2], pads[3], pads[6], pads[7]
    window = Window((1, 1), (1, 1), (top, left, bottom, right))
    shape = (channels, height + top + bottom, width + left + right)
    reader.put_moved(node, Op("move", "", (view.operand,), "", window), shape, (1, *shape))


def _is_zero(reader: Reader, node: NodeProto) -> bool:
    """True when a Pad's fill value is a stored 0, plain."""
    if len(node.input) < 3 or not node.input[2]:
        return float(attributes(node).get("value", 0.0)) == 0.0
    stored = reader.arrays.get(node.input[2])
    return stored is not None and not np.any(stored)


def resize(reader: Reader, node: NodeProto) -> None:
    """Resize by whole factors to the nearest pixel, which repeats codes."""
    view, (channels, height, width) = reader.image(node)
    a = attributes(node)
    if a.get("mode", b"nearest") != b"nearest":
        raise Refused(f"mode {a['mode'].decode()} is not supported, only nearest")
    how = (a.get("coordinate_transformation_mode", b"half_pixel"), a.get("nearest_mode", b"round_prefer_floor"))
    if how not in ((b"asymmetric", b"floor"), (b"half_pixel", b"round_prefer_floor")) or "axes" in a:
        raise Refused(f"{how[0].decode()} with {how[1].decode()} is not supported")
    if a.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise Refused(f"keep_aspect_ratio_policy {a['keep_aspect_ratio_policy'].decode()} is not supported")
    factors = _factors(reader, node, [1, channels, height, width])
    if factors is None or factors[:2] != [1.0, 1.0] or any(f < 1 or f != int(f) for f in factors[2:]):
        raise Refused(f"factors {factors} are not stored in the file or not whole numbers over H and W")
    down, across = int(factors[2]), int(factors[3])
    window = Window((1, 1), (down, across))
    shape = (channels, height * down, width * across)
    reader.put_moved(node, Op("move", "", (view.operand,), "", window), shape, (1, *shape))


def _factors(reader: Reader, node: NodeProto, dims: list[int]) -> list[float] | None:
    names = [*node.input, "", "", ""]
    if names[2]:
        stored = reader.arrays.get(names[2])
        if stored is not None and stored.size == len(dims):
            return [float(v) for v in stored.reshape(-1)]
    sizes = reader.numbers(node, "sizes", 3) if names[3] else None
    if sizes is None or len(sizes) != len(dims):
        return None
    return [size / n for size, n in zip(sizes, dims, strict=True)]
