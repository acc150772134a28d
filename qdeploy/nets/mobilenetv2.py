"""MobileNetV2 (Sandler et al. 2018, table 2), for 224 pixels and, with fewer strides, for 28 or 32."""

from __future__ import annotations

import torch
from torch import nn

from qdeploy.nets.parts import classifier, conv_bn, divisible, init_weights

PLAIN_WIDTH = 32  # channels behind the stem at width multiplier 1
PLAIN_HEAD = 1280
# expansion, channels at multiplier 1, blocks, stride of the first block at 224 pixels, and at 28 or 32
STAGES = (
    (1, 16, 1, 1, 1),
    (6, 24, 2, 2, 1),
    (6, 32, 3, 2, 2),
    (6, 64, 4, 2, 2),
    (6, 96, 3, 1, 1),
    (6, 160, 3, 2, 2),
    (6, 320, 1, 1, 1),
)


def scaled(channels: int, width: int) -> int:
    """`channels` at multiplier width / 32, rounded to a multiple of 8 that is at least 90% of the exact value."""
    return divisible(channels * width / PLAIN_WIDTH)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; the input is added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_bn(inputs, hidden, 1, activation=nn.ReLU6) if expansion != 1 else None
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6)
        self.project = conv_bn(hidden, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(hidden))
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """Stem 3x3, 17 inverted residuals, 1x1 to the head's width, classifier (no dropout: nothing to trace or fold)."""

    def __init__(self, channels: int, classes: int, width: int, stem_stride: int, head: int, small: bool) -> None:
        super().__init__()
        inputs = scaled(PLAIN_WIDTH, width)
        self.stem = conv_bn(channels, inputs, 3, stem_stride, activation=nn.ReLU6)
        blocks: list[nn.Module] = []
        for expansion, plain, depth, stride, small_stride in STAGES:
            outputs = scaled(plain, width)
            first_stride = small_stride if small else stride
            for block in range(depth):
                blocks.append(InvertedResidual(inputs, outputs, first_stride if block == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = conv_bn(inputs, head, 1, activation=nn.ReLU6)
        self.head = classifier(head, classes)
        init_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))


def mobilenetv2(channels: int, classes: int, width: int, stem_stride: int) -> MobileNetV2:
    """For 28 or 32 pixels: the size is halved three times and the head narrows with the rest."""
    return MobileNetV2(channels, classes, width, stem_stride, scaled(PLAIN_HEAD, width), small=True)


def mobilenetv2_imagenet(channels: int, classes: int, width: int, stem_stride: int) -> MobileNetV2:
    """As in the paper, for about 224 pixels: five halvings, and a head that never goes below 1280."""
    del stem_stride  # `build` refuses any choice: this stem is the network
    return MobileNetV2(channels, classes, width, 2, scaled(PLAIN_HEAD, max(width, PLAIN_WIDTH)), small=False)
