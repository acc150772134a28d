"""ENOSPC and EIO at every call: one line that says so, the level in force stays, and the same command goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qdeploy.client import disk as edge
from qdeploy.errors import DeviceError
from tests.faults.conftest import Amount, Record
from tests.faults.faulty import Failing, Quick
from tests.faults.releases import counters, make_files
from tests.faults.scenarios import Stage, do, staged

NAMES = ("pull", "climb", "drop", "update", "evict")
CASES = [(errno.ENOSPC, True), (errno.EIO, False), (errno.EIO, True)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(make_files(tmp_path_factory.mktemp("files")), tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[edge.Disk], None]:
    return lambda disk: monkeypatch.setattr(edge, "disk", disk)


@pytest.mark.parametrize(("code", "stays"), CASES, ids=["full", "one error", "broken"])
@pytest.mark.parametrize("name", NAMES)
def test_every_call_fails(
    stage: Stage, work: Path, put: Callable[[edge.Disk], None], name: str, code: int, stays: bool, amount: Amount,
    record: Record,
) -> None:  # fmt: skip
    scenario = stage.scenarios[name]
    before = counters(scenario.start) if scenario.start is not None else {}
    step = amount(5, 1) if amount(0, 1) == 0 else 1
    at, failed = 1, 0
    while True:
        job = scenario.on(work)
        layer = Failing(at, code, stays)
        put(layer)
        try:
            do(job)
        except DeviceError as e:
            assert "\n" not in str(e) and ("disk is full" if code == errno.ENOSPC else "Input/output error") in str(e)
            failed += 1
        finally:
            put(Quick())
        if layer.calls < at:
            break
        seen = stage.release.check(work, scenario.allowed, before)
        do(scenario.again(work))
        stage.release.check(work, {scenario.after}, seen)
        at += step
    assert failed
    record(f"{errno.errorcode[code]} {'from a call on' if stays else 'once'} in {name}", failures=failed)
