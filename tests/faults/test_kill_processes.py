"""kill -9 at exact bytes of the network and the disk, and at every call that changes the disk."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdeploy.bundle.manifest import LEAF_BYTES, Manifest
from qdeploy.client.plan import Layout, piece_kinds
from qdeploy.client.state import DeviceFolder, open_choice
from qdeploy.serve.byte_log import read_byte_log
from tests.faults.conftest import Amount, Record
from tests.faults.host import Ended, Host, Kill
from tests.faults.releases import SignedNets, counters
from tests.faults.scenarios import Scenario, Stage, staged

NAMES = ("pull", "climb", "drop", "update", "evict")
SMALL_FILES = LEAF_BYTES  # metadata, rollout and manifest, which come anew when they were in flight


@pytest.fixture(scope="module")
def stage(nets: SignedNets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(nets, tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture(scope="module")
def totals(stage: Stage, host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """How many bytes and calls each scenario has when nobody kills it."""
    folder = tmp_path_factory.mktemp("totals") / "dev"
    found = {}
    for name, scenario in stage.scenarios.items():
        ended = host.run(scenario.on(folder), None)
        assert ended.code == 0, ended.error
        stage.release.check(folder, {scenario.after}, {})
        found[name] = ended.totals
    return found


def overlap(spans: list[tuple[int, int]], span: tuple[int, int]) -> int:
    """Bytes of `span` that some of `spans` hold."""
    found, at = 0, span[0]
    for start, stop in sorted(spans):
        start, stop = max(start, at), min(stop, span[1])
        if stop > start:
            found, at = found + stop - start, stop
    return found


class Costs:
    """What the runs of one device asked for and received."""

    def __init__(self) -> None:
        self.delivered: dict[str, list[tuple[int, int]]] = {}
        self.body = self.again = self.kills = 0

    def add(self, ended: Ended) -> None:
        asked_again: Counter[str] = Counter()
        held = {path: list(spans) for path, spans in self.delivered.items()}
        for request in ended.requests:
            if "/objects/" in request.path and request.stop is not None:
                asked_again[request.path] += overlap(held.get(request.path, []), (request.start, request.stop))
                span = (request.start, request.start + request.received)
                self.delivered.setdefault(request.path, []).append(span)
        self.again = max([self.again, *asked_again.values()])
        self.body += ended.body
        self.kills += ended.code == -9


def signed_bytes(folder: Path) -> int:
    """Bytes of objects that the level in force needs."""
    current, manifest = open_choice(DeviceFolder(folder))
    return missing(manifest, current.level, current.artifact, set())


def missing(manifest: Manifest, level: str, artifact: int | None, held: set) -> int:  # type: ignore[type-arg]
    return Layout(manifest, piece_kinds(manifest, level, artifact)).missing_bytes(held)


def needed(stage: Stage, name: str, folder: Path) -> int:
    """Bytes of objects that the command of a scenario has to fetch."""
    start = stage.scenarios[name].start
    current, manifest = open_choice(DeviceFolder(folder))
    held = set() if start is None else DeviceFolder(start).journal()
    return missing(manifest, current.level, current.artifact, held)


def chain(stage: Stage, host: Host, name: str, folder: Path, kills: list[Kill]) -> tuple[Costs, int]:
    """Kill a command again and again, look at the folder each time, then let it end; (costs, kills that happened)."""
    scenario: Scenario = stage.scenarios[name]
    costs, job = Costs(), scenario.on(folder)
    seen = counters(folder)
    for kill in kills:
        ended = host.run(job, kill)
        assert ended.code in (-9, 0), (name, kill, ended.error)
        costs.add(ended)
        seen = stage.release.check(folder, scenario.allowed, seen)
        if ended.code == 0:
            break
    ended = host.run(job)
    assert ended.code == 0, (name, kills, ended.error)
    costs.add(ended)
    stage.release.check(folder, {scenario.after}, seen)
    return costs, costs.kills


def check_costs(stage: Stage, name: str, folder: Path, costs: Costs, kills: list[Kill]) -> None:
    assert costs.again <= LEAF_BYTES, (name, kills, costs.again)
    if name == "evict":
        assert costs.body == 0
        return
    small = SMALL_FILES * (1 + costs.kills) if name in ("pull", "update") else 0
    bound = needed(stage, name, folder) + LEAF_BYTES * costs.kills + small
    assert costs.body <= bound, (name, kills, costs.body, bound)
    if name == "drop":
        assert costs.body == 0


@pytest.mark.parametrize("part", range(5))
def test_random_bytes(
    stage: Stage, host: Host, totals: dict[str, dict[str, int]], work: Path, part: int, amount: Amount, record: Record
) -> None:
    """At random bytes of what arrives and of what is written: nothing lost, and no leaf comes twice for nothing."""
    rng = random.Random(part)
    want, done = amount(5, 200), Counter[str]()
    worst = body = 0
    while done.total() < want:
        name = rng.choice(("pull", "climb", "update", "pull", "update", "drop", "evict"))
        kinds = ("disk",) if name in ("drop", "evict") else ("net", "net", "disk")
        kills = []
        for _ in range(rng.randint(1, 5)):
            kind = rng.choice(kinds)
            kills.append(Kill(kind, rng.randrange(totals[name][kind]), rng.random() < 0.5))
        costs, killed = chain(stage, host, name, work, kills)
        check_costs(stage, name, work, costs, kills)
        done[name] += killed
        worst, body = max(worst, costs.again), body + costs.body
    record(
        "kill -9 at random bytes", kills=done.total(), worst_bytes_requested_again=worst,
        **dict(done),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_call(
    stage: Stage, host: Host, totals: dict[str, dict[str, int]], work: Path, name: str, amount: Amount, record: Record
) -> None:
    """Before each call that opens, writes, syncs, renames or removes, and in the middle of each write."""
    calls = totals[name]["call"]
    step = max(1, calls * 2 // amount(6, calls * 2))
    kills = 0
    for number in range(1, 2 * calls + 1, step):
        kill = Kill("call", (number + 1) // 2, bool(number % 2))
        costs, killed = chain(stage, host, name, work, [kill])
        assert killed == 1, (name, kill)
        check_costs(stage, name, work, costs, [kill])
        kills += killed
    record(f"kill -9 at calls of {name}", kills=kills, calls=calls)


def test_the_byte_log_agrees(stage: Stage, host: Host, totals: dict[str, dict[str, int]], work: Path) -> None:
    """What a child says that it asked for is what the server says that it was asked for."""
    before = len(read_byte_log(stage.logs[1]))
    scenario = stage.scenarios["pull"]
    job = scenario.on(work)
    asked = []
    for kill in (Kill("net", totals["pull"]["net"] // 2), None):
        asked += [(r.path, r.start, r.stop) for r in host.run(job, kill).requests if r.stop is not None]
    until = time.monotonic() + 20
    while True:
        rows = read_byte_log(stage.logs[1])[before:]
        sent = sorted((row.path, *_range(row.range)) for row in rows if row.range is not None)
        if sent == sorted(asked) or time.monotonic() > until:
            break
        time.sleep(0.05)
    assert sent == sorted(asked) and len(asked) > 1
    shutil.rmtree(work)


def _range(text: str) -> tuple[int, int]:
    start, _, last = text.removeprefix("bytes=").partition("-")
    return int(start), int(last) + 1
