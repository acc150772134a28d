"""Power cuts: what was not synced is lost, torn or reordered, and the device comes back at one level or the other."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qdeploy.client import disk as edge
from qdeploy.errors import QDeployError
from tests.faults.conftest import Amount, Record
from tests.faults.faulty import PowerCut, PowerLost, Quick
from tests.faults.releases import SignedNets, counters, make_files
from tests.faults.scenarios import Scenario, Stage, do, staged

NAMES = ("pull", "climb", "drop", "update", "evict")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(make_files(tmp_path_factory.mktemp("files")), tmp_path_factory.mktemp("stage")) as stage:
        yield stage


def cut_at(
    scenario: Scenario,
    work: Path,
    at: int,
    put: Callable[[edge.Disk], None],
    deaf: Callable[[Path], bool] | None = None,
) -> tuple[PowerCut, bool]:
    """Run a scenario until call `at`, where the power goes; (the disk, whether the command had ended before)."""
    job = scenario.on(work)
    work.parent.mkdir(exist_ok=True)
    layer = PowerCut(work.parent, at, deaf)
    put(layer)
    ended = False
    try:
        do(job)
        ended = True
        layer.cut()
    except PowerLost:
        pass
    finally:
        put(Quick())
    return layer, ended


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[edge.Disk], None]:
    return lambda disk: monkeypatch.setattr(edge, "disk", disk)


def trial(
    stage: Stage, name: str, home: Path, at: int, rng: random.Random, put: Callable[[edge.Disk], None],
    deaf: Callable[[Path], bool] | None = None, finish: bool = True,
) -> bool:  # fmt: skip
    """One power cut of one command; whether the command had ended before it. AssertionError when something is lost."""
    scenario = stage.scenarios[name]
    before = counters(scenario.start) if scenario.start is not None else {}
    shutil.rmtree(home, ignore_errors=True)
    live, back = home / "live", home / "back"
    live.mkdir(parents=True)
    layer, ended = cut_at(scenario, live / "dev", at, put, deaf)
    try:
        layer.after(rng, back)
    finally:
        layer.release()
    folder = back / "dev"
    seen = stage.release.check(folder, {scenario.after} if ended else scenario.allowed, before)
    if finish:
        do(scenario.again(folder))
        stage.release.check(folder, {scenario.after}, seen)
    return ended


@pytest.mark.parametrize("name", NAMES)
def test_power_cuts(
    stage: Stage, tmp_path: Path, put: Callable[[edge.Disk], None], name: str, amount: Amount, record: Record
) -> None:
    """At every call, in several ways; once the command has said that it is done, its result is durable."""
    rng = random.Random(name)
    at = cuts = 0
    sweeps = amount(1, 100)
    step = amount(3, 1) if sweeps == 1 else 1
    for sweep in range(sweeps):
        at = 1 + sweep % step
        while not trial(stage, name, tmp_path / "home", at, rng, put):
            at, cuts = at + step, cuts + 1
    assert at > 4
    record(f"power cut in {name}", cuts=cuts, calls=at - 1)


@pytest.mark.parametrize("name", ["pull", "climb", "update"])
def test_power_cuts_of_a_larger_release(
    nets: SignedNets,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    put: Callable[[edge.Disk], None],
    name: str,
    amount: Amount,
    record: Record,
) -> None:
    """Objects of several leaves and a compiled artifact; the level in force must run."""
    rng = random.Random(name)
    want, cuts, calls = amount(3, 100), 0, 90
    with staged(nets, tmp_path_factory.mktemp("larger")) as stage:
        while cuts < want:
            at = rng.randint(1, calls)
            if trial(stage, name, tmp_path / "home", at, rng, put):
                calls = min(calls, at)
            else:
                cuts += 1
    record(f"power cut in {name}, larger release", cuts=cuts)


FORGOTTEN = {
    "the pointer's bytes": ("update", lambda path: path.name.startswith(".current.json")),
    "the pointer's name": ("climb", lambda path: path.name == "dev"),
    "the bytes of objects": ("pull", lambda path: path.parent.name == "objects"),
    "the names of objects": ("pull", lambda path: path.name == "objects"),
    "the manifest's bytes": ("update", lambda path: path.parent.name == "manifests"),
    "the manifest's name": ("update", lambda path: path.name == "manifests"),
    "the counters' bytes": ("update", lambda path: path.name.startswith(".state.json")),
    "the counters' name": ("update", lambda path: path.name == "trust"),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_missing_fsync_is_found(
    stage: Stage, tmp_path: Path, put: Callable[[edge.Disk], None], forgotten: str
) -> None:
    """This suite fails when one fsync of the client does nothing."""
    name, deaf = FORGOTTEN[forgotten]
    rng = random.Random(forgotten)
    calls = 70
    with pytest.raises((AssertionError, QDeployError, ValueError)):
        for _ in range(300):
            if trial(stage, name, tmp_path / "home", rng.randint(calls // 3, calls), rng, put, deaf, finish=False):
                calls = max(10, calls - 1)
