"""A device run in a process of its own, with a time limit for each stage: whatever hangs or dies is only that run.

The child prints JSON lines: {"stage": NAME} when it begins one, {"found": ...} or {"error": TEXT} at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import DeviceError


class DeviceLostError(DeviceError):
    """The run ended without a result: a device that hangs, dies or vanishes. Another device may do it."""


def run_child(arguments: Sequence[str], limits: Mapping[str, float], what: str) -> dict[str, Any]:
    """Run `python -m qdeploy.farm.child ARGUMENTS`; returns its "found".

    `limits`: seconds from the beginning of each stage to the next, "start" among them. Raises DeviceLostError when one
    is exceeded or the child dies, DeviceError for what the child reports. The child and all its children are gone then.
    """
    command = [sys.executable, "-m", "qdeploy.farm.child", *arguments]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    )
    lines: queue.Queue[bytes | None] = queue.Queue()
    errors: list[bytes] = []
    assert child.stdout is not None and child.stderr is not None
    readers = [
        threading.Thread(target=_pump, args=(child.stdout, lines.put), daemon=True),
        threading.Thread(target=_drain, args=(child.stderr, errors), daemon=True),
    ]
    for reader in readers:
        reader.start()
    stage, deadline = "start", time.monotonic() + limits["start"]
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty as e:
                raise DeviceLostError(f"{what}: nothing came back within {limits[stage]:g} s of stage {stage}") from e
            if line is None:
                readers[1].join(1.0)
                raise DeviceLostError(f"{what}: the run died in stage {stage} ({_last(child, errors)})")
            message = _parsed(line)
            if "found" in message:
                return dict(message["found"])
            if "error" in message:
                raise (DeviceLostError if message.get("lost") else DeviceError)(f"{what}: {message['error']}")
            if message.get("stage") in limits:
                stage = message["stage"]
                deadline = time.monotonic() + limits[stage]
    finally:
        _end(child, readers)


def _pump(stream: Any, put: Any) -> None:
    for line in stream:
        put(line)
    put(None)


def _drain(stream: Any, into: list[bytes]) -> None:
    for line in stream:
        into.append(line)
        del into[:-20]


def _parsed(line: bytes) -> dict[str, Any]:
    """A message of the child; {} for what libraries print on their own."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _last(child: subprocess.Popen[bytes], errors: list[bytes]) -> str:
    code = child.wait()
    if code < 0:
        return signal.Signals(-code).name
    text = [line.decode(errors="replace").strip() for line in errors if line.strip()]
    return text[-1] if text else f"exit code {code}"


def _end(child: subprocess.Popen[bytes], readers: Sequence[threading.Thread]) -> None:
    """The child's whole process group ends: it started none of ours."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream, reader in zip((child.stdout, child.stderr), readers, strict=True):
        reader.join()  # its pipe has no writer any more
        assert stream is not None
        stream.close()


def write_params(path: Path, params: Mapping[str, np.ndarray]) -> None:
    """A level's initializers as .npz: their names are ONNX's and may hold any character."""
    names = list(params)
    arrays = {f"a{i}": np.asarray(params[name]) for i, name in enumerate(names)}
    np.savez(path, names=np.array(names), **arrays)  # type: ignore[arg-type]


def read_params(path: Path) -> dict[str, np.ndarray]:
    """Inverse of `write_params`."""
    with np.load(path, allow_pickle=False) as found:
        return {str(name): found[f"a{i}"] for i, name in enumerate(found["names"])}


def say(**message: Any) -> None:
    """A message of the child."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
