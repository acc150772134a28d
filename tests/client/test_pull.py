from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qdeploy.bundle.manifest import manifest_bytes
from qdeploy.bundle.store import assemble
from qdeploy.client.fetch import GoneError, Patience
from qdeploy.client.plan import piece_extent, piece_kinds
from qdeploy.client.pull import climb, drop, held_levels, pull
from qdeploy.client.receive import COMMIT_BYTES
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import BundleError, DeviceError, FetchError, QDeployError
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import Sent, read_byte_log
from tests.client.scripted import Hangup, Line, head, scripted
from tests.client.tree import Tree, make_tree, publish

QUICK = Patience(timeout_s=10, attempts=2, pause_s=0.001)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return make_tree(tmp_path / "root")


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    return tmp_path / "dev"


def file_of(folder: Path, level: str) -> bytes:
    """The assembled file of a level, from the folder alone."""
    device = DeviceFolder(folder)
    manifest = device.manifest(device.chosen().manifest)
    return assemble(manifest, level, device.reader(manifest))


def rows_of(log: Path) -> list[Sent]:
    return read_byte_log(log)


def objects_asked(rows: list[Sent]) -> dict[str, list[tuple[int, int]]]:
    """{object: [(start, stop) sent]}"""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        if row.path.startswith("/objects/"):
            found.setdefault(row.path.split("/")[-1], []).append((row.start, row.start + row.sent))
    return found


def assert_nothing_twice(rows: list[Sent]) -> None:
    for spans in objects_asked(rows).values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)), spans


# --- up and down -----------------------------------------------------------------------------------------------------


