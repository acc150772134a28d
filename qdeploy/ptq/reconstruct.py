"""Block reconstruction: one block after the other learned on what the blocks before it really output (BRECQ).

Each block starts from the codes of layer-wise rounding and ends with ones of less error on the calibration images, or
with the same. Its targets are the float network's, its inputs the quantized network's so far, run in ONNX Runtime.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from zipfile import BadZipFile

import numpy as np

from qdeploy.errors import DataError
from qdeploy.files import read_bytes, sha256, write_atomic
from qdeploy.ptq.blocks import Block, find_blocks, outputs_of_block
from qdeploy.ptq.insert import input_widths, insert
from qdeploy.ptq.layers import Layer
from qdeploy.ptq.learn import Problem, learn_block, unlearnable
from qdeploy.ptq.quantize import BIAS_LIMIT, Calibrated, Echo, Widths, activation_grids, layer_weights
from qdeploy.ptq.ranges import Grid
from qdeploy.ptq.settings import Choice
from qdeploy.ptq.weights import FULL, Quantized
from qdeploy.qdq import parse_model

FORMAT = 1  # of the kept blocks; raise it when the same input gives other results
Key = tuple[str, int]


@dataclass
class _State:
    """Weights by layer and grids by owner and width: what the network has so far."""

    weights: dict[str, Quantized]
    grids: dict[Key, Grid]


def reconstruct(
    calibrated: Calibrated, widths: Widths | None, iterations: int, folder: Path, echo: Echo | None = None
) -> bytes:
    """The QDQ ONNX file at `widths` {layer: weight bits} with every block learned for `iterations` steps.

    Finished blocks are kept in `folder`; the same call goes on behind them, the caller removes it in the end. Blocks
    that cannot be learned keep their layer-wise rounding and are said. Raises DataError for a damaged file there.
    """
    say = echo or (lambda text: None)
    graph, placement = calibrated.graph, calibrated.placement
    choices = calibrated.settings.choices(calibrated.layers, widths)
    weights = {layer.name: layer_weights(calibrated, layer, choices[layer.name]) for layer in placement.layers}
    state = _State(weights, activation_grids(calibrated, choices))
    layers = {layer.name: layer for layer in placement.layers}
    blocks = find_blocks(graph, placement)
    _open(folder, calibrated, choices, iterations)
    exact = seen = calibrated.images
    model, shape, values = graph.model(), graph.shape, graph.input
    for i, block in enumerate(blocks):
        label = f"block {i + 1} of {len(blocks)} ({len(block.layers)} layers to {block.output})"
        target = outputs_of_block(graph.model([block.output]), block.input, shape, block.output, exact)
        kept = folder / f"block-{i:03}.npz"
        reason = unlearnable(block, layers) if block.layers else "it has no layer"
        if kept.is_file():
            _load(kept, state, block)
            say(f"{label}: done before")
        elif reason is None:
            start = monotonic()
            problem = _problem(calibrated, block, choices, state)
            found = learn_block(problem, seen, target, iterations, i)
            state.weights |= {
                name: _fitting(problem, layers[name], w, found.grids) for name, w in found.weights.items()
            }
            state.grids |= found.grids
            _save(kept, state, block, found.grids)
            say(f"{label}: output error {found.before:.2%} -> {found.after:.2%}, {monotonic() - start:.0f} s")
        elif block.layers:
            say(f"{label}: rounded layer by layer: {reason}")
        if i + 1 < len(blocks):
            model = parse_model(insert(graph, placement, choices, state.grids, state.weights), "the model")
            after = f"{block.output}.values"
            seen, values = outputs_of_block(model, values, shape, after, seen), after
            exact, shape = target, graph.floats[block.output]
    left = [name for name in layers if not any(name in block.layers for block in blocks)]
    if left:
        say(f"rounded layer by layer, in no block: {', '.join(left)}")
    return insert(graph, placement, choices, state.grids, state.weights)


def _problem(calibrated: Calibrated, block: Block, choices: Mapping[str, Choice], state: _State) -> Problem:
    """What learn.py needs of a block."""
    graph, placement = calibrated.graph, calibrated.placement
    widths = input_widths(placement, choices, graph)
    layers = {layer.name: layer for layer in placement.layers if layer.name in block.layers}
    made = {name for node in block.nodes for name in node.output}
    edges = {placement.owners.get(name, name) for name in graph.output_names}
    owners = {name: owner for name, owner in placement.owners.items() if name in {*made, block.input}}
    grids = {key: grid for key, grid in state.grids.items() if key[0] in owners.values()}
    return Problem(
        block=block,
        layers=layers,
        arrays=graph.arrays,
        weights={name: calibrated.weight(layer) for name, layer in layers.items()},
        start={name: state.weights[name] for name in layers},
        bounds={name: _bounds(choices[name]) for name in layers},
        grids=grids,
        learned=frozenset(key for key in grids if key[0] in made - edges),
        owners=owners,
        widths={name: max(widths[name]) for name in owners},
        reads={name: choices[name].activation_bits for name in layers},
    )


def _bounds(choice: Choice) -> tuple[int, int]:
    """The least and the greatest code of a layer's weights (weights.fit_grid)."""
    high = (1 << (choice.weight_bits - 1)) - 1
    whole = choice.symmetry == "symmetric" and choice.weight_bits == FULL
    return -high if whole else -high - 1, high


