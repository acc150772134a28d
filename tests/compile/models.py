"""Whole models against ONNX Runtime: the integer graph in numpy, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.graph import Graph
from qdeploy.compile.pipeline import compile_model
from qdeploy.compile.read.handlers import read_graph
from qdeploy.compile.reference import Evaluator
from qdeploy.qdq import arrays, canonical_bytes
from qdeploy.target import load_target

TARGET = load_target(Path(__file__).parents[2] / "targets" / "x86-64.toml")


@dataclass(frozen=True)
class Difference:
    """In steps of the output's scale: the worst, and the share of outputs that differ."""

    worst: float
    share: float


def unoptimized(model: ModelProto, x: np.ndarray) -> np.ndarray:
    """Node by node as the file says: float operators between Q and DQ."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {model.graph.input[0].name: x})[0])


def images(graph: Graph, count: int = 4, spread: float = 4.0) -> list[np.ndarray]:
    """Random inputs of the graph's shape."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, spread, graph.input_shape).astype(np.float32) for _ in range(count)]


def difference(got: list[np.ndarray], want: list[np.ndarray], step: float) -> Difference:
    """Of outputs of equal shapes, each in steps."""
    assert [a.shape for a in got] == [a.shape for a in want]
    steps = np.concatenate([np.abs(a - b).reshape(-1) / step for a, b in zip(got, want, strict=True)])
    return Difference(float(steps.max()), float((steps > 0.01).mean()))


def read_difference(model: ModelProto, step: float, shape: Any = None) -> tuple[Graph, Difference]:
    """The integer graph of `model`, evaluated in numpy, against ONNX Runtime."""
    graph = read_graph(model, shape)
    evaluator, inputs = Evaluator(graph, arrays(model)), images(graph)
    got = [evaluator.output(x)[0] for x in inputs]
    return graph, difference(got, [unoptimized(model, x) for x in inputs], step)


def compiled_difference(
    model: ModelProto, step: float, folder: Path, other: Callable[[ModelProto, np.ndarray], np.ndarray] | None = None
) -> tuple[dict[str, Any], Difference]:
    """artifact.json, and the compiled model against the integer graph in numpy, or against `other`."""
    (folder / "m.onnx").write_bytes(canonical_bytes(model))
    head = compile_model(folder / "m.onnx", TARGET, folder / "artifact")
    artifact, graph = load_artifact(folder / "artifact"), read_graph(model)
    packed, evaluator = artifact.prepare(arrays(model)), Evaluator(graph, arrays(model))
    inputs = images(graph)
    got = [artifact.run(x, packed) for x in inputs]
    want = [other(model, x) if other is not None else evaluator.output(x)[0] for x in inputs]
    return head, difference(got, want, step)
