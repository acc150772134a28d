"""What a process is said to need is what it takes: the runner on a network of 1.2 million weights and on one of one."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.write import write_bundle
from qdeploy.client.pull import pull
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.ladder import read_ladder
from qdeploy.profile.memory import footprint
from qdeploy.qdq import canonical_bytes
from qdeploy.serve.app import serving
from qdeploy.target import SHIPPED, load_target
from tests.qdq_models import Net
from tests.runner.programs import run

HOST = load_target(SHIPPED / "host.toml")


def model(path: Path, channels: int, size: int) -> None:
    net = Net((1, channels, size, size))
    x = net.q("x")
    for _ in range(2):
        x = net.q(net.node("Conv", x, *net.weight(channels, channels, 3, 3), pads=[1] * 4))
    path.write_bytes(canonical_bytes(net.model(x)))


def peaks(folder: Path, channels: int, size: int) -> dict[str, tuple[float, int]]:
    """{how a level comes: (predicted, greatest resident set)}."""
    folder.mkdir()
    model(folder / "w8.onnx", channels, size)
    compile_model(folder / "w8.onnx", HOST, folder / "inside", options=Options(constant=True))
    compile_model(folder / "w8.onnx", HOST, folder / "plain")
    write_bundle(read_ladder([folder / "w8.onnx"]), [folder / "plain"], folder / "tree")
    with serving(folder / "tree") as url:
        pull(url, folder / "device", target=HOST.name, unsigned=True)
    np.save(folder / "x.npy", np.zeros((1, channels, size, size), np.float32))
    found = {}
    for name, artifact in (("inside", "inside"), ("device", "plain")):
        memory = run(folder / name, "--input", folder / "x.npy", "--json").report["memory"]
        found[name] = footprint(folder / artifact)["peak"].value, memory["peak_bytes"]
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the runner for this machine is built on x86_64")
def test_predicted_memory_is_what_the_runner_takes(tmp_path: Path) -> None:
    none, large = peaks(tmp_path / "none", 1, 1), peaks(tmp_path / "large", 448, 8)
    for name, (predicted, peak) in large.items():
        assert predicted > 3.6e6 and abs(predicted / (peak - none[name][1]) - 1) <= 0.05, name
    assert large["device"][0] > large["inside"][0] + 448 * 448 * 9
