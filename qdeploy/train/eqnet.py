"""EQ-Net: one training for every width, granularity and symmetry.

Every step runs three subnets on the same batch: all layers at the highest widths (H), every gene drawn at random (R),
all layers at the lowest widths (L); H and L with one granularity and symmetry each, drawn at random. H learns from the
labels, R from H and the labels, L from R and the labels (group progressive guidance); the gradients are summed. A
regularization draws the weights towards a uniform distribution, which tolerates many quantizers (theorem 1).
"""

from __future__ import annotations

from random import Random
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.quant.eqnet import EQNet
from qdeploy.quant.parallel import average_gradients
from qdeploy.recipe import EQNetQuantization, Schedule
from qdeploy.space import SubnetSpec
from qdeploy.train.groups import decay_groups

MAX_GRADIENT_NORM = 10.0  # usual norms lie below 5; a mobile net's first steps at 2 bits reach thousands
UNIFORM_KURTOSIS = 1.8
UNIFORM_SKEWNESS = 0.0


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax outputs [n, classes], mean over the batch; no gradient to the teacher."""
    return F.kl_div(student.log_softmax(1), teacher.detach().log_softmax(1), reduction="batchmean", log_target=True)


def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Skewness E[((w - mean) / deviation)^3] and kurtosis, the same with the fourth power; scalars."""
    centred = weight - weight.mean()
    square = centred.square()
    variance = square.mean().clamp_min(1e-12)
    return (square * centred).mean() / variance**1.5, square.square().mean() / variance.square()


class GroupProgressive:
    """Phase `quantized` of the EQ-Net method."""

    name = "quantized"

    def __init__(self, net: EQNet, schedule: Schedule, choice: EQNetQuantization, seed: int) -> None:
        self.module, self.schedule, self.choice, self.seed = net, schedule, choice, seed
        self.net = net
        self.regularized = [cast("nn.Conv2d | nn.Linear", step.module).weight for step in net.graph.layers[1:]]

    def groups(self) -> list[dict[str, Any]]:
        return [
            *decay_groups(self.net.network_parameters(), self.schedule.weight_decay),
            {"params": self.net.quantizer_parameters(), "weight_decay": 0.0, "rate": 1.0},
        ]

    def subnets(self, step: int) -> dict[str, SubnetSpec]:
        """The specs H, R and L of a training step; one alone where there is nothing to choose, which is LSQ."""
        if self.net.only is not None:
            return {"only": self.net.only}
        random = Random(f"{self.seed}:eqnet:{step}")
        choice = self.choice

        def uniform(end: int) -> SubnetSpec:
            options = random.choice(choice.granularity), random.choice(choice.symmetry)
            return self.net.uniform_pair(choice.weight_bits[end], choice.activation_bits[end], *options)

        if self.net.space.size == 1:
            return {"H": uniform(-1)}
        return {"H": uniform(-1), "R": self.net.space.sample(random), "L": uniform(0)}

    def regularization(self) -> Tensor:
        """Weighted mean over layers but the first of (kurtosis - 1.8)^2 and of (skewness - 0)^2."""
        pairs = [moments(weight) for weight in self.regularized]
        skewness = torch.stack([(s - UNIFORM_SKEWNESS).square() for s, _ in pairs]).mean()
        kurtosis = torch.stack([(k - UNIFORM_KURTOSIS).square() for _, k in pairs]).mean()
        return self.choice.kurtosis_weight * kurtosis + self.choice.skewness_weight * skewness

    def backward(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        if not self.net.training:
            self.net.train()
        part = self.choice.guidance
        losses: dict[str, float] = {}
        teacher: Tensor | None = None
        for name, spec in self.subnets(step).items():
            output = self.net(images, spec)
            loss = F.cross_entropy(output, labels)
            if teacher is not None:
                loss = part * distance(output, teacher) + (1 - part) * loss
            loss.backward()
            teacher = output.detach()
            losses[name] = float(loss.detach())
        if self.net.only is None:
            shape = self.regularization()
            shape.backward()
            losses["weights"] = float(shape.detach())
        average_gradients(self.net.parameters())
        nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRADIENT_NORM)
        return losses

    def after_step(self) -> None:
        self.net.project()
