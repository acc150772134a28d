"""BitOPs of a QDQ ONNX file, from its codes and geometry alone: nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.compile.graph import Graph, Op
from qdeploy.compile.read.handlers import read_graph
from qdeploy.cost import Cost, complexity
from qdeploy.qdq import arrays, canonical_bytes, load_model, parse_model


@dataclass(frozen=True)
class LayerBitops:
    """One convolution or fully connected layer."""

    name: str
    macs: int
    weights: int
    weight_bits: int
    activation_bits: int

    @property
    def bitops(self) -> int:
        """Multiply-adds x weight bits x activation bits."""
        return self.macs * self.weight_bits * self.activation_bits


def grid_bits(codes: np.ndarray) -> int:
    """Width of the coarsest power-of-two grid that holds all `codes` (int8, or uint8 taken as code - 128).

    Codes w * 2^t + m with 0 <= m < 2^t need the bits of w: [-64, -32, 0, 32] + 15 are 2-bit codes in an int8 container.
    """
    values = codes.astype(np.int64).reshape(-1) - (128 if codes.dtype == np.uint8 else 0)
    if not values.size:
        return 1
    step = int(np.gcd.reduce(values - values[0]))
    shift = (step & -step).bit_length() - 1 if step else 7
    low, high = int(values.min()) >> shift, int(values.max()) >> shift
    return max((high if high >= 0 else ~high).bit_length(), (low if low >= 0 else ~low).bit_length()) + 1


def activation_bits(graph: Graph, op: Op, values: Mapping[str, np.ndarray]) -> int:
    """Width of what a layer reads: from the integer Clip behind its input's quantizer, 8 where there is none."""
    quantizer = graph.tensors[op.inputs[0].tensor].quantizer
    low, high = (-128, 127) if quantizer.signed else (0, 255)
    if quantizer.clip_min is not None:
        low = int(values[quantizer.clip_min].reshape(()))
    if quantizer.clip_max is not None:
        high = int(values[quantizer.clip_max].reshape(()))
    return max(1, (high - low).bit_length())


def layer_bitops(graph: Graph, values: Mapping[str, np.ndarray]) -> list[LayerBitops]:
    """One entry a convolution or fully connected layer, in graph order; `values` are the model's initializers."""
    rows = []
    for op in graph.ops:
        if op.weights is None:
            continue
        codes = values[op.weights.weight]
        _, height, width = graph.tensors[op.output].shape
        bits = activation_bits(graph, op, values)
        rows.append(LayerBitops(op.name, codes.size * height * width, codes.size, grid_bits(codes), bits))
    return rows


Sizes = tuple[str, tuple[int, ...]]  # an input's name and shape


def read_values(onnx_path: Path, shape: Sizes | None = None) -> tuple[Graph, dict[str, np.ndarray]]:
    """Integer graph and initializers of a file, for an input of `shape` where it leaves sizes open.

    Raises ModelError or CompileError.
    """
    model = parse_model(canonical_bytes(load_model(Path(onnx_path))[1]), str(onnx_path))
    return read_graph(model, shape), arrays(model)


def bitops(onnx_path: Path, shape: Sizes | None = None) -> dict[str, Any]:
    """{"layers": [...], "total": {...}} of a file; every figure is predicted (counted, not measured).

    `complexity` is the papers' BitOPs / 64 of integer layers; those in float regions are not counted.
    """
    layers = layer_bitops(*read_values(onnx_path, shape))
    total = sum(layer.bitops for layer in layers)
    cost = Cost.build(
        [
            ("macs", sum(layer.macs for layer in layers), "macs", "predicted"),
            ("bitops", total, "bitops", "predicted"),
            ("complexity", complexity(0, total), "macs", "predicted"),
        ]
    )
    rows = [
        {
            "layer": layer.name, "macs": layer.macs, "weight_bits": layer.weight_bits,
            "activation_bits": layer.activation_bits, "bitops": layer.bitops,
        }
        for layer in layers
    ]  # fmt: skip
    return {"layers": rows, "total": cost.to_json()}
