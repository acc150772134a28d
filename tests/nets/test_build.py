"""Every registered network: shape, operators, names, and what `build` refuses."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from qdeploy.errors import RecipeError
from qdeploy.nets import NETWORKS, build
from qdeploy.nets.mobilenetv2 import scaled

ALLOWED = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Linear,
)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_traces_to_allowed_operators_with_one_module_a_use(name: str) -> None:
    graph = fx.symbolic_trace(build(name, 3, 7, width=8))
    modules = dict(graph.named_modules())
    calls = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            assert isinstance(modules[str(node.target)], ALLOWED), node.target
            calls.append(node.target)
        elif node.op == "call_function":
            assert node.target in (operator.add, operator.mul)
        else:
            assert node.op in ("placeholder", "output")
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 33)])
def test_shapes_and_finite_logits(name: str, channels: int, size: int) -> None:
    torch.manual_seed(0)
    network = build(name, channels, 7, width=8).eval()
    with torch.no_grad():
        logits = network(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits[0], logits[1], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "channels", "classes", "parameters"),
    [
        # counted by hand from the papers' tables: resnet20 with projections, resnet18 and mobilenetv2 as published
        ("resnet20", 3, 10, 272474),
        ("resnet18-imagenet", 3, 1000, 11689512),
        ("mobilenetv2-imagenet", 3, 1000, 3504872),
        ("mobilenetv3-imagenet", 3, 1000, 7666040),  # the largest of once-for-all's space at width 1.0
    ],
)
def test_known_sizes(name: str, channels: int, classes: int, parameters: int) -> None:
    network = build(name, channels, classes)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_depth_is_in_the_name() -> None:
    for name in ("resnet8", "resnet14", "resnet20", "resnet18", "resnet18-imagenet"):
        kernels = [m for m in build(name, 3, 10, width=4).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        shortcuts = [m for m in kernels if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
        assert len(kernels) - len(shortcuts) == int(name.removeprefix("resnet").removesuffix("-imagenet"))


def test_stem_stride_halves_the_first_map() -> None:
    for name in ("tiny", "resnet8", "resnet18", "mobilenetv2"):
        first = next(m for m in build(name, 1, 10, width=8, stem_stride=2).modules() if isinstance(m, nn.Conv2d))
        assert first.stride == (2, 2)


def test_same_seed_same_weights() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(build("tiny", 1, 10).state_dict())
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])


def test_mobilenet_widths_round_to_eight() -> None:
    assert [scaled(c, 32) for c in (16, 24, 320, 1280)] == [16, 24, 320, 1280]
    assert scaled(24, 16) == 16  # 12 would round to 8, below 90%
    assert scaled(16, 1) == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("resnet9", 3, 10), "unknown network 'resnet9': choose one of mobilenetv2, .*resnet8, tiny"),
        (("tiny", 0, 10), "channels of network tiny is 0"),
        (("tiny", 1, 10, 2.5), "width of network tiny is 2.5"),
        (("tiny", 1, True), "classes of network tiny is True"),
        (("tiny", 1, 10, None, 0), "stem_stride of network tiny is 0"),
        (("resnet18-imagenet", 3, 10, None, 2), "fixed stem: .* use resnet18"),
    ],
)
def test_refused(arguments: tuple, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        build(*arguments)
