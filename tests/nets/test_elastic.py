"""The supernet: smaller networks are slices of it, and the space is the paper's."""

from __future__ import annotations

from random import Random

import pytest
import torch

from qdeploy.errors import RecipeError
from qdeploy.nets import build_supernet
from qdeploy.nets.elastic import AtResolution, Supernet, resized, sliced
from qdeploy.nets.mobilenetv3 import SPACES
from qdeploy.quant.graph import read_graph
from qdeploy.space import Architecture, Block
from qdeploy.train.batchquant import random_architecture


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
    chosen = random_architecture(net.elastic, Random(seed))
    x = torch.rand(4, 1, 28, 28)
    net.eval()
    torch.testing.assert_close(net(x, chosen), net.copy_of(chosen)(x))
    kernel = chosen.stages[1][0].kernel
    assert net.copy_of(chosen).stages[1][0].depthwise.conv.kernel_size == (kernel,) * 2  # type: ignore


def test_gradients_and_statistics_go_into_the_slices() -> None:
    net = supernet()
    net(torch.rand(8, 1, 28, 28), net.elastic.least).sum().backward()
    layer = net.network.stages[1][0].depthwise  # type: ignore[union-attr, index]
    weight, small = layer.conv.weight, net.copy_of(net.elastic.least).stages[1][0].depthwise.conv.weight  # type: ignore
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
    torch.testing.assert_close(cropped(x, cropped.elastic.least), transformed(x, cropped.elastic.least))


def test_a_kernel_of_three_passes_both_matrices() -> None:
    torch.manual_seed(0)
    net = build_supernet("mobilenetv3", 1, 10, 4, 2, transforms=True)
    name = "stages.0.0.depthwise.conv.weight"
    first, second = (net.transforms[f"{name} {size}".replace(".", "/")] for size in (5, 3))
    with torch.no_grad():
        first.mul_(2.0)
        second.mul_(3.0)
    network = net.template(net.elastic.with_shape(net.elastic.uniform([2] * 5, 3, 3)))
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


# ---- resolution and width ------------------------------------------------------------------------------------------


def shaped(name: str = "mobilenetv3-tiny", only: Architecture | None = None) -> Supernet:
    torch.manual_seed(0)
    return build_supernet(name, 1, 10, 8, 2, False, resolutions=(16, 20, 28), widths=(4, 8), only=only)


def test_images_are_resized_and_rounded_to_pixels() -> None:
    images = torch.randint(0, 256, (3, 2, 28, 28)).float() / 255
    assert resized(images, None) is images and resized(images, 28) is images
    for size in (16, 20, 32):
        found = resized(images, size)
        assert found.shape == (3, 2, size, size) and float(found.min()) >= 0 and float(found.max()) <= 1
        assert torch.equal((found * 255).round() / 255, found)
    flat = torch.full((1, 1, 28, 28), 100 / 255)
    torch.testing.assert_close(resized(flat, 20), torch.full((1, 1, 20, 20), 100 / 255))
    ramp = (torch.arange(28) * 9).expand(1, 1, 28, 28) / 255  # a straight line stays one, inside
    found = (resized(ramp, 14) * 255)[0, 0, 5, 1:-1]
    assert float((found - (18 * torch.arange(1, 13) + 4.5)).abs().max()) <= 0.51  # the means of two pixels each


@pytest.mark.parametrize("seed", range(4))
def test_a_narrow_network_is_a_slice_at_its_resolution(seed: int) -> None:
    net = shaped().eval()
    chosen = random_architecture(net.elastic, Random(seed))
    assert chosen.width in (4, 8) and chosen.resolution in (16, 20, 28)
    x = torch.randint(0, 256, (4, 1, 28, 28)).float() / 255
    own = net.copy_of(chosen)
    torch.testing.assert_close(net(x, chosen), own(resized(x, chosen.resolution)))
    torch.testing.assert_close(net(x, chosen), AtResolution(own, chosen.resolution)(x))
    plain = SPACES["mobilenetv3-tiny"].build(1, 10, chosen.width or 0, 2, chosen.stages)
    assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_the_greatest_and_the_least() -> None:
    elastic = shaped().elastic
    assert elastic.greatest == Architecture(elastic.largest, 28, 8)
    assert elastic.least == Architecture(elastic.smallest, 16, 4)
    drawn = {(a.resolution, a.width) for a in (random_architecture(elastic, Random(s)) for s in range(60))}
    assert len(drawn) == 6


@pytest.mark.parametrize("name", sorted(SPACES))
def test_narrow_networks_have_the_graph_of_wide_ones(name: str) -> None:
    """Also where the rounding of channels makes the ends of a block equal."""
    space = SPACES[name]
    stride = 1
    with torch.device("meta"):
        graphs = [
            read_graph(space.build(1, 10, width, stride, space.smallest), scoped=True) for width in (1, 2, 4, 8, 16)
        ]
    ops = [[(step.name, step.op, step.inputs) for step in graph.steps] for graph in graphs]
    assert all(each == ops[0] for each in ops)


def test_one_architecture_alone() -> None:
    full = shaped()
    only = Architecture(((Block(3, 2), Block(5, 3)), (Block(5, 2),)), 20, 4)
    net = shaped(only=only)
    elastic = net.elastic
    assert elastic.largest == elastic.smallest == only.stages and elastic.greatest == elastic.least == only
    shapes = {name: tensor.shape for name, tensor in full.copy_of(only).state_dict().items()}
    assert {name: tensor.shape for name, tensor in net.network.state_dict().items()} == shapes
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("only", "text"),
    [
        (Architecture(((Block(3, 2),),), 20, 4), "has 1 elastic stages, the network 2"),
        (Architecture(((Block(3, 2),), (Block(7, 2),)), 20, 4), r"stage 1 block 0 kernel is 7: choose from \[3, 5\]"),
        (Architecture(((Block(3, 4),), (Block(3, 2),)), 20, 4), r"stage 0 block 0 expand is 4: choose from \[2, 3\]"),
        (Architecture(((Block(3, 2),) * 3, (Block(3, 2),)), 20, 4), r"stage 0 depth is 3: choose from \[1, 2\]"),
        (Architecture(((Block(3, 2),), (Block(3, 2),)), 24, 4), r"resolution is 24: choose from \[16, 20, 28\]"),
        (Architecture(((Block(3, 2),), (Block(3, 2),)), 20), r"width is None: choose from \[4, 8\]"),
    ],
)
def test_an_architecture_outside_the_space_is_refused(only: Architecture, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        shaped(only=only)
