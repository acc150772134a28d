"""Inference while levels climb and drop in the background: every output is that of exactly one level."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qdeploy.client import disk as edge
from qdeploy.client.evict import evict
from qdeploy.client.pull import pull
from qdeploy.client.runtime import MODES, LevelRunner
from qdeploy.serve.app import serving
from tests.client.conftest import LEVELS
from tests.faults.conftest import Amount, Record
from tests.faults.faulty import Quick
from tests.faults.releases import SignedNets, in_force, make_nets

TOUR = (("climb", "w3"), ("climb", "w4"), ("drop", "w3"), ("climb", "w4"), ("drop", "w2"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SignedNets:
    return make_nets(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_of_one_level(
    small: SignedNets, work: Path, monkeypatch: pytest.MonkeyPatch, mode: str, amount: Amount, record: Record
) -> None:
    """Planes are evicted at the foot of each tour, so climbs download again."""
    monkeypatch.setattr(edge, "disk", Quick())  # more changes
    want, tours = amount(250, 50_000), amount(2, 100)
    golden = {level: small.outputs[1, level] for level in LEVELS}
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(golden.values(), 2))
    stop, failures, changes = threading.Event(), list[BaseException](), Counter[str]()
    with serving(small.trees[1]) as url:
        pull(url, work, "w2", root=small.root)
        runner = LevelRunner(work, mode=mode)

        def tour() -> None:
            try:
                while not stop.is_set():
                    for verb, level in TOUR:
                        getattr(runner, verb)(level)
                        changes[verb] += 1
                    evict(work)
            except BaseException as e:  # raised again below
                failures.append(e)

        thread = threading.Thread(target=tour)
        thread.start()
        seen, wrong, count = Counter[str](), 0, 0
        try:
            while (count < want or len(seen) < len(LEVELS) or changes.total() < tours * len(TOUR)) and not failures:
                k = count % len(small.images)
                output, level = runner.run_with_level(small.images[k : k + 1])
                wrong += not np.array_equal(output[0], golden[level][k])
                seen[level] += 1
                count += 1
        finally:
            stop.set()
            thread.join()
    if failures:
        raise failures[0]
    assert wrong == 0 and in_force(work) == (1, "w2")
    record(f"inferences through changes of level, {mode}", inferences=count, wrong=wrong, **dict(changes))
