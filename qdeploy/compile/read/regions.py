"""Operators without an integer kernel: which of them form one float region, in what order everything runs.

A region is a connected group of float operators that no path through integer operators leaves and enters again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from onnx import NodeProto, ValueInfoProto, helper, numpy_helper

from qdeploy.compile.graph import FloatTensor, Op, RealParam, Region
from qdeploy.compile.read.values import Impossible
from qdeploy.qdq import attributes

EMBEDDED = 64  # elements: smaller float32 initializers become constants of the code
INDEXED = ("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND")  # input 1 says where
CODES = ".codes"  # behind the name of codes: the float tensor that holds them in the file's own form


@dataclass(frozen=True)
class FloatNode:
    """A node that runs in float, and why. `reads` are float tensors, `params` what it reads of the file."""

    node: NodeProto
    reason: str
    reads: tuple[str, ...]
    params: tuple[RealParam, ...]

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return tuple(name for name in self.node.output if name)


Item = Op | FloatNode


def check_indices(node: NodeProto, data: Sequence[int], indices: np.ndarray | None) -> None:
    """Raise Impossible where an INDEXED node's indices are outside `data`, or not stored: kernels do not check them."""
    if indices is None:
        raise Impossible(f"its indices {node.input[1]} are not stored in the file, so nothing can check them")
    a, whole = attributes(node), node.op_type.endswith("ND")
    if whole and a.get("batch_dims", 0):
        raise Impossible("batch_dims is not supported")
    limits = np.array(data[: indices.shape[-1]] if whole else data[int(a.get("axis", 0))])
    if (indices < -limits).any() or (indices >= limits).any():
        raise Impossible(f"its indices {node.input[1]} are outside {list(data)}")


def arrange(
    program: Sequence[Item],
    output: str,
    arrays: Mapping[str, np.ndarray],
    floats: Mapping[str, FloatTensor],
    opset: int,
) -> tuple[Op, ...]:  # fmt: skip
    """The operators that `output` needs, float nodes joined to regions, each after what it reads."""
    live = _live(program, output)
    groups = _groups(live)
    if not groups:
        return tuple(item for item in live if isinstance(item, Op))
    needed = {output}
    for item in live:
        needed.update(item.reads if isinstance(item, Op) else ())
    for items in groups.values():
        made = {name for item in items for name in item.writes}
        needed.update(name for item in items for name in item.reads if name not in made)
    ops: list[tuple[int, Op]] = [(i, item) for i, item in enumerate(live) if isinstance(item, Op)]
    for label, items in groups.items():
        ops.append((label, _region(items, needed, arrays, floats, opset)))
    return _sorted(ops)


def _live(program: Sequence[Item], output: str) -> list[Item]:
    needed, kept = {output}, []
    for item in reversed(program):
        if needed.intersection(item.writes):
            kept.append(item)
            needed.update(item.reads)
    return kept[::-1]


def _groups(live: Sequence[Item]) -> dict[int, list[FloatNode]]:
    """{place of a region's first node: its nodes}.

    A value's depth counts how often the way to it went from float operators through a quantizer; joining only nodes
    of equal depth keeps every region apart from what it waits for.
    """
    depth: dict[str, int] = {}
    region: dict[str, int] = {}  # float tensor -> label
    labels: dict[int, list[FloatNode]] = {}
    for place, item in enumerate(live):
        deepest = max((depth.get(name, 0) for name in item.reads), default=0)
        if isinstance(item, Op):
            deepest += item.kind == "quantize" and item.source in region
        else:
            near = {region[name] for name in item.reads if name in region and depth[name] == deepest}
            label = min(near, default=place)
            nodes = [node for one in sorted(near) for node in labels.pop(one)]
            labels[label] = [*nodes, item]
            region.update({name: label for node in labels[label] for name in node.writes})
        depth.update(dict.fromkeys(item.writes, deepest))
    order = {id(item): i for i, item in enumerate(live)}
    return {label: sorted(nodes, key=lambda node: order[id(node)]) for label, nodes in labels.items()}


def _region(
    items: Sequence[FloatNode],
    needed: set[str],
    arrays: Mapping[str, np.ndarray],
    floats: Mapping[str, FloatTensor],
    opset: int,
) -> Op:  # fmt: skip
    """One Op with the nodes as an ONNX model; what others need of it are its outputs."""
    made = {name for item in items for name in item.writes}
    inputs = tuple(dict.fromkeys(name for item in items for name in item.reads if name not in made))
    params = tuple(dict.fromkeys(param for item in items for param in item.params))
    outputs = tuple(name for item in items for name in item.writes if name in needed)
    known = {param.name for param in params}
    names = dict.fromkeys(name for item in items for name in item.node.input if name in arrays and name not in known)
    kinds = [_info(name.removesuffix(CODES), floats[name].dtype, floats[name].shape) for name in inputs]
    for param in params:
        stored = arrays[param.stored]
        shape = stored.shape[::-1] if param.turned else stored.shape
        kinds.append(_info(param.name, "float32" if param.scale is not None else stored.dtype.name, shape))
    graph = helper.make_graph(
        [item.node for item in items], "region", kinds,
        [_info(name, floats[name].dtype, floats[name].shape) for name in outputs],
        [numpy_helper.from_array(arrays[name], name) for name in names],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model.ClearField("producer_name")
    nodes = tuple((item.node.op_type, item.node.name or item.node.output[0], item.reason) for item in items)
    region = Region(model.SerializeToString(deterministic=True), inputs, params, outputs, nodes)
    return Op("float", nodes[-1][1], (), outputs[0], region=region)


def _info(name: str, dtype: str, shape: tuple[int, ...]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def _sorted(ops: Sequence[tuple[int, Op]]) -> tuple[Op, ...]:
    """Each operator after what it reads, else in order of the given places."""
    makers = {name: place for place, op in ops for name in op.writes}
    waiting = {place: {makers[name] for name in op.reads if name in makers} for place, op in ops}
    readers: dict[int, list[int]] = {}
    for place, others in waiting.items():
        for other in others:
            readers.setdefault(other, []).append(place)
    ready: list[int] = []
    for place, others in waiting.items():
        if not others:
            heappush(ready, place)
    by_place, out = dict(ops), []
    while ready:
        place = heappop(ready)
        out.append(by_place[place])
        for reader in readers.get(place, []):
            waiting[reader].discard(place)
            if not waiting[reader]:
                heappush(ready, reader)
    assert len(out) == len(ops), "regions wait for each other"
    return tuple(out)
