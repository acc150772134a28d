"""Which release a device may run: TUF metadata, verified by python-tuf, and counters of our own beside it.

```
DIR/trust/root.json    the pinned root metadata: the one thing that a device must get over a channel it trusts
DIR/trust/state.json   counters that never fall, and the last rollout that was accepted; one atomic, durable file
DIR/trust/metadata/    python-tuf's cache; its writes are not durable, so nothing depends on it
```

python-tuf compares versions with the files of its cache, and takes any valid version when they are lost or torn. The
counters close that gap: they are durable before anything of a new release is taken. A counter binds as long as what
was signed then could still verify now. Once root metadata has replaced so many keys of a role that old signatures no
longer reach its threshold, its versions may start anew: so a fleet recovers from a thief who counted up to the limit
(TUF specification, 5.3.11).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.bundle.rollout import (
    MAX_ROLLOUT,
    METADATA,
    ROLLOUT_TARGET,
    Entry,
    Rollout,
    choose,
    parse_rollout,
    rollout_bytes,
    rollout_json,
    rollout_name,
    rollout_of,
)
from qdeploy.bundle.rollout import METADATA_LIMITS as LIMITS
from qdeploy.bundle.store import manifest_name
from qdeploy.bundle.tables import DIGEST
from qdeploy.client import disk as edge
from qdeploy.client.disk import sync_folder, write_file, writing
from qdeploy.client.fetch import GoneError
from qdeploy.errors import BundleError, FetchError, TrustError
from qdeploy.files import canonical_json, locked_folder, parse_json, read_bytes, sha256

if TYPE_CHECKING:
    from tuf.api.metadata import Role, Root
    from tuf.ngclient import Updater
    from tuf.ngclient.fetcher import FetcherInterface

FORMAT = "qdeploy-trust/1"
MAX_ROOTS = 1024  # root versions that are followed from the pinned one on
_Chosen = tuple[str, str, Entry]
Fetch = Callable[[str, int], bytes]  # (path below the tree's root, most bytes) -> the file; FetchError, GoneError


@dataclass(frozen=True)
class Trusted:
    """What the signed rollout wants this device to run. The caller still checks the manifest's digest and size.

    `minimum` is the level below which no level may be chosen, `level` the one wanted for its hardware class (None: the
    device's own choice). On `hold`, or when `stale` says why the metadata is out of date, keep running and install
    nothing new.
    """

    manifest: str
    size: int
    release: int
    model: str
    channel: str
    minimum: str | None
    level: str | None
    hold: bool
    stale: str | None


class _Expired(Exception):
    """Metadata is authentic but out of date."""


@dataclass(frozen=True)
class _Counter:
    """The highest version seen, and the keys that its role had then."""

    version: int
    keys: tuple[str, ...]

    def binds(self, role: Role) -> bool:
        """Could signatures of these keys still reach the role's threshold?"""
        return len(set(self.keys) & set(role.keyids)) >= role.threshold


@dataclass(frozen=True)
class _State:
    """`root` is the highest root version; `roles` and `releases` hold a counter for each other role and each model."""

    root: int = 0
    roles: Mapping[str, _Counter] | None = None
    releases: Mapping[str, _Counter] | None = None
    rollout: Rollout | None = None


# --- the folder ------------------------------------------------------------------------------------------------------


def _trust(folder: Path) -> Path:
    return Path(folder) / "trust"


def _counters_json(counters: Mapping[str, _Counter] | None) -> dict[str, Any]:
    return {name: [counter.version, list(counter.keys)] for name, counter in (counters or {}).items()}


def _counters(value: dict[str, Any]) -> dict[str, _Counter]:
    found = {name: _Counter(version, tuple(keys)) for name, (version, keys) in value.items()}
    if not all(type(c.version) is int and all(isinstance(key, str) for key in c.keys) for c in found.values()):
        raise ValueError("a counter is no number")
    return found


def _state_bytes(state: _State) -> bytes:
    value = {
        "releases": _counters_json(state.releases),
        "roles": _counters_json(state.roles),
        "rollout": None if state.rollout is None else rollout_json(state.rollout),
        "root": state.root,
    }
    return canonical_json({"format": FORMAT, "sha256": sha256(canonical_json(value)), "state": value})


def _read_state(folder: Path) -> _State:
    """The counters; TrustError when they are gone or damaged: without them a replay would go unnoticed."""
    path = _trust(folder) / "state.json"
    top = parse_json(read_bytes(path, "the device's counters", TrustError), str(path), TrustError)
    try:
        value = top["state"]
        if top["format"] != FORMAT or sha256(canonical_json(value)) != top["sha256"]:
            raise ValueError("its digest is wrong")
        rollout = None if value["rollout"] is None else rollout_of(value["rollout"])
        if type(value["root"]) is not int:
            raise ValueError("the version of root is no number")
        return _State(value["root"], _counters(value["roles"]), _counters(value["releases"]), rollout)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, BundleError) as e:
        hint = "pull into a new folder with the root metadata"
        raise TrustError(f"{path} is damaged ({e}), so a replayed release would go unnoticed: {hint}") from e


