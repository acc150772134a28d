"""Any ordinary torch network -> FrozenNet at 8 bits, after training: per-channel weights, min-max ranges.

from qdeploy.export import export_onnx
from qdeploy.freeze import freeze

export_onnx(freeze(network, images), Path("model.onnx"))
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from qdeploy.errors import ModelError
from qdeploy.frozen import FrozenNet, Quantizer
from qdeploy.integer import dequantize, quantize
from qdeploy.quant.calibrate import CALIBRATION_BATCH, CALIBRATION_IMAGES, observe
from qdeploy.quant.graph import fold_norms, read_graph
from qdeploy.quant.network import QuantNet
from qdeploy.recipe import Quantization
from qdeploy.subnet import GOLDEN_IMAGES, PIXELS, to_integers

CHOICE = Quantization(widths=(8,), activation_bits=8)


def input_quantizer(images: np.ndarray) -> Quantizer:
    """uint8 images keep their pixels as codes (the network sees pixel / 255); float ones get a min-max range."""
    if images.dtype == np.uint8:
        return PIXELS
    low, high = min(0.0, float(images.min())), max(0.0, float(images.max()))
    scale = np.float32((high - low) / 255 or 1.0)
    return Quantizer(float(scale), int(np.clip(np.rint(-low / scale), 0, 255)))


def freeze(network: nn.Module, images: np.ndarray, name: str = "network") -> FrozenNet:
    """Quantize a trained float network with calibration images, uint8 or float32 [n, C, H, W].

    The network may hold Conv2d, BatchNorm2d (behind a Conv2d), Linear, ReLU, ReLU6, Hardswish, Hardsigmoid, + and * of
    two tensors, max, average and global average pooling and flatten, as modules or functions; it is not changed. Raises
    ModelError that lists what cannot be taken.
    """
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32) or not len(images):  # noqa: PLR2004
        raise ModelError(f"calibration images are uint8 or float32 [n, C, H, W], not {images.dtype} {images.shape}")
    if images.dtype == np.float32 and not np.isfinite(images).all():
        raise ModelError("the calibration images hold NaN or infinity")
    network = copy.deepcopy(network).eval()
    if any(p.dtype != torch.float32 for p in network.parameters()):
        raise ModelError("the network is not float32: call network.float() first")
    if any(isinstance(m, nn.BatchNorm2d) and m.running_mean is None for m in network.modules()):
        raise ModelError("a BatchNorm2d keeps no running statistics: nothing can be folded")
    if any(not bool(torch.isfinite(p).all()) for p in network.parameters()):
        raise ModelError("the network's weights hold NaN or infinity")
    source = input_quantizer(images)
    codes = images[:CALIBRATION_IMAGES] if images.dtype == np.uint8 else quantize(images[:CALIBRATION_IMAGES], source)
    inputs = torch.from_numpy(dequantize(codes, source))
    try:
        with torch.no_grad():
            expected = network(inputs[:GOLDEN_IMAGES])
    except (RuntimeError, TypeError, ValueError) as e:
        raise ModelError(f"the network does not run on these images {list(images.shape)}: {e}") from e
    graph = fold_norms(read_graph(network, inputs[:1]))
    net = QuantNet(network, graph, name, CHOICE, signed_input=source.zero_point > 0)
    for step in graph.layers:
        assert isinstance(step.module, nn.Conv2d | nn.Linear)
        net.weight_quantizer(step).per_channel(step.module.weight)
    spec = net.uniform(8)
    for quantizer, rows in observe(net, spec, inputs.split(CALIBRATION_BATCH)).items():
        positive = quantizer.hi - quantizer.zero_point
        quantizer.step.data.fill_(max([1e-5, *(row[1] for row in rows)]) / positive)
    frozen = to_integers(net, spec, name, codes[:GOLDEN_IMAGES], source)
    return _checked(frozen, expected)


def _checked(frozen: FrozenNet, expected: torch.Tensor) -> FrozenNet:
    """Compare the integers with the float network itself; the simulation could be wrong in the same way as they are."""
    output = dequantize(frozen.golden[frozen.output], frozen.activations[frozen.output].quantizer)
    if not isinstance(expected, torch.Tensor) or tuple(expected.shape) != output.shape:
        raise ModelError("the network must return one tensor [n, outputs]")
    error = float(np.sqrt(np.mean((output - expected.numpy()) ** 2)))
    spread = float(expected.std(0, correction=0).mean()) or float(expected.abs().mean()) or 1.0
    report = dict(frozen.report) | {"float": {"rms_error": error, "relative": error / spread}}
    return replace(frozen, report=report)
