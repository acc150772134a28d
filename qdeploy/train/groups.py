"""Optimizer groups: weight decay on weights only, never on batch norm, biases or steps."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(parameters: list[nn.Parameter], weight_decay: float, rate: float = 1.0) -> list[dict[str, Any]]:
    """Two groups: tensors of two or more dimensions decay, the others do not. `rate` multiplies the learning rate."""
    weights = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay, "rate": rate},
              {"params": others, "weight_decay": 0.0, "rate": rate}]  # fmt: skip
    return [group for group in groups if group["params"]]