def has_root(folder: Path) -> bool:
    """True when root metadata was pinned in this device folder: only signed releases are then taken."""
    return (_trust(folder) / "root.json").exists()


def install_root(folder: Path, root: bytes) -> None:
    """Pin root metadata in a device folder; the same again changes nothing. Raises TrustError, DeviceError."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    trust = _trust(folder)
    if has_root(folder):
        if read_bytes(trust / "root.json", "the pinned root metadata", TrustError) != root:
            raise TrustError(f"{folder} trusts another root already: choose another folder")
        return
    try:
        metadata = Metadata[Root].from_bytes(root)
        metadata.verify_delegate(Root.type, metadata)
    except (RepositoryError, ValueError, TypeError) as e:
        raise TrustError(f"this is no root metadata that its own keys signed ({e}): take it from the publisher") from e
    if not (trust / "state.json").exists():
        write_file(trust / "state.json", _state_bytes(_State()))
    write_file(trust / "root.json", root)  # last: once it is there, the counters are too


def _make_durable(metadata: Path) -> None:
    """fsync every file of python-tuf's cache, then its folders."""
    for path in sorted(metadata.rglob("*.json")):
        fd = edge.disk.open(path, os.O_RDONLY)
        try:
            edge.disk.fsync(fd)
        finally:
            edge.disk.close(fd)
    for path in (metadata / "root_history", metadata, metadata.parent):
        sync_folder(path)


# --- verification ----------------------------------------------------------------------------------------------------


def _fetcher(fetch: Fetch) -> FetcherInterface:
    """python-tuf's view of `fetch`."""
    from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError
    from tuf.ngclient.fetcher import FetcherInterface

    class Fetcher(FetcherInterface):
        def download_bytes(self, url: str, max_length: int) -> bytes:
            try:
                data = fetch(url, max_length)
            except GoneError as e:
                raise DownloadHTTPError(str(e), 404) from e
            except FetchError as e:
                raise DownloadError(str(e)) from e
            if len(data) > max_length:
                raise DownloadLengthMismatchError(f"{url} has more than the {max_length} bytes that are allowed")
            return data

        def _fetch(self, url: str) -> Iterator[bytes]:
            yield self.download_bytes(url, max(LIMITS.values()))

    return Fetcher()


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """python-tuf's exceptions become ours: FetchError as it was, _Expired, or one line of TrustError."""
    from tuf.api import exceptions

    try:
        yield
    except exceptions.ExpiredMetadataError as e:
        raise _Expired(str(e)) from e
    except exceptions.UnsignedMetadataError as e:
        raise TrustError(f"wrong signature or too few: {e}; nothing was taken: ask the publisher") from e
    except exceptions.BadVersionNumberError as e:
        raise TrustError(f"old or mixed metadata (rollback, mix and match): {e}; nothing was taken") from e
    except exceptions.LengthOrHashMismatchError as e:
        raise TrustError(f"metadata files that do not belong together (mix and match): {e}; nothing was taken") from e
    except exceptions.RepositoryError as e:
        raise TrustError(f"malformed metadata: {e}; nothing was taken") from e
    except exceptions.DownloadError as e:
        if isinstance(e.__cause__, FetchError):
            raise e.__cause__ from None
        raise FetchError(str(e)) from e


