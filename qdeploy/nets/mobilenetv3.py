"""MobileNetV3 (Howard et al. 2019) with free blocks: the networks of once-for-all's space (Cai et al. 2020).

Five stages of up to four inverted residual blocks; every block has a kernel of 3, 5 or 7 and expands its input 3, 4 or
6 times. Early stages use Relu, later ones hard-swish; three of them weigh their channels (squeeze-excite).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qdeploy.nets.elastic import Elastic
from qdeploy.nets.parts import classifier, conv_bn, divisible, init_weights
from qdeploy.space import Block

PLAIN_WIDTH = 16  # channels behind the stem at width multiplier 1
PLAIN_LAST, PLAIN_HEAD = 960, 1280
KERNELS, EXPANDS = (3, 5, 7), (3, 4, 6)


@dataclass(frozen=True)
class Stage:
    """Channels at multiplier 1, stride of the first block, hard-swish instead of Relu, squeeze-excite."""

    channels: int
    stride: int
    hard_swish: bool
    squeeze: bool


IMAGENET = (
    Stage(24, 2, False, False),
    Stage(40, 2, False, True),
    Stage(80, 2, True, False),
    Stage(112, 1, True, True),
    Stage(160, 2, True, True),
)
SMALL = tuple(replace(stage, stride=stride) for stage, stride in zip(IMAGENET, (1, 2, 2, 1, 1), strict=True))
THREE = (Stage(24, 2, False, False), Stage(40, 1, True, True), Stage(80, 2, True, True))
TINY = (Stage(16, 2, False, False), Stage(24, 2, True, True))


class SqueezeExcite(nn.Module):
    """Each channel times a gate in 0..1 that is computed from the means of all channels (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = divisible(channels / 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, middle, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(middle, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    """[1x1 expansion], depthwise, [squeeze-excite], linear 1x1 projection; `adds`: the input is added to it.

    All but the first block of a stage add, so that narrow networks have the graph of wide ones.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, block: Block, stage: Stage, adds: bool) -> None:  # noqa: PLR0913, PLR0917
        super().__init__()
        activation = nn.Hardswish if stage.hard_swish else nn.ReLU
        kernel, expand = block.kernel or 3, block.expand or 1
        hidden = inputs * expand
        self.expand = conv_bn(inputs, hidden, 1, activation=activation) if expand != 1 else None
        self.depthwise = conv_bn(hidden, hidden, kernel, stride, groups=hidden, activation=activation)
        self.squeeze = SqueezeExcite(hidden) if stage.squeeze else None
        self.project = conv_bn(hidden, outputs, 1)
        self.adds = adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(x if self.expand is None else self.expand(x))
        out = self.project(hidden if self.squeeze is None else self.squeeze(hidden))
        return x + out if self.adds else out


class MobileNetV3(nn.Module):
    """Stem 3x3, one plain block, elastic stages, 1x1 to the last width, pool, 1x1 without batch norm, classifier.

    The last two widths are 960 and 1280, divided by `head_part`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        width: int,
        stem_stride: int,
        stages: Sequence[Stage],
        blocks: Sequence[Sequence[Block]],
        head_part: int,
    ) -> None:
        super().__init__()

        def scaled(plain: float) -> int:
            return divisible(plain * width / PLAIN_WIDTH)

        inputs = scaled(PLAIN_WIDTH)
        self.stem = conv_bn(channels, inputs, 3, stem_stride, activation=nn.Hardswish)
        self.first = InvertedResidual(inputs, inputs, 1, Block(), Stage(inputs, 1, False, False), adds=True)
        rows: list[nn.Module] = []
        for stage, chosen in zip(stages, blocks, strict=True):
            outputs, row = scaled(stage.channels), []
            for index, block in enumerate(chosen):
                stride = stage.stride if index == 0 else 1
                row.append(InvertedResidual(inputs, outputs, stride, block, stage, adds=index > 0))
                inputs = outputs
            rows.append(nn.Sequential(*row))
        self.stages = nn.Sequential(*rows)
        last, head = scaled(PLAIN_LAST / head_part), scaled(PLAIN_HEAD / head_part)
        self.last = conv_bn(inputs, last, 1, activation=nn.Hardswish)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.mix = nn.Conv2d(last, head, 1)
        self.hard_swish = nn.Hardswish()
        self.head = classifier(head, classes)
        init_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.stages(self.first(self.stem(x))))
        return self.head(self.hard_swish(self.mix(self.pool(x))))


def _build(
    stages: Sequence[Stage],
    channels: int,
    classes: int,
    width: int,
    stem_stride: int,
    blocks: Sequence[Sequence[Block]],
    head_part: int = 1,
) -> nn.Module:
    return MobileNetV3(channels, classes, width, stem_stride, stages, blocks, head_part)


# by name of the network; its stages in `MobileNetV3.stages`
SPACES = {
    # for 28 or 32 pixels: the size is halved twice behind the stem
    "mobilenetv3": Elastic(functools.partial(_build, SMALL), ((2, 3, 4),) * 5, KERNELS, EXPANDS),
    # as in the paper, for about 224 pixels
    "mobilenetv3-imagenet": Elastic(functools.partial(_build, IMAGENET), ((2, 3, 4),) * 5, KERNELS, EXPANDS),
    # three stages of up to three blocks and a head of a quarter: for 28 or 32 pixels, small enough to ship
    "mobilenetv3-small": Elastic(functools.partial(_build, THREE, head_part=4), ((1, 2, 3),) * 3, (3, 5), (2, 3, 4)),
    # two stages of up to two blocks: the smallest elastic network, for tests
    "mobilenetv3-tiny": Elastic(functools.partial(_build, TINY), ((1, 2),) * 2, (3, 5), (2, 3)),
}


def largest(name: str, channels: int, classes: int, width: int, stem_stride: int) -> nn.Module:
    """The network of all blocks, with the greatest kernels and expansions."""
    space = SPACES[name]
    return space.build(channels, classes, width, 2 if name.endswith("-imagenet") else stem_stride, space.largest)
