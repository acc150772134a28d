"""Supernet + SubnetSpec -> FrozenNet: calibrate for this mix, fold, round to integers, evaluate what will ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy import integer
from qdeploy.data import Dataset
from qdeploy.errors import ModelError
from qdeploy.frozen import KEEPS_CODES, FrozenNet, Node, Quantizer, WeightBits
from qdeploy.frozen import Tensor as Activation
from qdeploy.quant.calibrate import calibrated
from qdeploy.quant.graph import Step
from qdeploy.quant.simulated import INPUT_SCALE, SimulatedNet
from qdeploy.space import SubnetSpec

GOLDEN_IMAGES = 32
BIAS_LIMIT = 1 << 30  # keeps bias + accumulator inside int32


# ---- integers --------------------------------------------------------------------------------------------------


def _norm_factors(net: SimulatedNet, step: Step, spec: SubnetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel factor and bias of a layer after its batch norm is folded, float64 [O]."""
    layer = cast("nn.Conv2d | nn.Linear", step.module)
    outputs = layer.weight.shape[0]
    bias = np.zeros(outputs) if layer.bias is None else layer.bias.detach().double().numpy()
    norm = net.norm(step, spec)
    if norm is None:
        return np.ones(outputs), bias
    mean, variance = cast(Tensor, norm.running_mean).double().numpy(), cast(Tensor, norm.running_var).double().numpy()
    gamma = norm.weight.detach().double().numpy() if norm.affine else np.ones(outputs)
    beta = norm.bias.detach().double().numpy() if norm.affine else np.zeros(outputs)
    factor = gamma / np.sqrt(variance + norm.eps)
    return factor, beta + (bias - mean) * factor


@dataclass
class _Assembly:
    """What freezing collects on its way through the graph."""

    nodes: list[Node]
    activations: dict[str, Activation]
    tensors: dict[str, np.ndarray]
    weights: dict[str, WeightBits]


def _layer_tensors(net: SimulatedNet, step: Step, spec: SubnetSpec, source: Quantizer, out: _Assembly) -> None:
    """Codes, scales, zero point and int32 bias of one layer (folding goes into scale and bias, never into codes)."""
    layer = net.layer_codes(step, spec)
    factor, bias = _norm_factors(net, step, spec)
    if not (factor > 0).all():
        raise ModelError(f"layer {step.name}: a batch-norm factor is not positive, so its scale would be negative")
    scale = np.broadcast_to(layer.step * factor, factor.shape).astype(np.float32)
    unit = (np.float32(source.scale) * scale).astype(np.float64)
    codes = np.rint(bias / unit)
    if not (np.abs(codes) < BIAS_LIMIT).all():
        raise ModelError(
            f"layer {step.name}: the bias does not fit int32 at its scale; a channel's weights are all but zero"
        )
    out.weights[step.name] = layer.bits
    out.tensors[f"{step.name}.weight"] = layer.codes
    out.tensors[f"{step.name}.weight_scale"] = scale
    out.tensors[f"{step.name}.bias"] = codes.astype(np.int32)
    if layer.zero_point:
        out.tensors[f"{step.name}.weight_zero_point"] = np.array(layer.zero_point, np.int8)


def _limit(quantizer: Quantizer, ceiling: float | None) -> Quantizer:
    """Lower `hi` to a Relu6's ceiling; that needs a Clip in the graph."""
    if ceiling is None:
        return quantizer
    hi = min(quantizer.hi, int(np.rint(np.float32(ceiling) / np.float32(quantizer.scale))) + quantizer.zero_point)
    return Quantizer(quantizer.scale, quantizer.zero_point, quantizer.lo, hi, clip=True)