def _open_updater(folder: Path, fetch: Fetch) -> Updater:
    from tuf.ngclient import Updater, UpdaterConfig

    metadata = _trust(folder) / METADATA
    with writing(metadata):
        metadata.mkdir(exist_ok=True)
        for leftover in (*metadata.glob("tmp*"), *metadata.parent.glob(".*.tmp")):  # of a process that was killed
            edge.disk.unlink(leftover)
        config = UpdaterConfig(
            max_root_rotations=MAX_ROOTS,
            root_max_length=LIMITS["root"],
            timestamp_max_length=LIMITS["timestamp"],
            snapshot_max_length=LIMITS["snapshot"],
            targets_max_length=LIMITS["targets"],
        )
        root = read_bytes(_trust(folder) / "root.json", "the pinned root metadata", TrustError)
        return Updater(str(metadata), METADATA, fetcher=_fetcher(fetch), config=config, bootstrap=root)


def _verified(folder: Path, now: datetime | None) -> tuple[Root, dict[str, int]]:
    """(root, {role: version}) of what python-tuf has just verified. Raises _Expired by the clock `now`."""
    from tuf.api.metadata import Metadata

    metadata = _trust(folder) / METADATA
    found = {name: Metadata.from_bytes((metadata / f"{name}.json").read_bytes()).signed for name in LIMITS}
    for name, signed in found.items():
        if now is not None and signed.is_expired(now):
            raise _Expired(f"{name}.json is expired")
    root: Any = found["root"]
    return root, {name: signed.version for name, signed in found.items()}


def _check_versions(state: _State, root: Root, versions: Mapping[str, int]) -> None:
    """Raise TrustError when a version is below its counter (replay with python-tuf's cache lost)."""
    if versions["root"] < state.root:
        raise TrustError(f"rollback: root version {versions['root']} is served, {state.root} was seen before")
    for name, counter in (state.roles or {}).items():
        if versions[name] < counter.version and counter.binds(root.roles[name]):
            raise TrustError(f"rollback: {name} version {versions[name]} is served, {counter.version} was seen before")


def _fetch_rollout(updater: Updater, fetch: Fetch, held: Rollout | None) -> Rollout:
    """The rollout that targets metadata names; not fetched again when it is the one held."""
    target = updater.get_targetinfo(ROLLOUT_TARGET)
    if target is None or set(target.hashes) != {"sha256"} or target.length > MAX_ROLLOUT:
        raise TrustError(f"the signed targets name no {ROLLOUT_TARGET} with a SHA-256 and at most {MAX_ROLLOUT} bytes")
    digest = target.hashes["sha256"]
    if not DIGEST.fullmatch(digest):  # it becomes part of a path
        raise TrustError(f"the signed targets name {ROLLOUT_TARGET} by {digest[:80]!r}, which is no SHA-256")
    if held is not None and sha256(rollout_bytes(held)) == digest:
        return held
    data = fetch(rollout_name(digest), target.length)
    if len(data) != target.length or sha256(data) != digest:
        raise TrustError("the rollout is not the one that was signed: it was damaged or swapped on the server")
    return parse_rollout(data)


def _check_manifests(updater: Updater, rollout: Rollout) -> None:
    """Raise TrustError unless every manifest of the rollout is a signed target of the same size."""
    for model, channels in rollout.items():
        for entry in (channels.stable, channels.canary):
            if entry is not None:
                target = updater.get_targetinfo(manifest_name(entry.sha256))
                if target is None or (target.length, target.hashes) != (entry.size, {"sha256": entry.sha256}):
                    raise TrustError(f"release {entry.release} of {model} is in the rollout but no signed target")


