"""A training small enough for tests: real images, two layers, seconds."""

from __future__ import annotations

from typing import Any

from qdeploy.recipe import Recipe, from_dict


def tiny_recipe(images: int = 512, epochs: int = 2, **quantization: Any) -> Recipe:
    """`tiny` on the shipped Fashion-MNIST sample."""
    phase = {"epochs": epochs, "weight_decay": 1e-4, "batch": 64}
    return from_dict(
        {
            "name": "tiny",
            "network": {"name": "tiny", "width": 8},
            "data": {"name": "fashion-mnist", "split": "sample", "train_images": images},
            "quantization": {"widths": [2, 3, 4]} | quantization,
            "float_phase": phase | {"learning_rate": 0.1},
            "quantized_phase": phase | {"learning_rate": 0.05},
        }
    )


def supernet_recipe(
    images: int = 256, stages: int = 2, shape: dict[str, Any] | None = None, **quantization: Any
) -> Recipe:
    """BatchQuant on the shipped sample, in one stage or two: two steps in each phase.

    `shape`: the network's resolutions and widths.
    """
    phase = {"epochs": 1, "weight_decay": 1e-4, "batch": 128}
    mixed: dict[str, Any] = {"mixed_phase": phase | {"learning_rate": 0.02}} if stages == 2 else {}  # noqa: PLR2004
    return from_dict(
        {
            "name": "supernet",
            "network": {"name": "mobilenetv3-tiny", "width": 8, "stem_stride": 2} | (shape or {}),
            "data": {"name": "fashion-mnist", "split": "sample", "train_images": images},
            "quantization": {"method": "batchquant", "random_subnets": 1} | mixed | quantization,
            "float_phase": phase | {"learning_rate": 0.05},
            "quantized_phase": phase | {"learning_rate": 0.02},
        }
    )


def elastic_recipe(images: int = 512, epochs: int = 1, network: str = "resnet8", **quantization: Any) -> Recipe:
    """EQ-Net on the shipped sample, 500 images of which are held out."""
    phase = {"epochs": epochs, "weight_decay": 1e-4, "batch": 64}
    return from_dict(
        {
            "name": "elastic",
            "network": {"name": network, "width": 8, "stem_stride": 2},
            "data": {"name": "fashion-mnist", "split": "sample", "train_images": images, "held_out": 500},
            "quantization": {"method": "eqnet", "weight_bits": [2, 4, 8], "activation_bits": [2, 4, 8]} | quantization,
            "float_phase": phase | {"learning_rate": 0.1},
            "quantized_phase": phase | {"learning_rate": 0.01},
        }
    )
