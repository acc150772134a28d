"""One pass of the float network over the calibration images: samples of activations, second moments of layer inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.errors import DataError
from qdeploy.ptq.graph import FloatGraph, limits, run, session
from qdeploy.ptq.layers import Layer, patches, rows
from qdeploy.ptq.ranges import Samples

KEPT = 1 << 17  # values kept of an activation, over all images
PLACES = 4096  # output places of a layer whose inputs enter its moments, over all images
SEED = 0


@dataclass
class Moments:
    """Of a layer's input patches: mean [G, K], second moments [G, K, K] (float32), `count` of them."""

    mean: np.ndarray
    second: np.ndarray
    count: int


@dataclass(frozen=True)
class Observed:
    """samples: by activation. moments: by layer. outputs: the float network's first output, [n, ...]."""

    samples: Mapping[str, Samples]
    moments: Mapping[str, Moments]
    outputs: np.ndarray


def observe(
    graph: FloatGraph, activations: Sequence[str], layers: Sequence[Layer], images: np.ndarray, second: bool
) -> Observed:
    """Run all `images`, float32 [n, ...]. `second`: also gather second moments, else only means.

    Raises DataError when an activation is NaN or infinite.
    """
    wanted = sorted({*activations, *(layer.input for layer in layers)} - {graph.input})
    names = [*graph.output_names, *wanted]
    runner = session(graph.model(wanted))
    nodes = {node.name: node for node in graph.nodes}
    low = dict.fromkeys(activations, np.inf)
    high = dict.fromkeys(activations, -np.inf)
    kept: dict[str, list[np.ndarray]] = {name: [] for name in activations}
    moments: dict[str, Moments] = {}
    outputs = []
    each, places = -(-KEPT // len(images)), -(-PLACES // len(images))
    for i, values in enumerate(run(runner, images, names)):
        seen = dict(zip(names, values, strict=True)) | {graph.input: images[i : i + 1]}
        outputs.append(values[0])
        for name in activations:
            flat = seen[name].reshape(-1)
            low[name], high[name] = min(low[name], float(flat.min())), max(high[name], float(flat.max()))
            if not np.isfinite(low[name]) or not np.isfinite(high[name]):
                raise DataError(f"activation {name} is not finite on image {i}: check --mean, --std and the model")
            kept[name].append(flat if flat.size <= each else flat[_places(flat.size, each, i)])
        for layer in (layer for layer in layers if layer.solvable):
            kernel = graph.arrays[layer.weight].shape[2:] if layer.op == "Conv" else ()
            random = np.random.default_rng((SEED, i))
            x = patches(layer, nodes[layer.name], kernel, seen[layer.input], places, random)
            _add(moments, layer, x, second)
    makers = graph.makers()
    samples = {
        name: Samples(
            low[name],
            high[name],
            np.concatenate(kept[name]),
            limits(graph, makers[name]) if name in makers else (-np.inf, np.inf),
        )
        for name in activations
    }
    for moment in moments.values():
        moment.mean /= moment.count
        moment.second /= moment.count
    return Observed(samples, moments, np.concatenate(outputs))


def _places(size: int, count: int, image: int) -> np.ndarray:
    """Random places, others for each image."""
    return np.random.default_rng((SEED, image, size)).integers(0, size, count)


def _add(moments: dict[str, Moments], layer: Layer, x: np.ndarray, second: bool) -> None:
    """Add patches [G, n, K]."""
    groups, count, width = x.shape
    if layer.name not in moments:
        square = (groups, width, width) if second else (0, 0, 0)
        moments[layer.name] = Moments(np.zeros((groups, width)), np.zeros(square, np.float32), 0)
    moment = moments[layer.name]
    moment.mean += x.sum(1, dtype=np.float64)
    moment.count += count
    if second:
        moment.second += x.transpose(0, 2, 1) @ x


def mean_output(layer: Layer, weight: np.ndarray, moment: Moments) -> np.ndarray:
    """float64 [O]: the layer's mean output without bias, for weights of any values."""
    matrix = rows(layer, weight).astype(np.float64)
    grouped = matrix.reshape(moment.mean.shape[0], -1, matrix.shape[1])
    return np.einsum("gok,gk->go", grouped, moment.mean).reshape(-1)
