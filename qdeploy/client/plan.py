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
    """What one step of a download writes: bytes `start` to `stop` of one object.

    `proofs` are the extents that must have their digest once these bytes are in place. Nearly always that is one: the
    leaf that the unit is.
    """

    start: int
    stop: int
    proofs: tuple[Extent, ...]


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
    """Ascending (start, stop) pairs -> as few disjoint spans, those that touch or overlap joined."""
    spans: list[Span] = []
    for start, stop in intervals:
        if spans and spans[-1].stop >= start:
            spans[-1] = Span(spans[-1].start, max(stop, spans[-1].stop))
        else:
            spans.append(Span(start, stop))
    return spans


def subtract(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """What of `spans` lies in none of `taken`; both ascending and disjoint."""
    left, k = [], 0
    for span in spans:
        at = span.start
        while k < len(taken) and taken[k].stop <= at:
            k += 1
        for other in taken[k:]:
            if other.start >= span.stop:
                break
            if other.start > at:
                left.append(Span(at, other.start))
            at = max(at, other.stop)
        if at < span.stop:
            left.append(Span(at, span.stop))
    return left


def within(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of `spans` between `start` and `stop`."""
    return [Span(max(s.start, start), min(s.stop, stop)) for s in spans if s.start < stop and s.stop > start]


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


def leaf_extents(manifest: Manifest, index: int) -> list[Extent]:
    """The 64 KiB leaves of object number `index`, which can be verified, kept and healed one by one."""
    pack = manifest.objects[index]
    digests = pack.leaves or (pack.sha256,)  # an object of one leaf (FORMAT.md, Objects)
    starts = range(0, pack.size, LEAF_BYTES)
    return [
        Extent(pack.sha256, start, min(start + LEAF_BYTES, pack.size), digest)
        for start, digest in zip(starts, digests, strict=True)
    ]


class Layout:
    """Objects of a manifest with their extents: what can be verified, and what of it is there."""

    def __init__(self, manifest: Manifest, pieces: Iterable[int]) -> None:
        """`pieces`: those that are wanted."""
        self.manifest = manifest
        self._wanted: dict[int, list[Extent]] = {}
        for piece in sorted(pieces):
            self._wanted.setdefault(manifest.pieces[piece].object, []).append(piece_extent(manifest, piece))

    @property
    def objects(self) -> list[int]:
        """Objects with wanted pieces, in fetch order."""
        return sorted(self._wanted)

    def pieces(self, index: int) -> list[Extent]:
        """Wanted pieces of an object."""
        return self._wanted[index]

    def runs(self, index: int) -> list[Span]:
        """Wanted bytes of an object."""
        return coalesce((extent.start, extent.stop) for extent in self._wanted[index])

    def provable(self, index: int) -> list[Extent]:
        """Leaves that hold wanted bytes, and the wanted pieces."""
        runs = self.runs(index)
        leaves = [leaf for leaf in leaf_extents(self.manifest, index) if within(runs, leaf.start, leaf.stop)]
        return [*leaves, *(piece for piece in self._wanted[index] if piece not in leaves)]

    def missing(self, index: int, held: Container[Extent]) -> list[Span]:
        """Wanted bytes of an object that no extent in `held` covers."""
        covered = sorted((extent.start, extent.stop) for extent in self.provable(index) if extent in held)
        return subtract(self.runs(index), coalesce(covered))

    def units(self, index: int, held: Container[Extent]) -> list[Unit]:
        """The missing bytes of an object, cut so that each leaf is proved as soon as it is there.

        Bytes of a leaf that is not wanted as a whole are proved by their piece, once that is complete.
        """
        gaps, runs = self.missing(index, held), self.runs(index)
        rows: list[tuple[Span, list[Extent]]] = []
        loose: list[Extent] = []
        for leaf in leaf_extents(self.manifest, index) if gaps else ():
            parts = within(gaps, leaf.start, leaf.stop)
            if not parts:
                continue
            if within(runs, leaf.start, leaf.stop) == [Span(leaf.start, leaf.stop)]:
                rows += [(part, []) for part in parts]
                rows[-1][1].append(leaf)
                continue
            for piece in self._wanted[index]:
                own = within(parts, piece.start, piece.stop)
                rows += [(part, []) for part in own]
                if own and piece not in loose:
                    loose.append(piece)
        for piece in loose:
            last = max(k for k, (row, _) in enumerate(rows) if row.start < piece.stop and row.stop > piece.start)
            rows[last][1].append(piece)
        return [Unit(span.start, span.stop, tuple(proofs)) for span, proofs in rows]

    def complete(self, held: Container[Extent]) -> bool:
        """Whether `held` covers all that is wanted."""
        return not any(self.missing(index, held) for index in self.objects)

    def missing_bytes(self, held: Container[Extent]) -> int:
        """Bytes that are to be fetched."""
        return sum(span.stop - span.start for index in self.objects for span in self.missing(index, held))


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
