"""Residual networks of basic blocks (He et al. 2016): three stages for small images, ResNet-18 with either stem."""

from __future__ import annotations

import torch
from torch import nn

from qdeploy.nets.parts import classifier, conv_bn, init_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the input, or 1x1 convolution + batch norm where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, 3, stride, activation=nn.ReLU)
        self.second = conv_bn(outputs, outputs, 3)
        changes = stride != 1 or inputs != outputs
        self.shortcut = conv_bn(inputs, outputs, 1, stride) if changes else None
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.second(self.first(x))
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.relu(residual + identity)


class ResNet(nn.Module):
    """Stem, stages of basic blocks (each stage after the first halves the size and doubles the width), classifier."""

    def __init__(self, stem: nn.Module, blocks: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        self.stem = stem
        stages: list[nn.Module] = []
        inputs = width
        for index, depth in enumerate(blocks):
            outputs = width << index
            layers = []
            for block in range(depth):
                stride = 2 if index > 0 and block == 0 else 1
                layers.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = classifier(inputs, classes)
        init_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)))


def _small(blocks: tuple[int, ...], channels: int, classes: int, width: int, stem_stride: int) -> ResNet:
    """With a 3x3 stem, for images of 28 or 32 pixels."""
    return ResNet(conv_bn(channels, width, 3, stem_stride, activation=nn.ReLU), blocks, classes, width)


def resnet8(channels: int, classes: int, width: int, stem_stride: int) -> ResNet:
    """One block a stage."""
    return _small((1, 1, 1), channels, classes, width, stem_stride)


def resnet14(channels: int, classes: int, width: int, stem_stride: int) -> ResNet:
    """Two blocks a stage."""
    return _small((2, 2, 2), channels, classes, width, stem_stride)


def resnet20(channels: int, classes: int, width: int, stem_stride: int) -> ResNet:
    """Three blocks a stage."""
    return _small((3, 3, 3), channels, classes, width, stem_stride)


def resnet18(channels: int, classes: int, width: int, stem_stride: int) -> ResNet:
    """Four stages of two blocks behind a 3x3 stem, the form that papers use for CIFAR."""
    return _small((2, 2, 2, 2), channels, classes, width, stem_stride)


def resnet18_imagenet(channels: int, classes: int, width: int, stem_stride: int) -> ResNet:
    """Four stages of two blocks behind 7x7/2 and a 3x3/2 max pool, for images of about 224 pixels."""
    del stem_stride  # `build` refuses any choice: this stem is the network
    stem = conv_bn(channels, width, 7, 2, activation=nn.ReLU)
    stem.add_module("pool", nn.MaxPool2d(3, 2, padding=1))
    return ResNet(stem, (2, 2, 2, 2), classes, width)
