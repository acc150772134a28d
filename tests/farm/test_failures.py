"""Real devices that vanish in a run, lose a session's process, or come back, and a tracker that does."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import DeviceError
from qdeploy.farm import device as module
from qdeploy.farm.device import RpcDevice
from tests.farm.children import Farm, until
from tests.farm.test_rpc import ANY, artifact, check, params

pytest.importorskip("tornado", reason="TVM's tracker needs tornado: pip install 'qdeploy[farm]'")
__all__ = ["artifact", "params"]  # fixtures


@pytest.fixture
def farm(device_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Farm]:
    monkeypatch.setattr(module, "CONNECT", 5.0)
    found = Farm(device_environment)
    yield found
    found.close()


def group(leader: int) -> set[int]:
    """Processes of a group."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


def while_two_run(
    farm: Farm, artifact: Path, params: dict[str, np.ndarray], happens: Callable[[int, set[int]], None]
) -> None:
    """Two runs on two servers, both to end well; `happens`, given a server and its session's processes, in one of them.

    Which server and which run cannot be known: on a busy machine one run may have ended before the other begins.
    """
    servers = {process.pid: group(process.pid) for process in farm.processes[1:] if process.poll() is None}
    device = RpcDevice(farm.tracker, "board", ANY)
    assert device.slots == len(servers) == 2

    def sessions() -> list[tuple[int, set[int]]]:
        return [(leader, new) for leader, rest in servers.items() if (new := group(leader) - rest)]

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(device.measure, artifact / "a", params) for _ in range(2)]
        happens(*until(sessions, "no run begins")[0])
        for run in runs:
            check(run.result(), artifact)


def kill_server(leader: int, _: set[int]) -> None:
    os.killpg(leader, signal.SIGKILL)


def kill_session(_: int, processes: set[int]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_device_that_vanishes_in_a_run_and_comes_back(
    farm: Farm, artifact: Path, params: dict[str, np.ndarray]
) -> None:
    farm.serve("board")
    farm.serve("board")
    while_two_run(farm, artifact, params, kill_server)
    until(lambda: (farm.listed() or {}).get("board") == 1, "the device that is left is not free again")
    assert RpcDevice(farm.tracker, "board", ANY).slots == 1
    farm.serve("board")
    while_two_run(farm, artifact, params, lambda *_: None)


def test_a_session_whose_process_dies(farm: Farm, artifact: Path, params: dict[str, np.ndarray]) -> None:
    farm.serve("board")
    farm.serve("board")
    while_two_run(farm, artifact, params, kill_session)


def test_a_tracker_that_is_restarted(farm: Farm, artifact: Path, params: dict[str, np.ndarray]) -> None:
    farm.serve("board")
    device = RpcDevice(farm.tracker, "board", ANY)
    check(device.measure(artifact / "a", params), artifact)
    os.killpg(farm.processes[0].pid, signal.SIGKILL)
    farm.processes[0].wait()
    start = time.monotonic()
    with pytest.raises(DeviceError, match="no RPC tracker at .*start one"):
        device.measure(artifact / "a", params)
    assert time.monotonic() - start < 60  # the limit of a run is 300
    farm.restart()
    until(lambda: (farm.listed() or {}).get("board") == 1, "the server does not register again")
    check(device.measure(artifact / "a", params), artifact)
