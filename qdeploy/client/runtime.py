"""Running a level, and going to another one while inference runs: prepare aside, swap one pointer between batches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.store import ReadPiece, assemble, level_tensors
from qdeploy.client.artifact import describe, unpack_artifact, unsuited
from qdeploy.client.fetch import Patience
from qdeploy.client.images import load_images, to_input
from qdeploy.client.pull import Choice, PullReport, levels_within, open_choice, prepare_climb, prepare_drop
from qdeploy.client.receive import Echo
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import DeviceError

RunBatch = Callable[[np.ndarray], np.ndarray]  # float32 [N, C, H, W] -> float32 [N, classes], N the model's batch
RUNTIMES = ("tvm", "ort")


def in_batches(run: RunBatch, images: np.ndarray, size: int) -> np.ndarray:
    """Outputs of any number of images, `size` at a time; the last image fills up the last batch."""
    outputs = []
    for i in range(0, len(images), size):
        part = images[i : i + size]
        filled = np.concatenate([part, *[part[-1:]] * (size - len(part))])
        outputs.append(run(filled)[: len(part)])
    return np.concatenate(outputs)


class _Compiled:
    """The compiled artifact: loaded once, it runs every level of the ladder."""

    def __init__(self, folder: Path, manifest: Manifest, index: int | None, read: ReadPiece) -> None:
        if index is None:
            raise DeviceError(f"{folder} has no compiled artifact for this machine: use --runtime ort")
        if reason := unsuited(manifest.artifacts[index].target):
            name = describe(manifest.artifacts[index])
            raise DeviceError(f"the compiled artifact {name} does not run here ({reason}): use --runtime ort")
        from qdeploy.compile.artifact import load_artifact

        self._artifact = load_artifact(unpack_artifact(folder, manifest, index, read))
        if self._artifact.graph != manifest.graph:
            raise DeviceError(f"the compiled artifact in {folder} is for another graph: publish the release again")
        self.batch: int = self._artifact.input_shape[0]
        self.sample: tuple[int, ...] = tuple(self._artifact.input_shape[1:])

    def prepare(self, manifest: Manifest, level: str, read: ReadPiece) -> RunBatch:
        packed = self._artifact.prepare(level_tensors(manifest, level, read, self._artifact.join))
        return lambda x: self._artifact.run(x, packed)


class _OnnxRuntime:
    """ONNX Runtime on the rebuilt ONNX file."""

    def __init__(self, manifest: Manifest, level: str, read: ReadPiece) -> None:
        session = self._session(manifest, level, read)
        batch, *sample = session.get_inputs()[0].shape
        self.batch: int = batch if isinstance(batch, int) else 1  # an open batch means one image, as `compile` has it
        self.sample: tuple[int, ...] = tuple(sample)

    @staticmethod
    def _session(manifest: Manifest, level: str, read: ReadPiece) -> Any:
        try:
            import onnxruntime
        except ImportError as e:
            raise DeviceError("--runtime ort needs the package onnxruntime: install it, or use --runtime tvm") from e
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact products without VNNI too
        data = assemble(manifest, level, read)
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's classes derive from Exception alone
            reason = str(e).strip().splitlines()[0]
            raise DeviceError(f"ONNX Runtime cannot load level {level} ({reason}): use --runtime tvm") from e

    def prepare(self, manifest: Manifest, level: str, read: ReadPiece) -> RunBatch:
        session = self._session(manifest, level, read)
        name = session.get_inputs()[0].name
        return lambda x: np.asarray(session.run(None, {name: x})[0])


class _Active(NamedTuple):
    """What runs now: one reference, so that a reader sees a level and its parameters together."""

    level: str
    run: RunBatch


class LevelRunner:
    """Inference from a device folder, with climbs and drops while another thread runs.

    `run` and `run_with_level` may be called from any thread at any time; each call uses one level from its first image
    to its last. `climb` and `drop` (one at a time) fetch, verify and prepare aside while inference goes on, then swap
    one pointer, then record the choice: peak memory is two sets of packed parameters, the pause is that of an
    assignment. When they raise, the level before stays in force.
    """

    def __init__(self, folder: Path, runtime: str = "tvm", patience: Patience | None = None) -> None:
        """Open `folder` at the level in force. `runtime` is "tvm" (the compiled artifact) or "ort" (ONNX Runtime).

        Raises BundleError when the folder is empty or damaged, DeviceError when the runtime cannot run here.
        """
        if runtime not in RUNTIMES:
            raise DeviceError(f"runtime {runtime!r} is unknown: choose {' or '.join(RUNTIMES)}")
        self.folder = Path(folder)
        self._patience = patience
        self._device = DeviceFolder(self.folder)
        current, self._manifest = open_choice(self._device)
        self._digest = current.manifest
        self._read = self._device.reader(self._manifest)
        self._backend: _Compiled | _OnnxRuntime
        if runtime == "tvm":
            self._backend = _Compiled(self.folder, self._manifest, current.artifact, self._read)
        else:
            self._backend = _OnnxRuntime(self._manifest, current.level, self._read)
        self._changing = threading.Lock()
        self._active = self._prepare(current.level)

    def _prepare(self, level: str) -> _Active:
        return _Active(level, self._backend.prepare(self._manifest, level, self._read))

    @property
    def level(self) -> str:
        """The level in force."""
        return self._active.level

    @property
    def levels_held(self) -> list[str]:
        """Levels whose pieces are all on disk, in fetch order."""
        return levels_within(self._manifest, self._device.journal())

    @property
    def sample(self) -> tuple[int, ...]:
        """Shape of one image: (C, H, W)."""
        return self._backend.sample

    def run(self, x: np.ndarray) -> np.ndarray:
        """Images, uint8 or float [n, C, H, W] (see `images.to_input`) -> float32 [n, classes]. Raises DataError."""
        return self.run_with_level(x)[0]

    def run_with_level(self, x: np.ndarray) -> tuple[np.ndarray, str]:
        """As `run`, with the level that made every one of these outputs."""
        active = self._active
        batch = to_input(np.asarray(x), self.sample)
        return in_batches(active.run, batch, self._backend.batch), active.level

    def climb(self, to: str, echo: Echo | None = None) -> PullReport:
        """As `pull.climb`, under running inference."""
        with self._changing:
            return self._swap(prepare_climb(self.folder, to, echo, patience=self._patience))

    def drop(self, to: str) -> PullReport:
        """As `pull.drop`, under running inference."""
        with self._changing:
            return self._swap(prepare_drop(self.folder, to))

    def _swap(self, choice: Choice) -> PullReport:
        if choice.current.manifest != self._digest:
            raise DeviceError(f"another release was pulled into {self.folder}: open it again to run that one")
        before, self._active = self._active, self._prepare(choice.level)
        try:
            return choice.commit()
        except BaseException:
            self._active = before
            raise


def run(folder: Path, images: Path | np.ndarray, runtime: str = "tvm") -> np.ndarray:
    """Outputs float32 [n, classes] of the level in force in `folder` for images in a file or an array.

    Raises DataError for a file that cannot be read or images of another shape, BundleError, DeviceError.
    """
    x = images if isinstance(images, np.ndarray) else load_images(images)
    return LevelRunner(folder, runtime).run(x)
