from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdeploy.client.state import DeviceFolder
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.conftest import LEVELS, RealRelease
from tests.client.device import pull


class Device:
    """A device process and its reports."""

    def __init__(self, environment: dict[str, str], *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qdeploy.client", *args], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The next report that has these values."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            row: dict[str, Any] = json.loads(line)
            if all(row.get(key) == value for key, value in wanted.items()):
                return row
        raise AssertionError(f"no {wanted}: {self.process.communicate()[1]}")

    def end(self) -> tuple[int, str]:
        _, error = self.process.communicate(timeout=60)
        return self.process.returncode, error


@pytest.fixture
def files(real: RealRelease, tmp_path: Path) -> tuple[str, ...]:
    np.save(tmp_path / "x.npy", real.images)
    np.save(tmp_path / "y.npy", real.outputs["w4"].argmax(1))
    return "--images", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")


@pytest.fixture
def dev(real: RealRelease, tmp_path: Path) -> Iterator[Path]:
    with serving(real.root, log=tmp_path / "log") as url:
        pull(url, tmp_path / "dev", "w2")
        yield tmp_path / "dev"


def test_a_device_climbs_while_it_infers(
    real: RealRelease, dev: Path, files: tuple[str, ...], tmp_path: Path, device_environment: dict[str, str]
) -> None:
    device = Device(device_environment, str(dev), *files)
    ready = device.until(event="ready")
    assert (ready["level"], ready["levels_held"], ready["images"]) == ("w2", ["w2"], 6)
    correct = {name: int((real.outputs[name].argmax(1) == real.outputs["w4"].argmax(1)).sum()) for name in LEVELS}
    for level in LEVELS:
        if level != "w2":
            device.say(f"climb {level}")
            done = device.until(event="climb")
            assert done["level"] == level and done["bytes"] == sum(done["fetched"].values()) > 0
        row = device.until(event="run", level=level, first=0, n=6)
        assert row["correct"] == correct[level]
        assert 0 < row["median_ms"] <= row["max_ms"]
    before = len(read_byte_log(tmp_path / "log"))
    device.say("drop w2")
    assert device.until(event="drop")["bytes"] == 0
    device.until(event="run", level="w2", n=6)
    assert len(read_byte_log(tmp_path / "log")) == before
    device.say("climb w9")
    assert "levels are w2, w3, w4" in device.until(event="error")["error"]
    device.say("dance")
    assert "climb LEVEL" in device.until(event="error")["error"]
    device.say("stop")
    assert device.until(event="stopped")["level"] == "w2"
    assert device.end() == (0, "")
    assert DeviceFolder(dev).chosen().level == "w2"


def test_the_end_of_commands_stops(dev: Path, files: tuple[str, ...], device_environment: dict[str, str]) -> None:
    device = Device(device_environment, str(dev), *files, "--interval", "0.01", "--runtime", "ort")
    device.until(event="ready")
    assert device.end() == (0, "")


def test_a_signal_ends_it_quietly(dev: Path, files: tuple[str, ...], device_environment: dict[str, str]) -> None:
    device = Device(device_environment, str(dev), *files)
    device.until(event="run")
    device.process.send_signal(signal.SIGINT)
    code, error = device.end()
    assert code == 130 and error == ""


@pytest.mark.parametrize("broken", ["folder", "images", "labels"])
def test_bad_input_is_one_line_and_exit_code_2(
    dev: Path, files: tuple[str, ...], tmp_path: Path, broken: str, device_environment: dict[str, str]
) -> None:
    bad = tmp_path / "bad.npy"
    np.save(bad, np.zeros((2, 2), np.uint8) if broken == "images" else np.zeros(2, np.int64))
    args = {
        "folder": (str(tmp_path / "none"), *files),
        "images": (str(dev), "--images", str(bad)),
        "labels": (str(dev), *files[:2], "--labels", str(bad)),
    }[broken]
    code, error = Device(device_environment, *args).end()
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
