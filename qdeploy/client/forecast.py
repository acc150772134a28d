"""What a pull or climb would fetch, for a dry run: a verified manifest against what is on record; writes nothing."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qdeploy.bundle.manifest import Manifest
from qdeploy.client.plan import KINDS, Extent, Layout, piece_extent, piece_kinds, within


@dataclass(frozen=True)
class Forecast:
    """Bytes by kind that would come, those of them that another release on disk has, and bytes of metadata that came.

    Damage on disk is not looked for: what is damaged would be fetched as well.
    """

    model: str
    release: int
    level: str
    signed: bool
    artifact: str | None
    missing: Mapping[str, int]
    reused: int
    metadata: int

    @property
    def fetch(self) -> int:
        """Bytes that would cross the network."""
        return sum(self.missing.values()) - self.reused

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"fetch": self.fetch, "dry_run": True}

    def text(self) -> str:
        """For people."""
        parts = ", ".join(f"{kind} {size}" for kind, size in self.missing.items() if size) or "nothing is missing"
        lines = [f"{self.model} release {self.release}, level {self.level}{'' if self.signed else ' (UNSIGNED)'}"]
        lines.append(f"dry run: {self.fetch} bytes would be fetched: {parts}")
        if self.reused:
            lines.append(f"of which another release on disk has {self.reused} bytes")
        return "\n".join(lines)


def missing_bytes(
    manifest: Manifest, level: str, artifact: int | None, held: Container[Extent], others: Iterable[Manifest] = ()
) -> tuple[dict[str, int], int]:
    """({kind: bytes} of a level that `held` does not cover, how many of them `others`, releases on disk, have)."""
    kinds = piece_kinds(manifest, level, artifact)
    missing, reused = dict.fromkeys(KINDS, 0), 0
    on_disk = set[str]()
    for other in others:
        everything = Layout(other, range(len(other.pieces)))
        absent = {index: everything.missing(index, held) for index in everything.objects}
        for number, entry in enumerate(other.pieces):
            extent = piece_extent(other, number)
            if not within(absent[entry.object], extent.start, extent.stop):
                on_disk.add(extent.sha256)
    layout = Layout(manifest, kinds)
    gaps = {index: layout.missing(index, held) for index in layout.objects}
    for piece, kind in kinds.items():
        extent = piece_extent(manifest, piece)
        own = within(gaps[manifest.pieces[piece].object], extent.start, extent.stop)
        count = sum(span.stop - span.start for span in own)
        missing[kind] += count
        reused += count if extent.sha256 in on_disk else 0
    return missing, reused
