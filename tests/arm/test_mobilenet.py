"""A MobileNet block net (inverted residuals, squeeze-excite, hard-swish) packaged for three ARM cores."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.package import package
from qdeploy.target import SHIPPED, load_target
from tests.arm.emulator import CORES, run_on
from tests.qdq_models import mobile_net, quantized


@dataclass(frozen=True)
class Net:
    onnx: Path
    images: np.ndarray  # float32 [n, 3, 20, 20]
    codes: np.ndarray  # what code for this machine computes


def lively() -> Any:
    """`mobile_net` with weights that keep the spread of activations, so that outputs differ between images."""
    import torch

    network = mobile_net(large=True)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    folder = tmp_path_factory.mktemp("mobilenet")
    onnx.save(quantized(lively(), folder, 17, signed=False), folder / "net.onnx")
    compile_model(
        folder / "net.onnx", load_target(SHIPPED / "host.toml"), folder / "host", options=Options(constant=True)
    )
    rng = np.random.default_rng(3)
    images = (rng.normal(0, 1, (40, 3, 20, 20)) + rng.normal(0, 1, (40, 3, 1, 1))).astype(np.float32)
    host = load_artifact(folder / "host")
    return Net(folder / "net.onnx", images, np.concatenate([host.codes(image[None]) for image in images]))


@pytest.mark.parametrize("target", CORES)
def test_packages_compute_the_codes_of_x86(net: Net, tmp_path: Path, target: str) -> None:
    device = load_target(SHIPPED / f"{target}.toml")
    compile_model(net.onnx, device, tmp_path / "artifact")
    package(tmp_path / "artifact", device, tmp_path / "p.tar.gz", model=net.onnx)
    with tarfile.open(tmp_path / "p.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    np.save(tmp_path / "x.npy", net.images)
    np.save(tmp_path / "y.npy", net.codes)
    assert len(np.unique(net.codes, axis=0)) == len(net.codes), "outputs hardly vary"
    folder = tmp_path / "qdeploy"
    own = ("--artifact", folder / "artifact", "--codes", "--json")
    images, expected = folder / "selftest" / "images.npy", folder / "selftest" / "expected.npy"
    found = run_on(
        CORES[target], folder / "device", "--input", tmp_path / "x.npy", "--expect", tmp_path / "y.npy", *own
    )
    assert found.report["expect"]["differing"] == 0
    found = run_on(CORES[target], folder / "device", "--input", images, "--expect", expected, *own)
    assert found.report["expect"]["differing"] == 0
