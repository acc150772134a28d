"""What a pull, climb or drop did, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdeploy.bundle.manifest import Manifest
from qdeploy.client import status
from qdeploy.client.artifact import describe
from qdeploy.client.plan import KINDS, piece_kinds
from qdeploy.client.receive import Tally
from qdeploy.client.settings import Settings, new_settings, read_settings


@dataclass(frozen=True)
class PullReport:
    """What one pull, climb or drop did. All sizes are coded bytes, as they cross the network.

    `level` is the one reached, `wanted` the one that was asked for or that the signed rollout wants; `wanted_release`
    is the rollout's release, which is not taken on `hold` or when `stale` says why the metadata is out of date.
    `signed` is False when nobody vouches for any of it; `minimum` is the signed minimum level.

    `fetched` and `held` map "planes", "side", "skeleton", "artifact" and "manifest" (with metadata) to bytes: what came
    this time, and what the folder holds of this level after it. `side_below` is the part of held side tensors that only
    lower levels need (it makes a drop free). `received` are all body bytes read, `skipped` those that crossed the
    network for nothing because the server knows no ranges, `reused` those that came from another release on disk.
    `set_aside` maps mirrors that are not asked any more to the reason. `artifact` names the hardware class of the
    compiled artifact; without one, `no_artifact` says why.
    """

    model: str
    release: int
    level: str
    wanted: str
    wanted_release: int
    stale: str | None
    hold: bool
    signed: bool
    minimum: str | None
    fetched: Mapping[str, int]
    held: Mapping[str, int]
    side_below: int
    requests: int
    received: int
    skipped: int
    reused: int
    set_aside: Mapping[str, str]
    artifact: str | None
    no_artifact: str | None

    @property
    def total_fetched(self) -> int:
        """Bytes that came this time."""
        return sum(self.fetched.values())

    @property
    def total_held(self) -> int:
        """Bytes that the level needs in all."""
        return sum(self.held.values())

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{kind} {size}" for kind, size in self.fetched.items() if size) or "nothing"
        text = [f"{self.model} release {self.release}, level {self.level}{'' if self.signed else ' (UNSIGNED)'}"]
        if (self.wanted, self.wanted_release) != (self.level, self.release):
            text.append(f"wanted: release {self.wanted_release}, level {self.wanted}")
        if self.stale is not None:
            text.append(f"stale: {self.stale}")
        if self.hold:
            text.append("the rollout is on hold: no other release is taken")
        text.append(f"fetched {self.total_fetched} bytes: {parts}")
        if self.reused:
            text.append(f"taken from another release on disk: {self.reused} bytes")
        text.append(
            f"held {self.total_held} bytes, of which {self.side_below} let it drop to lower levels without a fetch"
        )
        if self.skipped:
            text.append(f"the server knows no ranges: {self.skipped} bytes more were read and thrown away")
        text += [f"mirror {url} was set aside: {why}" for url, why in self.set_aside.items()]
        if self.no_artifact:
            text.append(f"no compiled artifact was fetched ({self.no_artifact}): use --runtime ort")
        return text


def tell(url: str, folder: Path, report: PullReport, token: str | None = None) -> str | None:
    """Send what a device folder runs now to the server at `url`; None, or one line that says why it was not taken."""
    settings = read_settings(folder) or new_settings()
    fields: dict[str, Any] = {"device": settings.id, "model": report.model, "target": report.artifact or "none"}
    fields |= {"channel": settings.channel, "release": report.release, "wanted": report.wanted, "reached": report.level}
    return status.report(url, fields | {"stale": report.stale is not None, "fetched": settings.received}, token=token)


def make_report(
    manifest: Manifest, level: str, artifact: int | None, why: str | None, size: int, tally: Tally,
    settings: Settings, signed: bool, asked: str | None,
) -> PullReport:  # fmt: skip
    """The report of a level that was reached; `size`: bytes of its manifest."""
    kinds = piece_kinds(manifest, level, artifact)
    held = dict.fromkeys(KINDS, 0) | {"manifest": size}
    for piece, kind in kinds.items():
        held[kind] += manifest.pieces[piece].size
    own = manifest.level(level).side
    below = sum(manifest.pieces[p].size for p, kind in kinds.items() if kind == "side" and p != own)
    name = describe(manifest.artifacts[artifact]) if artifact is not None else None
    return PullReport(
        model=manifest.model,
        release=manifest.release,
        level=level,
        wanted=(settings.wanted if signed else None) or asked or level,
        wanted_release=settings.wanted_release if signed and settings.wanted_release else manifest.release,
        stale=settings.stale if signed else None,
        hold=signed and settings.hold,
        signed=signed,
        minimum=settings.minimum if signed else None,
        fetched=tally.fetched,
        held=held,
        side_below=below,
        requests=tally.requests,
        received=tally.received,
        skipped=tally.skipped,
        reused=tally.reused,
        set_aside=tally.set_aside,
        artifact=name,
        no_artifact=why,
    )
