"""The post-training pipeline: prepare, place, observe once; then build any choice of widths, or a ladder of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from qdeploy.errors import DataError, ModelError, RecipeError
from qdeploy.ptq.fold import equalize
from qdeploy.ptq.graph import FloatGraph, outputs_of
from qdeploy.ptq.insert import input_widths, insert
from qdeploy.ptq.layers import Layer, rows, unrows
from qdeploy.ptq.observe import Observed, mean_output, observe
from qdeploy.ptq.place import Placement, place
from qdeploy.ptq.ranges import Grid as ActivationGrid
from qdeploy.ptq.ranges import find_grid
from qdeploy.ptq.rounding import least_squares, level_weights, refit_scale
from qdeploy.ptq.settings import MAX_BITS, Choice, Settings
from qdeploy.ptq.streams import balance
from qdeploy.ptq.weights import Grid, Level, Quantized, fit_grid, ladder_levels, nearest
from qdeploy.qdq import parse_model

MIN_IMAGES = 2
NESTINGS = ("joint", "truncate")
JOINT_POWER = 0.25  # how errors of a ladder's levels are weighed (rounding.level_weights)
BIAS_LIMIT = 1 << 30  # of an int32 bias: a weight scale is at least so large that its bias fits
AUTO_METHODS = ("mse", "minmax", "margin", "percentile")  # what calibration "auto" tries
OUTPUT_METHOD = "margin"  # of the network's output: the largest logit decides, other images have larger ones

Widths = Mapping[str, int]
Name = TypeVar("Name")  # of a level
Echo = Callable[[str], None]


@dataclass
class Calibrated:
    """A float network ready to be built at any widths. `done` keeps weights that were rounded before."""

    graph: FloatGraph
    placement: Placement
    observed: Observed
    settings: Settings
    images: np.ndarray
    done: dict[tuple[str, tuple[int, ...], str, str, str], dict[int, Quantized]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are quantized, in graph order."""
        return [layer.name for layer in self.placement.layers]

    def weight(self, layer: Layer) -> np.ndarray:
        """A layer's float32 weight."""
        return self.graph.arrays[layer.weight]

    def sizes(self) -> dict[str, int]:
        """Number of weights of each quantized layer."""
        return {layer.name: int(self.weight(layer).size) for layer in self.placement.layers}


def calibrate(graph: FloatGraph, images: np.ndarray, settings: Settings, echo: Echo | None = None) -> Calibrated:
    """Observe a prepared network on `images`, float32 [n, ...] as it reads them, the batch axis first.

    With `equalize` the ranges of `graph` are changed, not its function: of weights where a layer has one scale, of the
    channels of activations where each output channel has its own. Raises ModelError when nothing can be quantized,
    DataError for images that do not fit.
    """
    say = echo or (lambda text: None)
    check_images(images, graph.shape)
    placement = place(graph)
    if settings.equalize and settings.granularity == "tensor":
        say(f"equalized {equalize(graph)} pairs of layers")
    elif settings.equalize:
        owners = sorted(set(placement.owners.values()))
        count = balance(graph, images, owners, settings.weight_bits, settings.activation_bits)
        say(f"equalized the channels of {count} streams of activations")
    all_layers = [layer.name for layer in placement.layers]
    if all_layers:
        choices = settings.choices(all_layers)
        placement = place(graph, frozenset(name for name in all_layers if not choices[name].quantize))
        left = [layer.name for layer in placement.layers]  # rules and policies for layers in float have done their work
        rules = tuple(rule for rule in settings.rules if any(map(rule.fits, left)))
        edges = "same" if settings.first_last == "float" else settings.first_last
        settings = replace(settings, rules=rules, first_last=edges)
    if not placement.layers:
        reasons = "; ".join(dict.fromkeys(f"{op}: {why}" for op, _, why in placement.floats))
        raise ModelError(f"nothing of the model can be quantized ({reasons or 'it has no layer with stored weights'})")
    say(f"{len(placement.layers)} layers to quantize; observing {len(images)} images")
    solving = settings.rounding == "least-squares"
    seen = observe(graph, sorted(set(placement.owners.values())), placement.layers, images, solving)
    found = Calibrated(graph, placement, seen, settings, images)
    if settings.calibration == "auto":
        method = best_calibration(found)
        say(f"calibration {method}")
        found = replace(found, settings=replace(settings, calibration=method))
    return found


