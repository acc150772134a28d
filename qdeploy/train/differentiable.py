"""Differentiable mixed precision: uniform widths, then learned ones under budgets, then fixed ones (section 3.1).

While widths are learned, the loss has a penalty for each budget, `b * max(size / budget - 1, 0)^2` (eq. 2, in units of
the budget). b rises linearly from 0 in the first half of the phase. Steps and ranges are updated every few steps only,
with the gradients collected in between, so that weights and batch norms keep up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.quant.differentiable import KIB, DifferentiableNet
from qdeploy.quant.parallel import average_gradients
from qdeploy.recipe import Schedule
from qdeploy.train.eqnet import MAX_GRADIENT_NORM, distance
from qdeploy.train.groups import decay_groups
from qdeploy.train.loop import Phase, cosine

RAMP = 0.5  # part of the precision phase in which the penalty grows


class FixedWidths:
    """Phases `uniform` and, behind learned widths, `quantized`: step and range move together, no penalty."""

    def __init__(
        self, name: Literal["uniform", "quantized"], net: DifferentiableNet, schedule: Schedule, teacher: nn.Module,
        images: int,
    ) -> None:  # fmt: skip
        self.name: str = name
        self.module, self.net, self.schedule, self.teacher = net, net, schedule, teacher
        self.total = images // schedule.batch * schedule.epochs
        self.done = 0

    def groups(self) -> list[dict[str, Any]]:
        return decay_groups(self.net.network_parameters(), self.schedule.weight_decay)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with the labels, or as the recipe's distillation says."""
        output = self.net(images, self.net.only)
        kind = self.net.choice.distillation
        if kind == "none":
            return F.cross_entropy(output, labels)
        with torch.no_grad():
            soft = self.teacher(images)
        if kind == "soft":
            return F.cross_entropy(output, soft.softmax(1))
        return F.cross_entropy(output, labels) + distance(output, soft)

    def penalty(self, step: int) -> Tensor:
        """What sizes above the budgets cost at a step."""
        return torch.zeros(())

    def backward(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        if not self.net.training:
            self.net.train()
        if step == 0 and self.name == "quantized":
            self.net.settle()
        loss, penalty = self.loss(images, labels), self.penalty(step)
        (loss + penalty).backward()
        average_gradients(self.net.parameters())
        for entry in self.net.ranges():
            entry.collect()
        nn.utils.clip_grad_norm_(self.net.network_parameters(), MAX_GRADIENT_NORM)
        self.done = step + 1
        return {self.name: float(loss.detach()), "penalty": float(penalty.detach())}

    def after_step(self) -> None:
        choice = self.net.choice
        if self.done % choice.update_steps == 0:
            self.net.update_ranges(choice.range_rate * cosine(self.done, self.total), self.name == "precision")
        self.net.project()


class LearnedWidths(FixedWidths):
    """Phase `precision`."""

    def __init__(self, net: DifferentiableNet, schedule: Schedule, teacher: nn.Module, images: int) -> None:
        super().__init__("uniform", net, schedule, teacher, images)
        self.name = "precision"

    def penalty(self, step: int) -> Tensor:
        choice, grown = self.net.choice, min(1.0, step / (RAMP * self.total))
        of_weights = self.net.weight_bits() / (choice.weight_kib * KIB)
        of_activations = self.net.activation_bits() / (choice.activation_kib * KIB)
        excess = torch.stack([of_weights, of_activations]).sub(1.0).clamp_min(0.0)
        return choice.penalty * grown * excess.square().sum().float()


def phases(net: DifferentiableNet, last: Schedule, teacher: nn.Module, images: int) -> Sequence[Phase]:
    """All phases behind the float one, on so many images."""
    choice = net.choice
    found: list[Phase] = [FixedWidths("uniform", net, choice.uniform_phase, teacher, images)]
    if choice.precision_phase is not None:
        found.append(LearnedWidths(net, choice.precision_phase, teacher, images))
    return [*found, FixedWidths("quantized", net, last, teacher, images)]
