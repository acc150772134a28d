"""Running a level, and going to another one while inference runs.

Two ways (`MODES`). "swap" prepares the new level aside, a layer at a time, and exchanges one pointer between batches:
two levels are in memory for a while, and inference never waits. "in-place" overwrites the running level a layer at a
time while inference rests: one level and one layer are in memory. Every output comes from exactly one level.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.store import Join, ReadPiece, assemble, level_reader
from qdeploy.client.artifact import describe, unpack_artifact, unsuited
from qdeploy.client.fetch import Patience
from qdeploy.client.images import load_images, to_input
from qdeploy.client.pull import Choice, PullReport, levels_within, open_choice, prepare_climb, prepare_drop
from qdeploy.client.receive import Echo
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import DeviceError

RunBatch = Callable[[np.ndarray], np.ndarray]  # float32 [N, C, H, W] -> float32 [N, classes], N the model's batch
RUNTIMES = ("tvm", "ort")
MODES = ("swap", "in-place")

if TYPE_CHECKING:
    from qdeploy.compile.artifact import Packed


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
        self.join: Join | None = self._artifact.join
        self.overwrites: bool = self._artifact.connect() is None  # not on a GPU

    def prepare(self, manifest: Manifest, level: str, read: ReadPiece, into: _Active | None = None) -> _Active:
        """A level, a layer at a time; `into`: one that is overwritten and may not run any more."""
        source = level_reader(manifest, level, read, self._artifact.join)
        packed = self._artifact.prepare_each(source, None if into is None else into.packed)
        return _Active(level, lambda x: self._artifact.run(x, packed), packed)


class _OnnxRuntime:
    """ONNX Runtime on the rebuilt ONNX file."""

    def __init__(self, manifest: Manifest, level: str, read: ReadPiece) -> None:
        session = self._session(manifest, level, read)
        batch, *sample = session.get_inputs()[0].shape
        self.batch: int = batch if isinstance(batch, int) else 1  # an open batch means one image, as `compile` has it
        self.sample: tuple[int, ...] = tuple(sample)
        self.join: Join | None = None
        self.overwrites = False

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

    def prepare(self, manifest: Manifest, level: str, read: ReadPiece, _: _Active | None = None) -> _Active:
        """A level."""
        session = self._session(manifest, level, read)
        name = session.get_inputs()[0].name
        return _Active(level, lambda x: np.asarray(session.run(None, {name: x})[0]))


class _Active(NamedTuple):
    """What runs now: one reference, so that a reader sees a level and its parameters together."""

    level: str
    run: RunBatch
    packed: Packed | None = None


def _lost(_: np.ndarray) -> np.ndarray:
    raise DeviceError("the level in memory was lost when a change of level failed: open the folder again")


class _Gate:
    """Any number of threads pass at once, or one holds it closed."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._inside, self._shut = 0, False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Wait until it is open, then hold it open."""
        with self._turn:
            self._turn.wait_for(lambda: not self._shut)
            self._inside += 1
        try:
            yield
        finally:
            with self._turn:
                self._inside -= 1
                self._turn.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let nobody in any more, and wait until all are out; one thread at a time."""
        with self._turn:
            self._shut = True
            self._turn.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._turn:
                self._shut = False
                self._turn.notify_all()


class LevelRunner:
    """Inference from a device folder, with climbs and drops while another thread runs.

    `run` and `run_with_level` may be called from any thread at any time; each call uses one level from its first image
    to its last. `climb` and `drop` (one at a time) fetch and verify while inference goes on, change the level as `mode`
    says, then record the choice. "swap": peak memory is two sets of packed parameters and a layer, the pause that of an
    assignment. "in-place": one set and a layer, the pause that of packing. When they raise, the level before stays.
    """

    def __init__(
        self,
        folder: Path,
        runtime: str = "tvm",
        patience: Patience | None = None,
        mode: str = "swap",
        rate: float | None = None,
    ) -> None:
        """Open `folder` at the level in force. `runtime` is "tvm" (the compiled artifact) or "ort" (ONNX Runtime).

        `rate` caps the bytes a second of climbs. Raises BundleError when the folder is empty or damaged, DeviceError
        when the runtime cannot run here.
        """
        for what, given, known in (("runtime", runtime, RUNTIMES), ("mode", mode, MODES)):
            if given not in known:
                raise DeviceError(f"{what} {given!r} is unknown: choose {' or '.join(known)}")
        self.folder = Path(folder)
        self._patience, self._mode, self._rate = patience, mode, rate
        self._device = DeviceFolder(self.folder)
        current, self._manifest = open_choice(self._device)
        self._digest = current.manifest
        self._read = self._device.reader(self._manifest)
        self._backend: _Compiled | _OnnxRuntime
        if runtime == "tvm":
            self._backend = _Compiled(self.folder, self._manifest, current.artifact, self._read)
        else:
            self._backend = _OnnxRuntime(self._manifest, current.level, self._read)
        if mode == "in-place" and not self._backend.overwrites:
            raise DeviceError("only a compiled artifact that runs on the processor changes levels in place: use swap")
        self._changing, self._gate = threading.Lock(), _Gate()
        self._active = self._prepare(current.level)
        self.pause_s = 0.0  # how long the last change of level kept inference from beginning

    def _prepare(self, level: str, into: _Active | None = None) -> _Active:
        return self._backend.prepare(self._manifest, level, self._read, into)

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
        batch = to_input(np.asarray(x), self.sample)
        with self._gate.passing():
            active = self._active
            return in_batches(active.run, batch, self._backend.batch), active.level

    def climb(self, to: str, echo: Echo | None = None) -> PullReport:
        """As `pull.climb`, under running inference."""
        with self._changing:
            join = self._backend.join
            return self._change(prepare_climb(self.folder, to, echo, None, self._patience, self._rate, join))

    def drop(self, to: str) -> PullReport:
        """As `pull.drop`, under running inference."""
        with self._changing:
            return self._change(prepare_drop(self.folder, to, self._backend.join))

    def _change(self, choice: Choice) -> PullReport:
        if choice.current.manifest != self._digest:
            raise DeviceError(f"another release was pulled into {self.folder}: open it again to run that one")
        before = self._active
        try:
            self._go(choice.level)
            return choice.commit()
        except BaseException:
            if self._active.level != before.level:
                self._go(before.level, before)
            raise

    def _go(self, level: str, known: _Active | None = None) -> None:
        """Put a level into memory and let it run; `known` is that level where it may still be there."""
        if self._mode == "swap":
            prepared = known or self._prepare(level)
            began = time.perf_counter()
            self._active = prepared
            self.pause_s = time.perf_counter() - began
            return
        began = time.perf_counter()
        with self._gate.closed():
            before, self._active = self._active, _Active(level, _lost)
            try:
                self._active = self._prepare(level, before)
            except BaseException:
                if known is None:  # the layers that were overwritten come back from disk
                    self._active = self._prepare(before.level, before)
                raise
            finally:
                self.pause_s = time.perf_counter() - began


def run(folder: Path, images: Path | np.ndarray, runtime: str = "tvm") -> np.ndarray:
    """Outputs float32 [n, classes] of the level in force in `folder` for images in a file or an array.

    Raises DataError for a file that cannot be read or images of another shape, BundleError, DeviceError.
    """
    x = images if isinstance(images, np.ndarray) else load_images(images)
    return LevelRunner(folder, runtime).run(x)


def run_and_climb(
    folder: Path,
    images: Path | np.ndarray,
    to: str,
    runtime: str = "tvm",
    mode: str = "swap",
    rate: float | None = None,
) -> tuple[np.ndarray, dict[str, int]]:
    """Run the images again and again while a climb to level `to` goes on, then once by that level.

    Outputs float32 [n, classes] of the last pass, and passes by level. Raises as `run` and `climb`.
    """
    x = images if isinstance(images, np.ndarray) else load_images(images)
    runner = LevelRunner(folder, runtime, mode=mode, rate=rate)
    failures: list[BaseException] = []

    def climb() -> None:
        try:
            runner.climb(to)
        except BaseException as e:  # raised again below
            failures.append(e)

    passes: Counter[str] = Counter()
    thread = threading.Thread(target=climb, name="qdeploy-climb", daemon=True)
    thread.start()
    while thread.is_alive():
        passes[runner.run_with_level(x)[1]] += 1
    thread.join()
    if failures:
        raise failures[0]
    output, level = runner.run_with_level(x)
    passes[level] += 1
    return output, dict(passes)