def best_calibration(calibrated: Calibrated) -> str:
    """The method among AUTO_METHODS of least output error, tried with 8-bit weights rounded to nearest.

    Ranges are those of every other image, errors those of the images between: on images that a method saw, a range
    without room for larger values looks better than it is.
    """
    graph, placement, images = calibrated.graph, calibrated.placement, calibrated.images
    seen = observe(graph, sorted(set(placement.owners.values())), placement.layers, images[::2], second=False)
    expected = calibrated.observed.outputs.reshape(len(images), -1)[1::2]
    errors, eight = {}, dict.fromkeys(calibrated.layers, MAX_BITS)
    for method in AUTO_METHODS:
        settings = replace(calibrated.settings, calibration=method, rounding="nearest")
        built = build(replace(calibrated, settings=settings, observed=seen, done={}), eight)
        found = outputs_of(parse_model(built, "the model"), images[1::2], graph.output_names[0])
        errors[method] = compare(expected, found.reshape(expected.shape)).error
    return min(errors, key=errors.__getitem__)


def check_images(images: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise DataError unless `images` are enough float32 inputs [n, *shape[1:]], all finite."""
    if images.shape[1:] != shape[1:]:
        hint = ""
        if len(shape) == 4 and images.ndim == 4 and images.shape[1:] == (*shape[2:], shape[1]):  # noqa: PLR2004
            hint = ": they look like [n, H, W, C], add --layout nhwc"
        raise DataError(f"images are {list(images.shape)}, the model reads [n, {', '.join(map(str, shape[1:]))}]{hint}")
    if len(images) < MIN_IMAGES:
        raise DataError(f"too few images to calibrate on ({len(images)}): give at least {MIN_IMAGES}, better 100")
    if images.dtype != np.float32 or not np.isfinite(images).all():
        raise DataError("the images hold NaN or infinity, or are not float32")


# Building ------------------------------------------------------------------------------------------------------------


def build(calibrated: Calibrated, widths: Widths | None = None) -> bytes:
    """The QDQ ONNX file at `widths` {layer: weight bits}, by default those of the settings."""
    choices = calibrated.settings.choices(calibrated.layers, widths)
    tops = {layer.name: layer_weights(calibrated, layer, choices[layer.name]) for layer in calibrated.placement.layers}
    return insert(calibrated.graph, calibrated.placement, choices, activation_grids(calibrated, choices), tops)


def layer_weights(calibrated: Calibrated, layer: Layer, choice: Choice) -> Quantized:
    """One layer's weights at the width of `choice`, rounded by the settings' method."""
    return _weights(calibrated, layer, (choice.weight_bits,), choice, "joint")[choice.weight_bits]


def layer_at(calibrated: Calibrated, layer: Layer, bits: int) -> Quantized:
    """One layer's weights quantized to `bits`, its other choices those of the settings."""
    choice = calibrated.settings.choices(calibrated.layers)[layer.name]
    return layer_weights(calibrated, layer, replace(choice, weight_bits=bits))


def ladder_widths(calibrated: Calibrated, widths: Widths | int) -> dict[str, int]:
    """{layer: weight bits} of a level of a ladder that asks for `widths`, one for all layers or one for each.

    A rule's width bounds its layers' from above; with first_last "8" the first and the last have 8 bits at every level.
    """
    settings, layers = calibrated.settings, calibrated.layers
    greatest = replace(settings, weight_bits=MAX_BITS).choices(layers)
    edges = {layers[0], layers[-1]} if settings.first_last == "8" else set()
    found = {}
    for name in layers:
        bits = widths if isinstance(widths, int) else widths[name]
        found[name] = greatest[name].weight_bits if name in edges else min(bits, greatest[name].weight_bits)
    return found


def build_ladder(
    calibrated: Calibrated, levels: Mapping[Name, Widths], nesting: str = "joint", echo: Echo | None = None
) -> dict[Name, bytes]:
    """{level: QDQ ONNX file} for {level: {layer: weight bits}} (see ladder_widths): weight codes nest; graphs,
    activations and file lengths are the same.

    `nesting` "joint" chooses each top code for all levels together, "truncate" for the top alone. Raises RecipeError
    for asymmetric weights.
    """
    choices, weights = ladder_choices(calibrated, levels), ladder_weights(calibrated, levels, nesting, echo)
    grids = activation_grids(calibrated, choices)
    return {level: insert(calibrated.graph, calibrated.placement, choices, grids, weights[level]) for level in levels}


def ladder_choices(calibrated: Calibrated, levels: Mapping[Any, Widths]) -> dict[str, Choice]:
    """Every layer's choice at its greatest width; raises RecipeError for asymmetric weights."""
    settings = calibrated.settings
    tops = {name: max(widths[name] for widths in levels.values()) for name in calibrated.layers}
    choices = settings.choices(calibrated.layers, tops)
    if any(choice.symmetry != "symmetric" for choice in choices.values()):
        raise RecipeError("levels nest around 0: a ladder takes symmetric weights")
    return choices


def ladder_weights(
    calibrated: Calibrated, levels: Mapping[Name, Widths], nesting: str, echo: Echo | None = None
) -> dict[Name, dict[str, Quantized]]:
    """{level: {layer: weights}}, which nest, rounded layer by layer."""
    say = echo or (lambda text: None)
    if nesting not in NESTINGS:
        raise RecipeError(f"nesting {nesting!r} is unknown: choose from {', '.join(NESTINGS)}")
    choices = ladder_choices(calibrated, levels)
    weights: dict[Name, dict[str, Quantized]] = {level: {} for level in levels}
    for layer in calibrated.placement.layers:
        own = tuple(sorted({widths[layer.name] for widths in levels.values()}))
        found = _weights(calibrated, layer, own, choices[layer.name], nesting)
        for level, widths in levels.items():
            weights[level][layer.name] = found[widths[layer.name]]
        say(f"{layer.name}: {', '.join(map(str, own))} bits")
    return weights


def activation_grids(calibrated: Calibrated, choices: Mapping[str, Choice]) -> dict[tuple[str, int], ActivationGrid]:
    """The grid of every quantized activation at every width that it is read at."""
    settings, owners = calibrated.settings, calibrated.placement.owners
    found: dict[tuple[str, int], ActivationGrid] = {}
    outputs = {owners.get(name, name) for name in calibrated.graph.output_names}
    for name, widths in input_widths(calibrated.placement, choices, calibrated.graph).items():
        owner = owners[name]
        for bits in widths:
            if (owner, bits) not in found:
                method = OUTPUT_METHOD if owner in outputs else settings.calibration
                found[owner, bits] = find_grid(
                    calibrated.observed.samples[owner], bits, method, settings.percentile, settings.activation_symmetry
                )
    return found


def _weights(
    calibrated: Calibrated, layer: Layer, widths: tuple[int, ...], choice: Choice, nesting: str
) -> dict[int, Quantized]:
    """The layer's weights at each of `widths`, which nest; rounded once for the same arguments."""
    key = (layer.name, widths, choice.granularity, choice.symmetry, nesting)
    if key not in calibrated.done:
        input_bits = choice.activation_bits
        grid = find_grid(
            calibrated.observed.samples[calibrated.placement.owners[layer.input]], input_bits,
            calibrated.settings.calibration, calibrated.settings.percentile, calibrated.settings.activation_symmetry,
        )  # fmt: skip
        calibrated.done[key] = quantize_layer(calibrated, layer, widths, choice, nesting, float(grid.scale))
    return calibrated.done[key]


def quantize_layer(
    calibrated: Calibrated, layer: Layer, widths: tuple[int, ...], choice: Choice, nesting: str, input_scale: float
) -> dict[int, Quantized]:
    """Grid, codes, scales and biases of one layer at each of `widths`."""
    settings = calibrated.settings
    if layer.op == "ConvTranspose" and layer.groups > 1:
        choice = replace(choice, granularity="tensor")  # DequantizeLinear has no axis for channels of several groups
    matrix = rows(layer, calibrated.weight(layer)).astype(np.float64)
    moment = calibrated.observed.moments.get(layer.name)
    bias = None if layer.bias is None else calibrated.graph.arrays[layer.bias].astype(np.float64)
    solving = settings.rounding == "least-squares" and moment is not None
    if solving and moment is not None:
        second: np.ndarray = moment.second
        diagonal = np.diagonal(second, axis1=1, axis2=2).astype(np.float64)
    else:
        diagonal = np.ones((1, matrix.shape[1]))
        second = diagonal
    importance = np.repeat(diagonal, len(matrix) // len(diagonal), 0)
    levels = ladder_levels(widths)
    fitted = levels if nesting == "joint" else levels[-1:]
    counts = level_weights(fitted, JOINT_POWER)
    grid = fit_grid(matrix, fitted, choice.granularity, choice.symmetry, importance, counts)
    least = np.zeros(()) if bias is None else np.abs(bias).reshape(-1, 1) / BIAS_LIMIT / input_scale
    least = least.max() if choice.granularity == "tensor" else least
    grid = replace(grid, scale=np.maximum(grid.scale, least))
    codes = least_squares(matrix, second, fitted, grid, counts) if solving else nearest(matrix, fitted, grid)
    return {
        level.bits: _at_level(calibrated, layer, matrix, level, grid, codes, second, choice, bias, least)
        for level in levels
    }


def _at_level(  # noqa: PLR0913, PLR0917
    calibrated: Calibrated, layer: Layer, matrix: np.ndarray, level: Level, grid: Grid, codes: np.ndarray,
    second: np.ndarray, choice: Choice, bias: np.ndarray | None, least: np.ndarray,
) -> Quantized:  # fmt: skip
    """One level: its container codes, a scale of least error for them, not below `least`, a bias that removes the mean
    error."""
    weight, settings, moment = (
        calibrated.weight(layer),
        calibrated.settings,
        calibrated.observed.moments.get(layer.name),
    )
    container, scale, per_channel = level.codes(codes), grid.scale, choice.granularity == "channel"
    if per_channel and settings.rounding == "least-squares":
        fitted = refit_scale(matrix, container - grid.zero, second, scale)
        scale = np.clip(fitted, np.maximum(scale / 2, least), scale * 2)  # far from the grid's it is noise
    scales, zeros = scale.astype(np.float32)[:, 0], grid.zero.astype(np.int8)[:, 0]
    kept = unrows(layer, container.astype(np.int8), weight.shape)
    if not per_channel:
        scales, zeros = np.asarray(scales.max()), np.asarray(zeros[0])
    quantized = Quantized(kept, scales, zeros, None)
    if bias is not None and moment is not None and settings.bias_correction:
        bias = bias + mean_output(layer, weight, moment) - mean_output(layer, quantized.real(layer), moment)
    return replace(quantized, bias=None if bias is None else bias.astype(np.float32))


# Judging -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """Against the float network on the same images: relative root-mean-square error of the first output; percent of
    images with the same largest output; percent with the right one where labels are known.
    """

    error: float
    agreement: float
    accuracy: float | None

    def line(self) -> str:
        """For people."""
        text = f"output error {self.error:.2%}, {self.agreement:.2f}% of images with the float network's class"
        return text if self.accuracy is None else f"{text}, {self.accuracy:.2f}% right"


def effect(calibrated: Calibrated, data: bytes, labels: np.ndarray | None = None) -> Effect:
    """Run a built file on the calibration images; see also compare()."""
    name = calibrated.graph.output_names[0]
    return compare(
        calibrated.observed.outputs, outputs_of(parse_model(data, "the model"), calibrated.images, name), labels
    )


def compare(expected: np.ndarray, found: np.ndarray, labels: np.ndarray | None = None) -> Effect:
    """Outputs [n, ...] of two networks on the same images."""
    size = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2))) or 1.0
    error = float(np.sqrt(np.mean((expected.astype(np.float64) - found) ** 2))) / size
    classes = [outputs.reshape(len(outputs), -1).argmax(1) for outputs in (expected, found)]
    accuracy = None if labels is None else float(np.mean(classes[1] == labels) * 100)
    return Effect(error, float(np.mean(classes[0] == classes[1]) * 100), accuracy)
