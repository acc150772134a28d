"""Publish a bundle as a signed release, change who runs what, and keep the timestamp fresh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Metadata, Targets

from qdeploy.bundle.manifest import Manifest, is_below, manifest_bytes, parse_manifest, parse_release
from qdeploy.bundle.rollout import Channels, Entry, Rollout, rollout_bytes, rollout_name
from qdeploy.bundle.store import RELEASE_NAME, load_tree, manifest_name, object_name
from qdeploy.bundle.tables import Release
from qdeploy.errors import BundleError, TrustError
from qdeploy.files import read_bytes, sha256
from qdeploy.trust.keys import KeyFolder
from qdeploy.trust.repository import TIMESTAMP_DAYS, Repository, State
from qdeploy.trust.storage import Storage


@dataclass(frozen=True)
class Wish:
    """What a publisher says about a channel; None leaves it as it is (of a new release: as the release before it).

    `levels` are changes: hardware class -> level, or an empty text to forget the class.
    """

    hold: bool | None = None
    minimum: str | None = None
    levels: Mapping[str, str] | None = None
    percent: int | None = None


@dataclass(frozen=True)
class Published:
    """What is in force now. `sent` counts bytes of objects and manifest that the place did not have."""

    model: str
    channel: str
    entry: Entry
    sent: int
    expires: datetime


@dataclass(frozen=True)
class Expiry:
    """When the metadata in force expires, by role. Devices report "stale" after the first of them."""

    timestamp: datetime
    targets: datetime
    root: datetime


# --- the rollout -----------------------------------------------------------------------------------------------------


def _check_levels(manifest: Manifest, entry: Entry) -> Entry:
    """The entry, if its levels are in the manifest and none lies below the minimum; BundleError otherwise."""
    low = None if entry.minimum is None else manifest.level(entry.minimum)
    for name, wanted in entry.levels.items():
        level = manifest.level(wanted)
        if low is not None and not is_below(low, level):
            raise BundleError(f"level {wanted} for {name} is not at or above the minimum {entry.minimum}")
    return entry


def _apply(entry: Entry, wish: Wish) -> Entry:
    """An entry after a wish."""
    levels = dict(entry.levels) | dict(wish.levels or {})
    return replace(
        entry,
        hold=entry.hold if wish.hold is None else wish.hold,
        minimum=wish.minimum or entry.minimum,
        levels={name: level for name, level in levels.items() if level},
        percent=wish.percent or entry.percent,
    )


def _with_canary(channels: Channels, entry: Entry) -> Channels:
    """A canary may only grow: who left it would go back to an older release, which devices refuse."""
    before = channels.canary
    if before is not None and (entry.percent or 0) < (before.percent or 0):
        text = f"{before.percent}% of the devices run release {before.release} already"
        raise BundleError(f"{text}: name that or more with --canary, or publish another release to all")
    return replace(channels, canary=entry)


def _published_manifest(storage: Storage, entry: Entry) -> bytes:
    data = storage.read(manifest_name(entry.sha256))
    if data is None or sha256(data) != entry.sha256:
        raise TrustError(f"manifest {entry.sha256} in {storage.name} is missing or damaged: restore it from a mirror")
    return data


# --- the commands ----------------------------------------------------------------------------------------------------


def _next_release(channels: Channels, model: str, asked: int | None) -> int:
    """The number after the highest; that one is always on a channel, since a release only gives way to a later one."""
    last = max(entry.release if entry is not None else 0 for entry in (channels.stable, channels.canary))
    if asked is not None and asked <= last:
        text = f"release {last} of {model} was published already, and a device never goes back to {asked}"
        raise TrustError(f"{text}: leave out --release to publish this bundle as release {last + 1}")
    return asked or last + 1


def _send(storage: Storage, bundle: Path, manifest: Manifest, data: bytes) -> int:
    """Objects that the place lacks, in fetch order, then the manifest; returns the bytes sent."""
    sent = 0
    for entry in manifest.objects:
        if not storage.holds(object_name(entry.sha256), entry.sha256, entry.size):
            content = read_bytes(bundle / object_name(entry.sha256), "the object", BundleError)
            if sha256(content) != entry.sha256:
                raise BundleError(f"object {entry.sha256} in {bundle} is damaged: make the bundle again")
            storage.write(object_name(entry.sha256), content)
            sent += len(content)
    name = manifest_name(sha256(data))
    if not storage.holds(name, sha256(data), len(data)):
        storage.write(name, data)
        sent += len(data)
    return sent


def publish(
    bundle: Path,
    storage: Storage,
    keys: KeyFolder,
    wish: Wish,
    release: int | None = None,
    days: float = TIMESTAMP_DAYS,
    now: datetime | None = None,
) -> Published:
    """Publish `bundle` as the next release of its model: to all devices, or to `wish.percent` of them as canaries.

    Objects that the place has are not sent again. Readers see the release before or this one whole, also when this
    process is killed at any point; what it left is used or overwritten by the next. Raises BundleError (damaged
    bundle, unknown level), TrustError (keys, release number), DeviceError (storage, another publisher).
    """
    bundle = Path(bundle)
    with storage.locked():
        repository = Repository(storage, keys, now)
        state = repository.read()
        manifest = load_tree(bundle)
        channels = state.rollout.get(manifest.model, Channels())
        manifest = replace(manifest, release=_next_release(channels, manifest.model, release))
        data = manifest_bytes(manifest)
        canary = wish.percent is not None
        known = (channels.canary, channels.stable) if canary else (channels.stable, channels.canary)
        before = known[0] or known[1] or Entry(0, "", 0)
        fresh = Entry(manifest.release, sha256(data), len(data), False, before.minimum, before.levels)
        entry = _check_levels(manifest, _apply(fresh, wish))
        channels = _with_canary(channels, entry) if canary else Channels(stable=entry)
        rollout = {**state.rollout, manifest.model: channels}
        targets = repository.sign_targets(state, rollout)
        pointer = None if canary else _pointer(repository, data, entry)
        sent = _send(storage, bundle, manifest, data)
        after = _put(repository, state, rollout, targets, days, pointer)
    return Published(manifest.model, "canary" if canary else "stable", entry, sent, after)


def _pointer(repository: Repository, data: bytes, entry: Entry) -> Release:
    return Release(entry.sha256, entry.size, entry.release, repository.manifest_signatures(data))


def _put(
    repository: Repository,
    state: State,
    rollout: Rollout,
    targets: Metadata[Targets],
    days: float,
    pointer: Release | None,
) -> datetime:
    """Write the rollout, then the metadata; returns when the timestamp expires."""
    data = rollout_bytes(rollout)
    repository.storage.write(rollout_name(sha256(data)), data)
    return repository.commit(state, targets, days, pointer)


def _named(state: State, model: str | None, where: str) -> str:
    """The model, which need not be named if there is one."""
    names = sorted(state.rollout)
    if model is None and len(names) == 1:
        return names[0]
    if model not in names:
        raise BundleError(f"name the model: {where} publishes {', '.join(names) or 'none'}")
    return str(model)


def change_rollout(
    storage: Storage,
    keys: KeyFolder,
    wish: Wish,
    model: str | None = None,
    promote: bool = False,
    days: float = TIMESTAMP_DAYS,
    now: datetime | None = None,
) -> Published:
    """Change a channel without a new release: hold it, widen the canary, set levels, or `promote` the canary to all.

    The canary is meant where there is one, else the stable channel. Errors as `publish`.
    """
    with storage.locked():
        repository = Repository(storage, keys, now)
        state = repository.read()
        model = _named(state, model, storage.name)
        channels = state.rollout[model]
        if channels.canary is None and (promote or wish.percent is not None):
            raise BundleError(f"{model} has no canary release: publish one with `qdeploy publish --canary`")
        entry = channels.canary or channels.stable
        if entry is None:
            raise BundleError(f"{model} has no release: publish one with `qdeploy publish`")
        data = _published_manifest(storage, entry)
        changed = _check_levels(parse_manifest(data), _apply(entry, wish))
        pointer = None
        if promote:
            changed = replace(changed, percent=None)
            channels, pointer = Channels(stable=changed), _pointer(repository, data, changed)
        elif channels.canary is not None:
            channels = _with_canary(channels, changed)
        else:
            channels = replace(channels, stable=changed)
        rollout = {**state.rollout, model: channels}
        after = _put(repository, state, rollout, repository.sign_targets(state, rollout), days, pointer)
    return Published(model, "canary" if channels.canary is not None else "stable", changed, 0, after)


def refresh(storage: Storage, keys: KeyFolder, days: float = TIMESTAMP_DAYS, now: datetime | None = None) -> Expiry:
    """Sign a new timestamp, and whatever replaced keys must sign again; returns when metadata expires.

    Needs the online key alone, unless the keys of targets were replaced. Targets metadata that expires soon is signed
    again where its keys are at hand.
    """
    with storage.locked():
        repository = Repository(storage, keys, now)
        state = repository.read()
        pointer = None
        if state.targets is None:
            raise TrustError(f"{storage.name} publishes nothing yet: run `qdeploy publish`")
        signed = repository.sign_targets(state, state.rollout) if repository.must_sign_targets(state) else None
        if signed is not None:
            pointer = _resigned_pointer(repository, state)
        after = repository.commit(state, signed, days, pointer)
    return Expiry(after, (signed or state.targets).signed.expires, keys.root.expires)


def _resigned_pointer(repository: Repository, state: State) -> Release | None:
    """release.json with new signatures. It is unsigned itself, so it must name a release that the rollout names."""
    data = repository.storage.read(RELEASE_NAME)
    if data is None:
        return None
    named = parse_release(data).sha256
    for channels in state.rollout.values():
        if channels.stable is not None and channels.stable.sha256 == named:
            return _pointer(repository, _published_manifest(repository.storage, channels.stable), channels.stable)
    raise TrustError(f"release.json in {repository.storage.name} names no stable release: restore it from a mirror")
