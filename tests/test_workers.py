"""Work on several processes: one killed mid-way, nothing lost, nothing twice; schedulers that are not there."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import pytest

from qdeploy import workers as module
from qdeploy.errors import DeviceError, ModelError, RecipeError
from qdeploy.evaluate import evaluate, spec_lines
from qdeploy.train.run import load_run
from qdeploy.workers import Workers, connected, parse_workers


def square(folder: Path, waiting: int, number: int) -> int:
    """Squares; `waiting` never ends in the first process that meets it. Each call leaves a line in `folder`."""
    with (folder / f"{number}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if number == waiting and len((folder / f"{number}").read_text().splitlines()) == 1:
        time.sleep(600)
    if number < 0:
        raise ModelError(f"{number} is below 0")
    if number == 99:
        raise ZeroDivisionError("not of ours\nmore")
    return number * number


@dataclass(frozen=True)
class Squares:
    """Makes `square`, once a process."""

    folder: Path
    waiting: int = -1

    def __call__(self) -> Callable[[int], int]:
        with (self.folder / "made").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return partial(square, self.folder, self.waiting)


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    with connected("2", lambda _: None) as found:
        yield found


def items(*numbers: int) -> dict[str, int]:
    return {f"item {number}": number for number in numbers}


def test_each_item_once_and_made_once_a_process(pool: Workers, tmp_path: Path) -> None:
    found = list(pool.map(Squares(tmp_path), items(*range(20))))
    assert len(found) == 20 and dict(found) == {f"item {n}": n * n for n in range(20)}
    made = (tmp_path / "made").read_text().split()
    assert len(made) == len(set(made)) <= 2
    assert all(len((tmp_path / f"{n}").read_text().split()) == 1 for n in range(20))
    assert list(pool.map(Squares(tmp_path), {})) == []


def test_a_worker_killed_midway_loses_nothing(pool: Workers, tmp_path: Path) -> None:
    waiting = tmp_path / "3"

    def kill() -> None:
        while not waiting.exists() or not waiting.read_text().endswith("\n"):
            time.sleep(0.05)
        os.kill(int(waiting.read_text().split()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = list(pool.map(Squares(tmp_path, waiting=3), items(*range(12))))
    killer.join()
    assert len(found) == 12 and dict(found) == {f"item {n}": n * n for n in range(12)}
    assert len(set(waiting.read_text().split())) == 2  # at least once: in the dead worker and in another


def test_errors_are_one_line_and_the_pool_goes_on(pool: Workers, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="-4 is below 0"):
        list(pool.map(Squares(tmp_path), items(1, 2, -4)))
    with pytest.raises(DeviceError, match="a worker of .* failed .ZeroDivisionError: not of ours.$"):
        list(pool.map(Squares(tmp_path), items(99)))
    assert dict(pool.map(Squares(tmp_path), items(5))) == {"item 5": 25}


def test_other_versions_are_refused(pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "versions", lambda: {"Python": "2.7", "numpy": "0"})
    with pytest.raises(DeviceError, match="has Python 3.*, not 2.7; numpy .*, not 0: install the same"):
        list(pool.map(Squares(tmp_path), items(5)))


def test_a_scheduler_without_workers_and_one_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(module, "ALONE_SECONDS", 0.5)
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        with connected(cluster.scheduler_address, lambda _: None) as found:
            with pytest.raises(DeviceError, match="has had no worker for 0 s"):
                list(found.map(Squares(tmp_path), items(1)))
            monkeypatch.setattr(module, "ALONE_SECONDS", 600)
            closing = threading.Timer(1.0, cluster.close)
            closing.start()
            with pytest.raises(DeviceError, match="went away"):
                list(found.map(Squares(tmp_path), items(2)))
            closing.join()


def test_bad_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_workers("3") == 3 and parse_workers("tls://a.b:8786") == "tls://a.b:8786"
    for text in ("0", "-1", "two", "a:8786", "http://a:1", "tcp://:1", "tcp://a:0", "tcp://a:70000", "tcp://a", "²"):
        with pytest.raises(RecipeError, match="neither a number"):
            parse_workers(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1.0)
    with pytest.raises(DeviceError, match=f"the scheduler at tcp://127.0.0.1:{port} does not answer"):
        with connected(f"tcp://127.0.0.1:{port}", lambda _: None):
            pass
    with socket.create_server(("127.0.0.1", 0)) as other:  # takes connections and says nothing
        with pytest.raises(DeviceError, match="does not answer"):
            with connected(f"tcp://127.0.0.1:{other.getsockname()[1]}", lambda _: None):
                pass


def test_specs_are_scored_once_though_a_worker_dies(pool: Workers, elastic_run: Path, tmp_path: Path) -> None:
    space, random = load_run(elastic_run)[1].space, Random(0)
    specs, alone, out = tmp_path / "specs", tmp_path / "alone", tmp_path / "out"
    specs.write_bytes(spec_lines([space.sample(random) for _ in range(6)]))
    evaluate(elastic_run, specs, alone, None, lambda _: None)
    victim = min(pool._client.run(os.getpid).values())
    counts: list[int] = []

    def killed() -> None:
        while not out.exists() or not out.read_bytes().count(b"\n"):
            time.sleep(0.02)
        os.kill(victim, signal.SIGKILL)
        counts.append(out.read_bytes().count(b"\n"))

    killer = threading.Thread(target=killed)
    killer.start()
    evaluate(elastic_run, specs, out, None, lambda _: None, pool)
    killer.join()
    assert out.read_bytes() == alone.read_bytes() and counts[0] < 6
