"""A real release: three levels of a small network, exported, bundled and compiled for this machine, built once."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.write import write_bundle
from qdeploy.compile.pipeline import compile_model
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet
from qdeploy.integer import logits, quantize
from qdeploy.ladder import read_ladder
from qdeploy.target import Target
from tests.client.tree import Tree, make_tree
from tests.nets_frozen import ladder_of

LEVELS = ("w2", "w3", "w4")


@dataclass(frozen=True)
class RealRelease:
    """A published tree, images that its network reads, and what the integer reference says at each level."""

    root: Path
    onnx: Mapping[str, bytes]
    images: np.ndarray  # uint8 [n, C, H, W]
    outputs: Mapping[str, np.ndarray]  # float32 [n, classes]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A small published ladder of invented files."""
    return make_tree(tmp_path / "root")


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """Where a device folder is to be; nothing is there yet."""
    return tmp_path / "dev"


def reference(net: FrozenNet, images: np.ndarray) -> np.ndarray:
    pixels = images.astype(np.float32) / np.float32(255)
    return logits(net, quantize(pixels, net.activations[net.input].quantizer))


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealRelease:
    folder = tmp_path_factory.mktemp("real")
    nets = dict(zip(LEVELS, ladder_of(7, (2, 3, 4)), strict=True))
    files = {name: qdq_bytes(net) for name, net in nets.items()}
    for name, data in files.items():
        (folder / f"{name}.onnx").write_bytes(data)
    paths = [folder / f"{name}.onnx" for name in LEVELS]
    compile_model(paths[0], Target("here", platform.machine(), "llvm", "host"), folder / "artifact")
    write_bundle(read_ladder(paths), [folder / "artifact"], folder / "root")
    images = np.random.default_rng(1).integers(0, 256, (6, 3, 8, 8), np.uint8)
    outputs = {name: reference(net, images) for name, net in nets.items()}
    return RealRelease(folder / "root", files, images, outputs)
