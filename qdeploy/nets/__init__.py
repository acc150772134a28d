"""Plain float torch backbones; nothing here knows about quantization.

Every network is symbolically traceable by torch.fx and made only of Conv2d, BatchNorm2d, ReLU, ReLU6, Hardswish or
Hardsigmoid (one module a use), `x + y`, `x * y`, MaxPool2d, AdaptiveAvgPool2d(1), Flatten and Linear, so that a walk
over its graph meets nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from qdeploy.errors import RecipeError
from qdeploy.nets.elastic import Supernet
from qdeploy.nets.mobilenetv2 import mobilenetv2, mobilenetv2_imagenet
from qdeploy.nets.mobilenetv3 import SPACES, largest
from qdeploy.nets.resnet import resnet8, resnet14, resnet18, resnet18_imagenet, resnet20
from qdeploy.nets.tiny import tiny
from qdeploy.space import Architecture

# name -> (its builder, its width when none is asked for). The builders take (channels, classes, width, stem_stride).
NETWORKS: dict[str, tuple[Callable[[int, int, int, int], nn.Module], int]] = {
    "mobilenetv2": (mobilenetv2, 16),
    "mobilenetv2-imagenet": (mobilenetv2_imagenet, 32),
    "mobilenetv3": (functools.partial(largest, "mobilenetv3"), 16),
    "mobilenetv3-imagenet": (functools.partial(largest, "mobilenetv3-imagenet"), 16),
    "mobilenetv3-small": (functools.partial(largest, "mobilenetv3-small"), 16),
    "mobilenetv3-tiny": (functools.partial(largest, "mobilenetv3-tiny"), 8),
    "resnet14": (resnet14, 16),
    "resnet18": (resnet18, 64),
    "resnet18-imagenet": (resnet18_imagenet, 64),
    "resnet20": (resnet20, 16),
    "resnet8": (resnet8, 16),
    "tiny": (tiny, 8),
}


def build(name: str, channels: int, classes: int, width: int | None = None, stem_stride: int = 1) -> nn.Module:
    """A freshly initialised network: float32 [n, channels, H, W] -> logits [n, classes], any H and W that survive it.

    `width` is the number of channels behind the stem (default: the network's own); every other layer grows with it.
    `stem_stride` is the stride of the first convolution, for the networks whose stem is 3x3; the `-imagenet` forms
    bring their own stem and take no other. Initial weights come from torch's global random state.

    Raises RecipeError for an unknown name or a number that makes no network.
    """
    width = _checked(name, channels, classes, width, stem_stride)
    return NETWORKS[name][0](channels, classes, width, stem_stride)


def build_supernet(  # noqa: PLR0913
    name: str,
    channels: int,
    classes: int,
    width: int | None,
    stem_stride: int,
    transforms: bool,
    *,
    resolutions: tuple[int, ...] = (),
    widths: tuple[int, ...] = (),
    only: Architecture | None = None,
) -> Supernet:
    """A freshly initialised supernet, as `build`; `transforms` makes smaller kernels by learned matrices.

    `resolutions` in pixels and base `widths`, up to `width`, that subnets may have. `only`: the network of this one
    architecture, which is then the largest and the smallest.

    Raises RecipeError for a network that has no elastic blocks, and for an `only` outside the space.
    """
    if name in NETWORKS and name not in SPACES:
        raise RecipeError(f"network {name!r} has no elastic blocks: choose one of {', '.join(sorted(SPACES))}")
    width = _checked(name, channels, classes, width, stem_stride)
    stride = 2 if name.endswith("-imagenet") else stem_stride
    space = replace(SPACES[name], resolutions=resolutions, widths=widths)
    if only is not None:
        space = space.alone(only)

    def network(architecture: Architecture) -> nn.Module:
        return space.build(channels, classes, architecture.width or width, stride, architecture.stages)

    return Supernet(space, network, transforms)


def _checked(name: str, channels: int, classes: int, width: int | None, stem_stride: int) -> int:
    """The width; RecipeError for what makes no network."""
    if name not in NETWORKS:
        raise RecipeError(f"unknown network {name!r}: choose one of {', '.join(sorted(NETWORKS))}")
    width = NETWORKS[name][1] if width is None else width
    numbers = {"channels": channels, "classes": classes, "width": width, "stem_stride": stem_stride}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"{key} of network {name} is {value!r}: give a whole number from 1 up")
    if name.endswith("-imagenet") and stem_stride != 1:
        raise RecipeError(f"network {name} has a fixed stem: leave stem_stride out, or use {name[:-9]}")
    return width
