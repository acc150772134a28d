"""The supernet: smaller networks are slices of it, and the space is the paper's."""

from __future__ import annotations

from random import Random

import pytest
import torch

from qdeploy.errors import RecipeError
from qdeploy.nets import build_supernet
from qdeploy.nets.elastic import Supernet, sliced
from qdeploy.nets.mobilenetv3 import SPACES
from qdeploy.space import Block
from qdeploy.train.batchquant import random_blocks


def supernet(transforms: bool = False) -> Supernet:
    torch.manual_seed(0)
    return build_supernet("mobilenetv3-tiny", 1, 10, 8, 2, transforms)


def test_a_slice_is_the_leading_channels_and_the_centre() -> None:
    whole = torch.arange(6 * 4 * 7 * 7).reshape(6, 4, 7, 7)
    part = sliced(whole, (3, 2, 3, 3))
    assert torch.equal(part, whole[:3, :2, 2:5, 2:5]) and part.data_ptr() != whole.data_ptr()
    part[0, 0, 0, 0] = -1
    assert whole[0, 0, 2, 2] == -1  # a view
    assert torch.equal(sliced(torch.arange(5), (2,)), torch.tensor([0, 1]))


@pytest.mark.parametrize("transforms", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_network_computes_what_its_copy_computes(transforms: bool, seed: int) -> None:
    net = supernet(transforms)
    with torch.no_grad():
        for matrix in net.transforms.values():
            matrix.add_(0.1 * torch.randn(matrix.shape))
    blocks = random_blocks(net.elastic, Random(seed))
    x = torch.rand(4, 1, 28, 28)
    net.eval()
    torch.testing.assert_close(net(x, blocks), net.copy_of(blocks)(x))
    assert net.copy_of(blocks).stages[1][0].depthwise.conv.kernel_size == (blocks[1][0].kernel,) * 2  # type: ignore


def test_gradients_and_statistics_go_into_the_slices() -> None:
    net = supernet()
    net(torch.rand(8, 1, 28, 28), net.elastic.smallest).sum().backward()
    layer = net.network.stages[1][0].depthwise  # type: ignore[union-attr, index]
    weight, small = layer.conv.weight, net.copy_of(net.elastic.smallest).stages[1][0].depthwise.conv.weight  # type: ignore
    touched = weight.grad != 0
    outside = torch.ones_like(weight, dtype=torch.bool)
    sliced(outside, small.shape).fill_(False)
    assert small.shape[0] < weight.shape[0] and touched.any() and not touched[outside].any()
    channels = small.shape[0]
    assert (layer.bn.running_var[:channels] != 1).all() and (layer.bn.running_var[channels:] == 1).all()
    assert net.network.stages[1][1].project.conv.weight.grad is None  # type: ignore[union-attr, index]


def test_identity_transforms_are_the_crop() -> None:
    cropped, transformed = supernet(), supernet(transforms=True)
    assert len(transformed.transforms) == 4 and not cropped.transforms
    x = torch.rand(4, 1, 28, 28)
    for net in (cropped, transformed):
        net.eval()
    torch.testing.assert_close(cropped(x, cropped.elastic.smallest), transformed(x, cropped.elastic.smallest))


def test_a_kernel_of_three_passes_both_matrices() -> None:
    torch.manual_seed(0)
    net = build_supernet("mobilenetv3", 1, 10, 4, 2, transforms=True)
    name = "stages.0.0.depthwise.conv.weight"
    first, second = (net.transforms[f"{name} {size}".replace(".", "/")] for size in (5, 3))
    with torch.no_grad():
        first.mul_(2.0)
        second.mul_(3.0)
    network = net.template(net.elastic.uniform([2] * 5, 3, 3))
    found, whole = net.slices(network)[name], net.network.stages[0][0].depthwise.conv.weight  # type: ignore
    torch.testing.assert_close(found, 6 * sliced(whole, found.shape))


def test_the_spaces() -> None:
    for name in ("mobilenetv3", "mobilenetv3-imagenet"):
        space = SPACES[name]
        assert (space.depths, space.kernels, space.expands) == (((2, 3, 4),) * 5, (3, 5, 7), (3, 4, 6))
    tiny = SPACES["mobilenetv3-tiny"]
    assert tiny.largest == ((Block(5, 3),) * 2,) * 2 and tiny.smallest == ((Block(3, 2),),) * 2


def test_a_network_without_blocks_is_no_supernet() -> None:
    with pytest.raises(RecipeError, match="no elastic blocks: choose one of mobilenetv3"):
        build_supernet("resnet8", 1, 10, 8, 1, False)
    with pytest.raises(RecipeError, match="unknown network"):
        build_supernet("resnet9", 1, 10, 8, 1, False)
