"""What the mirrors publish for this device now: by signed metadata, or by an unsigned release.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qdeploy.bundle.manifest import Manifest, parse_manifest, parse_release
from qdeploy.bundle.store import RELEASE_NAME, manifest_name
from qdeploy.bundle.tables import MAX_RELEASE
from qdeploy.client.artifact import choose_artifact, describe
from qdeploy.client.fetch import GoneError, Source
from qdeploy.client.mirrors import Mirrors
from qdeploy.client.receive import Tally
from qdeploy.client.settings import Settings
from qdeploy.client.state import DeviceFolder
from qdeploy.client.trust import Trusted, refresh
from qdeploy.errors import BundleError, FetchError, TrustError
from qdeploy.files import sha256


@dataclass(frozen=True)
class Offer:
    """A release to take: its manifest's digest, the manifest, its bytes unless the folder has them, their number."""

    digest: str
    manifest: Manifest
    fresh: bytes | None
    size: int


Held = tuple[str, Manifest]  # digest and manifest of the release in force
Ask = Callable[[str | None], Trusted]  # hardware class -> what it is to run, of metadata that was fetched already


def _manifest(folder: DeviceFolder, mirrors: Mirrors, digest: str, size: int, tally: Tally) -> Offer:
    """The manifest of this digest, from the folder or from a mirror."""
    try:
        return Offer(digest, folder.manifest(digest), None, size)
    except BundleError:
        pass

    def ask(source: Source) -> bytes:
        data = source.small(manifest_name(digest), size)
        tally.fetched["manifest"] += len(data)
        if len(data) != size or sha256(data) != digest:
            text = f"the manifest from {source.url} is not the one that its release names"
            raise BundleError(f"{text}: it was damaged or swapped there; publish the release again")
        return data

    data = mirrors.first(ask)
    return Offer(digest, parse_manifest(data), data, size)


def unsigned_offer(folder: DeviceFolder, mirrors: Mirrors, tally: Tally) -> Offer:
    """What release.json names; nothing is written."""

    def ask(source: Source) -> bytes:
        data = source.small(RELEASE_NAME, MAX_RELEASE)
        tally.fetched["manifest"] += len(data)
        parse_release(data)
        return data

    release = parse_release(mirrors.first(ask))
    offer = _manifest(folder, mirrors, release.sha256, release.size, tally)
    if offer.manifest.release != release.release:
        numbers = f"{release.release} and {offer.manifest.release}"
        raise BundleError(f"release.json and its manifest differ in the release number ({numbers}): publish again")
    return offer


def _remembering(source: Source, tally: Tally) -> Callable[[str, int], bytes]:
    """Small files of a mirror, each asked for once."""
    known: dict[str, bytes | GoneError] = {}

    def fetch(path: str, limit: int) -> bytes:
        if path not in known:
            try:
                known[path] = data = source.small(path, limit)
                tally.fetched["manifest"] += len(data)
            except GoneError as e:
                known[path] = e
        found = known[path]
        if isinstance(found, GoneError):
            raise found
        return found

    return fetch


def _hear(folder: Path, mirrors: Mirrors, settings: Settings, tally: Tally) -> tuple[Trusted, Ask]:
    """What the first mirror says whose metadata is right and not out of date; else the first that is right."""
    late: tuple[Trusted, Ask] | None = None
    while True:
        source = mirrors.source()
        fetch = _remembering(source, tally)

        def ask(hardware: str | None, fetch: Callable[[str, int], bytes] = fetch) -> Trusted:
            return refresh(
                folder, fetch, model=settings.model, device_id=settings.id, channel=settings.channel, hardware=hardware
            )

        try:
            found = ask(None)
        except (FetchError, TrustError) as e:
            if late is not None and not mirrors.others(source):
                return late
            if isinstance(e, FetchError):
                mirrors.failed(source, e)
            else:
                mirrors.distrusted(source, e)
            continue
        mirrors.verified()
        if found.stale is None:
            return found, ask
        late = late or (found, ask)
        if not mirrors.others(source):
            return late
        mirrors.failed(source, FetchError(f"its metadata is out of date: {found.stale}"))


def signed_offer(
    folder: DeviceFolder, mirrors: Mirrors, settings: Settings, held: Held | None, target: str | None, tally: Tally
) -> tuple[Offer, Settings]:
    """What the signed rollout wants this device to run, and the settings with its policy.

    On hold, or when the metadata is out of date, that is the release in force. Raises TrustError when none is, and
    FetchError, BundleError, DeviceError.
    """
    trusted, ask = _hear(folder.path, mirrors, settings, tally)
    policy = replace(
        settings, model=trusted.model, minimum=trusted.minimum, wanted=trusted.level, hold=trusted.hold,
        stale=trusted.stale, wanted_release=trusted.release,
    )  # fmt: skip
    if (trusted.hold or trusted.stale) and (held is None or held[0] != trusted.manifest):
        if held is None:
            why = trusted.stale or f"release {trusted.release} of {trusted.model} is on hold"
            raise TrustError(f"nothing new is installed now ({why}): ask the publisher, or try again later")
        offer = Offer(held[0], held[1], None, trusted.size)
    else:
        offer = _manifest(folder, mirrors, trusted.manifest, trusted.size, tally)
        if (offer.manifest.model, offer.manifest.release) != (trusted.model, trusted.release):
            text = f"the signed manifest is of {offer.manifest.model} release {offer.manifest.release}"
            raise TrustError(f"{text}, the rollout says {trusted.model} release {trusted.release}: publish again")
    index, _ = choose_artifact(offer.manifest, target)
    if index is not None:
        policy = replace(policy, wanted=ask(describe(offer.manifest.artifacts[index])).level)
    return offer, policy
