"""Mixed-precision levels under a byte budget: eq. 12 of vertical layering, with bytes as they are really sent.

Chooses for every layer how many planes to take so that the summed squared error of the truncated weights against the
top ones is least, `sum ||(w_i + z_i) s_i - (w_n + z_n) s_n||^2` in dequantized units, within a budget of coded planes
plus the level's small tensors. Of a nested supernet that is done for one architecture with given activation widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from torch import nn

from qdeploy.bundle.codec import encode
from qdeploy.bundle.planes import gather, split
from qdeploy.errors import RecipeError
from qdeploy.quant.calibrate import reestimate_norms
from qdeploy.quant.graph import Step
from qdeploy.quant.grid import container_codes
from qdeploy.quant.layers import WeightQuantizer
from qdeploy.quant.network import QuantNet
from qdeploy.quant.simulated import SimulatedNet, safe
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.space import SubnetSpec
from qdeploy.subnet import check_integer, small_tensors

SIDE_MARGIN = 1.03  # calibration for a mix changes the small tensors' values, and with them how well they code
GRAIN = 20_000  # bytes are rounded up to budget / GRAIN, which bounds the number of states
NOISE_IMAGES, NOISE_SIZE = 64, 32  # stand in for real images where only the sizes of small tensors are asked for
Nested = QuantNet | BatchQuantNet


@dataclass(frozen=True)
class Option:
    """One layer at one width: coded bytes of its planes, squared error against the top width."""

    bits: int
    bytes: int
    error: float


def nested(net: SimulatedNet) -> Nested:
    """`net` itself; RecipeError where its low-bit codes are no prefixes of its high-bit ones."""
    if isinstance(net, QuantNet) or (isinstance(net, BatchQuantNet) and net.choice.weights == "vertical"):
        return net
    raise RecipeError(
        "a budget shares out bit planes, and low-bit codes of this run are no prefixes of high-bit ones: EQ-Net, and "
        'BatchQuant with weights = "lsq", learn the steps of each width by themselves. Choose --bits or --spec, or '
        'train with method vertical or with weights = "vertical"'
    )


def layer_options(net: Nested, step: Step) -> list[Option]:
    """What each trained width of a layer costs; one option for a fixed layer."""
    layer = cast("nn.Conv2d | nn.Linear", step.module)
    quantizer = cast(WeightQuantizer, net.weights[safe(step.name)])
    top = quantizer.top
    codes = quantizer.top_codes(layer.weight)
    widths = [8] if step.name in net.fixed else list(net.widths)
    if widths[-1] != top:
        raise RecipeError(f"layer {step.name}: widths {widths} do not reach its top width {top}")
    unused = top - _width(codes)  # leading planes that say nothing are not sent
    held = [max(1, width - unused) for width in widths]
    parts = [held[0], *(high - low for low, high in zip(held, held[1:], strict=False))]
    left_aligned = (codes + (1 << (top - unused - 1))).astype(np.uint8).reshape(codes.shape[0], -1)
    coded = split(left_aligned, top - unused, [part for part in parts if part])
    cost = iter([sum(len(piece.data) for piece in gather([part])) for part in coded])
    sizes = np.cumsum([next(cost) if part else 0 for part in parts])
    reference = container_codes(codes, top, top, quantizer.compensation).astype(np.float64)
    options = []
    for width, size in zip(widths, sizes, strict=True):
        found = container_codes(codes, width, top, quantizer.compensation) - reference
        error = float((found**2).sum() * float(np.max(quantizer.container_step)) ** 2)
        options.append(Option(width, int(size), error))
    return options


def _width(codes: np.ndarray) -> int:
    """Fewest bits of two's complement that hold all codes, at least 1."""
    return max(int(codes.max(initial=0)).bit_length(), int(~codes.min(initial=0)).bit_length()) + 1


