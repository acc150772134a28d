"""Vertical layering: all widths of one network trained together (sections 4.1 to 4.2).

Every step runs every width on the same batch. Weights and weight steps are shared; batch norm and activation steps
belong to one width. Each width learns from the labels and from the next higher width's softmax (eq. 11, cosine
similarity). The gradients on shared parameters are averaged (unitary scalarization) or combined by multiple-gradient
descent (eq. 10). With one width this is LSQ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.quant.network import QuantNet, levels
from qdeploy.quant.parallel import average_gradients
from qdeploy.recipe import Quantization, Schedule
from qdeploy.train.groups import decay_groups

FRANK_WOLFE_STEPS = 50


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine similarity of the softmax outputs [n, classes], mean over the batch; no gradient to the teacher."""
    similarity = F.cosine_similarity(student.softmax(1), teacher.detach().softmax(1), dim=1)
    return 1.0 - similarity.mean()


def min_norm_weights(gram: Tensor) -> Tensor:
    """argmin over the simplex of a' G a, G the Gram matrix [n, n] of the tasks' gradients (eq. 10, Frank-Wolfe)."""
    n = gram.shape[0]
    alpha = torch.full((n,), 1.0 / n, dtype=gram.dtype)
    for _ in range(FRANK_WOLFE_STEPS):
        slope = gram @ alpha
        vertex = int(slope.argmin())
        direction = -alpha.clone()
        direction[vertex] += 1.0
        curvature = float(direction @ gram @ direction)
        if curvature <= 0:
            break
        length = min(1.0, max(0.0, -float(direction @ slope) / curvature))
        if length == 0.0:
            break
        alpha = alpha + length * direction
    return alpha


class Vertical:
    """Phase `quantized` of the vertical method."""

    name = "quantized"

    def __init__(self, net: QuantNet, schedule: Schedule, choice: Quantization) -> None:
        self.module, self.schedule, self.choice = net, schedule, choice
        self.net = net
        self.shared = {id(p) for p in net.shared_parameters()}
        self.levels = dict(sorted(levels(net).items(), reverse=True))  # highest first: it teaches the next

    def groups(self) -> list[dict[str, Any]]:
        decay = self.schedule.weight_decay
        groups = decay_groups(self.net.shared_parameters(), decay)
        for width in self.choice.widths:  # the mean over widths divides their own gradients: undo it
            groups += decay_groups(self.net.own_parameters(width), 0.0, rate=float(len(self.choice.widths)))
        return groups

    def backward(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        if not self.net.training:
            self.net.train()
        losses: dict[str, float] = {}
        shared = self.net.shared_parameters()
        gradients: list[list[Tensor | None]] = []
        teacher: Tensor | None = None
        for width, spec in self.levels.items():
            output = self.net(images, spec)
            loss = F.cross_entropy(output, labels)
            if teacher is not None and self.choice.distillation:
                loss = loss + distillation(output, teacher)
            (loss / len(self.levels)).backward()
            if self.choice.scalarization == "mgd":
                average_gradients(shared)
                gradients.append([p.grad for p in shared])
                for parameter in shared:
                    parameter.grad = None
            teacher = output.detach()
            losses[f"w{width}"] = float(loss.detach())
        average_gradients(p for p in self.net.parameters() if not gradients or id(p) not in self.shared)
        if gradients:
            combine(shared, gradients)
        return losses

    def after_step(self) -> None:
        self.net.project()


def combine(shared: list[nn.Parameter], gradients: list[list[Tensor | None]]) -> None:
    """Set each parameter's gradient to n times the min-norm convex combination (the mean has weights 1/n on loss/n)."""
    flat = [torch.cat([g.flatten() for g in task if g is not None]) for task in gradients]
    stacked = torch.stack(flat).double()
    alpha = min_norm_weights(stacked @ stacked.T)
    for i, parameter in enumerate(shared):
        parts = [
            weight * task[i] for weight, task in zip(alpha.tolist(), gradients, strict=True) if task[i] is not None
        ]
        parameter.grad = len(gradients) * sum(parts[1:], parts[0]) if parts else None
