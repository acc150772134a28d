"""The demo model compiled for ARM cores, in one release beside the code for this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from qdeploy.bundle.write import write_bundle
from qdeploy.client.pull import pull
from qdeploy.compile.pipeline import compile_model
from qdeploy.ladder import read_ladder
from qdeploy.serve.app import serving
from qdeploy.target import SHIPPED, load_target
from tests.arm.emulator import CORES, check_tools
from tests.runner.conftest import Demo
from tests.runner.conftest import demo as demo  # a fixture


@dataclass(frozen=True)
class ArmDemo:
    """By target: the artifact, and the folder pulled for it at w4."""

    artifacts: dict[str, Path]
    devices: dict[str, Path]


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """Skip everything, before anything is compiled, where aarch64 cannot be built for or emulated."""
    check_tools()


@pytest.fixture(scope="session")
def arm(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> ArmDemo:
    folder = tmp_path_factory.mktemp("arm")
    artifacts = {name: folder / name for name in CORES}
    for name, path in artifacts.items():
        compile_model(demo.onnx["w2"], load_target(SHIPPED / f"{name}.toml"), path)
    write_bundle(read_ladder(list(demo.onnx.values())), list(artifacts.values()), folder / "tree")
    devices = {name: folder / f"device-{name}" for name in CORES}
    with serving(folder / "tree") as url:
        for name, path in devices.items():
            pull(url, path, level="w4", target=name, unsigned=True)
    return ArmDemo(artifacts, devices)
