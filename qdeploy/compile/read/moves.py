"""Operators that copy an activation's codes in another order: Transpose, Slice, Split, Gather, depth to space."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import NodeProto

from qdeploy.compile.graph import Shuffle
from qdeploy.compile.read.reader import Reader
from qdeploy.compile.read.values import Dims, Refused, Stored, View
from qdeploy.qdq import attributes


def _steps(dims: Sequence[int]) -> list[int]:
    """Elements from one place of each axis to the next."""
    return [prod(dims[i + 1 :]) for i in range(len(dims))]


def _put(
    reader: Reader, node: NodeProto, view: View, shuffle: Shuffle, dims: Dims, output: int = 0
) -> None:  # fmt: skip
    """Output `output` of the node: the input's elements as `shuffle` takes them, seen as `dims`."""
    name = node.output[output]
    reader.values[name] = reader.shuffled(view, shuffle, dims, f"{name}.moved")


def transpose(reader: Reader, node: NodeProto) -> None:
    """Any permutation of axes; of a stored matrix another way to read it."""
    stored = reader.values.get(node.input[0])
    if isinstance(stored, Stored):
        if len(reader.types[node.input[0]].shape) != 2 or attributes(node).get("perm", [1, 0]) != [1, 0]:
            raise Refused("its input is neither an activation nor a stored matrix")
        turned = Stored(**{**vars(stored), "turned": not stored.turned})
        reader.values[node.output[0]] = turned
        return
    view = reader.view(node.input[0])
    rank = len(view.dims)
    perm = [int(axis) for axis in attributes(node).get("perm", range(rank)[::-1])]
    if sorted(perm) != list(range(rank)):
        raise Refused(f"perm {perm} is no permutation of {rank} axes")
    dims = tuple(view.dims[axis] for axis in perm)
    steps = _steps(view.dims)
    if [axis for axis in perm if view.dims[axis] > 1] == [axis for axis in range(rank) if view.dims[axis] > 1]:
        reader.values[node.output[0]] = View(view.operand, dims)  # only axes of size 1 go elsewhere
        return
    _put(reader, node, view, Shuffle(dims, tuple(steps[axis] for axis in perm)), dims)


def slice_(reader: Reader, node: NodeProto) -> None:
    """Slice by stored bounds, steps of either sign included."""
    view = reader.view(node.input[0])
    rank = len(view.dims)
    starts, ends = reader.numbers(node, "starts", 1), reader.numbers(node, "ends", 2)
    axes = reader.numbers(node, "axes", 3)
    by = reader.numbers(node, "steps", 4)
    if starts is None or ends is None:
        raise Refused("its bounds are not stored in the file")
    axes = list(range(len(starts))) if axes is None else axes
    by = [1] * len(starts) if by is None else by
    if not len(starts) == len(ends) == len(axes) == len(by) or any(not -rank <= axis < rank for axis in axes):
        raise Refused(f"its axes {axes} do not fit {list(view.dims)}")
    if 0 in by:
        raise Refused("its step is 0")
    ranges = [range(n) for n in view.dims]
    for start, end, axis, step in zip(starts, ends, axes, by, strict=True):
        ranges[axis] = range(view.dims[axis])[slice(start, end, step)]
    _cut(reader, node, view, ranges)


def _cut(reader: Reader, node: NodeProto, view: View, ranges: Sequence[range], output: int = 0) -> None:
    """The elements at `ranges` of every axis."""
    dims = tuple(len(places) for places in ranges)
    if min(dims) < 1:
        raise Refused(f"its output {list(dims)} is empty")
    steps = _steps(view.dims)
    offset = sum(places[0] * step for places, step in zip(ranges, steps, strict=True))
    taken = [places.step * step for places, step in zip(ranges, steps, strict=True)]
    if dims == view.dims and taken == steps:
        reader.values[node.output[output]] = view
        return
    _put(reader, node, view, Shuffle(dims, tuple(taken), offset), dims, output)


def split(reader: Reader, node: NodeProto) -> None:
    """Split along an axis, into stored or equal sizes."""
    view, a = reader.view(node.input[0]), attributes(node)
    rank, axis, parts = len(view.dims), int(a.get("axis", 0)), len(node.output)
    if not -rank <= axis < rank:
        raise Refused(f"axis {axis} is none of {list(view.dims)}")
    length = view.dims[axis]
    sizes = reader.numbers(node, "split", 1)
    if sizes is None:
        each = -(-length // parts)
        sizes = [min(each, length - i * each) for i in range(parts)]
    if len(sizes) != parts or sum(sizes) != length or min(sizes) < 1:
        raise Refused(f"its parts {sizes} are not {length}")
    start = 0
    for output, size in enumerate(sizes):
        ranges = [range(n) for n in view.dims]
        ranges[axis] = range(start, start + size)
        start += size
        if node.output[output]:
            _cut(reader, node, view, ranges, output)


def gather(reader: Reader, node: NodeProto) -> None:
    """Gather of one stored place, or of places at equal distances."""
    view = reader.view(node.input[0])
    rank, axis = len(view.dims), int(attributes(node).get("axis", 0))
    stored = reader.arrays.get(node.input[1])
    if stored is None or stored.ndim > 1 or stored.size < 1 or not -rank <= axis < rank:
        raise Refused("its indices are not stored in the file, or have several axes")
    length = view.dims[axis]
    places = [int(i) + (length if i < 0 else 0) for i in stored.reshape(-1)]
    step = places[1] - places[0] if len(places) > 1 else 1
    if step == 0 or any(b - a != step for a, b in zip(places, places[1:], strict=False)):
        raise Refused("its indices are not at equal distances")
    if min(places) < 0 or max(places) >= length:
        raise Refused(f"its indices {places} are outside {length}")
    ranges = [range(n) for n in view.dims]
    ranges[axis] = range(places[0], places[-1] + (1 if step > 0 else -1), step)
    _cut(reader, node, view, ranges)
    if stored.ndim == 0:
        value = reader.view(node.output[0])
        dims = tuple(n for i, n in enumerate(value.dims) if i != axis % rank)
        reader.values[node.output[0]] = View(value.operand, dims)


def depth_to_space(reader: Reader, node: NodeProto) -> None:
    """Blocks of channels become pixels; both modes."""
    view, (channels, height, width) = reader.image(node)
    a = attributes(node)
    b = int(a.get("blocksize", 1))
    if b < 1 or channels % (b * b):
        raise Refused(f"{channels} channels are no blocks of {b} x {b}")
    depth, area = channels // (b * b), height * width
    down, across, each = b * area, area, b * b * area
    if a.get("mode", b"DCR") == b"DCR":
        down, across, each = depth * b * area, depth * area, area
    shuffle = Shuffle((depth, height, b, width, b), (each, width, down, 1, across))
    _put(reader, node, view, shuffle, (1, depth, height * b, width * b))


def space_to_depth(reader: Reader, node: NodeProto) -> None:
    """Blocks of pixels become channels."""
    view, (channels, height, width) = reader.image(node)
    b = int(attributes(node).get("blocksize", 1))
    if b < 1 or height % b or width % b:
        raise Refused(f"{height} x {width} is no multiple of {b}")
    shuffle = Shuffle((b, b, channels, height // b, width // b), (width, 1, height * width, b * width, b))
    _put(reader, node, view, shuffle, (1, channels * b * b, height // b, width // b))
