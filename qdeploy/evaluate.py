"""`qdeploy evaluate`: the accuracy of many specs of one run, on images held out of its training set.

SPECS and OUT are JSON lines: a subnet spec each; and {spec_id, spec, accuracy, images, run} each. `accuracy` is top-1
in per cent of the simulation, which computes with the integers' steps, codes and zero points, calibrated for that
spec; `run` names the checkpoint. A result is synced to OUT before the next one is awaited, so a killed evaluation goes
on where it stopped. The finished file has the order of SPECS, however many workers made it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from qdeploy.data import Dataset
from qdeploy.errors import DeviceError, ModelError, RecipeError
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256, write_atomic
from qdeploy.progress import Counter, Echo
from qdeploy.quant.calibrate import CALIBRATION_IMAGES, calibrated
from qdeploy.quant.simulated import SimulatedNet
from qdeploy.recipe import Recipe
from qdeploy.space import SubnetSpec
from qdeploy.train.memory import keep_freed_memory
from qdeploy.train.run import accuracy, held_out_set, load_run, training_set
from qdeploy.workers import Workers

Row = dict[str, Any]
KEYS = {"spec_id", "spec", "accuracy", "images", "run"}


class Judge:
    """Scores specs of one run. Loading it takes seconds, `score` is pure.

    With `mirror` the held-out images come a second time, left and right exchanged: as many again for a network that
    was trained on mirrored images too, so chance moves an accuracy less.
    The process keeps the memory that torch frees from then on: fetching it anew takes a third of a score's time.
    """

    def __init__(self, run: Path, data_dir: Path | None, mirror: bool = False) -> None:
        keep_freed_memory()
        recipe, self.net = load_run(run)
        self.held_out = held_out_set(recipe, data_dir)
        if mirror:
            self.held_out = mirrored(self.held_out)
        self.calibration = training_set(recipe, data_dir).images[:CALIBRATION_IMAGES]

    def score(self, spec: SubnetSpec) -> float:
        """Top-1 accuracy in per cent on the held-out images."""
        return accuracy(calibrated(self.net, spec, self.calibration), spec, self.held_out)


def mirrored(data: Dataset) -> Dataset:
    """`data`, then all of its images with left and right exchanged."""
    images = np.concatenate([data.images, data.images[..., ::-1]])
    return data.with_images(images, np.concatenate([data.labels, data.labels]))


PackedImages = tuple[np.ndarray, tuple[int, ...]]


def packed_images(images: np.ndarray) -> PackedImages:
    """Images [n, C, H, W] as they are pickled, with their strides in bytes.

    By the stride of a single channel torch chooses kernels, and so how sums round; a pickle does not keep it.
    """
    whole = np.ascontiguousarray(images)
    return whole, whole.strides


def unpacked_images(packed: PackedImages) -> np.ndarray:
    """Inverse of `packed_images`: both are contiguous, so strides differ on axes of one entry alone."""
    images, strides = packed
    return np.lib.stride_tricks.as_strided(images, strides=strides)


RUN_FILES = ("recipe.json", "quantized.checkpoint")  # all that `load_run` reads


@dataclass(frozen=True)
class RunCopy:
    """A trained run as bytes, for a process on a machine that does not have its folder."""

    files: Mapping[str, bytes]

    @classmethod
    def of(cls, run: Path) -> RunCopy:
        """The copy of folder `run`; raises ModelError."""
        return cls({name: read_bytes(Path(run) / name, "the trained run", ModelError) for name in RUN_FILES})

    def load(self) -> tuple[Recipe, SimulatedNet]:
        """As `load_run`."""
        with tempfile.TemporaryDirectory(prefix="qdeploy-run-") as folder:
            for name, data in self.files.items():
                (Path(folder) / name).write_bytes(data)
            return load_run(Path(folder))


@dataclass(frozen=True)
class Scoring:
    """Makes `Judge.score` in another process, with the images (`packed_images`) of this one."""

    run: RunCopy
    calibration: PackedImages
    held_out: PackedImages
    labels: np.ndarray
    about: tuple[str, str]  # name and split of the dataset
    names: tuple[str, ...]  # of its classes, where they are the user's own

    @classmethod
    def of(cls, run: Path, judge: Judge) -> Scoring:
        """What `judge`, of folder `run`, does."""
        data = judge.held_out
        images = packed_images(judge.calibration), packed_images(data.images)
        return cls(RunCopy.of(run), *images, data.labels, (data.name, data.split), data.names)

    def __call__(self) -> Callable[[SubnetSpec], float]:
        torch.set_num_threads(1)
        keep_freed_memory()
        judge = object.__new__(Judge)
        judge.net, judge.calibration = self.run.load()[1], unpacked_images(self.calibration)
        judge.held_out = Dataset(*self.about, unpacked_images(self.held_out), self.labels, self.names)
        return judge.score


# ---- files -----------------------------------------------------------------------------------------------------------


def read_specs(path: Path) -> list[SubnetSpec]:
    """Specs of a JSON lines file, each once, in its order; raises RecipeError that names the line."""
    found: dict[SubnetSpec, None] = {}
    for number, line in enumerate(read_bytes(path, "the specs", RecipeError).splitlines(), 1):
        if line.strip():
            try:
                found[SubnetSpec.parse(line)] = None
            except RecipeError as e:
                raise RecipeError(f"{path} line {number}: {e}") from e
    if not found:
        raise RecipeError(f"{path} holds no subnet spec: write one JSON object a line")
    return list(found)


def spec_lines(specs: Sequence[SubnetSpec]) -> bytes:
    """Inverse of `read_specs`."""
    return b"".join(canonical_json(spec.to_json()) for spec in specs)


def read_rows(data: bytes, path: Path) -> tuple[list[Row], int]:
    """Rows of OUT and the length of their bytes: a last line that a kill cut short does not count."""
    length = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:length].splitlines(), 1):
        row = parse_json(line, f"{path} line {number}", ModelError)
        if not isinstance(row, dict) or set(row) != KEYS:
            raise ModelError(f"{path} line {number} is not a result of `qdeploy evaluate`: choose another output file")
        rows.append(row)
    return rows, length


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """OUT opened for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as e:
        raise DeviceError(f"cannot write {path}: {e.strerror or e}") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DeviceError(f"{path} is being written by another `qdeploy evaluate`: wait for it") from e
        yield file


