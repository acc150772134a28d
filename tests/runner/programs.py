"""The C++ runner as tests call it: built from the source tree, on this machine or under an emulator."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VENV = Path(sys.prefix)
CROSS = VENV / "cross"  # where `make cross` puts what it needs


@dataclass(frozen=True)
class Ran:
    """How a run of qdeploy-run ended."""

    code: int
    out: str
    error: str

    @property
    def report(self) -> Any:
        """What --json printed; the run must have ended well."""
        assert self.code == 0, self.error
        return json.loads(self.out)


@functools.cache
def program(arch: str) -> Path:
    """qdeploy-run for `arch`, up to date with runner/; skips the test where a tool for building it is missing."""
    environment = os.environ | {"PATH": f"{CROSS / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "tools" / "make_runner.sh"), str(VENV), arch]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 2 and done.stderr.startswith("error: building"):
        pytest.skip(done.stderr.strip().removeprefix("error: "))
    assert done.returncode == 0, done.stderr
    return VENV / "device" / arch / "qdeploy-run"


def run(
    folder: Path | str, *args: Any, command: tuple[str, ...] = (), arch: str = "x86_64",
    environment: Mapping[str, str] | None = None,
) -> Ran:  # fmt: skip
    """Run qdeploy-run, behind `command` (an emulator) if there is one; `environment` adds variables."""
    words = [*command, str(program(arch)), str(folder), *map(str, args)]
    variables = os.environ | (environment or {})
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, env=variables)
    return Ran(done.returncode, done.stdout, done.stderr)
