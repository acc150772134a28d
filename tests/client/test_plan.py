from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.bundle.manifest import LEAF_BYTES
from qdeploy.client.fetch import Span
from qdeploy.client.plan import (
    Extent,
    Layout,
    check_climb,
    check_drop,
    coalesce,
    leaf_extents,
    piece_extent,
    piece_kinds,
    subtract,
    within,
)
from qdeploy.errors import BundleError
from tests.client.tree import Tree, make_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    # pieces below, at and above the size of a leaf, whose ends lie inside leaves
    return make_tree(tmp_path_factory.mktemp("tree"), weights=(700_000, 300_000, 40), artifact_bytes=200_000)


def test_adjacent_intervals_are_one_span() -> None:
    assert coalesce([(0, 5), (5, 9), (10, 12), (12, 13)]) == [Span(0, 9), Span(10, 13)]
    assert coalesce([(0, 9), (2, 4), (3, 12)]) == [Span(0, 12)]
    assert coalesce([]) == []


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8)


@given(SPANS, SPANS)
def test_what_is_left_of_spans(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    whole, taken = (coalesce(sorted((start, start + size) for start, size in rows)) for rows in (a, b))
    points = [{i for span in spans for i in range(span.start, span.stop)} for spans in (whole, taken)]
    left = subtract(whole, taken)
    assert {i for span in left for i in range(span.start, span.stop)} == points[0] - points[1]
    assert all(x.stop <= y.start for x, y in zip(left, left[1:], strict=False))


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
    layout = Layout(tree.manifest, piece_kinds(tree.manifest, "w4", 0))
    for index, entry in enumerate(tree.manifest.objects):
        units = layout.units(index, set())
        assert coalesce((u.start, u.stop) for u in units) == [Span(0, entry.size)]
        assert [unit.proofs for unit in units] == [(leaf,) for leaf in leaf_extents(tree.manifest, index)]
    assert layout.missing_bytes(set()) == sum(entry.size for entry in tree.manifest.objects)


def test_leaves_fill_their_object(tree: Tree) -> None:
    for index, entry in enumerate(tree.manifest.objects):
        leaves = leaf_extents(tree.manifest, index)
        assert coalesce((leaf.start, leaf.stop) for leaf in leaves) == [Span(0, entry.size)]
        assert all(leaf.start % LEAF_BYTES == 0 for leaf in leaves)


@given(st.data())
def test_units_are_what_is_missing_and_each_byte_is_proved(tree: Tree, data: st.DataObject) -> None:
    """Any pieces wanted, any extents held: fetching the units in order ends with everything on record."""
    manifest = tree.manifest
    wanted = data.draw(st.sets(st.integers(0, len(manifest.pieces) - 1), min_size=1))
    layout = Layout(manifest, wanted)
    extents = [piece_extent(manifest, piece) for piece in range(len(manifest.pieces))]
    extents += [leaf for index in range(len(manifest.objects)) for leaf in leaf_extents(manifest, index)]
    held = data.draw(st.sets(st.sampled_from(extents)))
    before = set(held)
    for index in layout.objects:
        gaps, units = layout.missing(index, before), layout.units(index, before)
        assert coalesce((u.start, u.stop) for u in units) == gaps
        there = coalesce(sorted((e.start, e.stop) for e in layout.provable(index) if e in before))
        for unit in units:
            there = coalesce(sorted([*((s.start, s.stop) for s in there), (unit.start, unit.stop)]))
            for proof in unit.proofs:  # all of what it covers is on disk by now
                assert within(there, proof.start, proof.stop) == [Span(proof.start, proof.stop)]
                held.add(proof)
        assert layout.units(index, held) == []
    assert layout.complete(held) and not layout.missing_bytes(held)


def test_a_piece_that_shares_a_leaf_brings_no_byte_of_its_neighbour(tree: Tree) -> None:
    """A piece is wanted alone: the ends of its leaves are proved by the piece, the leaves inside by themselves."""
    manifest = tree.manifest
    big = max(range(len(manifest.pieces)), key=lambda i: manifest.pieces[i].size if manifest.pieces[i].offset else 0)
    whole, index = piece_extent(manifest, big), manifest.pieces[big].object
    assert whole.start % LEAF_BYTES and whole.stop - whole.start > 2 * LEAF_BYTES
    units = Layout(manifest, [big]).units(index, set())
    assert coalesce((u.start, u.stop) for u in units) == [Span(whole.start, whole.stop)]
    assert whole in units[-1].proofs and units[0].proofs == ()
    below = Layout(manifest, [big - 1, big]).units(index, {piece_extent(manifest, big - 1)})
    assert below[0].start == whole.start and below[0].proofs[0].start < whole.start  # its first leaf, with held bytes


def test_a_record_of_other_bytes_does_not_count(tree: Tree) -> None:
    layout, leaf = Layout(tree.manifest, [0]), leaf_extents(tree.manifest, 0)[0]
    assert layout.missing(0, {Extent(leaf.object, leaf.start, leaf.stop, "0" * 64)}) == layout.missing(0, set())


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
