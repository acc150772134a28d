"""What a search measures on: this machine, in a process of its own, or the servers of one key of an RPC tracker."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import DeviceError, RecipeError
from qdeploy.farm.process import DeviceLostError, run_child, write_params
from qdeploy.farm.tracker import Tracker, of_key, request
from qdeploy.files import canonical_json, write_atomic
from qdeploy.profile.latency import machine
from qdeploy.profile.timing import NOISE
from qdeploy.target import Target

LOCAL = "local"
SECONDS = 300.0  # for one measurement
START, CONNECT = 120.0, 15.0  # for a process with its imports; for a server's answer


class ProcessDevice:
    """This machine. A run that crashes or hangs is an error of its own and nothing else's."""

    slots = 1  # two at once would slow each other

    def __init__(self, noise: float = NOISE, seconds: float = SECONDS) -> None:
        self.noise, self.seconds = noise, seconds
        self.machine = str(machine()["cpu"])

    def measure(self, artifact: Path, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """As `qdeploy.profile.timing.timed`; DeviceError, or DeviceLostError after `seconds`."""
        with tempfile.TemporaryDirectory(prefix="qdeploy-run-") as where:
            job = _job(Path(where), artifact, params, {"noise": self.noise})
            return run_child(["local", str(job)], {"start": START, "measure": self.seconds}, "this machine")


class RpcDevice:
    """All servers of `key` at `tracker`, used at once; one that hangs, dies or vanishes is left, others go on."""

    def __init__(self, tracker: Tracker, key: str, noise: float = NOISE, seconds: float = SECONDS) -> None:
        self.tracker, self.key, self.noise, self.seconds = tracker, key, noise, seconds
        self.slots = len(of_key(tracker, key).addresses)
        self.machine = f"device {key}"

    def measure(self, artifact: Path, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """As `qdeploy.profile.timing.timed`, on whichever server is free first.

        Each server is tried once more than there are servers; then DeviceError with what became of the runs.
        """
        lost: list[str] = []
        with tempfile.TemporaryDirectory(prefix="qdeploy-run-") as where:
            while len(lost) <= self.slots:
                try:
                    of_key(self.tracker, self.key)
                    host, port, match = request(self.tracker, self.key, self.seconds)
                except DeviceError as e:
                    if lost:
                        raise DeviceError(f"{e}; before that {'; '.join(lost)}") from e
                    raise
                more = {"host": host, "port": port, "match": match, "noise": self.noise, "seconds": self.seconds}
                job = _job(Path(where), artifact, params, more)
                limits = {"start": START, "connect": CONNECT, "measure": self.seconds}
                try:
                    found = run_child(["rpc", str(job)], limits, f"device {self.key} at {host}:{port}")
                except DeviceLostError as e:
                    lost.append(str(e))
                else:
                    return found | {"machine": self.machine}
        raise DeviceError(f"no device of key {self.key} finishes the run: {'; '.join(lost)}")


def _job(folder: Path, artifact: Path, params: Mapping[str, np.ndarray], more: Mapping[str, Any]) -> Path:
    """The file of a job, beside its parameters."""
    write_params(folder / "params.npz", params)
    job = {"artifact": str(Path(artifact).resolve()), "params": str(folder / "params.npz"), **more}
    write_atomic(folder / "job.json", canonical_json(job))
    return folder / "job.json"


def parse_device(text: str, noise: float = NOISE) -> ProcessDevice | RpcDevice:
    """local, or HOST:PORT/KEY of a tracker; raises RecipeError, and DeviceError where no such device answers."""
    if text == LOCAL:
        return ProcessDevice(noise)
    where, slash, key = text.partition("/")
    if not slash or not key:
        raise RecipeError(f"device {text!r} is unknown: write local or HOST:PORT/KEY; `qdeploy devices` lists keys")
    return RpcDevice(Tracker.parse(where), key, noise)


def parse_devices(
    texts: Sequence[str], targets: Sequence[Target], noise: float = NOISE
) -> dict[str, ProcessDevice | RpcDevice]:
    """What each target is measured on, by its name; "" stands for all that have no entry.

    `texts`: DEVICE, for all targets, or TARGET=DEVICE; they come before what target files say (their `device`).
    Raises RecipeError for a target that is not among `targets` or has two devices; else as `parse_device`.
    """
    names = {target.name for target in targets}
    asked: dict[str, str] = {}
    for text in texts:
        target, equals, name = text.rpartition("=")
        if equals and target not in names:
            raise RecipeError(f"--device {text}: no --target has the name {target!r}")
        if target in asked:
            raise RecipeError(f"--device {text}: {target or 'what names no target'} has a device already")
        asked[target] = name
    if "" not in asked:
        asked = {"": LOCAL} | {target.name: target.device for target in targets if target.device} | asked
    made = {text: parse_device(text, noise) for text in dict.fromkeys(asked.values())}
    return {name: made[text] for name, text in asked.items()}
