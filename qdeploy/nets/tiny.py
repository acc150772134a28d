"""Two convolutions and a classifier: the smallest network that drives every stage, for tests."""

from __future__ import annotations

from torch import nn

from qdeploy.nets.parts import classifier, conv_bn, init_weights


def tiny(channels: int, classes: int, width: int, stem_stride: int) -> nn.Sequential:
    """conv-bn-relu, conv-bn-relu at stride 2, global average pool, linear."""
    network = nn.Sequential()
    network.add_module("first", conv_bn(channels, width, 3, stem_stride, activation=nn.ReLU))
    network.add_module("second", conv_bn(width, 2 * width, 3, 2, activation=nn.ReLU))
    network.add_module("head", classifier(2 * width, classes))
    init_weights(network)
    return network
