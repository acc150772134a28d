"""What to fetch and in which order: pure functions of a manifest and of what is held already."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from qdeploy.bundle.manifest import LEAF_BYTES, Level, Manifest, is_below
from qdeploy.bundle.store import artifact_pieces, pieces_of
from qdeploy.client.fetch import Span
from qdeploy.errors import BundleError

KINDS = ("planes", "side", "skeleton", "artifact")


@dataclass(frozen=True, order=True)
class Extent:
    """Bytes `start` to `stop` of object `object` (its SHA-256), and the SHA-256 of these bytes."""

    object: str
    start: int
    stop: int
    sha256: str


@dataclass(frozen=True)
class Unit:
    """What one step of a download writes: bytes of one object, with their digest where the manifest has one.

    `piece` is the index of the piece that it belongs to; `last` says that this unit completes that piece.
    """

    start: int
    stop: int
    sha256: str | None
    piece: int
    last: bool


@dataclass(frozen=True)
class Download:
    """Units of one object, ascending; `spans` are the ranges to ask for."""

    object: int
    units: tuple[Unit, ...]

    @property
    def spans(self) -> list[Span]:
        """Adjacent units in one range each."""
        return coalesce((unit.start, unit.stop) for unit in self.units)


def coalesce(intervals: Iterable[tuple[int, int]]) -> list[Span]:
    """Ascending disjoint (start, stop) pairs -> as few spans, adjacent ones joined."""
    spans: list[Span] = []
    for start, stop in intervals:
        if spans and spans[-1].stop == start:
            spans[-1] = Span(spans[-1].start, stop)
        else:
            spans.append(Span(start, stop))
    return spans


def piece_kinds(manifest: Manifest, level: str, artifact: int | None) -> dict[int, str]:
    """{piece: kind} of everything that a device at `level` holds, in fetch order; a piece with two uses counts once."""
    sides = {entry.side for entry in manifest.levels}
    kinds = {}
    for piece in pieces_of(manifest, level):
        if piece == manifest.skeleton:
            kinds[piece] = "skeleton"
        elif piece in sides:
            kinds[piece] = "side"
        else:
            kinds[piece] = "planes"
    if artifact is not None:
        kinds = {piece: "artifact" for piece in artifact_pieces(manifest, artifact)} | kinds
    return dict(sorted(kinds.items()))


def piece_extent(manifest: Manifest, piece: int) -> Extent:
    """Where a piece lies."""
    entry = manifest.pieces[piece]
    return Extent(manifest.objects[entry.object].sha256, entry.offset, entry.offset + entry.size, entry.sha256)


def leaf_extents(manifest: Manifest, piece: int) -> list[Extent]:
    """The 64 KiB leaves that lie wholly inside a piece: they can be verified, kept and healed one by one."""
    entry = manifest.pieces[piece]
    pack = manifest.objects[entry.object]
    end = entry.offset + entry.size
    found = []
    for number in range(-(-entry.offset // LEAF_BYTES), len(pack.leaves)):
        start, stop = number * LEAF_BYTES, min((number + 1) * LEAF_BYTES, pack.size)
        if stop > end:
            break
        found.append(Extent(pack.sha256, start, stop, pack.leaves[number]))
    return found


def units_of(manifest: Manifest, piece: int, held: Container[Extent]) -> list[Unit]:
    """The units of a piece that are not in `held`. A piece without whole leaves is one unit.

    The ends of a larger piece have no digest of their own: they are verified with the whole piece.
    """
    whole = piece_extent(manifest, piece)
    if whole in held:
        return []
    leaves = leaf_extents(manifest, piece)
    if not leaves:
        return [Unit(whole.start, whole.stop, whole.sha256, piece, True)]
    rows: list[tuple[int, int, str | None]] = []
    if whole.start < leaves[0].start:
        rows.append((whole.start, leaves[0].start, None))
    rows += [(leaf.start, leaf.stop, leaf.sha256) for leaf in leaves if leaf not in held]
    if leaves[-1].stop < whole.stop:
        rows.append((leaves[-1].stop, whole.stop, None))
    if not rows:  # every leaf is there but not the record of the whole: the last leaf brings it
        rows.append((leaves[-1].start, leaves[-1].stop, leaves[-1].sha256))
    return [Unit(*row, piece, row is rows[-1]) for row in rows]


def downloads(manifest: Manifest, pieces: Sequence[int], held: Container[Extent]) -> list[Download]:
    """What is to be fetched for `pieces` (ascending), by object in fetch order."""
    by_object: dict[int, list[Unit]] = {}
    for piece in pieces:
        if units := units_of(manifest, piece, held):
            by_object.setdefault(manifest.pieces[piece].object, []).extend(units)
    return [Download(index, tuple(units)) for index, units in by_object.items()]


def check_climb(manifest: Manifest, current: str, to: str) -> Level:
    """The level `to`, unless it is below the current one (BundleError: that is a drop) or unknown (BundleError)."""
    low, high = manifest.level(current), manifest.level(to)
    if to != current and is_below(high, low) and not is_below(low, high):
        raise BundleError(f"level {to} is below the current level {current}: use drop")
    return high


def check_drop(manifest: Manifest, current: str, to: str) -> Level:
    """The level `to`, if it is the current one or below it; BundleError otherwise."""
    high, low = manifest.level(current), manifest.level(to)
    if not is_below(low, high):
        raise BundleError(f"level {to} is not below the current level {current}: use climb")
    return low
