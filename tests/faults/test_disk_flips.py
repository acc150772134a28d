"""Flipped bytes, on the disk and on the line: no wrong answer, and one damaged byte costs one leaf."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qdeploy.bundle.manifest import LEAF_BYTES
from qdeploy.bundle.store import RELEASE_NAME, manifest_name, object_name
from qdeploy.client import disk as edge
from qdeploy.client.plan import leaf_extents
from qdeploy.client.pull import pull
from qdeploy.client.state import DeviceFolder, open_choice
from qdeploy.errors import BundleError, QDeployError
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import QUICK, file_of, objects_asked
from tests.client.device import pull as unsigned_pull
from tests.client.scripted import Line, head, scripted
from tests.client.tree import make_tree
from tests.faults.conftest import Amount, Record
from tests.faults.faulty import Quick
from tests.faults.releases import SignedFiles, in_force, make_files


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> SignedFiles:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "disk", Quick())


@contextmanager
def flipped(path: Path, at: int, mask: int) -> Iterator[None]:
    """The file with one byte changed, if the file is still the same afterwards."""
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ mask]))
    yield


def every(path: Path, step: int, first: int) -> range:
    return range(first % step, path.stat().st_size, step)


def answers(folder: Path, release: SignedFiles) -> bool:
    """Whether the level in force gives its own file; False when it says that it cannot. A wrong file fails."""
    try:
        found = in_force(folder)
        if found is None:
            return False
        data = file_of(folder, found[1])
    except QDeployError:
        return False
    assert found in release.files and data == release.files[found], "a wrong answer"
    return True


def test_on_disk(release: SignedFiles, tmp_path: Path, amount: Amount, record: Record) -> None:
    """Each byte of each file of a device folder; then the next pull mends it, or names the file that it cannot mend."""
    start, work = tmp_path / "start", tmp_path / "dev"
    rng = random.Random(1)
    flips = mended = refused = unnoticed = 0
    with serving(release.trees[1]) as url:
        pull(url, start, "w4", root=release.root)
        names = sorted(p.relative_to(start) for p in start.rglob("*") if p.is_file() and p.stat().st_size)
        total = sum((start / name).stat().st_size for name in names)
        step = max(1, total // amount(40, total))
        for number, name in enumerate(names):
            for at in every(start / name, step, number):
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(start, work)
                with flipped(work / name, at, 1 << rng.randrange(8)):
                    unnoticed += answers(work, release)
                    try:
                        report = pull(url, work, "w4")
                    except QDeployError as e:
                        assert "\n" not in str(e)
                        assert name.parts[0] in ("trust", "device.json"), f"{name} byte {at} cannot be mended: {e}"
                        refused += 1
                    else:
                        objects = sum(size for kind, size in report.fetched.items() if kind != "manifest")
                        assert objects <= LEAF_BYTES
                        assert answers(work, release), f"{name} byte {at}"
                        mended += 1
                    flips += 1
    assert mended > refused
    record(
        "bytes flipped on disk", flips=flips, of=total, mended=mended, refused=refused,
        no_effect=unnoticed,
    )  # fmt: skip


def test_in_flight(release: SignedFiles, tmp_path: Path, amount: Amount, record: Record) -> None:
    """Each byte of each body that a first pull receives, flipped once: the pull ends right, or ends with one line."""
    tree, work = release.trees[1], tmp_path / "dev"
    target = ["", 0, 0]
    served: dict[str, int] = {}

    def answer(line: Line, asked: tuple[int, int] | None) -> None:
        path = tree / line.path.lstrip("/")
        if not path.is_file():
            line.send(head(404, 0))
            return
        data = bytearray(path.read_bytes())
        start, stop = asked or (0, len(data))
        body = data[start:stop]
        served[line.path] = len(data)
        at = int(target[1]) - start
        if line.path == target[0] and 0 <= at < len(body):
            body[at] ^= int(target[2])
            target[0] = ""
        extra = [f"Content-Range: bytes {start}-{stop - 1}/{len(data)}"] if asked else []
        line.send(head(206 if asked else 200, len(body), *extra).encode() + bytes(body))

    rng = random.Random(2)
    flips = healed = refused = 0
    with scripted(answer) as (url, _):
        pull(url, work, "w4", root=release.root, patience=QUICK)
        files = dict(served)
        total = sum(files.values())
        step = max(1, total // amount(40, total))
        for number, (path, size) in enumerate(sorted(files.items())):
            for at in range(number % step, size, step):
                shutil.rmtree(work, ignore_errors=True)
                target[:] = [path, at, 1 << rng.randrange(8)]
                try:
                    pull(url, work, "w4", root=release.root, patience=QUICK)
                    healed += 1
                except QDeployError as e:
                    assert "\n" not in str(e)
                    assert not path.startswith("/objects/"), f"a leaf of {path} is not asked for again: {e}"
                    answers(work, release)
                    pull(url, work, "w4", root=release.root, patience=QUICK)
                    refused += 1
                assert answers(work, release)
                flips += 1
    assert healed and refused
    record("bytes flipped in flight", flips=flips, of=total, healed_at_once=healed, refused=refused)


def test_release_json(tmp_path: Path, amount: Amount, record: Record) -> None:
    """Each byte of release.json and of the manifest of an unsigned tree, on the server: refused, or of no effect."""
    tree, work = make_tree(tmp_path / "root", weights=(60,), gap=4), tmp_path / "dev"
    rng = random.Random(4)
    names = [tree.root / RELEASE_NAME, tree.root / manifest_name(tree.digest)]
    total = sum(path.stat().st_size for path in names)
    step = max(1, total // amount(30, total))
    refused = flips = 0
    with serving(tree.root) as url:
        for path in names:
            for at in every(path, step, 0):
                shutil.rmtree(work, ignore_errors=True)
                mask = 1 << rng.randrange(8)
                with flipped(path, at, mask):
                    try:
                        unsigned_pull(url, work, "w4", patience=QUICK)
                    except QDeployError as e:
                        assert "\n" not in str(e) and DeviceFolder(work).current() is None
                        refused += 1
                    else:
                        assert file_of(work, "w4") == tree.files["w4"]
                with flipped(path, at, mask):  # and back
                    pass
                flips += 1
    assert refused > flips // 2
    record("bytes flipped in an unsigned release.json and manifest", flips=flips, of=total, refused=refused)


def test_samples_of_a_large_release(tmp_path: Path, amount: Amount, record: Record) -> None:
    """A byte anywhere in a release of several megabytes: the piece is refused, and one leaf alone is wrong."""
    weights = (60_000,) * amount(10, 40)
    tree = make_tree(tmp_path / "root", weights=weights, levels=(2, 4))
    dev, log = tmp_path / "dev", tmp_path / "log"
    rng = random.Random(3)
    samples, mends = amount(300, 100_000), amount(2, 50)
    with serving(tree.root, log=log) as url:
        unsigned_pull(url, dev, "w4")
        device = DeviceFolder(dev)
        _, manifest = open_choice(device)
        read = device.reader(manifest)
        for number in range(samples):
            index = rng.randrange(len(manifest.pieces))
            piece = manifest.pieces[index]
            entry = manifest.objects[piece.object]
            path, at, mask = dev / object_name(entry.sha256), rng.randrange(piece.size), 1 << rng.randrange(8)
            with flipped(path, piece.offset + at, mask):
                with pytest.raises(BundleError, match="is damaged in"):
                    read(index)
                near = [
                    leaf for leaf in leaf_extents(manifest, piece.object)
                    if leaf.start - LEAF_BYTES <= piece.offset + at < leaf.stop + LEAF_BYTES
                ]  # fmt: skip
                assert sum(not device.intact(leaf) for leaf in near) == 1
                if number < mends:
                    before = len(read_byte_log(log))
                    unsigned_pull(url, dev, "w4")
                    asked = objects_asked(read_byte_log(log)[before:])
                    spans = [span for rows in asked.values() for span in rows]
                    assert len(spans) == 1 and spans[0][1] - spans[0][0] <= LEAF_BYTES
                else:
                    with flipped(path, piece.offset + at, mask):  # and back
                        pass
                assert read(index) is not None
        assert file_of(dev, "w4") == tree.files["w4"]
    size = sum(entry.size for entry in manifest.objects)
    record("bytes of a large release flipped", flips=samples, of=size, mended_by_a_pull=mends)
