"""Float networks of the benchmark that qdeploy.nets lacks, published weights for them, batch norms for the rest.

MobileNetV3-Large is table 1 of Howard et al. 2019; EfficientNet-Lite0 is EfficientNet-B0 (Tan and Le 2019, table 1)
without squeeze-and-excitation, with Relu6, and with TensorFlow's SAME padding, which its weights were trained under.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

# kernel, expanded channels, output channels, squeeze-and-excitation, hard-swish (else Relu), stride
V3_LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
# blocks, kernel, stride of the first, expansion, output channels
LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: nn.Module | None = None,
    same: bool = False, eps: float = 1e-3,
) -> nn.Sequential:  # fmt: skip
    """Convolution, batch norm, activation. `same`: pad as TensorFlow does, one more below and right at stride 2."""
    layers: list[nn.Module] = []
    padding = kernel // 2
    if same and stride == 2:  # right for even sizes, which these are
        layers.append(nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2))
        padding = 0
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(outputs, eps=eps))
    if activation is not None:
        layers.append(activation)
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    """x * hard-sigmoid(fc(relu(fc(mean of x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, int(channels / 4 + 4) // 8 * 8)  # a multiple of 8, at least 90% of a quarter
        squeezed += 8 if squeezed < 0.9 * channels / 4 else 0
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.relu, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))


class Block(nn.Module):
    """Expansion (left out where it would change nothing), depthwise, squeeze-and-excitation, projection, shortcut."""

    def __init__(self, layers: list[nn.Module], adds: bool) -> None:
        super().__init__()
        self.layers, self.adds = nn.Sequential(*layers), adds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layers(x)
        return x + out if self.adds else out


def mobilenetv3_large() -> nn.Module:
    """float32 [n, 3, 224, 224] -> logits [n, 1000]; 5.5 million weights."""
    inputs = 16
    layers: list[nn.Module] = [conv_bn(3, inputs, 3, 2, activation=nn.Hardswish())]
    for kernel, hidden, outputs, squeeze, swish, stride in V3_LARGE:
        act = nn.Hardswish if swish else nn.ReLU
        inner: list[nn.Module] = [] if hidden == inputs else [conv_bn(inputs, hidden, 1, activation=act())]
        inner.append(conv_bn(hidden, hidden, kernel, stride, hidden, act()))
        inner += [SqueezeExcite(hidden)] if squeeze else []
        inner.append(conv_bn(hidden, outputs, 1))
        layers.append(Block(inner, stride == 1 and inputs == outputs))
        inputs = outputs
    layers += [conv_bn(inputs, 960, 1, activation=nn.Hardswish()), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000)]
    return seeded(nn.Sequential(*layers))


def efficientnet_lite0() -> nn.Module:
    """float32 [n, 3, 224, 224] -> logits [n, 1000]; 4.7 million weights."""
    inputs = 32
    layers: list[nn.Module] = [conv_bn(3, inputs, 3, 2, activation=nn.ReLU6(), same=True)]
    for depth, kernel, first_stride, expansion, outputs in LITE0:
        for block in range(depth):
            stride, hidden = first_stride if block == 0 else 1, inputs * expansion
            inner: list[nn.Module] = [conv_bn(inputs, hidden, 1, activation=nn.ReLU6())] if expansion > 1 else []
            inner.append(conv_bn(hidden, hidden, kernel, stride, hidden, nn.ReLU6(), same=True))
            inner.append(conv_bn(hidden, outputs, 1))
            layers.append(Block(inner, stride == 1 and inputs == outputs))
            inputs = outputs
    layers += [conv_bn(inputs, 1280, 1, activation=nn.ReLU6()), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers.append(nn.Linear(1280, 1000))
    return seeded(nn.Sequential(*layers))


def seeded(network: nn.Module) -> nn.Module:
    """Kaiming normal weights (fan out of one group), from torch's global random state."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    return network


def load_by_order(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into `network` in the order of both; ValueError when a shape or a kind differs.

    Published files name layers after other classes than these; their order, the data flow's, is the same.
    """
    mine = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    theirs = {name: value for name, value in tensors.items() if "num_batches" not in name}
    if len(mine) != len(theirs):
        raise ValueError(f"{len(theirs)} tensors for a network of {len(mine)}")
    for (name, value), (other, given) in zip(mine.items(), theirs.items(), strict=True):
        if value.shape != given.shape or name.rsplit(".", 1)[-1] != other.rsplit(".", 1)[-1]:
            raise ValueError(f"{other} {list(given.shape)} does not fit {name} {list(value.shape)}")
        value.copy_(given)


def calibrate(network: nn.Module, batches: Iterable[torch.Tensor], seed: int = 0) -> None:
    """Give seeded weights the activations of a trained network: spread batch norms, statistics of real `batches`.

    Scales and shifts are drawn so that channels differ in range, as trained ones do; the running statistics are the
    batches' own average, so no layer dies or explodes.
    """
    random = torch.Generator().manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.ones_(norm.weight)
        with torch.no_grad():
            norm.weight.mul_(torch.exp(0.3 * torch.randn(norm.weight.shape, generator=random)))
            norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=random))
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    network.eval()
