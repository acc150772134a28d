from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.bundle.manifest import LEAF_BYTES
from qdeploy.client.fetch import Span
from qdeploy.client.plan import (
    Extent,
    check_climb,
    check_drop,
    coalesce,
    downloads,
    leaf_extents,
    piece_extent,
    piece_kinds,
    units_of,
)
from qdeploy.errors import BundleError
from tests.client.tree import Tree, make_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    # pieces below, at and above the size of a leaf, whose ends lie inside leaves
    return make_tree(tmp_path_factory.mktemp("tree"), weights=(700_000, 300_000, 40), artifact_bytes=200_000)


def test_adjacent_intervals_are_one_span() -> None:
    assert coalesce([(0, 5), (5, 9), (10, 12), (12, 13)]) == [Span(0, 9), Span(10, 13)]
    assert coalesce([]) == []


def test_kinds_of_a_level(tree: Tree) -> None:
    kinds = piece_kinds(tree.manifest, "w3", 0)
    assert list(kinds.values()) == [
        "skeleton",
        "planes",
        "planes",
        "planes",
        "side",
        *["planes"] * 3,
        "side",
        "artifact",
    ]
    assert set(piece_kinds(tree.manifest, "w2", None)) < set(kinds)


def test_a_whole_level_is_one_range_an_object(tree: Tree) -> None:
    todo = downloads(tree.manifest, list(piece_kinds(tree.manifest, "w4", 0)), set())
    assert [download.spans for download in todo] == [[Span(0, entry.size)] for entry in tree.manifest.objects]


def test_leaves_lie_inside_their_piece(tree: Tree) -> None:
    big = max(range(len(tree.manifest.pieces)), key=lambda i: tree.manifest.pieces[i].size)
    whole = piece_extent(tree.manifest, big)
    leaves = leaf_extents(tree.manifest, big)
    assert leaves and all(whole.start <= leaf.start < leaf.stop <= whole.stop for leaf in leaves)
    assert all(leaf.start % LEAF_BYTES == 0 for leaf in leaves)


@given(st.integers(0, 10**6), st.integers(0, 2**16 - 1))
def test_units_are_what_is_missing_and_no_more(tree: Tree, number: int, mask: int) -> None:
    manifest = tree.manifest
    piece = number % len(manifest.pieces)
    leaves = leaf_extents(manifest, piece)
    held = {leaf for i, leaf in enumerate(leaves) if mask >> i & 1}
    whole = piece_extent(manifest, piece)
    units = units_of(manifest, piece, held)
    assert [unit.last for unit in units] == [False] * (len(units) - 1) + [True]
    assert all(a.stop <= b.start for a, b in zip(units, units[1:], strict=False))
    covered = sorted([(u.start, u.stop) for u in units] + [(leaf.start, leaf.stop) for leaf in held])
    complete = bool(leaves) and held == set(leaves) and (leaves[0].start, leaves[-1].stop) == (whole.start, whole.stop)
    if not complete:  # else the last leaf comes again, see below
        assert coalesce(covered) == [Span(whole.start, whole.stop)]
    assert units_of(manifest, piece, held | {whole}) == []


def test_a_piece_of_held_leaves_without_its_record_costs_one_leaf(tree: Tree) -> None:
    piece = tree.manifest.artifacts[0].files[0][1]
    leaves = leaf_extents(tree.manifest, piece)
    (unit,) = units_of(tree.manifest, piece, set(leaves))
    assert (unit.start, unit.stop, unit.last) == (leaves[-1].start, leaves[-1].stop, True)


def test_a_record_of_other_bytes_does_not_count(tree: Tree) -> None:
    whole = piece_extent(tree.manifest, 0)
    assert units_of(tree.manifest, 0, {Extent(whole.object, whole.start, whole.stop, "0" * 64)})


def test_up_and_down(tree: Tree) -> None:
    assert check_climb(tree.manifest, "w2", "w4").name == "w4"
    assert check_climb(tree.manifest, "w3", "w3").name == "w3"
    assert check_drop(tree.manifest, "w4", "w2").name == "w2"
    with pytest.raises(BundleError, match="is below the current level w4: use drop"):
        check_climb(tree.manifest, "w4", "w2")
    with pytest.raises(BundleError, match="not below the current level w2: use climb"):
        check_drop(tree.manifest, "w2", "w4")
    for check in (check_climb, check_drop):
        with pytest.raises(BundleError, match="levels are w2, w3, w4"):
            check(tree.manifest, "w2", "w9")


def test_levels_that_are_not_comparable_can_be_climbed_across(tmp_path: Path) -> None:
    manifest = make_tree(tmp_path).manifest
    low, middle, high = manifest.levels
    from dataclasses import replace

    mixed = replace(middle, tensors=(high.tensors[0], low.tensors[1]))
    other = replace(manifest, levels=(low, mixed, replace(middle, name="other")))
    assert check_climb(other, "w3", "other").name == "other"
    with pytest.raises(BundleError, match="use climb"):
        check_drop(other, "w3", "other")
