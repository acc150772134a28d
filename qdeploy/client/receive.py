"""Receiving pieces: cut the stream into units, verify each, make it durable, record it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.store import object_name
from qdeploy.client.fetch import Source
from qdeploy.client.plan import KINDS, Download, Extent, Unit, downloads, piece_extent
from qdeploy.client.state import FolderWriter
from qdeploy.errors import BundleError
from qdeploy.files import sha256

Echo = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

COMMIT_BYTES = 1 << 18  # what a crash may cost at most, besides the unit in flight
COMMIT_S = 1.0


@dataclass
class Tally:
    """Running counts of one command: verified bytes by kind, requests, bytes that came for nothing."""

    fetched: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*KINDS, "manifest"), 0))
    requests: int = 0
    skipped: int = 0


class _Receiver:
    """Cuts what arrives for one object into units, verifies them and hands them to the folder."""

    def __init__(self, folder: FolderWriter, manifest: Manifest, download: Download, url: str) -> None:
        self.folder, self.manifest, self.url = folder, manifest, url
        self.object = manifest.objects[download.object].sha256
        self.units = list(download.units)
        self.buffer = bytearray()
        self.uncommitted = 0
        self.committed_at = time.monotonic()

    def take(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            unit = self.units[0]
            want = unit.stop - unit.start - len(self.buffer)
            self.buffer += view[:want]
            view = view[want:]
            if len(self.buffer) == unit.stop - unit.start:
                self._keep(unit)
                self.units.pop(0)
                self.buffer = bytearray()

    def _keep(self, unit: Unit) -> None:
        if unit.sha256 is not None:
            if sha256(bytes(self.buffer)) != unit.sha256:
                raise self._wrong(unit.start, unit.stop)
            self.folder.note(Extent(self.object, unit.start, unit.stop, unit.sha256))
        self.folder.put(self.object, unit.start, self.buffer)
        whole = piece_extent(self.manifest, unit.piece)
        if unit.last and (unit.start, unit.stop) != (whole.start, whole.stop):
            if not self.folder.intact(whole):
                raise self._wrong(whole.start, whole.stop)
            self.folder.note(whole)
        self.uncommitted += len(self.buffer)
        if self.uncommitted >= COMMIT_BYTES or time.monotonic() - self.committed_at > COMMIT_S:
            self.folder.commit()
            self.uncommitted, self.committed_at = 0, time.monotonic()

    def _wrong(self, start: int, stop: int) -> BundleError:
        return BundleError(
            f"object {self.object} from {self.url} is not what the manifest names in bytes {start}..{stop}: it was "
            f"damaged or swapped there; publish the release again, then run the same command"
        )


def _receive(
    folder: FolderWriter,
    source: Source,
    manifest: Manifest,
    todo: list[Download],
    progress: Progress | None,
) -> None:
    total = sum(unit.stop - unit.start for download in todo for unit in download.units)
    done = 0
    for download in todo:
        pack = manifest.objects[download.object]
        receiver = _Receiver(folder, manifest, download, source.url)
        try:
            with closing(source.ranges(object_name(pack.sha256), pack.size, download.spans)) as chunks:
                for _, chunk in chunks:
                    receiver.take(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
        finally:
            folder.commit()


def fetch_pieces(
    folder: FolderWriter,
    source: Source,
    manifest: Manifest,
    kinds: Mapping[int, str],
    tally: Tally,
    echo: Echo | None,
    progress: Progress | None,
) -> None:
    """Bring every piece of `kinds` that is missing or damaged. Without any, no connection is made."""
    pieces = sorted(kinds)
    damaged = folder.heal(manifest, pieces)
    if damaged and echo is not None:
        echo(f"{len(damaged)} pieces are damaged on disk and are fetched again")
    todo = downloads(manifest, pieces, folder.held)
    requests, skipped = source.requests, source.skipped
    try:
        _receive(folder, source, manifest, todo, progress)
    finally:
        tally.requests += source.requests - requests
        tally.skipped += source.skipped - skipped
    for download in todo:
        for unit in download.units:
            tally.fetched[kinds[unit.piece]] += unit.stop - unit.start
