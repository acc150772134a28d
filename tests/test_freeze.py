import numpy as np
import pytest
import torch
from torch import nn

from qdeploy import integer
from qdeploy.errors import ModelError
from qdeploy.freeze import freeze
from qdeploy.nets import build
from tests.quant.test_graph import Ordinary


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_users_network_at_eight_bits_is_close_to_itself(dtype: type) -> None:
    torch.manual_seed(0)
    network = Ordinary().eval()
    with torch.no_grad():
        network.norm.weight.uniform_(-1, 1)  # negative factors fold into the weights
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 3, 16, 16), dtype=np.uint8)
    if dtype is np.float32:
        images = random.standard_normal((64, 3, 16, 16)).astype(np.float32)
    frozen = freeze(network, images)
    quantizer = frozen.activations[frozen.input].quantizer
    codes = images if dtype is np.uint8 else integer.quantize(images, quantizer)
    inputs = torch.from_numpy(images).float() / (255 if dtype is np.uint8 else 1)
    expected = network(inputs).detach().numpy()
    error = np.abs(integer.logits(frozen, codes) - expected)
    assert error.max() < 0.05 * np.abs(expected).max()
    assert frozen.report["parity"]["simulation"]["largest_step"] <= 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_our_networks_freeze_too(name: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    frozen = freeze(build(name, 3, 10, 8), images, name)
    assert frozen.problems() == []


def test_relu6_becomes_a_code_bound() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 4, 3))
    with torch.no_grad():
        network[0].weight.mul_(100)  # type: ignore[union-attr, operator]
    frozen = freeze(network, np.random.default_rng(0).integers(0, 256, (8, 1, 4, 4), dtype=np.uint8).repeat(2, 0)[:8])
    quantizer = frozen.activations["0"].quantizer
    assert quantizer.clip and (quantizer.hi - quantizer.zero_point) * quantizer.scale == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (np.zeros((3, 16, 16), np.uint8), "calibration images"),
        (np.zeros((0, 3, 16, 16), np.uint8), "calibration images"),
        (np.zeros((2, 3, 16, 16)), "float64"),
        (np.full((2, 3, 16, 16), np.nan, np.float32), "NaN"),
    ],
)
def test_wrong_images_are_refused(images: np.ndarray, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        freeze(Ordinary(), images)


def test_signed_input_that_is_pooled_directly() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))
    images = np.random.default_rng(0).normal(-0.5, 1, (64, 3, 16, 16)).astype(np.float32)
    assert freeze(network, images).report["float"]["relative"] < 0.1


class Viewed(nn.Module):
    """Flattens as old code does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        return self.last(torch.flatten(self.mid(x.view(x.size(0), -1)), start_dim=1))


def test_view_is_flatten() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    assert [node.op for node in freeze(Viewed(), images).nodes] == ["conv", "flatten", "linear", "flatten", "linear"]


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (Ordinary().double(), "not float32"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 3)), "does not run on these images"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), nn.Linear(56, 3)),
            "Adaptive",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "running statistics"),
    ],
)
def test_networks_that_are_refused(network: nn.Module, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        freeze(network, np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8))


def test_nan_weights_are_refused() -> None:
    network = Ordinary()
    with torch.no_grad():
        network.last.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="weights hold NaN"):
        freeze(network, np.zeros((2, 3, 16, 16), np.uint8))
