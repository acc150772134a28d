"""A real nginx on loopback, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def running(prefix: Path, config: Callable[[int, str], str]) -> Iterator[int]:
    """nginx with `config(port, user)` as its file, below the new folder `prefix`; skips where it is not installed.

    `user` is the directive that a server started by root needs.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    prefix.mkdir()
    (prefix / "conf").write_text(config(port, "user root;" if os.geteuid() == 0 else ""))
    command = [program, "-p", str(prefix), "-c", str(prefix / "conf"), "-g", "daemon off;"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(400):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
                    assert process.stderr is not None
                    pytest.fail(f"nginx ended: {process.stderr.read().decode()}")
            yield port
        finally:
            process.terminate()
            process.wait(20)
