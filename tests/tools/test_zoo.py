"""The benchmark's networks and its arithmetic; nothing is timed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


zoo_networks, zoo, bench = (load(name) for name in ("zoo_networks", "zoo", "bench_compile"))


@pytest.mark.parametrize(("name", "weights"), [("mobilenetv3_large", 5_483_032), ("efficientnet_lite0", 4_652_008)])
def test_networks_have_the_papers_size(name: str, weights: int) -> None:
    network = getattr(zoo_networks, name)()
    assert sum(p.numel() for p in network.parameters()) == weights
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_weights_are_copied_in_order_or_refused() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    source, target = make(), make()
    renamed = {f"stem.{name}": value for name, value in source.state_dict().items()}
    zoo_networks.load_by_order(target, renamed)
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="does not fit"):
        zoo_networks.load_by_order(nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)), renamed)
    with pytest.raises(ValueError, match="tensors for a network of"):
        zoo_networks.load_by_order(nn.Conv2d(1, 2, 1), renamed)


def test_calibrated_norms_hold_the_statistics_of_their_images() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    batches = [torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    zoo_networks.calibrate(network, batches)
    with torch.no_grad():
        out = network(torch.cat(batches)).transpose(0, 1).flatten(1)
    norm: Any = network[1]
    assert torch.allclose(out.mean(1), norm.bias, atol=0.1)
    assert torch.allclose(out.std(1), norm.weight.abs(), rtol=0.1)


def test_a_refused_network_counts_as_missing() -> None:
    ran = {"network": "a", "weights": "seeded", "ratio": {"onnxruntime": 2.0}}
    other = {"network": "b", "weights": "seeded", "ratio": {"onnxruntime": 0.5}}
    refused = {"network": "c", "weights": "seeded", "refused": "Einsum x: no kernel", "refusals": 2}
    found = bench.means([ran, refused, other])
    assert found["missing"] == ["c"]
    assert found["onnxruntime"] == {"mean": pytest.approx(1), "least": 0.5, "of": 2} and "openvino" not in found
    assert "refused: Einsum x: no kernel (2 in all)" in bench.line(refused)


def test_images_come_in_the_size_that_a_network_reads() -> None:
    images = zoo.Images(None)
    assert "Fashion-MNIST" in images.label
    x = list(images.inputs("efficientnet-lite0", "test", 2))
    assert [image.shape for image in x] == [(1, 3, 224, 224)] * 2 and x[0].dtype == np.float32
    assert next(images.inputs("demo", "test", 1)).shape == (1, 1, 28, 28)
