"""BatchQuant/QFA: one training for every architecture and every width a layer.

Every step sums the gradients of several subnets on the same batch (sandwich rule): the largest and the smallest
architecture, each with one random width everywhere, and random ones. Phases: the full-precision supernet; then widths
and floating point mixed; then widths alone. In the last two all learn from the labels and from that supernet.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.nets.elastic import AtResolution, Elastic, Supernet
from qdeploy.quant.calibrate import reestimate_float_norms
from qdeploy.quant.parallel import average_gradients
from qdeploy.quant.supernet import BatchQuantNet
from qdeploy.recipe import BatchQuantization, Schedule
from qdeploy.space import FLOAT_BITS, Architecture, Block, LayerBits, SubnetSpec
from qdeploy.train.eqnet import distance
from qdeploy.train.full_precision import FullPrecision
from qdeploy.train.groups import decay_groups


def random_architecture(elastic: Elastic, random: Random) -> Architecture:
    """An architecture whose every choice is drawn uniformly."""

    def block() -> Block:
        return Block(random.choice(elastic.kernels), random.choice(elastic.expands))

    stages = tuple(tuple(block() for _ in range(random.choice(depths))) for depths in elastic.depths)
    shape = [random.choice(choices) if choices else None for choices in (elastic.resolutions, elastic.widths)]
    return Architecture(stages, *shape)


class ElasticFullPrecision(FullPrecision):
    """Phase `float` of a supernet: the largest network learns from the labels, the others from it too.

    Where one subnet is trained alone there are no others.
    """

    def __init__(self, supernet: Supernet, schedule: Schedule, choice: BatchQuantization, seed: int) -> None:
        super().__init__(supernet, schedule)
        self.supernet, self.choice, self.seed = supernet, choice, seed

    def architectures(self, step: int) -> list[Architecture]:
        """Architectures of a training step's networks, the largest first."""
        random, elastic = Random(f"{self.seed}:float:{step}"), self.supernet.elastic
        if elastic.only is not None:
            return [elastic.only]
        drawn = [random_architecture(elastic, random) for _ in range(self.choice.random_subnets)]
        return [elastic.greatest, elastic.least, *drawn]

    def backward(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        self.supernet.train()
        teacher: Tensor | None = None
        losses = []
        for architecture in self.architectures(step):
            output = self.supernet(images, architecture)
            loss = F.cross_entropy(output, labels)
            (loss if teacher is None else loss + distance(output, teacher)).backward()
            teacher = output.detach() if teacher is None else teacher
            losses.append(float(loss.detach()))
        average_gradients(self.supernet.parameters())
        nn.utils.clip_grad_norm_(self.supernet.parameters(), self.choice.gradient_norm)
        return _named(losses, self.supernet.elastic.only is None)


def full_precision_teacher(network: nn.Module, images: np.ndarray) -> nn.Module:
    """The trained float network, frozen; a supernet's largest, its batch-norm statistics estimated in place before.

    `images`: training images uint8 [n, C, H, W].
    """
    if isinstance(network, Supernet):
        network = AtResolution(network.network, network.elastic.greatest.resolution)
        reestimate_float_norms(network, images)
    return copy.deepcopy(network).eval().requires_grad_(False)


class Sandwich:
    """Phases `mixed` (`floating`: layers may be left in floating point) and `quantized`.

    Where one subnet is trained alone, every step of both runs that subnet as it is.
    """

    def __init__(self, net: BatchQuantNet, schedule: Schedule, teacher: nn.Module, seed: int, floating: bool) -> None:
        self.module, self.schedule, self.teacher, self.seed = net, schedule, teacher, seed
        self.net, self.choice = net, net.choice
        self.name = "mixed" if floating else "quantized"
        extra = (FLOAT_BITS,) if floating else ()
        self.weight_bits = (*net.choice.weight_bits, *extra)
        self.activation_bits = (*net.choice.activation_bits, *extra)

    def groups(self) -> list[dict[str, Any]]:
        plain = [*self.net.quantizer_parameters(), *self.net.residual_parameters()]
        return [
            *decay_groups(self.net.network_parameters(), self.schedule.weight_decay),
            {"params": plain, "weight_decay": 0.0, "rate": 1.0},
        ]

    def subnets(self, step: int) -> list[SubnetSpec]:
        """Specs of a training step: the largest and the smallest at one width each, and random ones."""
        if self.net.only is not None:
            return [self.net.only]
        random = Random(f"{self.seed}:{self.name}:{step}")
        elastic = self.net.supernet.elastic if self.net.supernet is not None else None
        found = []
        for architecture in [elastic.greatest, elastic.least] if elastic is not None else [None]:
            found.append(self.net.uniform_of(architecture, *self._uniform(random)))
        for _ in range(self.choice.random_subnets):
            found.append(self._with_widths(self.net.space.sample(random), random))
        return found

    def _uniform(self, random: Random) -> tuple[int, int]:
        """One width for all weights and activations, or, where they have other choices, one for each."""
        if self.weight_bits == self.activation_bits:
            return (random.choice(self.weight_bits),) * 2
        return random.choice(self.weight_bits), random.choice(self.activation_bits)

    def _with_widths(self, spec: SubnetSpec, random: Random) -> SubnetSpec:
        """`spec` with widths drawn anew, floating point among them in the phase `mixed`."""
        if FLOAT_BITS not in self.weight_bits:
            return spec
        activations: dict[str, int] = {}
        rows: list[LayerBits] = []
        for space in (layer for layer in self.net.space.layers if layer.layer in {e.layer for e in spec.layers}):
            entry = spec[space.layer]
            if entry.layer not in self.net.fixed:
                shared = activations.get(space.shares or "")
                bits = random.choice(self.weight_bits), shared or random.choice(self.activation_bits)
                entry = replace(entry, weight_bits=bits[0], activation_bits=bits[1])
            activations[entry.layer] = entry.activation_bits
            rows.append(entry)
        return replace(spec, layers=tuple(rows))

    def backward(self, images: Tensor, labels: Tensor, step: int) -> dict[str, float]:
        self.net.train()
        with torch.no_grad():
            taught = self.teacher(images)
        losses = []
        for spec in self.subnets(step):
            output = self.net(images, spec)
            loss = F.cross_entropy(output, labels)
            (loss + distance(output, taught)).backward()
            losses.append(float(loss.detach()))
        average_gradients(self.net.parameters())
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.choice.gradient_norm)
        return _named(losses, self.net.supernet is not None and self.net.only is None) | {"gradient": float(norm)}

    def after_step(self) -> None:
        self.net.project()


def _named(losses: list[float], elastic: bool = True) -> dict[str, float]:
    """Losses of the largest, the smallest and the mean of the random subnets."""
    names = ("largest", "smallest") if elastic else ("largest",)
    found = dict(zip(names, losses, strict=False))
    rest = losses[len(names) :]
    return found | ({"random": float(np.mean(rest))} if rest else {})


def phases(net: BatchQuantNet, schedule: Schedule, teacher: nn.Module, seed: int) -> list[Sandwich]:
    """The mixed phase, where the recipe has one, and the quantized phase."""
    mixed = net.choice.mixed_phase
    first = [] if mixed is None else [Sandwich(net, mixed, teacher, seed, floating=True)]
    return [*first, Sandwich(net, schedule, teacher, seed, floating=False)]
