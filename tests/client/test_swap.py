"""Changes of level while inference runs, in both modes: pure outputs, no lost level, background climbs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.store import level_reader, level_tensors
from qdeploy.client.runtime import LevelRunner, run_and_climb
from qdeploy.client.state import DeviceFolder
from qdeploy.compile.artifact import Artifact, load_artifact
from qdeploy.errors import BundleError, DeviceError
from qdeploy.serve.app import serving
from tests.client.conftest import LEVELS, RealRelease
from tests.client.device import damage, pull


@pytest.fixture
def url(real: RealRelease) -> Iterator[str]:
    with serving(real.root) as url:
        yield url


@pytest.mark.parametrize("mode", ["swap", "in-place"])
def test_every_output_is_one_levels(real: RealRelease, url: str, dev: Path, mode: str) -> None:
    pull(url, dev, "w2")
    runner = LevelRunner(dev, mode=mode)
    seen: list[str] = []
    wrong: list[str] = []
    stop = threading.Event()

    def infer() -> None:
        while not stop.is_set():
            output, level = runner.run_with_level(real.images)
            seen.append(level)
            if not np.array_equal(output, real.outputs[level]):
                wrong.append(level)

    threads = [threading.Thread(target=infer) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for step, to in [(runner.climb, "w3"), (runner.climb, "w4"), (runner.drop, "w2")] * 3:
            step(to)
            count = len(seen)
            while len(seen) < count + 4:
                stop.wait(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong and set(seen) == set(LEVELS)
    assert DeviceFolder(dev).chosen().level == "w2" and runner.pause_s >= 0


def test_in_place_overwrites_the_level_that_ran(real: RealRelease, url: str, dev: Path) -> None:
    """No second set of packed parameters: the same buffer runs each level."""
    pull(url, dev, "w2")
    runner = LevelRunner(dev, mode="in-place")
    buffer = runner._active.packed
    assert buffer is not None
    for level in ("w3", "w4"):
        runner.climb(level)
        assert runner._active.packed is buffer
        np.testing.assert_array_equal(runner.run(real.images), real.outputs[level])


@pytest.mark.parametrize("mode", ["swap", "in-place"])
def test_a_change_that_fails_half_way_brings_the_level_back(
    real: RealRelease, url: str, dev: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    pull(url, dev, "w2")
    runner = LevelRunner(dev, mode=mode)
    prepare = Artifact.prepare_each
    asked: list[str] = []

    def half(self: Artifact, read, into=None):  # type: ignore[no-untyped-def]
        def stop(name: str) -> np.ndarray:
            asked.append(name)
            if len(asked) == len(self.params) // 2:
                raise BundleError("the disk forgot")
            return read(name)  # type: ignore[no-any-return]

        return prepare(self, stop, into)

    monkeypatch.setattr(Artifact, "prepare_each", half)
    with pytest.raises(BundleError, match="the disk forgot"):
        runner.climb("w4")
    assert runner.level == "w2" == DeviceFolder(dev).chosen().level
    np.testing.assert_array_equal(runner.run(real.images), real.outputs["w2"])


@pytest.mark.parametrize("mode", ["swap", "in-place"])
def test_a_choice_that_cannot_be_recorded_is_taken_back(
    real: RealRelease, url: str, dev: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    pull(url, dev, "w2")
    runner = LevelRunner(dev, mode=mode)

    def refuse(*_: object) -> None:
        raise DeviceError("the disk is full")

    monkeypatch.setattr("qdeploy.client.state.FolderWriter.activate", refuse)
    with pytest.raises(DeviceError, match="disk is full"):
        runner.climb("w4")
    assert runner.level == "w2"
    np.testing.assert_array_equal(runner.run(real.images), real.outputs["w2"])


def test_a_level_that_is_lost_is_never_run(
    real: RealRelease, url: str, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, when the old level cannot come back from disk either."""
    pull(url, dev, "w4")
    runner = LevelRunner(dev, mode="in-place")
    verified = DeviceFolder.reader

    def reader_of_damaged(self: DeviceFolder, manifest):  # type: ignore[no-untyped-def]
        found = verified(self, manifest)
        for path in (dev / "objects").iterdir():  # after the check, before the levels are read
            damage(path, 5)
        return found

    monkeypatch.setattr("qdeploy.client.pull.verify_level", lambda *_: reader_of_damaged(DeviceFolder(dev), None))
    with pytest.raises(BundleError, match="damaged"):
        runner.drop("w2")
    with pytest.raises(DeviceError, match="was lost when a change of level failed: open the folder again"):
        runner.run(real.images)


def test_modes_that_cannot_be(url: str, dev: Path) -> None:
    pull(url, dev, "w2")
    with pytest.raises(DeviceError, match="mode 'both' is unknown: choose swap or in-place"):
        LevelRunner(dev, mode="both")
    with pytest.raises(DeviceError, match="only a compiled artifact that runs on the processor"):
        LevelRunner(dev, "ort", mode="in-place")


@pytest.mark.parametrize("mode", ["swap", "in-place"])
def test_images_run_while_a_climb_goes_on(real: RealRelease, url: str, dev: Path, mode: str) -> None:
    pull(url, dev, "w2")
    outputs, passes = run_and_climb(dev, real.images, "w4", mode=mode, rate=100_000)
    np.testing.assert_array_equal(outputs, real.outputs["w4"])
    assert passes["w2"] > 0 and passes["w4"] > 0
    with pytest.raises(BundleError, match="use drop"):
        run_and_climb(dev, real.images, "w2")


def test_a_level_is_packed_a_parameter_at_a_time(real: RealRelease, url: str, dev: Path) -> None:
    """The same bytes as at once, each initializer asked for once, each weight gone before the next comes."""
    pull(url, dev, "w4")
    device = DeviceFolder(dev)
    manifest = device.manifest(device.chosen().manifest)
    artifact = load_artifact(next((dev / "artifacts").iterdir()))
    weights = {area.name for area in manifest.of_kind("planes")}
    into = None
    for level in LEVELS:
        load = level_reader(manifest, level, device.reader(manifest), artifact.join)
        known = level_tensors(manifest, level, device.reader(manifest))
        alive: list[weakref.ref[np.ndarray]] = []
        asked: list[str] = []

        def read(name: str, load=load, known=known, asked=asked, alive=alive) -> np.ndarray:  # type: ignore[no-untyped-def]
            asked.append(name)
            array = np.array(load(name))
            np.testing.assert_array_equal(array, known[name])
            if name in weights:
                assert not any(one() is not None for one in alive), "another weight is still in memory"
                alive.append(weakref.ref(array))
            return array

        packed = artifact.prepare_each(read, into)
        whole = artifact.prepare(known)
        np.testing.assert_array_equal(np.from_dlpack(packed.tensor), np.from_dlpack(whole.tensor))
        assert sorted(asked) == sorted(set(asked)) and weights <= set(asked)
        into = packed
