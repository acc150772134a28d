"""What all tests share: one thread, and small batches of real images."""

from __future__ import annotations

import os
from pathlib import Path

# before any test imports numpy, torch or a runtime: on a busy machine more threads are slower, and sums would vary
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
from hypothesis import settings

from qdeploy.data import Dataset, load

settings.register_profile(
    "qdeploy", deadline=None, print_blob=True
)  # deadlines are wall clock: false alarms under load
settings.load_profile("qdeploy")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """torch reads OMP_NUM_THREADS only at its own start; say it again."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fashion_test() -> Dataset:
    """The shipped test set: 10,000 images. Shared: do not write into it."""
    return load("fashion-mnist", "test")


@pytest.fixture(scope="session")
def fashion_sample() -> Dataset:
    """The shipped part of the training set: 5,000 images. Shared: do not write into it."""
    return load("fashion-mnist", "sample")


@pytest.fixture(scope="session")
def device_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process on a machine without torch, as devices are; TVM loads torch where there is one."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "torch.py").write_text("raise ImportError('no torch on a device')\n")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parents[1]}"}


@pytest.fixture(scope="session")
def elastic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short EQ-Net training with held-out images. Shared: do not write into it."""
    from qdeploy.train.run import train
    from tests.train.runs import elastic_recipe

    run = tmp_path_factory.mktemp("elastic") / "run"
    train(elastic_recipe(images=1024), run, None, lambda _: None)
    return run


@pytest.fixture
def images(fashion_test: Dataset) -> np.ndarray:
    """64 real images, uint8 [64, 1, 28, 28]."""
    return fashion_test.images[:64].copy()


@pytest.fixture
def labels(fashion_test: Dataset) -> np.ndarray:
    """Their labels, int64 [64]."""
    return fashion_test.labels[:64].copy()
