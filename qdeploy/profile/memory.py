"""Bytes that a model needs: weights at their own widths and in containers, and the planned arena."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qdeploy.compile.graph import Graph
from qdeploy.cost import Cost
from qdeploy.profile.bitops import layer_bitops


def memory(graph: Graph, values: Mapping[str, np.ndarray], arena_bytes: int, packed_bytes: int) -> Cost:
    """Memory of one level.

    weights            weight codes at the width of their grid, each layer filled up to whole bytes
    weight_containers  the same in one byte a code, as runtimes hold them
    side_tensors       everything else that belongs to a level: scales, zero points, biases, bounds
    packed             what the artifact holds of a level in memory (layout padding and folded parameters included)
    arena              activations by the memory plan, from artifact.json; neither the network's input nor its output
    workspace          0: kernels keep their accumulators in registers and on the stack
    peak               packed + arena + workspace; while a level is swapped, packed counts twice, and every thread that
                       runs at the same time has an arena
    """
    layers = layer_bitops(graph, values)
    names = {op.weights.weight for op in graph.ops if op.weights is not None}
    side = sum(values[param.name].nbytes for param in graph.params if param.name not in names)
    return Cost.build(
        [
            ("weights", sum(-(-layer.weights * layer.weight_bits // 8) for layer in layers), "bytes", "predicted"),
            ("weight_containers", sum(values[name].nbytes for name in names), "bytes", "predicted"),
            ("side_tensors", side, "bytes", "predicted"),
            ("packed", packed_bytes, "bytes", "measured"),
            ("arena", arena_bytes, "bytes", "predicted"),
            ("workspace", 0, "bytes", "predicted"),
            ("peak", packed_bytes + arena_bytes, "bytes", "predicted"),
        ]
    )
