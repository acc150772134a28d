"""The full-precision phase: plain cross-entropy on the float backbone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.quant.network import MIN_NORM_FACTOR
from qdeploy.quant.parallel import average_gradients
from qdeploy.recipe import Schedule
from qdeploy.train.groups import decay_groups


class FullPrecision:
    """Phase `float`; batch-norm factors are kept positive so that they can be folded into positive scales."""

    name = "float"

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        self.module, self.schedule = network, schedule

    def groups(self) -> list[dict[str, Any]]:
        return decay_groups(list(self.module.parameters()), self.schedule.weight_decay)

    def backward(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        self.module.train()
        loss = F.cross_entropy(self.module(images).float(), labels)
        loss.backward()
        average_gradients(self.module.parameters())
        return {"fp": float(loss.detach())}

    @torch.no_grad()
    def after_step(self) -> None:
        for module in self.module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.clamp_(min=MIN_NORM_FACTOR)
