"""Pull, climb and drop: how a device folder comes to a level of a ladder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qdeploy.bundle.manifest import Manifest, manifest_bytes, parse_manifest, parse_release
from qdeploy.bundle.store import RELEASE_NAME, assemble, manifest_name
from qdeploy.bundle.tables import MAX_RELEASE
from qdeploy.client.artifact import choose_artifact, describe, unpack_artifact
from qdeploy.client.fetch import GoneError, Patience, Source
from qdeploy.client.plan import KINDS, Extent, check_climb, check_drop, piece_extent, piece_kinds
from qdeploy.client.receive import Echo, Progress, Tally, fetch_pieces
from qdeploy.client.state import PULL_AGAIN, Current, DeviceFolder, write_folder
from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import sha256


@dataclass(frozen=True)
class PullReport:
    """What one pull, climb or drop did. All sizes are coded bytes, as they cross the network.

    `fetched` and `held` map "planes", "side", "skeleton", "artifact" and "manifest" (with release.json) to bytes: what
    came this time, and what the folder holds of this level after it. `side_below` is the part of held side tensors that
    only lower levels need (it makes a drop free). `skipped` bytes crossed the network for nothing, because the server
    knows no ranges. `artifact` names the hardware class of the compiled artifact; without one, `no_artifact` says why.
    """

    model: str
    release: int
    level: str
    fetched: Mapping[str, int]
    held: Mapping[str, int]
    side_below: int
    requests: int
    skipped: int
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

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{kind} {size}" for kind, size in self.fetched.items() if size) or "nothing"
        text = [
            f"{self.model} release {self.release}, level {self.level}",
            f"fetched {self.total_fetched} bytes: {parts}",
            f"held {self.total_held} bytes, of which {self.side_below} let it drop to lower levels without a fetch",
        ]
        if self.skipped:
            text.append(f"the server knows no ranges: {self.skipped} bytes more were read and thrown away")
        if self.no_artifact:
            text.append(f"no compiled artifact was fetched ({self.no_artifact}): use --runtime ort")
        return text


def _report(
    manifest: Manifest, level: str, artifact: int | None, why: str | None, size: int, tally: Tally
) -> PullReport:
    kinds = piece_kinds(manifest, level, artifact)
    held = dict.fromkeys(KINDS, 0) | {"manifest": size}
    for piece, kind in kinds.items():
        held[kind] += manifest.pieces[piece].size
    own = manifest.level(level).side
    below = sum(manifest.pieces[p].size for p, kind in kinds.items() if kind == "side" and p != own)
    name = describe(manifest.artifacts[artifact]) if artifact is not None else None
    return PullReport(
        manifest.model, manifest.release, level, tally.fetched, held, below, tally.requests, tally.skipped, name, why
    )


def verify_level(folder: DeviceFolder, manifest: Manifest, level: str, artifact: int | None) -> None:
    """Assemble a level from disk and unpack the artifact; raises BundleError when the digest is not the manifest's."""
    read = folder.reader(manifest)
    assemble(manifest, level, read)
    if artifact is not None:
        unpack_artifact(folder.path, manifest, artifact, read)


# --- the three commands ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Offer:
    """The server's current release: its manifest's digest, the manifest, its bytes unless the folder has them, and the
    size of these bytes."""

    digest: str
    manifest: Manifest
    fresh: bytes | None
    size: int


def _offer(folder: DeviceFolder, source: Source, tally: Tally) -> _Offer:
    """What the server publishes now; nothing is written."""
    head = source.small(RELEASE_NAME, MAX_RELEASE)
    release = parse_release(head)
    tally.fetched["manifest"] += len(head)
    fresh = None
    try:
        manifest = folder.manifest(release.sha256)
    except BundleError:
        fresh = source.small(manifest_name(release.sha256), release.size)
        tally.fetched["manifest"] += len(fresh)
        if len(fresh) != release.size or sha256(fresh) != release.sha256:
            text = f"the manifest from {source.url} is not the one that its release.json names"
            raise BundleError(f"{text}: it was damaged or swapped there; publish the release again") from None
        manifest = parse_manifest(fresh)
    if manifest.release != release.release:
        numbers = f"{release.release} and {manifest.release}"
        raise BundleError(f"release.json and its manifest differ in the release number ({numbers}): publish again")
    tally.requests = source.requests
    return _Offer(release.sha256, manifest, fresh, release.size)


def _check_asked(manifest: Manifest, level: str | None, target: str | None) -> None:
    """Raise BundleError for a level or a hardware class that the release lacks, before a folder is made for it."""
    if level is not None:
        manifest.level(level)
    if target is not None:
        choose_artifact(manifest, target)


def _held_choice(folder: DeviceFolder) -> tuple[Current, Manifest] | None:
    """The choice in force and its manifest; None when there is none or they are damaged, which a pull mends."""
    try:
        current = folder.current()
        return None if current is None else (current, folder.manifest(current.manifest))
    except BundleError:
        return None


def _check_successor(folder: DeviceFolder, held: Manifest, offered: Manifest) -> None:
    if held.model != offered.model:
        hint = "choose another folder"
        raise BundleError(f"{folder.path} holds {held.model}, the server has {offered.model}: {hint}")
    if offered.release < held.release:
        text = f"the server offers release {offered.release}, {folder.path} holds the newer {held.release}"
        raise BundleError(f"{text}: ask its publisher, or pull into another folder")