# ---- work ------------------------------------------------------------------------------------------------------------


Scores = Generator[tuple[SubnetSpec, float], None, None]


def _scores(judge: Judge, run: Path, specs: Sequence[SubnetSpec], workers: Workers | None) -> Scores:
    """Each spec with its accuracy, in this process or, as they come, from `workers`."""
    if workers is not None:
        named = {spec.id: spec for spec in specs}
        for key, found in workers.map(Scoring.of(run, judge), named):
            yield named[key], found
        return
    for spec in specs:
        yield spec, judge.score(spec)


def evaluate(
    run: Path, specs_path: Path, out: Path, data_dir: Path | None, echo: Echo,
    workers: Workers | None = None, mirror: bool = False,
) -> list[Row]:  # fmt: skip
    """Score every spec of `specs_path` that `out` does not hold yet; returns the rows in the order of the specs.

    `workers`, where they are given, score in place of this process. `mirror`: as `Judge`'s.
    Raises RecipeError for a spec outside the run's space or a run without held-out images, ModelError when `out`
    belongs to another run, DeviceError when it cannot be written.
    """
    specs, judge = read_specs(specs_path), Judge(run, data_dir, mirror)
    for number, spec in enumerate(specs, 1):
        try:
            judge.net.check_spec(spec)
        except RecipeError as e:
            raise RecipeError(f"{specs_path}, spec {number} ({spec.id}): {e}") from e
    about: Row = {"run": sha256(read_bytes(run / "quantized.checkpoint", "the checkpoint", ModelError))[:12]}
    about |= {"images": len(judge.held_out)}
    with _locked(out) as file:
        file.seek(0)
        rows, length = read_rows(file.read(), out)
        if any({key: row[key] for key in about} != about for row in rows):
            raise ModelError(
                f"{out} holds results of another run or of other images (--mirror?): choose another output file"
            )
        file.truncate(length)
        done = {row["spec_id"]: row for row in rows}
        todo = [spec for spec in specs if spec.id not in done]
        if len(todo) < len(specs):
            echo(f"{len(specs) - len(todo)} of {len(specs)} specs are scored already")
        with closing(_scores(judge, run, todo, workers)) as scored:
            counter = Counter(echo, "scoring", len(todo), "spec")
            for count, (spec, found) in enumerate(scored, 1):
                done[spec.id] = about | {"spec_id": spec.id, "spec": spec.to_json(), "accuracy": found}
                _append(file, done[spec.id], out)
                counter.at(count, f"{spec.id} {found:.2f}%")
        wanted = [spec.id for spec in specs]
        others = [row for key, row in done.items() if key not in set(wanted)]
        write_atomic(out, b"".join(canonical_json(row) for row in (*(done[key] for key in wanted), *others)))
    return [done[key] for key in wanted]


def _append(file: BinaryIO, row: Row, path: Path) -> None:
    try:
        file.write(canonical_json(row))
        file.flush()
        os.fsync(file.fileno())
    except OSError as e:
        raise DeviceError(f"cannot write {path}: {e.strerror or e}") from e
