"""Elastic networks: what may vary, and a supernet whose tensors hold those of all smaller networks.

A subnet's tensor is the leading channels and the kernel's centre of the supernet's tensor of the same name, a view.
With `transforms`, smaller kernels are the centre times a learned matrix (once-for-all, Cai et al. 2020, section 3).
A narrower network (a smaller base width) has the leading channels everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

from qdeploy.errors import RecipeError
from qdeploy.space import Architecture, Block, check_choice

Blocks = Sequence[Sequence[Block]]
DEPTHWISE = ".depthwise.conv.weight"
PIXEL = 255  # the greatest 8-bit pixel


@dataclass(frozen=True)
class Elastic:
    """Choices of an elastic network. `build` takes channels, classes, width, stem stride and the blocks of each stage.

    The network keeps its stages as `stages.STAGE.BLOCK`; only the depthwise kernels of a block vary in size.
    `resolutions` in pixels and base `widths`, rising; empty: the images' size, the network's own width. `only`: the one
    architecture of a network that is trained alone.
    """

    build: Callable[[int, int, int, int, Blocks], nn.Module]
    depths: tuple[tuple[int, ...], ...]
    kernels: tuple[int, ...]
    expands: tuple[int, ...]
    resolutions: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    only: Architecture | None = None

    def alone(self, architecture: Architecture) -> Elastic:
        """The same with this one architecture; RecipeError for one that is not among the choices."""
        stages = architecture.stages
        if len(stages) != len(self.depths):
            raise RecipeError(f"the spec has {len(stages)} elastic stages, the network {len(self.depths)}")
        check_choice("resolution", architecture.resolution, self.resolutions)
        check_choice("width", architecture.width, self.widths)
        for s, (stage, depths) in enumerate(zip(stages, self.depths, strict=True)):
            check_choice(f"stage {s} depth", len(stage), depths)
            for b, block in enumerate(stage):
                check_choice(f"stage {s} block {b} kernel", block.kernel, self.kernels)
                check_choice(f"stage {s} block {b} expand", block.expand, self.expands)
        return replace(self, only=architecture)

    def uniform(self, depths: Sequence[int], kernel: int, expand: int) -> tuple[tuple[Block, ...], ...]:
        """The same kernel and expansion in every block."""
        return tuple((Block(kernel, expand),) * depth for depth in depths)

    @property
    def largest(self) -> tuple[tuple[Block, ...], ...]:
        """Blocks of the supernet."""
        if self.only is not None:
            return self.only.stages
        return self.uniform([max(d) for d in self.depths], max(self.kernels), max(self.expands))

    @property
    def smallest(self) -> tuple[tuple[Block, ...], ...]:
        """Blocks of the least network."""
        if self.only is not None:
            return self.only.stages
        return self.uniform([min(d) for d in self.depths], min(self.kernels), min(self.expands))

    def with_shape(self, blocks: Blocks) -> Architecture:
        """`blocks` at the greatest resolution and width, as a part of a spec."""
        if self.only is not None:
            return self.only
        last = [choices[-1] if choices else None for choices in (self.resolutions, self.widths)]
        return Architecture(tuple(tuple(stage) for stage in blocks), *last)

    @property
    def greatest(self) -> Architecture:
        """The supernet's own architecture."""
        return self.with_shape(self.largest)

    @property
    def least(self) -> Architecture:
        """The smallest blocks at the least resolution and width."""
        if self.only is not None:
            return self.only
        first = [choices[0] if choices else None for choices in (self.resolutions, self.widths)]
        return Architecture(self.smallest, *first)


def resized(images: Tensor, resolution: int | None) -> Tensor:
    """Images [n, C, H, W] of 8-bit pixels in [0, 1] as squares of `resolution`, bilinear and rounded to pixels again.

    None, or the size that they have: as they are.
    """
    if resolution is None or images.shape[2:] == (resolution, resolution):
        return images
    smooth = F.interpolate(images, (resolution, resolution), mode="bilinear", antialias=True)
    return smooth.mul_(PIXEL).round_().div_(PIXEL)


def sliced(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """View of the leading channels (axes 0 and 1) and of the kernel's centre (axes 2 and 3)."""
    for axis, size in enumerate(shape):
        start = (tensor.shape[axis] - size) // 2 if axis > 1 else 0
        tensor = tensor.narrow(axis, start, size)
    return tensor


class Supernet(nn.Module):
    """The largest float network of an `Elastic`, and any smaller one as slices of it."""

    def __init__(self, elastic: Elastic, build: Callable[[Architecture], nn.Module], transforms: bool) -> None:
        super().__init__()
        self.elastic, self._build = elastic, build
        self.network = build(elastic.greatest)
        self.transforms = nn.ParameterDict()
        if transforms:
            for name, _ in self.network.named_parameters():
                if name.startswith("stages.") and name.endswith(DEPTHWISE):
                    for size in elastic.kernels[:-1]:
                        self.transforms[f"{name} {size}".replace(".", "/")] = nn.Parameter(torch.eye(size * size))

    def template(self, architecture: Architecture) -> nn.Module:
        """The network of `architecture` without memory: its tensors are slices when it runs.

        Its batch norms are of the kind that this network's are now.
        """
        with torch.device("meta"):
            network = self._build(architecture)
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = type(cast(nn.BatchNorm2d, self.network.get_submodule(name)))
        return network

    def copy_of(self, architecture: Architecture) -> nn.Module:
        """The network of `architecture` with tensors of its own."""
        network = self.template(architecture).to_empty(device="cpu")
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

    def is_whole(self, architecture: Architecture) -> bool:
        """True for the supernet's own blocks and width, at any resolution."""
        return replace(architecture, resolution=self.elastic.greatest.resolution) == self.elastic.greatest

    def forward(self, x: Tensor, architecture: Architecture | None = None) -> Tensor:
        """Float logits [n, classes] of the network of `architecture` (default: the greatest) on the resized images."""
        architecture = architecture or self.elastic.greatest
        x = resized(x, architecture.resolution)
        if self.is_whole(architecture):
            return cast(Tensor, self.network(x))
        template = self.template(architecture).train(self.training)
        return cast(Tensor, functional_call(template, self.slices(template), (x,)))


class AtResolution(nn.Module):
    """`network` on images that are resized first."""

    def __init__(self, network: nn.Module, resolution: int | None) -> None:
        super().__init__()
        self.network, self.resolution = network, resolution

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.network(resized(x, self.resolution)))