def _freeze_step(
    net: SimulatedNet, step: Step, spec: SubnetSpec, shapes: Mapping[str, tuple[int, ...]], out: _Assembly
) -> None:
    place = net.placements[step.name]
    lows = net.reads_low(step)
    inputs = tuple(net.placements[name].low_name if lows else name for name in step.inputs)
    source = out.activations[inputs[0]].quantizer
    if step.op in KEEPS_CODES:
        quantizer = source
    elif place.stream:
        stream = net.stream_quantizer(step.name, spec)
        assert stream is not None
        quantizer = _limit(stream.frozen(clip=False), step.ceiling)
    else:
        quantizer = _limit(net.low_quantizer(step.name, spec).frozen(clip=True), step.ceiling)
    if step.op in ("conv", "linear"):
        _layer_tensors(net, step, spec, source, out)
    out.nodes.append(Node(step.name, step.op, inputs, step.name, step.relu, step.attributes))
    out.activations[step.name] = Activation(step.name, shapes[step.name], quantizer)
    _freeze_low(net, step.name, spec, shapes, out)


def _freeze_low(
    net: SimulatedNet, tensor: str, spec: SubnetSpec, shapes: Mapping[str, tuple[int, ...]], out: _Assembly
) -> None:
    """The second quantizer of a tensor whose 8-bit form other readers need."""
    place = net.placements[tensor]
    if not (place.stream and place.low):
        return
    quantizer = net.low_quantizer(tensor, spec).frozen(clip=True)
    out.nodes.append(Node(place.low_name, "requantize", (tensor,), place.low_name))
    out.activations[place.low_name] = Activation(place.low_name, shapes[tensor], quantizer)


@torch.no_grad()
def _shapes(net: SimulatedNet, spec: SubnetSpec, image: Tensor) -> dict[str, tuple[int, ...]]:
    trace: dict[str, Tensor] = {}
    net.eval()
    net(image, spec, trace)
    shapes = {name.removesuffix(".low"): tuple(value.shape[1:]) for name, value in trace.items()}
    return shapes


def _assemble(
    net: SimulatedNet, spec: SubnetSpec, shapes: Mapping[str, tuple[int, ...]], source: Quantizer
) -> _Assembly:
    """All nodes, quantizers and integer tensors of a calibrated network."""
    out = _Assembly([], {net.graph.input: Activation(net.graph.input, shapes[net.graph.input], source)}, {}, {})
    _freeze_low(net, net.graph.input, spec, shapes, out)
    for step in net.graph.steps:
        _freeze_step(net, step, spec, shapes, out)
    return out


def small_tensors(net: SimulatedNet, spec: SubnetSpec) -> bytes:
    """What a level ships besides weight codes: scales, biases, zero points, Clip bounds, as they lie in the file."""
    names = [net.graph.input, *net.steps]
    out = _assemble(net, spec, dict.fromkeys(names, ()), PIXELS)
    parts = []
    for node in out.nodes:
        if node.op in ("conv", "linear"):
            scale = out.tensors[f"{node.name}.weight_scale"]
            source = np.float32(out.activations[node.inputs[0]].quantizer.scale)
            parts += [out.tensors[f"{node.name}.bias"].tobytes(), (source * scale).tobytes(), scale.tobytes()]
        q = out.activations[node.output].quantizer
        if node.op not in KEEPS_CODES:
            parts.append(np.float32(q.scale).tobytes() + bytes([q.zero_point, q.lo, q.hi]))
    return b"".join(parts)


def check_integer(net: SimulatedNet) -> None:
    """Raise ModelError when layers were left in float: a legal model is integer from end to end."""
    if net.float_ends:
        raise ModelError('first_last = "float" leaves layers in float: such a network trains but cannot be frozen')


PIXELS = Quantizer(float(np.float32(INPUT_SCALE)), 0)


def to_integers(
    net: SimulatedNet, spec: SubnetSpec, name: str, golden: np.ndarray, source: Quantizer = PIXELS
) -> FrozenNet:
    """Freeze a calibrated network whose input has the quantizer `source`.

    Goldens are the integer reference's codes on the input codes `golden`, uint8 [n, C, H, W].

    Raises ModelError when layers were left in float, since a legal model is integer from end to end.
    """
    check_integer(net)
    out = _assemble(net, spec, _shapes(net, spec, torch.zeros(1, *golden.shape[1:])), source)
    frozen = FrozenNet(
        name, spec, net.graph.input, net.graph.output, tuple(out.nodes), out.activations, out.weights, out.tensors, {}
    )
    codes = integer.run(frozen, golden)
    report = {"parity": simulation_parity(net, spec, frozen, golden)}
    return replace(frozen, golden=codes, report=report).check()