def side_bytes(net: Nested, spec: SubnetSpec | None = None) -> int:
    """Coded bytes of a level's small tensors, and a margin: the most that a trained width needs.

    Of a supernet those of `spec` (default: its largest network at the top width), with the ranges that noise has: batch
    norm makes them about as wide as those of images.
    """
    check_integer(net)
    if isinstance(net, QuantNet):
        found = [small_tensors(net, net.uniform(width)) for width in net.widths]
    else:
        spec = spec or net.uniform(net.widths[-1])
        own = net.subnet(spec)
        channels = cast(nn.Conv2d, own.graph.layers[0].module).in_channels
        shape = (NOISE_IMAGES, channels, NOISE_SIZE, NOISE_SIZE)
        reestimate_norms(own, spec, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        found = [small_tensors(own, spec)]
    return int(max(len(encode(tensors)[1]) for tensors in found) * SIDE_MARGIN)


def of_architecture(net: Nested, spec: SubnetSpec) -> Nested:
    """The network whose layers `spec` names: `net`, or a subnet of it."""
    return net if isinstance(net, QuantNet) else net.subnet(spec)


def level_bytes(net: SimulatedNet, spec: SubnetSpec) -> int:
    """What a budget counts for `spec`: coded planes of every layer plus the level's small tensors."""
    whole = nested(net)
    whole.check_spec(spec)
    own = of_architecture(whole, spec)
    chosen = [
        next(option.bytes for option in layer_options(own, step) if option.bits == spec[step.name].weight_bits)
        for step in own.graph.layers
    ]
    return side_bytes(whole, spec) + sum(chosen)


def cheapest(options: Mapping[str, list[Option]], budget: int) -> dict[str, int]:
    """Width of every layer with the least summed error within `budget` bytes (exact up to rounding bytes up).

    Raises RecipeError that names the least reachable budget when none fits.
    """
    least = sum(min(option.bytes for option in row) for row in options.values())
    if least > budget:
        raise RecipeError(f"a budget of {budget} bytes cannot hold the lowest widths: they need {least} bytes")
    grain = max(1, budget // GRAIN)
    states: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    remaining = least
    for row in options.values():
        remaining -= min(option.bytes for option in row)
        grown = sorted(
            (used + -(-option.bytes // grain) * grain, error + option.error, (*chosen, option.bits))
            for used, error, chosen in states
            for option in row
        )
        states, best = [], float("inf")
        for state in grown:
            if state[1] < best and (state[0] + remaining <= budget or not states):
                states.append(state)
                best = state[1]
    fitting = [state for state in states if state[0] <= budget] or states[:1]
    return dict(zip(options, min(fitting, key=lambda state: state[1])[2], strict=True))


def allocate(
    net: SimulatedNet, budget: int, nested_with: SubnetSpec | None = None, architecture: SubnetSpec | None = None
) -> SubnetSpec:
    """The spec that eq. 12 chooses within `budget` bytes of coded planes and small tensors.

    `nested_with` is a level that the new one must extend: no layer goes below its width there. A level of a supernet
    has the architecture and the activation widths of `nested_with`, or else of `architecture` (default: of the largest
    network at the top width). Raises RecipeError for a budget that is too small, or a network whose codes do not nest.
    """
    whole = nested(net)
    for spec in (nested_with, architecture):
        if spec is not None:
            whole.check_spec(spec)
    if architecture is not None and (nested_with is not None or isinstance(whole, QuantNet)):
        raise RecipeError(
            "an architecture is chosen for a supernet, and only without a level to nest with: leave it out"
        )
    basis = nested_with or architecture or whole.uniform(whole.widths[-1])
    own = of_architecture(whole, basis)
    options = {}
    for step in own.graph.layers:
        floor = 0 if nested_with is None else nested_with[step.name].weight_bits
        options[step.name] = [option for option in layer_options(own, step) if option.bits >= floor]
    side = side_bytes(whole, basis)
    least = side + sum(row[0].bytes for row in options.values())
    if least > budget:
        raise RecipeError(
            f"a budget of {budget} bytes is too small: the lowest widths need {least} ({side} of them small tensors)"
        )
    chosen = cheapest(options, budget - side)
    if isinstance(whole, QuantNet):
        return complete(whole, chosen)
    return replace(basis, layers=tuple(replace(entry, weight_bits=chosen[entry.layer]) for entry in basis.layers))


def complete(net: QuantNet, weight_bits: Mapping[str, int]) -> SubnetSpec:
    """A spec from weight widths: layers that read one tensor get the greatest width among them as activation width."""
    activations = {}
    for step in net.graph.layers:
        readers = [s.name for s in net.graph.consumers(step.inputs[0]) if net.reads_low(s)]
        activations[step.name] = max(weight_bits[name] for name in readers) if net.reads_low(step) else 8
    return SubnetSpec.build(net.name, {name: (bits, activations[name]) for name, bits in weight_bits.items()})
