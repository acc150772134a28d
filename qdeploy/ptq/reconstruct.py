"""Block reconstruction: one block after the other learned on what the blocks before it really output (BRECQ).

Each block starts from the codes of layer-wise rounding and ends with ones of less error on the calibration images, or
with the same. Its targets are the float network's, its inputs the quantized network's so far, run in ONNX Runtime. The
levels of a ladder are learned together (learn.py), each on what it outputs itself.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from zipfile import BadZipFile

import numpy as np

from qdeploy.errors import DataError
from qdeploy.files import read_bytes, sha256, write_atomic
from qdeploy.progress import Counter
from qdeploy.ptq.blocks import Block, find_blocks, outputs_of_block
from qdeploy.ptq.insert import input_widths, insert
from qdeploy.ptq.learn import Problem, learn_block, top_codes, unlearnable
from qdeploy.ptq.quantize import (
    BIAS_LIMIT,
    Calibrated,
    Echo,
    Widths,
    activation_grids,
    ladder_choices,
    ladder_weights,
    layer_weights,
)
from qdeploy.ptq.ranges import Grid
from qdeploy.ptq.settings import Choice
from qdeploy.ptq.weights import Level, Quantized, bounds, ladder_levels
from qdeploy.qdq import parse_model

FORMAT = 2  # of the kept blocks; raise it when the same input gives other results
Key = tuple[str, int]


@dataclass
class _State:
    """What the network has so far: grids by owner and width, and of each level weights by layer.

    `forms`: by layer, how each level's codes come from its top codes. `folder` keeps finished blocks.
    """

    calibrated: Calibrated
    choices: Mapping[str, Choice]
    levels: list[dict[str, Quantized]]
    forms: Mapping[str, Sequence[Level]]
    grids: dict[Key, Grid]
    iterations: int
    folder: Path

    def model(self, level: int) -> bytes:
        """The QDQ ONNX file of a level."""
        graph, placement = self.calibrated.graph, self.calibrated.placement
        return insert(graph, placement, self.choices, self.grids, self.levels[level])


def reconstruct(
    calibrated: Calibrated, widths: Widths | None, iterations: int, folder: Path, echo: Echo | None = None
) -> bytes:
    """The QDQ ONNX file at `widths` {layer: weight bits} with every block learned for `iterations` steps.

    Finished blocks are kept in `folder`; the same call goes on behind them, the caller removes it in the end. Blocks
    that cannot be learned keep their layer-wise rounding and are said. Raises DataError for a damaged file there.
    """
    choices = calibrated.settings.choices(calibrated.layers, widths)
    weights = {
        layer.name: layer_weights(calibrated, layer, choices[layer.name]) for layer in calibrated.placement.layers
    }
    forms = {name: ladder_levels((choice.weight_bits,)) for name, choice in choices.items()}
    state = _State(calibrated, choices, [weights], forms, activation_grids(calibrated, choices), iterations, folder)
    _learn(state, echo or (lambda text: None))
    return state.model(0)


def reconstruct_ladder(
    calibrated: Calibrated, levels: Mapping[str, Widths], iterations: int, folder: Path, echo: Echo | None = None
) -> dict[str, bytes]:
    """As reconstruct(), of a ladder: {level: QDQ ONNX file} for {level: {layer: weight bits}}, which nest.

    Every block is learned in as many turns as there are levels, of `iterations` steps each. Raises RecipeError for
    asymmetric weights.
    """
    choices, found = ladder_choices(calibrated, levels), ladder_weights(calibrated, levels, "joint", echo)
    names = sorted(levels, key=lambda level: [levels[level][name] for name in calibrated.layers])
    forms = dict[str, list[Level]]()
    for layer in calibrated.layers:
        own = ladder_levels(sorted({levels[level][layer] for level in levels}))
        forms[layer] = [next(form for form in own if form.bits == levels[level][layer]) for level in names]
    weights = [found[name] for name in names]
    state = _State(calibrated, choices, weights, forms, activation_grids(calibrated, choices), iterations, folder)
    _learn(state, echo or (lambda text: None))
    return {name: state.model(names.index(name)) for name in levels}


def _learn(state: _State, say: Echo) -> None:
    """Learn one block after the other."""
    graph, layers = state.calibrated.graph, {layer.name: layer for layer in state.calibrated.placement.layers}
    blocks = find_blocks(graph, state.calibrated.placement)
    _open(state)
    counter = Counter(say, "reconstruction", len(blocks), "block", last=False)
    exact, shape, values = state.calibrated.images, graph.shape, graph.input
    seen, models = [exact] * len(state.levels), [graph.model()] * len(state.levels)
    for i, block in enumerate(blocks):
        label = f"block {i + 1} of {len(blocks)} ({len(block.layers)} layers to {block.output})"
        target = outputs_of_block(graph.model([block.output]), block.input, shape, block.output, exact)
        kept = state.folder / f"block-{i:03}.npz"
        reason = unlearnable(block, layers) if block.layers else "it has no layer"
        if kept.is_file():
            _load(kept, state, block)
            say(f"{label}: done before")
        elif reason is None:
            start = monotonic()
            problem = _problem(state, block)
            found = learn_block(problem, seen, target, state.iterations, i)
            for name, weights in found.weights.items():
                for level, one in zip(state.levels, _fitting(problem, name, weights, found.grids), strict=True):
                    level[name] = one
            state.grids |= found.grids
            _save(kept, state, block, found.grids)
            errors = [", ".join(f"{error:.2%}" for error in part) for part in (found.before, found.after)]
            say(f"{label}: output error {errors[0]} -> {errors[1]}, {monotonic() - start:.0f} s")
        elif block.layers:
            say(f"{label}: rounded layer by layer: {reason}")
        counter.at(i + 1)
        if i + 1 < len(blocks):
            after = f"{block.output}.values"
            models = [parse_model(state.model(level), "the model") for level in range(len(state.levels))]
            seen = [outputs_of_block(model, values, shape, after, one) for model, one in zip(models, seen, strict=True)]
            exact, shape, values = target, graph.floats[block.output], after
    left = [name for name in layers if not any(name in block.layers for block in blocks)]
    if left:
        say(f"rounded layer by layer, in no block: {', '.join(left)}")


def _problem(state: _State, block: Block) -> Problem:
    """What learn.py needs of a block."""
    graph, placement, choices = state.calibrated.graph, state.calibrated.placement, state.choices
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
        weights={name: state.calibrated.weight(layer) for name, layer in layers.items()},
        start={name: [level[name] for level in state.levels] for name in layers},
        forms={name: state.forms[name] for name in layers},
        bounds={name: _bounds(state.forms[name], choices[name].symmetry) for name in layers},
        grids=grids,
        learned=frozenset(key for key in grids if key[0] in made - edges),
        owners=owners,
        widths={name: max(widths[name]) for name in owners},
        reads={name: choices[name].activation_bits for name in layers},
    )


def _bounds(forms: Sequence[Level], symmetry: str) -> tuple[int, int]:
    """The least and the greatest top code of a layer's weights."""
    return bounds(forms[0].top, len({form.bits for form in forms}), symmetry)