@torch.no_grad()
def simulation_parity(net: SimulatedNet, spec: SubnetSpec, frozen: FrozenNet, images: np.ndarray) -> dict[str, Any]:
    """How many codes of the trained simulation differ from the integers, each layer fed the integers' codes.

    Two counts {codes, differing, largest_step}: `simulation`, with the int32 biases put into the simulation (what is
    left is the order of float32 operations), and `int32_bias`, without (what rounding the biases costs on top).
    """
    codes = integer.run(frozen, images)
    values = {t: torch.from_numpy(integer.dequantize(codes[t], frozen.activations[t].quantizer)) for t in codes}
    net.eval()
    counts = {key: {"codes": 0, "differing": 0, "largest_step": 0} for key in ("simulation", "int32_bias")}
    for step in net.graph.steps:
        inputs = [net.placements[name].low_name if net.reads_low(step) else name for name in step.inputs]
        result = net.compute(step, [values[name] for name in inputs], spec, relu=False).numpy()
        rounded = result + _bias_change(net, step, spec, frozen, inputs[0]) if step.module is not None else result
        for key, value in (("simulation", rounded), ("int32_bias", result)):
            quantizer = frozen.activations[step.name].quantizer
            expected = integer.quantize(np.maximum(value, 0) if step.relu else value, quantizer)
            distance = np.abs(expected.astype(np.int32) - codes[step.name].astype(np.int32))
            counts[key]["codes"] += distance.size
            counts[key]["differing"] += int((distance > 0).sum())
            counts[key]["largest_step"] = max(counts[key]["largest_step"], int(distance.max(initial=0)))
    return counts


def _bias_change(net: SimulatedNet, step: Step, spec: SubnetSpec, frozen: FrozenNet, source: str) -> np.ndarray:
    """Rounded minus trained bias of a layer, float32, broadcastable to its output."""
    unit = np.float32(frozen.activations[source].quantizer.scale) * frozen.tensors[f"{step.name}.weight_scale"]
    rounded = frozen.tensors[f"{step.name}.bias"] * unit.astype(np.float64)
    change = (rounded - _norm_factors(net, step, spec)[1]).astype(np.float32)
    return change[:, None, None] if step.op == "conv" else change


def integer_accuracy(frozen: FrozenNet, data: Dataset) -> float:
    """Top-1 accuracy in per cent of the integers themselves."""
    output = integer.logits(frozen, data.images)
    return 100.0 * float((output.argmax(1) == data.labels).mean())


def input_codes(net: SimulatedNet, spec: SubnetSpec, images: np.ndarray) -> np.ndarray:
    """What the integers of `spec` read of images uint8 [n, C, H, W]: those, or resized ones."""
    pixels = net.input_of(torch.from_numpy(images).float().div_(255.0), spec)
    return pixels.mul(255.0).round_().to(torch.uint8).numpy()


def extract(net: SimulatedNet, spec: SubnetSpec, name: str, calibration: np.ndarray, test: Dataset | None) -> FrozenNet:
    """Calibrate, freeze and evaluate one subnet. `calibration`: training images uint8 [n, C, H, W]."""
    mixed = calibrated(net, spec, calibration)
    frozen = to_integers(mixed, spec, name, input_codes(mixed, spec, calibration[:GOLDEN_IMAGES]))
    if test is None:
        return frozen
    test = test.with_images(input_codes(mixed, spec, test.images), test.labels)
    report = dict(frozen.report) | {"accuracy": integer_accuracy(frozen, test), "test_images": len(test.labels)}
    return replace(frozen, report=report)
