"""A tracker and servers of TVM's for tests, each in a process of its own that can be stopped and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from qdeploy.errors import DeviceError
from qdeploy.farm.tracker import Tracker, devices

T = TypeVar("T")
SECONDS = 60.0  # to wait for a process on a busy machine


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(found: Callable[[], T], what: str) -> T:
    """What `found` answers as soon as that is true."""
    end = time.monotonic() + SECONDS
    while not (answer := found()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return answer


class Farm:
    """A tracker; `serve` adds a server of a key."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, port = environment | {"OMP_NUM_THREADS": "1"}, free_port()
        self.tracker = Tracker("127.0.0.1", port)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.restart()

    def restart(self) -> None:
        """Start the tracker, at the same port every time."""
        port = self.tracker.port
        self.processes.append(self._start("rpc_tracker", "--port", str(port), "--port-end", str(port + 1)))
        until(lambda: self.listed() is not None, "the tracker does not start")

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"tvm.exec.{name}", "--host", "127.0.0.1", *arguments]
        return subprocess.Popen(
            command, env=self.environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def listed(self) -> dict[str, int] | None:
        """{key: servers that are free}; None where the tracker does not answer."""
        try:
            return {one.key: one.free for one in devices(self.tracker)}
        except DeviceError:
            return None

    def serve(self, key: str) -> subprocess.Popen[bytes]:
        before, port = (self.listed() or {}).get(key, 0), free_port()
        where = ("--port", str(port), "--port-end", str(port + 1), "--tracker", str(self.tracker), "--key", key)
        process = self._start("rpc_server", *where)
        self.processes.append(process)
        until(lambda: (self.listed() or {}).get(key, 0) > before, f"the server of {key} does not register")
        return process

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
