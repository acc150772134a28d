"""The demo's elastic checkpoint at two widths: a release, a pulled folder, an artifact with its level."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.write import write_bundle
from qdeploy.client.pull import pull
from qdeploy.client.runtime import LevelRunner
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.data import load
from qdeploy.demo import MODEL
from qdeploy.export import export_onnx
from qdeploy.extract import calibration_set, read_spec
from qdeploy.ladder import read_ladder
from qdeploy.serve.app import serving
from qdeploy.subnet import extract
from qdeploy.target import SHIPPED, load_target
from qdeploy.train.run import load_run
from tests.runner.programs import program

LEVELS = {"w2": 2, "w4": 4}
CALIBRATION = 256  # images; all that it takes, where accuracy does not matter


@dataclass(frozen=True)
class Demo:
    """Files of the demo model; shared, so copy what you change."""

    onnx: dict[str, Path]
    artifact: Path  # any level
    constant: Path  # w4 inside
    tree: Path
    device: Path  # pulled at w4
    images: np.ndarray  # uint8 [n, 1, 28, 28]
    outputs: dict[str, np.ndarray]  # what the Python client computes

    def copy(self, name: str, to: Path) -> Path:
        """A private copy of `artifact`, `constant` or `device`."""
        return Path(shutil.copytree(getattr(self, name), to / name))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    if platform.machine() != "x86_64":
        pytest.skip(f"the expected outputs are computed by x86 code, this machine is {platform.machine()}")
    program("x86_64")
    folder = tmp_path_factory.mktemp("demo")
    recipe, net = load_run(MODEL)
    calibration = calibration_set(recipe, None).images[:CALIBRATION]
    base = read_spec(MODEL / "base.json")
    assert base.architecture is not None
    onnx = {name: folder / f"{name}.onnx" for name in LEVELS}
    for name, path in onnx.items():
        spec = net.uniform_blocks(base.architecture.stages, LEVELS[name], 8)
        export_onnx(extract(net, spec, recipe.name, calibration, None), path)
    target = load_target(SHIPPED / "host.toml")
    compile_model(onnx["w2"], target, folder / "artifact")
    compile_model(onnx["w4"], target, folder / "constant", options=Options(constant=True))
    write_bundle(read_ladder(list(onnx.values())), [folder / "artifact"], folder / "tree")
    images = load("fashion-mnist", "test").images[:200]
    with serving(folder / "tree") as url:
        pull(url, folder / "device", level="w4", unsigned=True)
    runner = LevelRunner(folder / "device")
    outputs = {"w4": runner.run(images)}
    runner.drop("w2")
    outputs["w2"] = runner.run(images)
    runner.climb("w4")
    return Demo(onnx, folder / "artifact", folder / "constant", folder / "tree", folder / "device", images, outputs)