def test_climbs_fetch_the_difference_and_drops_nothing(tree: Tree, dev: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(tree.root, log=log) as url:
        first = pull(url, dev, "w2")
        assert file_of(dev, "w2") == tree.files["w2"]
        second = climb(dev, "w3")
        third = climb(dev, "w4")
        before = len(rows_of(log))
        down = drop(dev, "w2")
        up = climb(dev, "w4")
        assert len(rows_of(log)) == before
    assert file_of(dev, "w4") == tree.files["w4"]
    assert held_levels(dev) == ["w2", "w3", "w4"]
    for report in (down, up):
        assert (report.total_fetched, report.requests) == (0, 0)
    rows = rows_of(log)
    assert_nothing_twice(rows)
    assert sum(row.sent for row in rows) == sum(r.total_fetched for r in (first, second, third))
    assert sum(b - a for spans in objects_asked(rows).values() for a, b in spans) == sum(
        entry.size for entry in tree.manifest.objects
    )
    assert second.fetched["planes"] > 0 and second.fetched["skeleton"] == second.fetched["manifest"] == 0


def test_a_pull_brings_the_side_tensors_below(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        report = pull(url, dev, "w4")
    sizes = {level.name: tree.manifest.pieces[level.side or 0].size for level in tree.manifest.levels}
    assert report.side_below == sizes["w2"] + sizes["w3"]
    assert report.held["side"] == sum(sizes.values())
    for level in ("w3", "w2"):
        drop(dev, level)
        assert file_of(dev, level) == tree.files[level]
    assert "of which 160 let it drop" in "\n".join(report.lines())


def test_a_pull_again_costs_the_release_pointer(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w3")
        again = pull(url, dev)  # the level in force
    assert (again.level, again.requests) == ("w3", 1)
    assert {kind for kind, size in again.fetched.items() if size} == {"manifest"}


def test_without_a_level_the_first_pull_takes_the_lowest(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        assert pull(url, dev).level == "w2"


def test_progress_and_its_end(tree: Tree, dev: Path) -> None:
    seen: list[tuple[int, int]] = []
    with serving(tree.root) as url:
        pull(url, dev, "w4", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(o.size for o in tree.manifest.objects)


def test_unknown_levels_and_wrong_directions(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        with pytest.raises(BundleError, match="no level 'w7' in toy: levels are w2, w3, w4"):
            pull(url, dev, "w7")
        with pytest.raises(BundleError, match="holds no level yet"):
            climb(dev, "w3")
        pull(url, dev, "w3")
    for step, to, match in ((climb, "w7", "levels are"), (climb, "w2", "use drop"), (drop, "w4", "use climb")):
        with pytest.raises(BundleError, match=match):
            step(dev, to)
    with pytest.raises(BundleError, match="no device folder"):
        climb(dev / "none", "w2")
    assert DeviceFolder(dev).chosen().level == "w3"


def test_a_server_that_is_away_leaves_the_level(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
    with pytest.raises(FetchError, match="run the same command again"):
        climb(dev, "w3", patience=QUICK)
    assert DeviceFolder(dev).chosen().level == "w2"
    assert file_of(dev, "w2") == tree.files["w2"]


# --- a release that changes ------------------------------------------------------------------------------------------


def test_a_pull_takes_the_new_release_and_shares_what_is_equal(tree: Tree, dev: Path, tmp_path: Path) -> None:
    with serving(tree.root, log=tmp_path / "log") as url:
        pull(url, dev, "w4")
        publish(tree.root, replace(tree.manifest, release=2))
        report = pull(url, dev)
    assert (report.release, report.level) == (2, "w4")
    assert_nothing_twice(rows_of(tmp_path / "log"))
    assert DeviceFolder(dev).chosen().previous == (tree.digest, "w4")


def test_a_climb_stays_with_the_release_that_is_held(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        make_tree(tree.root, seed=5, release=2)  # beside the old objects
        assert climb(dev, "w3").release == 1
        assert file_of(dev, "w3") == tree.files["w3"]
        for entry in tree.manifest.objects:
            (tree.root / "objects" / entry.sha256).unlink()
        with pytest.raises(GoneError, match=r"no longer has release 1 .*qdeploy pull http.*--level w4"):
            climb(dev, "w4")
        assert drop(dev, "w2").level == "w2"
        assert pull(url, dev, "w4").release == 2


def test_an_older_release_is_not_taken(tree: Tree, dev: Path) -> None:
    publish(tree.root, replace(tree.manifest, release=3))
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        publish(tree.root, replace(tree.manifest, release=2))
        with pytest.raises(BundleError, match="server offers release 2, .* holds the newer 3"):
            pull(url, dev, "w4")
    assert DeviceFolder(dev).chosen().level == "w2"


def test_another_model_is_not_taken(tree: Tree, dev: Path, tmp_path: Path) -> None:
    other = make_tree(tmp_path / "other", model="cat")
    with serving(tree.root) as url, serving(other.root) as second:
        pull(url, dev, "w2")
        with pytest.raises(BundleError, match="holds toy, the server has cat: choose another folder"):
            pull(second, dev, "w2")


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_on_disk_is_named_and_healed_by_a_pull(dev: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root", weights=(1_600_000, 500))
    said: list[str] = []
    with serving(tree.root, log=tmp_path / "log") as url:
        pull(url, dev, "w2")
        first = tree.manifest.objects[0].sha256
        damage(dev / "objects" / first, 200_000)
        with pytest.raises(BundleError, match=f"object {first} .*is damaged in .*run `qdeploy pull` again"):
            drop(dev, "w2")
        before = len(rows_of(tmp_path / "log"))
        pull(url, dev, echo=said.append)
        again = objects_asked(rows_of(tmp_path / "log")[before:])
    assert said == ["1 pieces are damaged on disk and are fetched again"]
    assert (196_608, 262_144) in again[first]  # the one bad leaf, and the ends that have no digest of their own
    assert sum(b - a for a, b in again[first]) < 3 * 65_536
    assert file_of(dev, "w2") == tree.files["w2"]


def test_every_byte_of_a_small_bundle_counts(tree: Tree, dev: Path) -> None:
    """Flipped bytes, one by one, over each object: always refused, and nothing but the good bytes is held."""
    with serving(tree.root) as url:
        for index, entry in enumerate(tree.manifest.objects):
            for at in range(0, entry.size, max(1, entry.size // 5)):
                shutil.rmtree(dev, ignore_errors=True)
                damage(tree.object_path(index), at)
                with pytest.raises(BundleError, match=f"object {entry.sha256} from {url} is not what the manifest"):
                    pull(url, dev, "w4")
                assert DeviceFolder(dev).current() is None
                damage(tree.object_path(index), at)
                pull(url, dev, "w4")
                assert file_of(dev, "w4") == tree.files["w4"]


def test_a_truncated_object_is_refused(tree: Tree, dev: Path) -> None:
    path = tree.object_path(1)
    whole = path.read_bytes()
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        path.write_bytes(whole[:-9])
        with pytest.raises(FetchError, match="sent range|shorter"):
            climb(dev, "w3", patience=QUICK)
        path.write_bytes(b"")
        with pytest.raises(FetchError, match="shorter than the manifest says"):
            climb(dev, "w3", patience=QUICK)
        path.write_bytes(whole)
        climb(dev, "w3")


def test_swapped_objects_are_refused(tree: Tree, dev: Path) -> None:
    a, b = tree.object_path(1), tree.object_path(2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second.ljust(len(first), b"\0")[: len(first)])
    with serving(tree.root) as url:
        with pytest.raises(BundleError, match="damaged or swapped"):
            pull(url, dev, "w4")
    assert held_after_failure(dev) == 0


def held_after_failure(dev: Path) -> int:
    return 0 if DeviceFolder(dev).current() is None else 1


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda data: data[:-1], "is not the one that its release.json names"),
        (lambda data: data + b"\n", "has .* bytes, at most"),
        (lambda data: data.replace(b'"toy"', b'"tuy"'), "is not the one that its release.json names"),
    ],
)
def test_an_edited_manifest_is_refused(tree: Tree, dev: Path, edit: Callable[[bytes], bytes], match: str) -> None:
    path = tree.root / "manifests" / f"{tree.digest}.json"
    path.write_bytes(edit(path.read_bytes()))
    with serving(tree.root) as url:
        with pytest.raises(QDeployError, match=match):
            pull(url, dev, "w2", patience=QUICK)
    assert DeviceFolder(dev).current() is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"<html>welcome</html>", b"{" * 5000])
def test_what_is_no_release_is_refused(tree: Tree, dev: Path, data: bytes) -> None:
    (tree.root / "release.json").write_bytes(data)
    with serving(tree.root) as url:
        with pytest.raises(BundleError, match=r"release\.json"):
            pull(url, dev, "w2")


def test_a_url_without_a_release(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        with pytest.raises(FetchError, match=r"release\.json is not there \(404\): check the URL"):
            pull(url + "/elsewhere", dev, "w2")


def test_a_manifest_damaged_on_disk_is_fetched_again(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        damage(dev / "manifests" / f"{tree.digest}.json", 50)
        with pytest.raises(BundleError, match="is damaged: run `qdeploy pull` again"):
            climb(dev, "w3")
        assert pull(url, dev, "w2").fetched["manifest"] > len(manifest_bytes(tree.manifest))


def test_a_damaged_pointer_is_replaced(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        (dev / "current.json").write_bytes(b"{")
        with pytest.raises(BundleError, match=r"current\.json"):
            climb(dev, "w3")
        assert pull(url, dev, "w2").total_fetched < 1000


def test_a_lost_journal_costs_a_fetch_but_no_error(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
        (dev / "journal").unlink()
        assert file_of(dev, "w2") == tree.files["w2"]
        assert pull(url, dev, "w2").fetched["planes"] > 0


# --- artifacts -------------------------------------------------------------------------------------------------------


def test_the_artifact_that_suits_comes_once(dev: Path, tmp_path: Path) -> None:
    import platform

    here = {"name": "here", "arch": platform.machine(), "features": []}
    tree = make_tree(tmp_path / "root", artifact_bytes=100_000, target=here)
    with serving(tree.root) as url:
        report = pull(url, dev, "w2")
        assert (report.artifact, report.fetched["artifact"]) == ("here", 100_000)
        assert climb(dev, "w3").fetched["artifact"] == 0
    (unpacked,) = (dev / "artifacts").glob("*/lib.so")
    assert len(unpacked.read_bytes()) == 100_000


def test_an_artifact_for_another_machine_comes_only_by_name(dev: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root", artifact_bytes=1000, target={"name": "board", "arch": "vax", "features": []})
    with serving(tree.root) as url:
        report = pull(url, dev, "w2")
        assert report.artifact is None and "vax" in (report.no_artifact or "")
        assert report.fetched["artifact"] == 0
        with pytest.raises(BundleError, match="no compiled artifact for 'bord' in toy: there are board"):
            pull(url, dev, "w2", target="bord")
        assert pull(url, dev, "w2", target="board").artifact == "board"
        assert pull(url, dev, "w3").artifact == "board"  # asked for once, kept


# --- interruptions ---------------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from qdeploy.client.pull import pull
pull(sys.argv[1], Path(sys.argv[2]), "w2", "toy")
"""


def held_bytes(dev: Path, tree: Tree) -> int:
    """Bytes of the level's objects that the journal covers."""
    covered = {(e.object, at) for e in DeviceFolder(dev).journal() for at in range(e.start, e.stop, 1)}
    return len(covered)


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


def test_kill_at_any_offset_and_resume(dev: Path, tmp_path: Path) -> None:
    """kill -9 while the line is silent: what comes again is at most a commit and a unit; in the end all is right."""
    tree = make_tree(tmp_path / "root", weights=(500_000,), artifact_bytes=2_000_000)
    slack = COMMIT_BYTES + 2 * 65_536
    for budget in (300, 50_000, 600_001, 500_000):
        held = held_bytes(dev, tree)
        with scripted(stingy(tree.root, [budget])) as (url, _):
            child = subprocess.Popen([sys.executable, "-c", CHILD, url, str(dev)])
            try:
                for _ in range(400):
                    if held_bytes(dev, tree) >= held + budget - slack and (dev / "objects").exists():
                        break
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(0.05)
                        pytest.fail("the child ended by itself")
                assert held_bytes(dev, tree) >= held + budget - slack
            finally:
                child.kill()
                child.wait()
        assert DeviceFolder(dev).current() is None
    journal = DeviceFolder(dev).journal()
    assert journal
    with serving(tree.root, log=tmp_path / "log") as url:
        pull(url, dev, "w2", "toy")
    asked = objects_asked(rows_of(tmp_path / "log"))
    whole = {piece_extent(tree.manifest, piece) for piece in range(len(tree.manifest.pieces))}
    for extent in journal & whole:
        for start, stop in asked.get(extent.object, []):
            assert stop <= extent.start or start >= extent.stop
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
        for start, stop in objects_asked(rows_of(tmp_path / "log")).get(extent.object, []):
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


# --- any static web server -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def python_server(root: Path) -> Iterator[str]:
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().split(" port ")[1].split()[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def test_a_server_without_ranges_works(tree: Tree, dev: Path) -> None:
    with python_server(tree.root) as url:
        assert pull(url, dev, "w2").skipped == 0
        climb(dev, "w4")
        assert file_of(dev, "w4") == tree.files["w4"]
        first = tree.manifest.objects[0]
        damage(dev / "objects" / first.sha256, first.size - 1)
        report = pull(url, dev, "w4")
    assert report.skipped > 0 and "knows no ranges" in "\n".join(report.lines())


NGINX = """
pid {prefix}/pid; error_log {prefix}/error warn; worker_processes 1; {user}
events {{ worker_connections 64; }}
http {{
  log_format bytes '{{"method":"$request_method","path":"$uri","range":"$http_range","status":$status,"start":0,'
                   '"size":$body_bytes_sent,"sent":$body_bytes_sent}}';
  access_log {prefix}/access bytes; gzip on; gzip_types application/json; gzip_min_length 1; gzip_proxied any;
  client_body_temp_path {prefix}/t; proxy_temp_path {prefix}/t; fastcgi_temp_path {prefix}/t;
  uwsgi_temp_path {prefix}/t; scgi_temp_path {prefix}/t; types {{ application/json json; }}
  server {{ listen 127.0.0.1:{port}; location /models/toy/ {{ alias {root}/; }} }}
}}
"""


@contextlib.contextmanager
def nginx(root: Path, prefix: Path) -> Iterator[str]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    prefix.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""
    (prefix / "conf").write_text(NGINX.format(prefix=prefix, port=port, root=root, user=user))
    command = [program, "-p", str(prefix), "-c", str(prefix / "conf"), "-g", "daemon off;"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
                    assert process.stderr is not None
                    pytest.fail(f"nginx ended: {process.stderr.read().decode()}")
            yield f"http://127.0.0.1:{port}/models/toy/"
        finally:
            process.terminate()
            process.wait(20)


def test_nginx_serves_the_same_tree(dev: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "root", weights=(500_000,))
    with nginx(tree.root, tmp_path / "nginx") as url:
        assert urlsplit(url).path == "/models/toy/"
        reports = [pull(url, dev, "w2"), climb(dev, "w3"), climb(dev, "w4")]
        damage(dev / "objects" / tree.manifest.objects[0].sha256, 3)
        reports.append(pull(url, dev, "w4"))
    assert file_of(dev, "w4") == tree.files["w4"]
    assert all(report.skipped == 0 for report in reports)
    rows = rows_of(tmp_path / "nginx" / "access")
    assert sum(row.sent for row in rows) == sum(report.total_fetched for report in reports)
    assert {row.status for row in rows if "/objects/" in row.path} == {206}


def test_pieces_of_the_level_are_the_objects_of_the_level(tree: Tree) -> None:
    """What the byte log is compared with: here levels and objects coincide."""
    kinds = piece_kinds(tree.manifest, "w2", None)
    assert {tree.manifest.pieces[piece].object for piece in kinds} == {0}
