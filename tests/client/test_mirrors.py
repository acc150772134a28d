"""Several mirrors: dead ones, slow ones, liars, flaky ones."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from qdeploy.client.fetch import GoneError, Pace, Patience
from qdeploy.client.pull import climb
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import BundleError, FetchError
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import QUICK, damage, file_of, objects_asked, pull
from tests.client.scripted import Answer, Hangup, Line, head, scripted
from tests.client.tree import Tree, make_tree


def serve_file(root: Path, line: Line, asked: tuple[int, int] | None, flip: set[int] | None = None) -> int:
    """Answer as a good server; bytes of objects at the offsets `flip` are wrong. The number of bytes sent."""
    data = bytearray((root / line.path.lstrip("/")).read_bytes())
    if asked is None:
        line.send(head(200, len(data)), bytes(data))
        return 0
    for at in flip or ():
        if at < len(data):
            data[at] ^= 1
    start, stop = asked
    line.send(head(206, stop - start, f"Content-Range: bytes {start}-{stop - 1}/{len(data)}"), bytes(data[start:stop]))
    return stop - start


@pytest.fixture
def big(tmp_path: Path) -> Tree:
    return make_tree(tmp_path / "root", weights=(1_600_000,))


def dead_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_dead_mirror_is_passed_over(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        report = pull([dead_url(), url], dev, "w2", patience=QUICK)
        assert report.set_aside == {}
        assert climb(dev, "w4", patience=QUICK).level == "w4"  # the mirrors are on record
    assert file_of(dev, "w4") == tree.files["w4"]


def test_when_all_are_dead_each_is_named(dev: Path) -> None:
    urls = [dead_url(), dead_url()]
    with pytest.raises(FetchError, match=f"no mirror is left: {urls[0]}: .*; {urls[1]}: "):
        pull(urls, dev, patience=QUICK)


def test_a_mirror_that_lacks_objects_is_set_aside(tree: Tree, dev: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(tree.root, partial)
    (partial / "objects" / tree.manifest.objects[1].sha256).unlink()
    with serving(partial) as first, serving(tree.root) as second:
        report = pull([first, second], dev, "w4")
        assert "is not there (404)" in report.set_aside[first]
        with pytest.raises(GoneError, match="incomplete"):
            pull(first, tmp_path / "other", "w4")
    assert file_of(dev, "w4") == tree.files["w4"]


def test_a_liar_costs_one_leaf_and_is_named(big: Tree, dev: Path, tmp_path: Path) -> None:
    lies = tmp_path / "lies"
    shutil.copytree(big.root, lies)
    first = big.manifest.objects[0].sha256
    damage(lies / "objects" / first, 3 * 65536 + 5)
    log = tmp_path / "log"
    with serving(lies) as bad, serving(big.root, log=log) as good:
        report = pull([bad, good], dev, "w2")
    assert f"bytes {3 * 65536}..{4 * 65536}" in report.set_aside[bad]
    assert objects_asked(read_byte_log(log))[first][0][0] == 3 * 65536  # what was good is not asked for again
    need = sum(entry.size for entry in big.manifest.objects[:1])
    assert report.received <= need + report.fetched["manifest"] + 65536
    assert file_of(dev, "w2") == big.files["w2"]


def test_a_byte_damaged_on_the_line_of_the_only_mirror_costs_a_leaf(big: Tree, dev: Path) -> None:
    flipped: list[int] = []

    def answer(line: Line, asked: tuple[int, int] | None) -> None:
        fresh = {200_000} if asked is not None and not flipped else set()
        flipped.extend(fresh)
        serve_file(big.root, line, asked, fresh)

    with scripted(answer) as (url, asked):
        report = pull(url, dev, "w2", patience=QUICK)
    size = big.manifest.objects[0].size
    assert flipped and [row for row in asked if row] == [(0, size), (196_608, size)]
    assert report.received - report.total_fetched <= 65536
    assert report.set_aside == {}
    assert file_of(dev, "w2") == big.files["w2"]


def test_a_mirror_that_always_lies_ends_the_run(big: Tree, dev: Path) -> None:
    with scripted(lambda line, asked: serve_file(big.root, line, asked, {200_000}) and None) as (url, asked):
        with pytest.raises(BundleError, match=f"from {url} is not what the manifest names in bytes 196608..262144"):
            pull(url, dev, "w2", patience=QUICK)
    assert len([row for row in asked if row]) == 2
    assert len(DeviceFolder(dev).journal()) == 3  # the leaves before it stay


def slow(root: Path, count: int) -> Answer:
    """Objects come to `count` bytes, then one a while."""

    def answer(line: Line, asked: tuple[int, int] | None) -> None:
        if asked is None:
            serve_file(root, line, asked)
            return
        data = (root / line.path.lstrip("/")).read_bytes()
        start, stop = asked
        line.send(head(206, stop - start, f"Content-Range: bytes {start}-{stop - 1}/{len(data)}"))
        line.send(data[start : start + count])
        for at in range(start + count, stop):
            if line.over.wait(0.02):
                raise Hangup
            line.send(data[at : at + 1])

    return answer


def test_a_slow_mirror_is_left_for_another_one(big: Tree, dev: Path) -> None:
    impatient = Patience(timeout_s=10, attempts=2, pause_s=0.001, grace_s=0.3, floor_bytes_per_s=2000)
    with scripted(slow(big.root, 70_000)) as (bad, _), serving(big.root) as good:
        report = pull([bad, good], dev, "w2", patience=impatient)
        assert report.set_aside == {}
    assert file_of(dev, "w2") == big.files["w2"]


def test_two_flaky_mirrors_take_turns(big: Tree, dev: Path) -> None:
    """Each gives a leaf or so and hangs up for a while: bytes that came from elsewhere forgive it."""

    def flaky(line: Line, asked: tuple[int, int] | None) -> None:
        if asked is None:
            serve_file(big.root, line, asked)
        elif len([row for row in line.asked if row]) % 3 == 1:
            data = (big.root / line.path.lstrip("/")).read_bytes()
            start, stop = asked
            line.send(head(206, stop - start, f"Content-Range: bytes {start}-{stop - 1}/{len(data)}"))
            line.send(data[start : min(stop, start + 70_000)])
            raise Hangup
        else:
            raise Hangup

    with scripted(flaky) as (a, _), scripted(flaky) as (b, _):
        pull([a, b], dev, "w2", patience=QUICK)
    assert file_of(dev, "w2") == big.files["w2"]


def test_a_rate_is_kept(big: Tree, dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time slept is that of the bytes at the rate; nothing really waits here."""
    clock = [0.0]
    monkeypatch.setattr("qdeploy.client.fetch.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("qdeploy.client.fetch.time.sleep", lambda s: clock.__setitem__(0, clock[0] + max(0.0, s)))
    with serving(big.root) as url:
        report = pull(url, dev, "w2", rate=100_000)
    assert clock[0] == pytest.approx(report.received / 100_000)


def test_no_rate_is_refused() -> None:
    with pytest.raises(FetchError, match="give a positive one"):
        Pace(0)
