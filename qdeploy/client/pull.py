"""Pull, climb and drop: how a device folder comes to a level of a ladder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qdeploy.bundle.manifest import Manifest, is_below, manifest_bytes
from qdeploy.bundle.store import Join, verify_parts
from qdeploy.client.artifact import artifact_folder, choose_artifact, describe, unpack_artifact
from qdeploy.client.evict import check_quota
from qdeploy.client.fetch import GoneError, Pace, Patience
from qdeploy.client.forecast import Forecast, missing_bytes
from qdeploy.client.mirrors import Mirrors
from qdeploy.client.offer import Offer, signed_offer, unsigned_offer
from qdeploy.client.plan import Extent, Layout, check_climb, check_drop, piece_kinds
from qdeploy.client.receive import Echo, Progress, Tally, fetch_missing, reuse, settle
from qdeploy.client.report import PullReport, make_report
from qdeploy.client.settings import Settings, new_settings, read_settings, signed, write_settings
from qdeploy.client.state import Current, DeviceFolder, FolderWriter, open_choice, write_folder
from qdeploy.client.trust import install_root
from qdeploy.errors import BundleError, DeviceError, TrustError
from qdeploy.files import read_bytes

__all__ = ["Choice", "PullReport", "climb", "drop", "levels_within", "open_choice", "pull"]


@dataclass(frozen=True)
class Asked:
    """What a pull was asked for; None leaves it as it was, or to the rollout."""

    level: str | None = None
    target: str | None = None
    model: str | None = None
    channel: str | None = None
    quota: int | None = None


def verify_level(
    folder: DeviceFolder, manifest: Manifest, level: str, artifact: int | None, join: Join | None = None
) -> None:
    """Read a level from disk, a tensor at a time, and unpack the artifact unless `join` is from it: it runs then.

    Raises BundleError when the digest is not the manifest's.
    """
    read = folder.reader(manifest)
    verify_parts(manifest, level, read, join)
    if artifact is not None and join is None:
        unpack_artifact(folder.path, manifest, artifact, read)


def may_run(manifest: Manifest, level: str, minimum: str | None) -> bool:
    """Whether a level reaches the signed minimum. One that the release does not know was signed for another release."""
    if minimum is None or minimum not in [entry.name for entry in manifest.levels]:
        return True
    return is_below(manifest.level(minimum), manifest.level(level))


def check_minimum(manifest: Manifest, level: str, minimum: str | None) -> None:
    """Raise TrustError for a level below the signed minimum."""
    if not may_run(manifest, level, minimum):
        text = f"level {level} is below the minimum {minimum} that was signed for {manifest.model}"
        raise TrustError(f"{text}: choose that one or a higher one")


# --- pull ------------------------------------------------------------------------------------------------------------


def _check_trust(folder: Path, root: Path | None, unsigned: bool) -> None:
    """Pin a root at first contact; raise TrustError unless it is clear whether releases are signed."""
    if root is not None:
        if unsigned:
            raise TrustError("--root and --unsigned exclude each other: with a root, only what is signed is taken")
        install_root(folder, read_bytes(root, "the root metadata", TrustError))
    elif unsigned and signed(folder):
        raise TrustError(f"{folder} has a root of trust and takes only what is signed: leave out --unsigned")
    elif not unsigned and not signed(folder):
        hint = "give --root FILE with the publisher's root.json, or --unsigned for a tree that nobody signed"
        raise TrustError(f"{folder} has no root of trust yet: {hint}")


def _settings(folder: Path, urls: Sequence[str], asked: Asked) -> Settings:
    found = read_settings(folder) or new_settings()
    given = {name: getattr(asked, name) for name in ("model", "channel", "quota") if getattr(asked, name) is not None}
    return replace(found, mirrors=tuple(urls), **given)


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


def _level(manifest: Manifest, asked: Asked, settings: Settings, held: tuple[Current, Manifest] | None) -> str:
    """The level to bring the device to: asked for, wanted by the rollout, in force, or the lowest that may run."""
    wanted = settings.wanted if settings.wanted_release == manifest.release else None
    if level := asked.level or wanted:
        check_minimum(manifest, manifest.level(level).name, settings.minimum)
        return level
    names = [entry.name for entry in manifest.levels]
    for name in (*([] if held is None else [held[0].level]), *names):
        if name in names and may_run(manifest, name, settings.minimum):
            return name
    raise TrustError(f"no level of {manifest.model} reaches the signed minimum {settings.minimum}: publish again")


def _other_manifests(folder: DeviceFolder, digest: str) -> dict[str, Manifest]:
    """Other releases that the folder knows, by digest."""
    found = {}
    for path in sorted(folder.path.glob("manifests/*.json")):
        if path.stem != digest:
            try:
                found[path.stem] = folder.manifest(path.stem)
            except BundleError:  # a damaged one is of no use
                continue
    return found


def _room_for_artifact(folder: DeviceFolder, manifest: Manifest, artifact: int | None) -> int:
    """Bytes that unpacking the artifact takes beside its pieces."""
    if artifact is None or (folder.path / artifact_folder(manifest, artifact)).is_dir():
        return 0
    return sum(manifest.pieces[piece].raw for _, piece in manifest.artifacts[artifact].files)


def _bring(
    writer: FolderWriter, mirrors: Mirrors, offer: Offer, level: str, artifact: int | None, settings: Settings,
    tally: Tally, echo: Echo | None, progress: Progress | None, join: Join | None = None,
) -> None:  # fmt: skip
    """Everything of a level onto the disk, verified; nothing is put in force."""
    kinds = piece_kinds(offer.manifest, level, artifact)
    layout = Layout(offer.manifest, kinds)
    settle(writer, layout, echo)
    more = _room_for_artifact(writer, offer.manifest, artifact) + len(offer.fresh or b"")
    check_quota(writer, offer.manifest, layout, settings.quota, more)
    if offer.fresh is not None:
        writer.save_manifest(offer.digest, offer.fresh)
    if layout.missing_bytes(writer.held):
        tally.reused += reuse(writer, layout, _other_manifests(writer, offer.digest))
    fetch_missing(writer, mirrors, layout, kinds, tally, progress)
    verify_level(writer, offer.manifest, level, artifact, join)


def pull(
    url: str | Sequence[str],
    folder: Path,
    level: str | None = None,
    target: str | None = None,
    echo: Echo | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
    *,
    root: Path | None = None,
    unsigned: bool = False,
    model: str | None = None,
    channel: str | None = None,
    quota: int | None = None,
    rate: float | None = None,
) -> PullReport:
    """Bring `folder` to a level of the release that the mirrors `url` publish for it now, and put it in force. Resumes,
    mends damage, takes from releases on disk what is equal there.

    `root` is the publisher's root metadata, pinned at the first pull; later ones leave it out. `unsigned` reads
    release.json of a tree that nobody signed, and must be said each time. Without `level`: the one that the signed
    rollout wants, else the level in force if the release has it, else the lowest that may run. `target` names the
    hardware class whose compiled artifact is fetched (default: the one named before, else the one that suits this
    machine). Side tensors of all levels below come too, so that a drop costs nothing. `model`, `channel` and `quota`
    (bytes that the folder may take) are remembered; `rate` caps bytes a second.

    Raises TrustError (unsigned, replayed, below the signed minimum), FetchError (what was verified is kept),
    BundleError (unknown level, damaged or swapped files, an older release), DeviceError (full disk, quota, folder
    locked); the level in force is then unchanged, and no folder is made for a level or hardware class that an unsigned
    release lacks.
    """
    folder, urls = Path(folder), [url] if isinstance(url, str) else list(url)
    asked, tally = Asked(level, target, model, channel, quota), Tally()
    _check_trust(folder, root, unsigned)
    with ExitStack() as stack:
        mirrors = stack.enter_context(Mirrors(urls, patience, Pace(rate)))
        settings = _settings(folder, urls, asked)
        if unsigned:
            offer = unsigned_offer(DeviceFolder(folder), mirrors, tally)
            _check_asked(offer.manifest, asked)
            if echo is not None:
                echo("nothing is signed: whoever controls the server or the line chooses what runs here")
            writer = stack.enter_context(write_folder(folder, create=True))
            held = _held_choice(writer)
        else:
            writer = stack.enter_context(write_folder(folder))
            write_settings(folder, settings)
            held = _held_choice(writer)
            known = None if held is None else (held[0].manifest, held[1])
            offer, settings = signed_offer(writer, mirrors, settings, known, _target(asked, held), tally)
            _check_asked(offer.manifest, asked)
        if held is not None:
            _check_successor(writer, held[1], offer.manifest)
        write_settings(folder, settings)
        chosen = _level(offer.manifest, asked, settings, held)
        target = _known_target(offer.manifest, asked, held)
        artifact, why = choose_artifact(offer.manifest, target)
        try:
            _bring(writer, mirrors, offer, chosen, artifact, settings, tally, echo, progress)
        except GoneError as e:
            raise GoneError(f"{e}; the published tree is incomplete or was just replaced: try again") from e
        finally:
            tally.count(mirrors)
        settings = replace(settings, received=settings.received + mirrors.received)
        write_settings(folder, settings)
        writer.activate(Current(urls[0], offer.digest, chosen, artifact, target))
    return make_report(offer.manifest, chosen, artifact, why, offer.size, tally, settings, not unsigned, level)


def _target(asked: Asked, held: tuple[Current, Manifest] | None) -> str | None:
    """The hardware class asked for, now or before."""
    return asked.target or (None if held is None else held[0].target)


def _check_asked(manifest: Manifest, asked: Asked) -> None:
    """Raise BundleError for a level or a hardware class that the release lacks, before anything is fetched."""
    if asked.level is not None:
        manifest.level(asked.level)
    if asked.target is not None:
        choose_artifact(manifest, asked.target)


def foresee_pull(
    url: str | Sequence[str],
    folder: Path,
    level: str | None = None,
    target: str | None = None,
    patience: Patience | None = None,
    *,
    root: Path | None = None,
    unsigned: bool = False,
    model: str | None = None,
    channel: str | None = None,
    rate: float | None = None,
) -> Forecast:
    """What `pull` would fetch: metadata is fetched and verified in a copy of the folder's, `folder` stays as it is.

    Raises what `pull` does before it fetches an object.
    """
    real, urls = DeviceFolder(Path(folder)), [url] if isinstance(url, str) else list(url)
    asked, tally = Asked(level, target, model, channel), Tally()
    with ExitStack() as stack:
        copy = DeviceFolder(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qdeploy-"))))
        for name in ("trust", "manifests", "current.json", "device.json"):
            source = real.path / name
            if source.is_dir():
                shutil.copytree(source, copy.path / name)
            elif source.exists():
                shutil.copy2(source, copy.path / name)
        _check_trust(copy.path, root, unsigned)
        mirrors = stack.enter_context(Mirrors(urls, patience, Pace(rate)))
        settings, held = _settings(copy.path, urls, asked), _held_choice(copy)
        if unsigned:
            offer = unsigned_offer(copy, mirrors, tally)
        else:
            known = None if held is None else (held[0].manifest, held[1])
            offer, settings = signed_offer(copy, mirrors, settings, known, _target(asked, held), tally)
        _check_asked(offer.manifest, asked)
        if held is not None:
            _check_successor(real, held[1], offer.manifest)
        chosen = _level(offer.manifest, asked, settings, held)
        artifact, _ = choose_artifact(offer.manifest, _known_target(offer.manifest, asked, held))
        others = _other_manifests(copy, offer.digest).values()
    missing, reused = missing_bytes(offer.manifest, chosen, artifact, real.journal(), others)
    return _forecast(offer.manifest, chosen, not unsigned, artifact, missing, reused, tally.fetched["manifest"])


def _forecast(
    manifest: Manifest, level: str, is_signed: bool, artifact: int | None, missing: dict[str, int], reused: int,
    metadata: int,
) -> Forecast:  # fmt: skip
    name = None if artifact is None else describe(manifest.artifacts[artifact])
    return Forecast(manifest.model, manifest.release, level, is_signed, name, missing, reused, metadata)


def _known_target(manifest: Manifest, asked: Asked, held: tuple[Current, Manifest] | None) -> str | None:
    """The hardware class asked for now, or before and still in the release."""
    target = _target(asked, held)
    if asked.target is None and target not in [describe(a) for a in manifest.artifacts]:
        return None
    return target


# --- climb and drop --------------------------------------------------------------------------------------------------


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


def _choice(folder: DeviceFolder, current: Current, manifest: Manifest, to: str, tally: Tally) -> Choice:
    settings = read_settings(folder.path) or new_settings()
    size, is_signed = len(manifest_bytes(manifest)), signed(folder.path)
    report = make_report(manifest, to, current.artifact, None, size, tally, settings, is_signed, to)
    return Choice(folder.path, current, manifest, to, report)


def prepare_climb(
    folder: Path,
    to: str,
    echo: Echo | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
    rate: float | None = None,
    join: Join | None = None,
) -> Choice:
    """Fetch what level `to` lacks, from the mirrors on record and of the release held; nothing is put in force.

    `join`: that of the artifact in force, which then is not unpacked again.
    """
    tally = Tally()
    with write_folder(folder) as writer:
        current, manifest = open_choice(writer)
        check_climb(manifest, current.level, to)
        settings = read_settings(folder) or new_settings()
        check_minimum(manifest, to, settings.minimum)
        urls = settings.mirrors or (current.url,)
        with Mirrors(urls, patience, Pace(rate)) as mirrors:
            offer = Offer(current.manifest, manifest, None, 0)
            try:
                _bring(writer, mirrors, offer, to, current.artifact, settings, tally, echo, progress, join)
            except GoneError as e:
                again = f"run `qdeploy pull {' '.join(urls)} {folder} --level {to}` to take the current release"
                raise GoneError(f"the server no longer has release {manifest.release} ({e}): {again}") from e
            if mirrors.received:
                write_settings(folder, replace(settings, received=settings.received + mirrors.received))
        return _choice(writer, current, manifest, to, tally)


def prepare_drop(folder: Path, to: str, join: Join | None = None) -> Choice:
    """Check that level `to` is below the level in force and intact on disk. Touches no network; `join` as above."""
    device = DeviceFolder(folder)
    current, manifest = open_choice(device)
    check_drop(manifest, current.level, to)
    settings = read_settings(device.path)
    check_minimum(manifest, to, settings.minimum if settings is not None else None)
    verify_level(device, manifest, to, current.artifact, join)
    return _choice(device, current, manifest, to, Tally())


def climb(
    folder: Path,
    to: str,
    echo: Echo | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
    rate: float | None = None,
) -> PullReport:
    """Go up (or across) to level `to` of the release that `folder` holds; fetches only what is missing.

    Raises BundleError (unknown level, or one below: that is a drop), and as `pull`.
    """
    return prepare_climb(folder, to, echo, progress, patience, rate).commit()


def foresee_climb(folder: Path, to: str) -> Forecast:
    """What `climb` would fetch, by the manifest that the folder holds. Raises what `climb` does before it fetches."""
    device = DeviceFolder(Path(folder))
    current, manifest = open_choice(device)
    check_climb(manifest, current.level, to)
    settings = read_settings(device.path)
    check_minimum(manifest, to, settings.minimum if settings is not None else None)
    others = _other_manifests(device, current.manifest).values()
    missing, reused = missing_bytes(manifest, to, current.artifact, device.journal(), others)
    return _forecast(manifest, to, signed(device.path), current.artifact, missing, reused, 0)


def drop(folder: Path, to: str) -> PullReport:
    """Go down to level `to`: no bytes and no network. Planes stay on disk, so climbing back costs nothing either.

    Raises BundleError when the level is unknown, not below the current one, or damaged on disk; TrustError when it is
    below the signed minimum.
    """
    return prepare_drop(folder, to).commit()


def levels_within(manifest: Manifest, held: Iterable[Extent]) -> list[str]:
    """Levels whose pieces the extents `held` cover, in fetch order."""
    have = set(held)
    names = [level.name for level in manifest.levels]
    return [name for name in names if Layout(manifest, piece_kinds(manifest, name, None)).complete(have)]
