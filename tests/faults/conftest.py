"""Fault suites: a short form in every run of the tests, the long one with QDEPLOY_FAULTS=1.

QDEPLOY_FAULTS is the share of the long form (1 is all of it; without it the short form runs). QDEPLOY_FAULTS_LOG names
a file that gets one JSON line of counts for each test that passed; `tools/fault_report.py` makes docs/faults.md of it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.host import Host
from tests.faults.releases import SignedNets, make_nets

SHARE = float(os.environ.get("QDEPLOY_FAULTS", "0"))

Amount = Callable[[int, int], int]
Record = Callable[..., None]


@pytest.fixture(scope="session")
def amount() -> Amount:
    """How often: `amount(short, long)`."""
    return lambda short, long: max(short, round(long * SHARE)) if SHARE else short


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Note what a test did: `record("what was tried", trials=..., wrong=0, ...)`."""
    began = time.monotonic()

    def note(suite: str, **counts: Any) -> None:
        path = os.environ.get("QDEPLOY_FAULTS_LOG")
        if path:
            row = {"suite": suite, "test": request.node.nodeid, "seconds": round(time.monotonic() - began, 1)} | counts
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return note


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> SignedNets:
    """Two signed releases of a network of some hundred kilobytes, three levels each."""
    return make_nets(tmp_path_factory.mktemp("nets"), width=128)


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """Client processes that can be killed."""
    with Host() as host:
        yield host


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where a device folder is to be; nothing is there yet."""
    return tmp_path / "dev"
