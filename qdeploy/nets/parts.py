"""What the backbones share: a convolution with its batch norm, the classifier, the initial weights."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn


def divisible(exact: float) -> int:
    """A number of channels: `exact` rounded to a multiple of 8 that is at least 90% of it, 8 or more."""
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """Convolution that keeps the size at stride 1, batch norm, and an activation if one is named."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    layers: list[tuple[str, nn.Module]] = [("conv", conv), ("bn", nn.BatchNorm2d(outputs))]
    if activation is not None:
        layers.append(("hard_swish" if activation is nn.Hardswish else "relu", activation()))
    return nn.Sequential(OrderedDict(layers))


def classifier(inputs: int, classes: int) -> nn.Sequential:
    """[n, inputs, H, W] -> logits [n, classes]."""
    layers = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("linear", nn.Linear(inputs, classes))]
    return nn.Sequential(OrderedDict(layers))


def init_weights(network: nn.Module) -> None:
    """Kaiming normal for convolutions (He et al. 2015, fan out), plain batch norms, a small classifier.

    A network on the device "meta" has no values and is left alone.
    """
    if next(network.parameters()).is_meta:
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # torch's own fan out ignores groups and would start depthwise layers far too small
            fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
