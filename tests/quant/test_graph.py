import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qdeploy.errors import ModelError
from qdeploy.nets import build
from qdeploy.quant.graph import fold_norms, read_graph


class Ordinary(nn.Module):
    """Functions, modules, in-place forms and every pooling, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.pool = nn.AvgPool2d(2)
        self.drop = nn.Dropout()
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        y = self.second(x).relu()
        y += x
        return self.last(self.drop(self.pool(y).mean((2, 3))))


def test_reads_an_ordinary_network() -> None:
    graph = read_graph(Ordinary(), torch.zeros(2, 3, 16, 16))
    ops = [(step.op, step.relu, step.norm is not None) for step in graph.steps]
    assert ops == [
        ("conv", True, True),
        ("max_pool", False, False),
        ("conv", True, False),
        ("add", False, False),
        ("conv", False, False),  # average pooling is a depthwise convolution
        ("global_average_pool", False, False),
        ("flatten", False, False),
        ("linear", False, False),
    ]
    assert graph.steps[0].attributes["padding"] == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "resnet18-imagenet", "mobilenetv2", "tiny"])
def test_reads_every_network_of_ours(name: str) -> None:
    graph = read_graph(build(name, 3, 10), torch.zeros(1, 3, 64, 64))
    assert graph.steps[-1].op == "linear"
    assert all(step.norm is not None for step in graph.layers[:-1])


def test_folding_batch_norm_keeps_the_function() -> None:
    network = Ordinary().eval()
    with torch.no_grad():
        network.norm.weight.uniform_(-1, 1)
        network.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 16, 16)
    before = F.relu(network.norm(network.first(x)))
    graph = fold_norms(read_graph(network, x))
    assert graph.steps[0].norm is None
    torch.testing.assert_close(F.relu(network.first(x)), before, rtol=1e-4, atol=1e-5)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.GELU()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(self.act(self.conv(x))))


def test_refuses_all_unknown_operators_at_once() -> None:
    with pytest.raises(ModelError) as error:
        read_graph(Unknown())
    for name in ("GELU", "GroupNorm", "sigmoid"):
        assert name in str(error.value)


class Flow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_refuses_flow_that_depends_on_values() -> None:
    with pytest.raises(ModelError, match="trace"):
        read_graph(Flow())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


def test_refuses_a_module_that_is_called_twice() -> None:
    with pytest.raises(ModelError, match="twice"):
        read_graph(Shared())


class Gate(nn.Module):
    """x * hard_sigmoid(hard_swish(x)) as functions, and a sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(F.hardswish(x)) + x


def test_gates_are_read_and_scoped_names_come_from_their_modules() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Hardswish(), Gate(), Gate(), nn.Hardsigmoid())
    plain, scoped = read_graph(network), read_graph(network, scoped=True)
    ops = ["conv", "hard_swish", *["hard_swish", "hard_sigmoid", "mul", "add"] * 2, "hard_sigmoid"]
    assert [step.op for step in plain.steps] == [step.op for step in scoped.steps] == ops
    names = [step.name for step in scoped.steps]
    assert names[2:6] == ["2.hard_swish", "2.hard_sigmoid", "2.mul", "2.add"] and names[6] == "3.hard_swish"
    assert names[-1] == "4" and scoped.steps[4].inputs == ("1", "2.hard_sigmoid")
    assert [step.name for step in plain.steps][4:6] == ["mul", "add"]
