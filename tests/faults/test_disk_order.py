"""The order of writes, fsyncs and renames of a real client process, as the kernel sees it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qdeploy.serve.app import serving
from tests.faults.conftest import Record
from tests.faults.host import ROOT
from tests.faults.releases import make_files

STRACE = shutil.which("strace")
CALLS = "openat,open,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2"
FD = r"[0-9]+<([^>]*)>"
PULL = """
import sys
from pathlib import Path
from qdeploy.client.pull import climb, pull
pull(sys.argv[1], Path(sys.argv[2]), "w2", root=Path(sys.argv[3]))
climb(Path(sys.argv[2]), "w4")
"""


@dataclass(frozen=True)
class Call:
    name: str  # write, sync, rename
    path: str
    target: str = ""


def parse(text: str, folder: Path) -> list[Call]:
    """Calls that succeeded, below `folder`."""
    found, begun = [], dict[str, str]()
    for line in text.splitlines():
        process, _, line = line.partition(" ")
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", line):
            line = begun.pop(process, "") + resumed[1]
        if match := re.search(rf"(?:pwrite64|write)\({FD}.*= [1-9]", line):
            found.append(Call("write", match[1]))
        elif match := re.search(rf"(?:fsync|fdatasync)\({FD}\)\s*= 0", line):
            found.append(Call("sync", match[1]))
        elif match := re.search(r'rename\w*\((?:AT_FDCWD[^,]*, )?"([^"]*)", (?:AT_FDCWD[^,]*, )?"([^"]*)".*= 0', line):
            found.append(Call("rename", match[1], match[2]))
    return [call for call in found if folder in (Path(call.path), *Path(call.path).parents)]


def test_parse() -> None:
    text = '1 pwrite64(5</d/objects/a>, "x"..., 3, 0) = 3\n1 fsync(5</d/objects/a>) = 0\n1 rename("/d/.a", "/d/a") = 0'
    assert parse(text, Path("/d")) == [
        Call("write", "/d/objects/a"), Call("sync", "/d/objects/a"), Call("rename", "/d/.a", "/d/a")
    ]  # fmt: skip
    text = "1 fsync(5</d/a> <unfinished ...>\n2 fsync(6</d/b>) = 0\n1 <... fsync resumed>) = 0"
    assert parse(text, Path("/d")) == [Call("sync", "/d/b"), Call("sync", "/d/a")]
    assert parse('1 fsync(5</d/a>) = -1 EIO (x)\n1 write(2</dev/null>, "", 1) = 1', Path("/d")) == []


def test_order_of_a_real_pull(tmp_path: Path, record: Record) -> None:
    if STRACE is None:
        pytest.skip("strace is not installed")
    release = make_files(tmp_path)
    folder, log = tmp_path / "dev", tmp_path / "strace"
    with serving(release.trees[1]) as url:
        command = [sys.executable, "-c", PULL, url, folder, release.root]
        done = subprocess.run(
            [STRACE, "-f", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", log, *command],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip(f"strace may not trace here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    calls = parse(log.read_text(errors="replace"), folder)
    ours = [call for call in calls if "/trust/metadata" not in call.path]  # python-tuf's cache is synced afterwards
    renames = [(number, call) for number, call in enumerate(ours) if call.name == "rename"]
    assert len(renames) > 5
    for number, call in renames:
        own = [at for at, other in enumerate(ours[:number]) if other.name == "write" and other.path == call.path]
        syncs = [at for at, other in enumerate(ours[:number]) if other.name == "sync" and other.path == call.path]
        assert own and syncs and max(own) < max(syncs), f"{call.target} is renamed before its bytes are synced"
        after = next(other for other in ours[number + 1 :] if other.name != "write")
        assert after == Call("sync", str(Path(call.target).parent)), f"{call.target}: its folder is not synced next"
    pointers = [number for number, call in renames if call.target.endswith("/current.json")]
    counters = [number for number, call in renames if call.target.endswith("/trust/state.json")]
    assert len(pointers) == 2 and counters[-1] < pointers[0], "the counters come first"
    for pointer in pointers:
        objects = [n for n, call in enumerate(ours[:pointer]) if call.name == "write" and "/objects/" in call.path]
        journal = [n for n, call in enumerate(ours[:pointer]) if call.path.endswith("/journal")]
        assert ours[journal[-1]].name == "sync" and objects[-1] < journal[-1]
        last = objects[-1]
        names = [call.path for call in ours[last + 1 : journal[-1]]]
        assert names.index(ours[last].path) < names.index(str(folder / "objects")) < names.index(f"{folder}/journal")
    synced = {call.path for call in calls if call.name == "sync"}
    written = {call.path for call in calls if call.name == "write"}
    assert {path for path in written if path.endswith(".json")} <= synced
    record("order of fsync by strace", calls=len(calls), renames=len(renames))
