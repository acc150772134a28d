"""Elastic networks: what may vary, and a supernet whose tensors hold those of all smaller networks.

A subnet's tensor is the leading channels and the kernel's centre of the supernet's tensor of the same name, a view.
With `transforms`, smaller kernels are the centre times a learned matrix (once-for-all, Cai et al. 2020, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qdeploy.space import Architecture, Block

Blocks = Sequence[Sequence[Block]]
DEPTHWISE = ".depthwise.conv.weight"


@dataclass(frozen=True)
class Elastic:
    """Choices of an elastic network. `build` takes channels, classes, width, stem stride and the blocks of each stage.

    The network keeps its stages as `stages.STAGE.BLOCK`; only the depthwise kernels of a block vary in size.
    """

    build: Callable[[int, int, int, int, Blocks], nn.Module]
    depths: tuple[tuple[int, ...], ...]
    kernels: tuple[int, ...]
    expands: tuple[int, ...]

    def uniform(self, depths: Sequence[int], kernel: int, expand: int) -> tuple[tuple[Block, ...], ...]:
        """The same kernel and expansion in every block."""
        return tuple((Block(kernel, expand),) * depth for depth in depths)

    @property
    def largest(self) -> tuple[tuple[Block, ...], ...]:
        """Blocks of the supernet."""
        return self.uniform([max(d) for d in self.depths], max(self.kernels), max(self.expands))

    @property
    def smallest(self) -> tuple[tuple[Block, ...], ...]:
        """Blocks of the least network."""
        return self.uniform([min(d) for d in self.depths], min(self.kernels), min(self.expands))


def sliced(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """View of the leading channels (axes 0 and 1) and of the kernel's centre (axes 2 and 3)."""
    for axis, size in enumerate(shape):
        start = (tensor.shape[axis] - size) // 2 if axis > 1 else 0
        tensor = tensor.narrow(axis, start, size)
    return tensor


class Supernet(nn.Module):
    """The largest float network of an `Elastic`, and any smaller one as slices of it."""

    def __init__(self, elastic: Elastic, build: Callable[[Blocks], nn.Module], transforms: bool) -> None:
        super().__init__()
        self.elastic, self._build = elastic, build
        self.network = build(elastic.largest)
        self.transforms = nn.ParameterDict()
        if transforms:
            for name, _ in self.network.named_parameters():
                if name.startswith("stages.") and name.endswith(DEPTHWISE):
                    for size in elastic.kernels[:-1]:
                        self.transforms[f"{name} {size}".replace(".", "/")] = nn.Parameter(torch.eye(size * size))

    def template(self, blocks: Blocks) -> nn.Module:
        """The network of `blocks` without memory: its tensors are slices when it runs."""
        with torch.device("meta"):
            return self._build(blocks)

    def copy_of(self, blocks: Blocks) -> nn.Module:
        """The network of `blocks` with tensors of its own."""
        network = self.template(blocks).to_empty(device="cpu")
        network.load_state_dict({name: tensor.detach().clone() for name, tensor in self.slices(network).items()})
        return network.train(self.training)

    def slices(self, network: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers of a smaller `network` of this space, by name, as views of the supernet's."""
        own = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        found = {}
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            whole = own[name]
            kernel = tensor.shape[-1] if tensor.ndim == 4 else 0  # noqa: PLR2004
            if self.transforms and kernel and kernel < whole.shape[-1]:
                whole = self._transformed(name, whole, kernel)
            found[name] = sliced(whole, tensor.shape)
        return found

    def _transformed(self, name: str, weight: Tensor, kernel: int) -> Tensor:
        """The kernel's centre, made smaller one size after the other, each time through its matrix."""
        for size in reversed([k for k in self.elastic.kernels if kernel <= k < weight.shape[-1]]):
            centre = sliced(weight, (*weight.shape[:2], size, size))
            matrix = self.transforms[f"{name} {size}".replace(".", "/")]
            weight = (centre.reshape(-1, size * size) @ matrix).reshape(centre.shape)
        return weight

    def forward(self, x: Tensor, blocks: Blocks | None = None) -> Tensor:
        """Float logits [n, classes] of the network of `blocks` (default: the largest)."""
        if blocks is None or tuple(map(tuple, blocks)) == self.elastic.largest:
            return cast(Tensor, self.network(x))
        template = self.template(blocks).train(self.training)
        return cast(Tensor, functional_call(template, self.slices(template), (x,)))


def architecture(blocks: Blocks) -> Architecture:
    """`blocks` as a part of a spec."""
    return Architecture(tuple(tuple(stage) for stage in blocks))
