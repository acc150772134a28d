"""Receiving what a level needs: verify each leaf, make it durable, record it, and take what is on disk already."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.store import object_name
from qdeploy.client.fetch import Source
from qdeploy.client.mirrors import Mirrors
from qdeploy.client.plan import KINDS, Download, Extent, Layout, Unit, piece_extent, within
from qdeploy.client.state import FolderWriter
from qdeploy.errors import BundleError, FetchError
from qdeploy.files import sha256

Echo = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

COMMIT_BYTES = 1 << 18  # what a power cut may cost at most, besides the leaf in flight
COMMIT_S = 1.0


@dataclass
class Tally:
    """Running counts of one command: verified bytes by kind, requests, body bytes in all, those of no use, bytes taken
    from another release on disk, mirrors set aside and why."""

    fetched: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*KINDS, "manifest"), 0))
    requests: int = 0
    received: int = 0
    skipped: int = 0
    reused: int = 0
    set_aside: dict[str, str] = field(default_factory=dict)

    def count(self, mirrors: Mirrors) -> None:
        """Take over what the mirrors counted."""
        self.requests, self.received, self.skipped = mirrors.requests, mirrors.received, mirrors.skipped
        self.set_aside = dict(mirrors.set_aside)


class _Receiver:
    """Cuts what arrives for one object into units, verifies them and hands them to the folder."""

    def __init__(self, folder: FolderWriter, source: Source, object_digest: str, units: tuple[Unit, ...]) -> None:
        self.folder, self.url, self.object = folder, source.url, object_digest
        self.units = list(units)
        self.buffer = bytearray()
        self.uncommitted = 0
        self.committed_at = time.monotonic()

    def take(self, chunk: bytes) -> bool:
        """Whether these bytes completed something that could be verified."""
        view, proved = memoryview(chunk), False
        while view:
            unit = self.units[0]
            want = unit.stop - unit.start - len(self.buffer)
            self.buffer += view[:want]
            view = view[want:]
            if len(self.buffer) == unit.stop - unit.start:
                self._keep(unit)
                proved |= bool(unit.proofs)
                self.units.pop(0)
                self.buffer = bytearray()
        return proved

    def _keep(self, unit: Unit) -> None:
        own = [proof for proof in unit.proofs if (proof.start, proof.stop) == (unit.start, unit.stop)]
        for proof in own:  # before the store sees them
            if sha256(memoryview(self.buffer)) != proof.sha256:
                raise self._wrong(proof)
        self.folder.put(self.object, unit.start, self.buffer)
        for proof in unit.proofs:
            if proof not in own and not self.folder.intact(proof):
                raise self._wrong(proof)
            self.folder.note(proof)
        self.uncommitted += len(self.buffer)
        if self.uncommitted >= COMMIT_BYTES or time.monotonic() - self.committed_at > COMMIT_S:
            self.folder.commit()
            self.uncommitted, self.committed_at = 0, time.monotonic()

    def _wrong(self, proof: Extent) -> BundleError:
        return BundleError(
            f"object {self.object} from {self.url} is not what the manifest names in bytes {proof.start}..{proof.stop}:"
            f" it was damaged or swapped there; publish the release again, then run the same command"
        )


def heal(folder: FolderWriter, layout: Layout) -> int:
    """Strike from the journal what is damaged on disk; the number of damaged extents."""
    struck = [
        extent
        for index in layout.objects
        for extent in layout.provable(index)
        if extent in folder.held and not folder.intact(extent)
    ]
    folder.strike(struck)
    return len(struck)


def adopt(folder: FolderWriter, layout: Layout) -> None:
    """Record what is right on disk and not on record: it was written before the process was killed, or the journal is
    lost. A digest says so, never a length."""
    for index in layout.objects:
        size = folder.object_size(layout.manifest.objects[index].sha256)
        gaps = layout.missing(index, folder.held) if size else []
        for extent in layout.provable(index) if gaps else ():
            if extent.stop <= size and within(gaps, extent.start, extent.stop) and folder.intact(extent):
                folder.note(extent)
    folder.commit()


def reuse(folder: FolderWriter, layout: Layout, others: Mapping[str, Manifest]) -> int:
    """Copy pieces that other releases in the folder have in other objects; the number of bytes."""
    found: dict[str, Extent] = {}
    for other in others.values():
        for extent in (piece_extent(other, number) for number in range(len(other.pieces))):
            found.setdefault(extent.sha256, extent)
    copied = 0
    for index in layout.objects:
        gaps = layout.missing(index, folder.held)
        for piece in layout.pieces(index) if gaps else ():
            source = found.get(piece.sha256)
            if source is None or source.object == piece.object or not within(gaps, piece.start, piece.stop):
                continue
            if (data := folder.verified_bytes(source)) is not None:
                folder.put(piece.object, piece.start, data)
                folder.note(piece)
                copied += len(data)
    folder.commit()
    return copied


def _attempt(folder: FolderWriter, mirrors: Mirrors, manifest: Manifest, download: Download) -> Iterator[int]:
    """Ask one mirror for what an object lacks; yields the bytes that came as they are taken."""
    pack, source = manifest.objects[download.object], mirrors.source()
    receiver = _Receiver(folder, source, pack.sha256, download.units)
    try:
        with closing(source.ranges(object_name(pack.sha256), pack.size, download.spans)) as chunks:
            for _, chunk in chunks:
                if receiver.take(chunk):
                    mirrors.verified()
                yield len(chunk)
    except FetchError as e:
        mirrors.failed(source, e)
    except BundleError as e:
        mirrors.wrong(source, e)
    finally:
        folder.commit()


def _by_kind(layout: Layout, kinds: Mapping[int, str], held: set[Extent]) -> dict[str, int]:
    """Missing bytes by kind of piece."""
    counts = dict.fromkeys(KINDS, 0)
    gaps = {index: layout.missing(index, held) for index in layout.objects}
    for piece, kind in kinds.items():
        entry = layout.manifest.pieces[piece]
        spans = within(gaps[entry.object], entry.offset, entry.offset + entry.size)
        counts[kind] += sum(span.stop - span.start for span in spans)
    return counts


def settle(folder: FolderWriter, layout: Layout, echo: Echo | None) -> None:
    """Make the journal say what is right on disk: strike damage, adopt the rest."""
    damaged = heal(folder, layout)
    if damaged and echo is not None:
        echo(f"{damaged} leaves are damaged on disk and are fetched again")
    adopt(folder, layout)


def fetch_missing(
    folder: FolderWriter,
    mirrors: Mirrors,
    layout: Layout,
    kinds: Mapping[int, str],
    tally: Tally,
    progress: Progress | None,
) -> None:
    """Bring what is missing after `settle`. When nothing is, no connection is made.

    Raises FetchError or BundleError when no mirror is left that can be asked; what was verified is kept.
    """
    before = _by_kind(layout, kinds, folder.held)
    total, done = layout.missing_bytes(folder.held), 0
    try:
        for index in layout.objects:
            while units := layout.units(index, folder.held):
                for count in _attempt(folder, mirrors, layout.manifest, Download(index, tuple(units))):
                    done += count
                    if progress is not None:
                        progress(min(done, total), total)
    finally:
        tally.count(mirrors)
        after = _by_kind(layout, kinds, folder.held)
        for kind in KINDS:
            tally.fetched[kind] += before[kind] - after[kind]