def _fitting(
    problem: Problem, name: str, levels: Sequence[Quantized], grids: Mapping[Key, Grid]
) -> Sequence[Quantized]:
    """`levels` of a layer with scales so large that the biases fit their int32, whose unit is input scale x weight
    scale; the codes then shrink by as much.
    """
    layer, forms = problem.layers[name], problem.forms[name]
    owner = problem.owners.get(layer.input)
    if levels[0].bias is None or owner is None:
        return levels
    key, growth = (owner, problem.reads[name]), np.ones(levels[0].scale.shape)
    unit = float(grids.get(key, problem.grids[key]).scale)
    for one in levels:
        least = np.abs(np.asarray(one.bias, np.float64)) / BIAS_LIMIT / unit
        growth = np.maximum(growth, (least if one.scale.ndim else least.max()) / one.scale)
    if np.all(growth <= 1):
        return levels
    form = [-1 if i == layer.axis and growth.ndim else 1 for i in range(levels[0].codes.ndim)]
    zero = levels[-1].zero_point.astype(np.float64).reshape(form)
    tops = np.rint((top_codes(levels, forms) - zero) / growth.reshape(form) + zero)
    tops = np.clip(tops, *problem.bounds[name]).astype(np.int64)
    return [
        replace(one, codes=level.codes(tops).astype(np.int8), scale=(one.scale * growth).astype(np.float32))
        for one, level in zip(levels, forms, strict=True)
    ]


# Kept blocks ---------------------------------------------------------------------------------------------------------


def _open(state: _State) -> None:
    """Make the folder; one that holds blocks of another quantization is emptied first."""
    calibrated, folder = state.calibrated, state.folder
    parts = [calibrated.graph.model().SerializeToString(deterministic=True), calibrated.images.tobytes()]
    forms = sorted((name, tuple(own)) for name, own in state.forms.items())
    text = repr((FORMAT, calibrated.settings, sorted(state.choices.items()), forms, state.iterations))
    key = sha256("\n".join([*map(sha256, parts), text]).encode("utf-8")).encode("ascii")
    if folder.is_dir() and not ((folder / "key").is_file() and (folder / "key").read_bytes() == key):
        if any(path.name != "key" and path.suffix != ".npz" for path in folder.iterdir()):
            raise DataError(f"{folder} holds files that are no kept blocks: move it away, or choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "key", key)


def _save(path: Path, state: _State, block: Block, grids: Mapping[Key, Grid]) -> None:
    """One learned block: arrays of its layers in order, at each level; scales of its grids in order of their keys."""
    arrays = {"scales": np.array([grids[key].scale for key in sorted(grids)], np.float32)}
    arrays["keys"] = np.array([f"{bits}:{owner}" for owner, bits in sorted(grids)], np.str_)
    for level, weights in enumerate(state.levels):
        for i, name in enumerate(block.layers):
            found, at = weights[name], f"{level}.{i}"
            arrays |= {f"{at}.codes": found.codes, f"{at}.scale": found.scale, f"{at}.zero": found.zero_point}
            if found.bias is not None:
                arrays[f"{at}.bias"] = found.bias
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def _load(path: Path, state: _State, block: Block) -> None:
    """Put a kept block into `state`; raises DataError."""
    try:
        with np.load(io.BytesIO(read_bytes(path, "the kept block", DataError)), allow_pickle=False) as arrays:
            for level, weights in enumerate(state.levels):
                for i, name in enumerate(block.layers):
                    at = f"{level}.{i}"
                    codes, scale, zero = (arrays[f"{at}.{part}"] for part in ("codes", "scale", "zero"))
                    weights[name] = Quantized(codes, scale, zero, arrays.get(f"{at}.bias"))
            for text, scale in zip(arrays["keys"].tolist(), arrays["scales"], strict=True):
                bits, owner = text.split(":", 1)
                state.grids[owner, int(bits)] = replace(state.grids[owner, int(bits)], scale=np.float32(scale))
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as e:
        raise DataError(f"{path} is damaged ({e}): delete {path.parent} and start again") from e
