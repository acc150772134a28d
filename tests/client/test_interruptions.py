"""Killed devices, servers that vanish, full disks: the level in force stays, and no verified byte comes twice."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qdeploy.client.pull import climb
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import DeviceError, FetchError
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import QUICK, file_of, objects_asked, pull
from tests.client.scripted import Hangup, Line, head, scripted
from tests.client.tree import Tree, make_tree

CHILD = """
import sys
from pathlib import Path
from qdeploy.client.pull import pull
pull(sys.argv[1], Path(sys.argv[2]), "w2", "toy", unsigned=True)
"""


def stingy(root: Path, budget: list[int]) -> Callable[[Line, tuple[int, int] | None], None]:
    """A server that sends whole small files, and `budget` bytes of objects before it falls silent."""

    def answer(line: Line, asked: tuple[int, int] | None) -> None:
        data = (root / line.path.lstrip("/")).read_bytes()
        if asked is None:
            line.send(head(200, len(data)), data)
            return
        start, stop = asked
        line.send(head(206, stop - start, f"Content-Range: bytes {start}-{stop - 1}/{len(data)}"))
        give = min(stop - start, budget[0])
        budget[0] -= give
        line.send(data[start : start + give])
        if give < stop - start:
            line.over.wait()
            raise Hangup

    return answer


def test_a_kill_costs_the_leaf_in_flight(dev: Path, tmp_path: Path) -> None:
    """kill -9 at many offsets: all leaves that were complete are on disk, recorded or not, and never come again."""
    tree = make_tree(tmp_path / "root", weights=(500_000,), artifact_bytes=700_000)
    need = sum(tree.manifest.objects[i].size for i in (0, 3))
    budgets = [300, 65_535, 200_001, 400_000]
    sent = 0
    for budget in budgets:
        left = [budget]
        with scripted(stingy(tree.root, left)) as (url, _):
            child = subprocess.Popen([sys.executable, "-c", CHILD, url, str(dev)])
            try:
                for _ in range(600):
                    if left[0] == 0:
                        break
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(0.05)
                        pytest.fail("the child ended by itself")
                time.sleep(0.1)  # let it take what was sent
            finally:
                child.kill()
                child.wait()
        sent += budget
    assert DeviceFolder(dev).current() is None
    with serving(tree.root, log=tmp_path / "log") as url:
        pull(url, dev, "w2", "toy")
    sent += sum(b - a for spans in objects_asked(read_byte_log(tmp_path / "log")).values() for a, b in spans)
    assert sent <= need + 65_536 * len(budgets)
    assert file_of(dev, "w2") == tree.files["w2"]


CRASHER = """
import os, shutil, sys
from pathlib import Path
from qdeploy.bundle.store import assemble
from qdeploy.client.pull import climb
from qdeploy.client.state import DeviceFolder

start, work = Path(sys.argv[1]), Path(sys.argv[2])

def dying(real, how):
    def call(fd, *args, **kwargs):
        counter[0] += 1
        if counter[0] == n:
            if how == "torn":
                real(fd, args[0][: len(args[0]) // 2], *args[1:])
            os._exit(9)
        return real(fd, *args, **kwargs)
    return call

CALLS = {"before": ("pwrite", "write", "fsync", "replace", "open"), "torn": ("pwrite", "write")}
for how in ("before", "torn"):
    n = 0
    while True:
        n += 1
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work)
        child = os.fork()
        if not child:
            counter = [0]
            for name in CALLS[how]:
                setattr(os, name, dying(getattr(os, name), how))
            climb(work, "w4")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        device = DeviceFolder(work)
        assert all(device.intact(extent) for extent in device.journal()), (how, n)
        current = device.chosen()
        manifest = device.manifest(current.manifest)
        assemble(manifest, current.level, device.reader(manifest))
        assert current.level == "w4" or code == 9, (how, n, code)
        climb(work, "w4")
        assemble(manifest, "w4", device.reader(manifest))
        if code != 9:
            assert code == 0 and n > 4, (how, n, code)
            print(n)
            break
"""


def test_a_crash_at_any_write_leaves_the_old_level_or_the_new_one(tree: Tree, dev: Path, tmp_path: Path) -> None:
    """Dies before and in the middle of each call that writes, syncs, renames or opens."""
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        command = [sys.executable, "-c", CRASHER, str(dev), str(tmp_path / "work")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2


def test_a_server_that_vanishes_is_resumed_without_a_byte_twice(dev: Path, tmp_path: Path) -> None:
    """The error path keeps every verified unit, so only the unit that was cut comes again."""
    tree = make_tree(tmp_path / "root", weights=(500_000,))

    def answer(line: Line, asked: tuple[int, int] | None) -> None:
        data = (tree.root / line.path.lstrip("/")).read_bytes()
        if asked is None:
            line.send(head(200, len(data)), data)
            return
        start, stop = asked
        line.send(head(206, stop - start, f"Content-Range: bytes {start}-{stop - 1}/{len(data)}"))
        if len(line.asked) == 3:
            line.send(data[start : start + 80_000])
        raise Hangup

    with scripted(answer) as (url, _):
        with pytest.raises(FetchError, match="run the same command again to resume"):
            pull(url, dev, "w2", patience=QUICK)
    journal = DeviceFolder(dev).journal()
    assert journal
    with serving(tree.root, log=tmp_path / "log") as url:
        pull(url, dev, "w2")
    for extent in journal:
        for start, stop in objects_asked(read_byte_log(tmp_path / "log")).get(extent.object, []):
            assert stop <= extent.start or start >= extent.stop
    assert file_of(dev, "w2") == tree.files["w2"]


def test_a_full_disk_keeps_the_level(dev: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse writes as a full disk does."""
    tree = make_tree(tmp_path / "root", weights=(500_000,))
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        code = f"""
import resource, sys
from pathlib import Path
from qdeploy.client.pull import climb
from qdeploy.errors import DeviceError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    climb(Path({str(dev)!r}), "w3")
except DeviceError as e:
    print(e)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert "the disk is full" in done.stdout and "the level in use is untouched" in done.stdout
        assert DeviceFolder(dev).chosen().level == "w2"
        assert file_of(dev, "w2") == tree.files["w2"]
        assert climb(dev, "w3").level == "w3"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tree: Tree, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        (disk / "ballast").write_bytes(b"x" * 20_000)
        with serving(tree.root) as url:
            pull(url, disk / "dev", "w2")
            with contextlib.suppress(OSError), open(disk / "ballast", "ab", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
            with pytest.raises(DeviceError, match="disk is full|No space left"):
                climb(disk / "dev", "w4")
            assert file_of(disk / "dev", "w2") == tree.files["w2"]
            (disk / "ballast").unlink()
            climb(disk / "dev", "w4")
    finally:
        subprocess.run(["umount", disk], check=True)