def _update(folder: Path, fetch: Fetch, state: _State, now: datetime | None) -> tuple[_State, Root]:
    """The state after everything on the server was verified. Raises _Expired, TrustError, FetchError, DeviceError."""
    metadata = _trust(folder) / METADATA
    with _named_errors():
        updater = _open_updater(folder, fetch)
        with writing(metadata):
            updater.refresh()
            root, versions = _verified(folder, now)
        _check_versions(state, root, versions)
        rollout = _fetch_rollout(updater, fetch, state.rollout)
        _check_manifests(updater, rollout)
    with writing(metadata):
        _make_durable(metadata)
    roles = {name: _Counter(version, tuple(root.roles[name].keyids)) for name, version in versions.items()}
    del roles["root"]
    return _State(versions["root"], roles, state.releases, rollout), root


def _refused(folder: Path, state: _State, e: Exception) -> _State:
    """The state after nothing was taken: a revoked key stays revoked, and nothing refused stays in the cache."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    trust = _trust(folder)
    try:  # root metadata that python-tuf has followed is right, whatever was wrong after it
        version = Metadata[Root].from_bytes((trust / METADATA / "root.json").read_bytes()).signed.version
    except (OSError, RepositoryError):
        version = state.root
    if version > state.root:
        state = replace(state, root=version)
        write_file(trust / "state.json", _state_bytes(state))
    if isinstance(e, TrustError):
        with writing(trust):
            for name in ("timestamp", "snapshot", "targets"):
                with contextlib.suppress(FileNotFoundError):
                    edge.disk.unlink(trust / METADATA / f"{name}.json")
    return state


def _choose(state: _State, model: str | None, device_id: str, channel: str | None, root: Root | None) -> _Chosen:
    """Model, channel and entry for a device; TrustError when the release is below its counter."""
    rollout = state.rollout or {}
    if model is None:
        if len(rollout) != 1:
            raise BundleError(f"several models are published: name one of {', '.join(sorted(rollout))}")
        model = next(iter(rollout))
    where, entry = choose(rollout, model, device_id, channel)
    seen = (state.releases or {}).get(model)
    if seen is not None and entry.release < seen.version and (root is None or seen.binds(root.roles["targets"])):
        text = f"rollback: release {entry.release} of {model} is offered ({where}), {seen.version} was taken before"
        raise TrustError(f"{text}; to go back, its publisher publishes the old bundle as a new release")
    return model, where, entry


def refresh(
    folder: Path,
    fetch: Fetch,
    *,
    model: str | None = None,
    device_id: str = "",
    channel: str | None = None,
    hardware: str | None = None,
    now: datetime | None = None,
) -> Trusted:
    """Verify the metadata that `fetch` brings, raise the counters durably, and say what this device is to run.

    `model` may be left out when one is published; `channel` None lets `device_id` decide; `hardware` names the class of
    compiled artifacts; `now` is a clock to be trusted beside the system's (a board without a battery starts in 1970).
    Raises TrustError (nothing was taken; keep running), FetchError, BundleError (nothing is published for this device),
    DeviceError. Expired metadata is no error once something was accepted: see `Trusted.stale`.
    """
    trust = _trust(folder)
    if not has_root(folder):
        raise TrustError(f"{folder} has no root metadata: pin the publisher's root.json first")
    with locked_folder(trust, f"another process refreshes {trust}: wait for it to end, or stop it"):
        state, stale = _read_state(folder), None
        try:
            new, root = _update(folder, fetch, state, None if now is None else now.astimezone(UTC))
            model, where, entry = _choose(new, model, device_id, channel, root)
        except _Expired as e:
            state = _refused(folder, state, e)
            if state.rollout is None:
                raise TrustError(f"{e}: nothing was taken; its publisher must run `qdeploy refresh`") from e
            stale = str(e)
            model, where, entry = _choose(state, model, device_id, channel, None)
        except (TrustError, FetchError, BundleError) as e:
            _refused(folder, state, e)
            raise
        else:
            counter = _Counter(entry.release, tuple(root.roles["targets"].keyids))
            new = replace(new, releases={**(new.releases or {}), model: counter})
            if new != state:
                write_file(trust / "state.json", _state_bytes(new))
    level = None if hardware is None else entry.levels.get(hardware)
    return Trusted(entry.sha256, entry.size, entry.release, model, where, entry.minimum, level, entry.hold, stale)
