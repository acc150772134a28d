"""The three ARM cores of these tests, and how qdeploy-run is called on them."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qdeploy.compile.codegen import linker
from qdeploy.errors import CompileError
from tests.runner.programs import CROSS, Ran, program, run

# target -> qemu's processor; version 7.2 has i8mm in `max` alone
CORES = {"raspberry-pi-4": "cortex-a72", "raspberry-pi-5": "cortex-a76", "neoverse-v1": "max"}
PACKAGES = {"qemu-aarch64-static": "qemu-user-static", "proot": "proot"}
ROOT = CROSS / "root"  # a bare Debian


def tool(name: str) -> str:
    """Path of a program that `make cross` provides; skips the test where it is missing."""
    found = shutil.which(name, path=f"{CROSS / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"there is no {name}: run make cross (or, on Debian, apt install {PACKAGES[name]})")
    return found


@functools.cache
def check_tools() -> None:
    """Skip the test where aarch64 cannot be compiled for, built for or emulated."""
    tool("qemu-aarch64-static")
    if not (ROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        pytest.skip(f"there is no Debian root for aarch64 in {ROOT}: run make cross")
    try:
        linker("aarch64")
    except CompileError as e:
        pytest.skip(str(e))
    program("aarch64")


def emulator(core: str) -> tuple[str, ...]:
    """Words before a program of aarch64 that run it on `core`."""
    check_tools()
    return (tool("qemu-aarch64-static"), "-cpu", core, "-L", str(ROOT))


def run_on(core: str, folder: Path | str, *args: Any) -> Ran:
    """qdeploy-run on an emulated core."""
    return run(folder, *args, command=emulator(core), arch="aarch64")


def shell(root: Path, core: str, script: str) -> subprocess.CompletedProcess[str]:
    """A shell script inside the bare system `root`, all of its programs emulated, no right of root needed."""
    proot = [tool("proot"), "-0", "-q", f"{tool('qemu-aarch64-static')} -cpu {core}", "-r", str(root), "-b", "/proc"]
    command = [*proot, "-b", "/dev", "-w", "/data", "/bin/sh", "-c", script]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/root"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    if "ptrace(" in done.stderr:
        pytest.skip("this system forbids ptrace, with which proot runs the programs of another root")
    return done
