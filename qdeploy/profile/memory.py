"""Bytes that a model needs: weights at their own widths and in containers, and the planned arena."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.compile.artifact import read_description
from qdeploy.compile.graph import Graph
from qdeploy.cost import Cost
from qdeploy.profile.bitops import activation_bits, layer_bitops

RUNTIME_BYTES = 8_700_000  # measured on x86_64 (tools/bench_memory.py)


def memory(graph: Graph, values: Mapping[str, np.ndarray], arena_bytes: int, packed_bytes: int) -> Cost:
    """Memory of one level.

    weights            weight codes at the width of their grid, each layer filled up to whole bytes
    weight_containers  the same in one byte a code, as runtimes hold them
    side_tensors       everything else that belongs to a level: scales, zero points, biases, bounds
    packed             what the artifact holds of a level in memory (layout padding and folded parameters included)
    arena              activations by the memory plan, from artifact.json; neither the network's input nor its output
    workspace          0: kernels keep their accumulators in registers and on the stack
    peak               packed + arena + workspace; while a level is swapped, packed counts twice, and every thread that
                       runs at the same time has an arena. `footprint` is of a whole process
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


def footprint(artifact: Path) -> Cost:
    """Memory of a process that runs an artifact, beside what such a process has for a network of no size.

    packed        a level's parameters in the kernels' layout
    arena         activations by the memory plan
    input_output  a batch of images and of outputs, float32
    code          the library
    parameters    the level before it is packed: codes in containers, scales, biases
    running       packed + arena + input_output + code
    packing       packed + parameters + code, while a level comes from a bundle; one that the artifact holds is read
    peak          the greater of both
    runtime       of qdeploy-run itself, with TVM's libraries (docs/devices.md)

    Of several libraries the one with the greatest sum counts. A GPU has a copy of `packed` and the arena in its own
    memory. Raises CompileError.
    """
    head = read_description(artifact)

    def size(tensor: Mapping[str, Any]) -> int:
        return int(np.prod(tensor["shape"], dtype=np.int64)) * np.dtype(tensor["dtype"]).itemsize

    code = {row["library"]: (Path(artifact) / row["library"]).stat().st_size for row in head["variants"]}
    variant = max(head["variants"], key=lambda row: row["packed_bytes"] + row["arena_bytes"] + code[row["library"]])
    edges = sum(map(size, [*head["inputs"], *head["outputs"]]))
    parameters = 0 if head["constant"] else sum(map(size, head["params"]))
    packed, library = variant["packed_bytes"], code[variant["library"]]
    running, packing = packed + variant["arena_bytes"] + edges + library, packed + parameters + library
    figures = {
        "packed": packed, "arena": variant["arena_bytes"], "input_output": edges, "code": library,
        "parameters": parameters, "running": running, "packing": packing, "peak": max(running, packing),
        "runtime": RUNTIME_BYTES,
    }  # fmt: skip
    return Cost.build((name, value, "bytes", "predicted") for name, value in figures.items())


def activation_bytes(graph: Graph, values: Mapping[str, np.ndarray]) -> int:
    """Sum of the sizes of all tensors that layers read, each at its own width, in whole bytes.

    The activation size of differentiable mixed precision (eq. 2): not what lives at once, but all of them.
    """
    widths: dict[str, int] = {}
    for op in graph.ops:
        if op.weights is not None:
            widths[op.inputs[0].tensor] = activation_bits(graph, op, values)
    return sum(-(-int(np.prod(graph.tensors[name].shape)) * bits // 8) for name, bits in widths.items())