def _fitting(problem: Problem, layer: Layer, weights: Quantized, grids: Mapping[Key, Grid]) -> Quantized:
    """`weights` with scales so large that the bias fits its int32, whose unit is input scale x weight scale."""
    owner = problem.owners.get(layer.input)
    if weights.bias is None or owner is None:
        return weights
    key = owner, problem.reads[layer.name]
    unit = float(grids.get(key, problem.grids[key]).scale)
    least = np.abs(weights.bias.astype(np.float64)) / BIAS_LIMIT / unit
    scale = np.maximum(weights.scale, least if weights.scale.ndim else least.max()).astype(np.float32)
    if np.array_equal(scale, weights.scale):
        return weights
    form = [-1 if i == layer.axis and scale.ndim else 1 for i in range(weights.codes.ndim)]
    ratio, zero = (weights.scale / scale).reshape(form), weights.zero_point.astype(np.float32).reshape(form)
    lo, hi = problem.bounds[layer.name]
    codes = np.clip(np.rint((weights.codes - zero) * ratio + zero), lo, hi)
    return replace(weights, codes=codes.astype(np.int8), scale=scale)


# Kept blocks ---------------------------------------------------------------------------------------------------------


def _open(folder: Path, calibrated: Calibrated, choices: Mapping[str, Choice], iterations: int) -> None:
    """Make `folder`; one that holds blocks of another quantization is emptied first."""
    parts = [calibrated.graph.model().SerializeToString(deterministic=True), calibrated.images.tobytes()]
    text = repr((FORMAT, calibrated.settings, sorted(choices.items()), iterations))
    key = sha256("\n".join([*map(sha256, parts), text]).encode("utf-8")).encode("ascii")
    if folder.is_dir() and not ((folder / "key").is_file() and (folder / "key").read_bytes() == key):
        if any(path.name != "key" and path.suffix != ".npz" for path in folder.iterdir()):
            raise DataError(f"{folder} holds files that are no kept blocks: move it away, or choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "key", key)


def _save(path: Path, state: _State, block: Block, grids: Mapping[Key, Grid]) -> None:
    """One learned block: arrays of its layers in order, scales of its grids in order of their keys."""
    arrays = {"scales": np.array([grids[key].scale for key in sorted(grids)], np.float32)}
    arrays["keys"] = np.array([f"{bits}:{owner}" for owner, bits in sorted(grids)], np.str_)
    for i, name in enumerate(block.layers):
        found = state.weights[name]
        arrays |= {f"{i}.codes": found.codes, f"{i}.scale": found.scale, f"{i}.zero": found.zero_point}
        if found.bias is not None:
            arrays[f"{i}.bias"] = found.bias
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def _load(path: Path, state: _State, block: Block) -> None:
    """Put a kept block into `state`; raises DataError."""
    try:
        with np.load(io.BytesIO(read_bytes(path, "the kept block", DataError)), allow_pickle=False) as arrays:
            for i, name in enumerate(block.layers):
                bias = arrays.get(f"{i}.bias")
                weights = Quantized(arrays[f"{i}.codes"], arrays[f"{i}.scale"], arrays[f"{i}.zero"], bias)
                state.weights[name] = weights
            for text, scale in zip(arrays["keys"].tolist(), arrays["scales"], strict=True):
                bits, owner = text.split(":", 1)
                state.grids[owner, int(bits)] = replace(state.grids[owner, int(bits)], scale=np.float32(scale))
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as e:
        raise DataError(f"{path} is damaged ({e}): delete {path.parent} and start again") from e
