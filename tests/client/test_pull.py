from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.client.fetch import GoneError
from qdeploy.client.plan import piece_kinds
from qdeploy.client.pull import climb, drop, levels_within
from qdeploy.client.state import DeviceFolder
from qdeploy.errors import BundleError, FetchError, QDeployError
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import read_byte_log
from tests.client.device import QUICK, assert_nothing_twice, file_of, objects_asked, pull
from tests.client.tree import Tree, make_tree, publish

# --- up and down -----------------------------------------------------------------------------------------------------


def test_climbs_fetch_the_difference_and_drops_nothing(tree: Tree, dev: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(tree.root, log=log) as url:
        first = pull(url, dev, "w2")
        assert file_of(dev, "w2") == tree.files["w2"]
        second = climb(dev, "w3")
        third = climb(dev, "w4")
        before = len(read_byte_log(log))
        down = drop(dev, "w2")
        up = climb(dev, "w4")
        assert len(read_byte_log(log)) == before
    assert file_of(dev, "w4") == tree.files["w4"]
    assert levels_within(tree.manifest, DeviceFolder(dev).journal()) == ["w2", "w3", "w4"]
    for report in (down, up):
        assert (report.total_fetched, report.requests) == (0, 0)
    rows = read_byte_log(log)
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
        dev.mkdir()
        with pytest.raises(BundleError, match="holds no level yet"):
            climb(dev, "w3")
        pull(url, dev, "w3")
    for step, to, match in ((climb, "w7", "levels are"), (climb, "w2", "use drop"), (drop, "w4", "use climb")):
        with pytest.raises(BundleError, match=match):
            step(dev, to)
    with pytest.raises(BundleError, match="no device folder"):
        climb(dev / "none", "w2")
    assert DeviceFolder(dev).chosen().level == "w3"


@pytest.mark.parametrize(
    ("asked", "match"),
    [({"level": "w7"}, "no level 'w7'"), ({"target": "board"}, "no compiled artifact for 'board'"), ({}, "404")],
)
def test_a_refused_first_pull_leaves_nothing(tree: Tree, dev: Path, asked: dict[str, str], match: str) -> None:
    with serving(tree.root) as url:
        with pytest.raises(QDeployError, match=match):
            pull(url if asked else f"{url}/elsewhere", dev, **asked)
    assert not dev.exists()


def test_a_server_that_is_away_leaves_the_level(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        pull(url, dev, "w2")
    with pytest.raises(FetchError, match="run the same command again"):
        climb(dev, "w3", patience=QUICK)
    assert DeviceFolder(dev).chosen().level == "w2"
    assert file_of(dev, "w2") == tree.files["w2"]


def test_pieces_of_the_level_are_the_objects_of_the_level(tree: Tree) -> None:
    """What the byte log is compared with: here levels and objects coincide."""
    kinds = piece_kinds(tree.manifest, "w2", None)
    assert {tree.manifest.pieces[piece].object for piece in kinds} == {0}


# --- a release that changes ------------------------------------------------------------------------------------------


def test_a_pull_takes_the_new_release_and_shares_what_is_equal(tree: Tree, dev: Path, tmp_path: Path) -> None:
    with serving(tree.root, log=tmp_path / "log") as url:
        pull(url, dev, "w4")
        publish(tree.root, replace(tree.manifest, release=2))
        report = pull(url, dev)
    assert (report.release, report.level) == (2, "w4")
    assert_nothing_twice(read_byte_log(tmp_path / "log"))
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
