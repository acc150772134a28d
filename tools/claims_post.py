"""Cells of the claims table that quantize a trained float network without training it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qdeploy.data import Dataset
from qdeploy.export.parity import stock_session
from qdeploy.ptq import mixquant
from qdeploy.ptq.prepare import prepare
from qdeploy.ptq.quantize import Calibrated, build, calibrate
from qdeploy.ptq.reconstruct import reconstruct
from qdeploy.ptq.settings import Settings

IMAGES = 512  # for calibration
OPSET = 17
ACCURACY, WEIGHT_KIB = "accuracy", "weight KiB"
FIGURES = (ACCURACY, WEIGHT_KIB)


def as_onnx(network: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write a float network that reads images [1, *shape]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this exporter is the older one
        names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
        torch.onnx.export(network, (torch.zeros(1, *shape),), str(path), opset_version=OPSET, dynamo=False, **names)


def as_read(images: np.ndarray) -> np.ndarray:
    """Images uint8 as the networks read them: float32 in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)


def weight_bits(calibrated: Calibrated, widths: Mapping[str, int] | None) -> int:
    """Bits of all weights at `widths`, or at those of the settings."""
    choices = calibrated.settings.choices(calibrated.layers, widths)
    return mixquant.size_bits({name: choice.weight_bits for name, choice in choices.items()}, calibrated.sizes())


def same_size(calibrated: Calibrated) -> dict[str, int]:
    """MixQuant's widths with the least QEM whose weights take no more than the settings' uniform ones."""
    table = mixquant.error_table({layer.name: calibrated.weight(layer) for layer in calibrated.placement.layers})
    size = partial(weight_bits, calibrated)
    return mixquant.choose(table, mixquant.for_size(table, size, size(None)))


def measure(
    network: nn.Module, post: Mapping[str, Any], data: Dataset, test: Dataset, echo: Callable[[str], None]
) -> dict[str, float]:
    """Every one of FIGURES of a trained float network, in evaluation mode, after quantization as `post` says.

    `post`: {"settings": fields of Settings}; with "mixquant" true, MixQuant's widths of the same size; with
    "reconstruct", BRECQ of so many steps a block. `data` holds the training images, the first of which calibrate.
    Accuracy is top-1 in per cent of the QDQ model in ONNX Runtime; weights count at their widths.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        as_onnx(network, data.images.shape[1:], path)
        graph = prepare(path)
        calibrated = calibrate(graph, as_read(data.images[:IMAGES]), Settings(**post["settings"]), echo)
        widths = same_size(calibrated) if post.get("mixquant") else None
        if "reconstruct" in post:
            built = reconstruct(calibrated, widths, post["reconstruct"], Path(folder) / "blocks", echo)
        else:
            built = build(calibrated, widths)
    run = stock_session(built)
    name, images = graph.input, as_read(test.images)
    found = np.concatenate([run({name: image[None]})[0] for image in images])
    kib = weight_bits(calibrated, widths) / 8 / 1024
    return {ACCURACY: 100.0 * float((found.argmax(1) == test.labels).mean()), WEIGHT_KIB: kib}
