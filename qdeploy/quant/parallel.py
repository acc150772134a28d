"""Data-parallel training under torchrun: every process takes its part of each batch, all hold the same network.

Two processes compute what one would, but for the order of sums: gradients are averaged, batch norms use the statistics
of the whole batch (as one process would see them), and the gradient scale of an activation step, which depends on how
many values the batch has, counts all processes' values. A first batch that starts activation steps is gathered.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; only process 0 writes files and prints."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started (gloo); without torchrun this process stays alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    if processes() > 1:
        dist.barrier()


def part(batch: Tensor) -> Tensor:
    """This process's part of a batch whose size the number of processes divides."""
    return batch.chunk(processes())[rank()]


def gathered(x: Tensor) -> Tensor:
    """The parts of all processes in one tensor, in the order of the batch; no gradient."""
    if processes() == 1:
        return x.detach()
    parts = [torch.empty(x.shape, dtype=x.dtype) for _ in range(processes())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def _mean(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one message."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= processes()
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(piece.view(tensor.shape))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes: the gradient of the whole batch's mean loss."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if processes() > 1 and gradients:
        _mean(gradients)


def average_losses(losses: dict[str, float]) -> dict[str, float]:
    """Means over the processes."""
    if processes() == 1:
        return losses
    values = torch.tensor(list(losses.values()), dtype=torch.float64)
    _mean([values])
    return dict(zip(losses, values.tolist(), strict=True))


class _Extreme(Function):
    """Least or greatest values over `axes` (none: over all) of all processes' parts.

    All elements that attain one share its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: tuple[int, ...], smallest: bool) -> Tensor:
        found = x.amin(axes) if smallest else x.amax(axes)
        dist.all_reduce(found, dist.ReduceOp.MIN if smallest else dist.ReduceOp.MAX)
        ctx.save_for_backward(x, found)
        ctx.axes = axes
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, found = ctx.saved_tensors
        shape = [1 if axis in ctx.axes or not ctx.axes else size for axis, size in enumerate(x.shape)]
        attains = x == found.view(shape)
        totals = torch.stack([grads[0], attains.sum(ctx.axes).to(x.dtype)])
        dist.all_reduce(totals)
        return attains * (totals[0] / totals[1]).view(shape), None, None


def least(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Least values over `axes` (none: over all) of the whole batch; their gradient is the whole batch's loss's."""
    return x.amin(axes) if processes() == 1 else _Extreme.apply(x, axes, True)


def greatest(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """As `least`, the greatest."""
    return x.amax(axes) if processes() == 1 else _Extreme.apply(x, axes, False)


class _MeanOfParts(Function):
    """Mean of a value over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / processes()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _MeanOfParts.forward(ctx, grads[0])


def mean_of_parts(x: Tensor) -> Tensor:
    """Mean over the processes of what each found in its part of a batch; differentiable."""
    return x if processes() == 1 else _MeanOfParts.apply(x)


class _SyncedNorm(Function):
    """Batch norm [n, C, H, W] with the statistics of all processes' parts; returns mean and biased variance too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        axes, channels = (0, 2, 3), (1, -1, 1, 1)
        mean = x.mean(axes)
        square = (x - mean.view(channels)).square().mean(axes)
        mean = mean.double()  # in single precision a mean far from zero would swallow the variance
        found = torch.stack([mean, square.double() + mean.square()])
        dist.all_reduce(found)
        mean, square = found / processes()
        variance = square - mean.square()
        deviation = (variance + eps).rsqrt().float().view(channels)
        mean = mean.float()
        normal = (x - mean.view(channels)) * deviation
        ctx.save_for_backward(normal, weight, deviation)
        variance = variance.float()
        ctx.mark_non_differentiable(mean, variance)
        return normal * weight.view(channels) + bias.view(channels), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        normal, weight, deviation = ctx.saved_tensors
        grad, axes, channels = grads[0], (0, 2, 3), (1, -1, 1, 1)
        of_bias, of_weight = grad.sum(axes), (grad * normal).sum(axes)
        totals = torch.stack([of_bias, of_weight])
        dist.all_reduce(totals)
        totals = totals / (grad.numel() // grad.shape[1] * processes())
        centred = grad - totals[0].view(channels) - normal * totals[1].view(channels)
        return centred * weight.view(channels) * deviation, of_weight, of_bias, None


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of all processes; the same tensors in checkpoints."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or processes() == 1 or self.running_mean is None or self.running_var is None:
            return super().forward(x)
        assert self.num_batches_tracked is not None
        count = x.numel() // x.shape[1] * processes()
        weight = self.weight if self.affine else torch.ones(self.num_features)
        bias = self.bias if self.affine else torch.zeros(self.num_features)
        out, mean, variance = _SyncedNorm.apply(x, weight, bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * (count / (count - 1)), rate)
        return out


@contextmanager
def synchronized_norms(module: nn.Module) -> Iterator[None]:
    """Every batch norm of `module` is a synchronized one meanwhile, in place: others hold references to them."""
    norms = [norm for norm in module.modules() if type(norm) is nn.BatchNorm2d] if processes() > 1 else []
    for norm in norms:
        norm.__class__ = SyncedBatchNorm2d
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d
