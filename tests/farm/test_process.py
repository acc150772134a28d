"""Runs in child processes: what hangs, dies, prints nonsense or leaves children behind is one error in time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import DeviceError
from qdeploy.farm import process
from qdeploy.farm.process import DeviceLostError, read_params, run_child, write_params

LIMITS = {"start": 20.0, "measure": 0.5}


def child(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `run_child` start this code instead of the farm's child."""
    script = tmp_path / "child.py"
    script.write_text(f"import json, os, sys, time, subprocess, signal\n{code}\n")
    real = process.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        return real([sys.executable, str(script), *command[3:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(process.subprocess, "Popen", popen)


def test_a_result_between_other_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(
        tmp_path, "print('hello'); print('[1]'); print(json.dumps({'found': {'argument': sys.argv[1]}}))", monkeypatch
    )
    assert run_child(["word"], LIMITS, "it") == {"argument": "word"}


@pytest.mark.parametrize(
    ("code", "message", "lost"),
    [
        ("time.sleep(60)", "within 1 s of stage start", True),
        ('print(\'{"stage": "measure"}\', flush=True); time.sleep(60)', "within 0.5 s of stage measure", True),
        ('print(\'{"stage": "measure"}\', flush=True); os.kill(os.getpid(), signal.SIGSTOP)', "stage measure", True),
        ("os.kill(os.getpid(), signal.SIGILL)", "died in stage start (SIGILL)", True),
        ("raise OSError('no memory')", "OSError: no memory", True),
        ("sys.exit(7)", "exit code 7", True),
        ("print(json.dumps({'error': 'too noisy'}))", "it: too noisy", False),
        ("print(json.dumps({'error': 'reset', 'lost': True}))", "it: reset", True),
    ],
)
def test_what_goes_wrong(code: str, message: str, lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(tmp_path, code, monkeypatch)
    limits = LIMITS if "within 1 s" not in message else LIMITS | {"start": 1.0}
    with pytest.raises(DeviceError) as error:
        run_child([], limits, "it")
    assert message in str(error.value) and isinstance(error.value, DeviceLostError) == lost


def test_nothing_outlives_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    code = f"""
p = subprocess.Popen(['sleep', '100'])
open({str(note)!r}, 'w').write(str(p.pid))
print('{{"stage": "measure"}}', flush=True)
time.sleep(100)"""
    child(tmp_path, code, monkeypatch)
    with pytest.raises(DeviceLostError):
        run_child([], LIMITS, "it")
    pid, end = int(note.read_text()), time.monotonic() + 5
    while time.monotonic() < end and _alive(pid):
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_parameters_keep_their_names(tmp_path: Path) -> None:
    params = {"a/b:0": np.arange(6, dtype=np.int8).reshape(2, 3), "": np.float32(2.5), "file": np.zeros((0, 3))}
    write_params(tmp_path / "p.npz", params)
    found = read_params(tmp_path / "p.npz")
    assert list(found) == list(params)
    for name, array in params.items():
        assert found[name].dtype == np.asarray(array).dtype and np.array_equal(found[name], array)