def pull(
    url: str,
    folder: Path,
    level: str | None = None,
    target: str | None = None,
    echo: Echo | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> PullReport:
    """Bring `folder` to `level` of the release that `url` publishes now, and put it in force. Resumes, mends damage.

    Without `level`: the level in force if the release has it, else the lowest. `target` names the hardware class whose
    compiled artifact is fetched (default: the one named before, else the one that suits this machine). Side tensors of
    all levels below come too, so that a drop costs nothing. Raises FetchError (what was verified is kept), BundleError
    (unknown level, damaged or swapped files, an older release), DeviceError (full disk, folder locked); the level in
    force is then unchanged, and no folder is made for a level or hardware class that the release lacks.
    """
    tally = Tally()
    with ExitStack() as stack:
        source = stack.enter_context(Source(url, patience))
        offer = _offer(DeviceFolder(folder), source, tally)
        manifest = offer.manifest
        _check_asked(manifest, level, target)
        writer = stack.enter_context(write_folder(folder, create=True))
        held = _held_choice(writer)
        if held is not None:
            _check_successor(writer, held[1], manifest)
        if level is None:
            names = [entry.name for entry in manifest.levels]
            level = held[0].level if held is not None and held[0].level in names else names[0]
        if target is None and held is not None and held[0].target in [describe(a) for a in manifest.artifacts]:
            target = held[0].target
        artifact, why = choose_artifact(manifest, target)
        kinds = piece_kinds(manifest, level, artifact)
        if offer.fresh is not None:
            writer.save_manifest(offer.digest, offer.fresh)
        try:
            fetch_pieces(writer, source, manifest, kinds, tally, echo, progress)
        except GoneError as e:
            raise GoneError(f"{e}; the published tree is incomplete or was just replaced: try again") from e
        verify_level(writer, manifest, level, artifact)
        writer.activate(Current(url, offer.digest, level, artifact, target))
    return _report(manifest, level, artifact, why, offer.size, tally)


@dataclass(frozen=True)
class Choice:
    """A level whose bytes are all held and verified, ready to be put in force."""

    folder: Path
    current: Current
    manifest: Manifest
    level: str
    report: PullReport

    def commit(self) -> PullReport:
        """Record the choice in the folder; DeviceError when another process changed it since."""
        with write_folder(self.folder) as writer:
            if writer.current() != self.current:
                raise DeviceError(f"another process changed {self.folder} meanwhile: run the same command again")
            writer.activate(replace(self.current, level=self.level))
        return self.report


def open_choice(folder: DeviceFolder) -> tuple[Current, Manifest]:
    """The choice in force and its manifest, both checked; raises BundleError."""
    current = folder.chosen()
    manifest = folder.manifest(current.manifest)
    manifest.level(current.level)
    if current.artifact is not None and not 0 <= current.artifact < len(manifest.artifacts):
        raise BundleError(f"current.json in {folder.path} names an artifact that is not there: {PULL_AGAIN}")
    return current, manifest


def prepare_climb(
    folder: Path,
    to: str,
    echo: Echo | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> Choice:
    """Fetch what level `to` lacks, from the URL on record and of the release that is held; nothing is put in force."""
    tally = Tally()
    with write_folder(folder) as writer:
        current, manifest = open_choice(writer)
        check_climb(manifest, current.level, to)
        kinds = piece_kinds(manifest, to, current.artifact)
        with Source(current.url, patience) as source:
            try:
                fetch_pieces(writer, source, manifest, kinds, tally, echo, progress)
            except GoneError as e:
                again = f"run `qdeploy pull {current.url} -o {folder} --level {to}` to take the current release"
                raise GoneError(f"the server no longer has release {manifest.release} ({e}): {again}") from e
        verify_level(writer, manifest, to, current.artifact)
        size = len(manifest_bytes(manifest))
    return Choice(Path(folder), current, manifest, to, _report(manifest, to, current.artifact, None, size, tally))


def prepare_drop(folder: Path, to: str) -> Choice:
    """Check that level `to` is below the level in force and intact on disk. Touches no network."""
    device = DeviceFolder(folder)
    current, manifest = open_choice(device)
    check_drop(manifest, current.level, to)
    verify_level(device, manifest, to, current.artifact)
    size = len(manifest_bytes(manifest))
    return Choice(Path(folder), current, manifest, to, _report(manifest, to, current.artifact, None, size, Tally()))


def climb(
    folder: Path,
    to: str,
    echo: Echo | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
) -> PullReport:
    """Go up (or across) to level `to` of the release that `folder` holds; fetches only what is missing.

    Raises BundleError (unknown level, or one below: that is a drop), and as `pull`.
    """
    return prepare_climb(folder, to, echo, progress, patience).commit()


def drop(folder: Path, to: str) -> PullReport:
    """Go down to level `to`: no bytes and no network. Planes stay on disk, so climbing back costs nothing either.

    Raises BundleError when the level is unknown, not below the current one, or damaged on disk.
    """
    return prepare_drop(folder, to).commit()


def levels_within(manifest: Manifest, held: Iterable[Extent]) -> list[str]:
    """Levels whose pieces are all among the extents `held`, in fetch order."""
    have = set(held)
    return [
        level.name
        for level in manifest.levels
        if all(piece_extent(manifest, piece) in have for piece in piece_kinds(manifest, level.name, None))
    ]
