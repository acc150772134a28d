"""Blocks of a network: stretches between activations that everything passes through, and their models by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from qdeploy.ptq.graph import FloatGraph, run, session
from qdeploy.ptq.place import Placement

CHAIN = 3  # layers at most of a block without a sum


@dataclass(frozen=True)
class Block:
    """`nodes` compute the quantized activation `output` from `input` alone; `layers` names those with weights."""

    nodes: tuple[NodeProto, ...]
    input: str
    output: str
    layers: tuple[str, ...]


def find_blocks(graph: FloatGraph, placement: Placement) -> list[Block]:
    """Blocks in graph order: what lies around one residual sum, or up to CHAIN layers in a row.

    A block ends at a quantized activation that is the only one read later. Nodes behind the last one, as in networks of
    several outputs, are in no block.
    """
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.input}
    last_use |= dict.fromkeys(graph.output_names, len(graph.nodes))
    layers = {layer.name for layer in placement.layers}
    live, start, source, found = {graph.input}, 0, graph.input, list[Block]()
    for i, node in enumerate(graph.nodes):
        live = {name for name in {*live, *node.output} if last_use.get(name, -1) > i}
        if len(live) != 1 or not live <= placement.owners.keys() - placement.inside:
            continue
        target = next(iter(live))
        part = tuple(graph.nodes[start : i + 1])
        names = tuple(node.name for node in part if node.name in layers)
        block = Block(part, source, target, names)
        if found and _continues(found[-1], block):
            before = found.pop()
            block = Block(before.nodes + part, before.input, target, before.layers + names)
        found.append(block)
        start, source = i + 1, target
    return found


def _continues(before: Block, block: Block) -> bool:
    """True when `block` is taken together with the one before it."""
    if not block.layers:
        return True
    sums = any(node.op_type == "Add" for part in (before, block) for node in part.nodes)
    return not before.layers or (not sums and len(before.layers) + len(block.layers) <= CHAIN)


def between(model: ModelProto, source: str, shape: tuple[int, ...], target: str) -> ModelProto:
    """The part of `model` that computes `target` from the float32 value `source` of `shape`."""
    needed, nodes = {target}, list[NodeProto]()
    for node in reversed(model.graph.node):
        if source not in node.output and needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    graph = helper.make_graph(
        nodes[::-1], "block", [helper.make_tensor_value_info(source, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(target, TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def outputs_of_block(
    model: ModelProto, source: str, shape: tuple[int, ...], target: str, inputs: np.ndarray
) -> np.ndarray:
    """`target` for every one of `inputs`, values of `source`: float32 [n, ...]."""
    runner = session(between(model, source, shape, target))
    return np.concatenate([values[0] for values in run(runner, inputs, [target])])
