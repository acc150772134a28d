"""Calibration for one spec: batch-norm statistics, and activation ranges that the spec's mix shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.errors import ModelError
from qdeploy.quant.batchquant import BatchQuantizer
from qdeploy.quant.layers import ActivationQuantizer
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.space import SubnetSpec

CALIBRATION_IMAGES = 2048
CALIBRATION_BATCH = 256


def _batches(images: np.ndarray) -> Iterator[Tensor]:
    for i in range(0, min(len(images), CALIBRATION_IMAGES), CALIBRATION_BATCH):
        yield torch.from_numpy(images[i : i + CALIBRATION_BATCH]).float().div_(255.0)


@torch.no_grad()
def _average(
    network: nn.Module, norms: Sequence[nn.BatchNorm2d], run: Callable[[Tensor], Tensor], images: np.ndarray
) -> None:
    """Replace the statistics of `norms` by their mean over the batches of `images` that `run` takes."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    for batch in _batches(images):
        run(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def reestimate_norms(net: SimulatedNet, spec: SubnetSpec, images: np.ndarray) -> None:
    """Replace the statistics that `spec` uses by their mean over calibration images uint8 [n, C, H, W].

    Those of batch norm, and in the same pass the extreme values of BatchQuant.
    """
    norms = [norm for step in net.graph.steps if (norm := net.norm(step, spec)) is not None]
    net.eval()
    for quantizer in (module for module in net.modules() if isinstance(module, BatchQuantizer)):
        quantizer.reset_extremes()
    _average(net, norms, lambda batch: net(batch, spec), images)


def reestimate_float_norms(network: nn.Module, images: np.ndarray) -> None:
    """Replace the batch-norm statistics of a float network by their mean over images uint8 [n, C, H, W]."""
    norms = [module for module in network.eval().modules() if isinstance(module, nn.BatchNorm2d)]
    _average(network, norms, network, images)


@torch.no_grad()
def observe(
    net: SimulatedNet, spec: SubnetSpec, batches: Iterable[Tensor]
) -> dict[ActivationQuantizer, list[tuple[float, float]]]:
    """(mean square, greatest magnitude) of every batch at every activation quantizer that `spec` uses."""
    quantizers = [m for m in net.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.observed = []
    net.eval()
    for batch in batches:
        net(batch, spec)
    found = {q: q.observed for q in quantizers if q.observed}
    for quantizer in quantizers:
        quantizer.observed = None
    return found


def _mean_squares(net: SimulatedNet, spec: SubnetSpec, images: np.ndarray) -> dict[ActivationQuantizer, float]:
    return {q: float(np.mean([row[0] for row in rows])) for q, rows in observe(net, spec, _batches(images)).items()}


def trained_mean_squares(net: SimulatedNet, images: np.ndarray) -> dict[ActivationQuantizer, float]:
    """Mean square of what every activation quantizer sees in the network that its step was learned in, as trained."""
    found: dict[ActivationQuantizer, float] = {}
    for spec in net.learned_in:
        found |= _mean_squares(net, spec, images)
    return found


def reestimate_ranges(
    net: SimulatedNet, spec: SubnetSpec, images: np.ndarray, uniform: Mapping[ActivationQuantizer, float]
) -> None:
    """Scale each learned activation step by the ratio of its tensor's root mean square in this mix and in training.

    The step was learned for its width's uniform network, whose mean squares `uniform` holds; the clipping that training
    chose is kept relative to the tensor's spread.
    """
    for quantizer, mixed in _mean_squares(net, spec, images).items():
        if quantizer in uniform and uniform[quantizer] > 0 and mixed > 0:
            quantizer.step.data.mul_((mixed / uniform[quantizer]) ** 0.5)


def calibrated(net: SimulatedNet, spec: SubnetSpec, images: np.ndarray) -> SimulatedNet:
    """A network of its own for `spec`, with batch norm, and ranges that other mixes taught, estimated anew.

    `images`: training images uint8 [n, C, H, W], CALIBRATION_BATCH or more; the first CALIBRATION_IMAGES are used.
    """
    net.check_spec(spec)
    if len(images) < CALIBRATION_BATCH:
        raise ModelError(
            f"{len(images)} calibration images are too few for statistics: give {CALIBRATION_BATCH} or more"
        )
    net = net.subnet(spec)
    if net.learned_in and spec not in net.learned_in:
        uniform = trained_mean_squares(net, images)  # before the statistics that training left are replaced
        reestimate_norms(net, spec, images)
        reestimate_ranges(net, spec, images, uniform)
    reestimate_norms(net, spec, images)
    return net
