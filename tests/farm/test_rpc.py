"""Real trackers and servers of TVM's: a run over RPC, and servers that freeze, die and come back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import DeviceError
from qdeploy.export.write import qdq_bytes
from qdeploy.farm import device as module
from qdeploy.farm.device import ProcessDevice, RpcDevice
from qdeploy.profile.signature import signatures
from qdeploy.qdq import arrays, load_model
from qdeploy.target import load_target
from tests.farm.children import Farm
from tests.nets_frozen import ladder_of

pytest.importorskip("tornado", reason="TVM's tracker needs tornado: pip install 'qdeploy[farm]'")
TARGET = load_target(Path(__file__).parents[2] / "targets" / "x86-64.toml")
ANY = 1000.0  # tests run on machines of any noise


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rpc")
    (folder / "w2.onnx").write_bytes(qdq_bytes(ladder_of(2, (2, 4), width=4, size=6, blocks=1)[0]))
    compile_model(folder / "w2.onnx", TARGET, folder / "a")
    return folder


@pytest.fixture(scope="module")
def params(artifact: Path) -> dict[str, np.ndarray]:
    return arrays(load_model(artifact / "w2.onnx")[1])


@pytest.fixture(scope="module")
def farm(device_environment: dict[str, str]) -> Iterator[Farm]:
    found = Farm(device_environment)
    yield found
    found.close()


def check(found: dict[str, object], artifact: Path) -> None:
    low, high = found["latency"]["quartiles"]  # type: ignore[index]
    assert 0 < low <= found["latency"]["median"] <= high  # type: ignore[index]
    kernels = found["kernels"]
    assert len(kernels) == len(signatures(artifact / "w2.onnx", TARGET))  # type: ignore[arg-type]
    assert all(0 <= a <= b <= c for a, b, c in kernels)  # type: ignore[attr-defined]
    assert found["packed_bytes"] > 0 and found["arena_bytes"] > 0  # type: ignore[operator]


def test_this_machine_in_a_process(artifact: Path, params: dict[str, np.ndarray]) -> None:
    check(ProcessDevice(ANY).measure(artifact / "a", params), artifact)
    with pytest.raises(DeviceError, match="this machine: parameter .* is missing"):
        ProcessDevice(ANY).measure(artifact / "a", {})


def test_servers_of_one_key(
    farm: Farm, artifact: Path, params: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT", 4.0)
    first = farm.serve("board")
    frozen = farm.serve("board")
    device = RpcDevice(farm.tracker, "board", ANY)
    assert device.slots == 2
    with ThreadPoolExecutor(2) as pool:  # both at once
        for found in pool.map(lambda _: device.measure(artifact / "a", params), range(2)):
            check(found, artifact)
    with pytest.raises(DeviceError, match="parameter .* is missing"):
        device.measure(artifact / "a", {})
    os.killpg(frozen.pid, signal.SIGSTOP)  # the tracker goes on to offer it
    for _ in range(2):
        check(device.measure(artifact / "a", params), artifact)
    os.killpg(first.pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match="board"):
        RpcDevice(farm.tracker, "board", ANY, seconds=3.0).measure(artifact / "a", params)


def test_unknown_keys_name_the_known_ones(farm: Farm) -> None:
    farm.serve("orin")
    with pytest.raises(DeviceError, match="no device has key 'oryn'.*orin"):
        RpcDevice(farm.tracker, "oryn")
