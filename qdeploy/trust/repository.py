"""TUF metadata of a published tree: what is in force there, and its successor, written so that readers see one whole.

Order of writing: objects, manifest, rollout, targets, snapshot, which nothing names yet; new root metadata;
release.json; last timestamp.json, which puts the release in force. A crash before leaves files that nothing names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from qdeploy.bundle.manifest import release_bytes
from qdeploy.bundle.rollout import (
    METADATA_LIMITS,
    ROLLOUT_TARGET,
    Rollout,
    metadata_name,
    parse_rollout,
    rollout_bytes,
    rollout_name,
)
from qdeploy.bundle.store import RELEASE_NAME, manifest_name
from qdeploy.bundle.tables import Release
from qdeploy.errors import DeviceError, TrustError
from qdeploy.files import read_bytes
from qdeploy.trust.keys import KeyFolder, expiry
from qdeploy.trust.storage import ANOTHER, Storage

TARGETS_DAYS = 365.0
TIMESTAMP_DAYS = 7.0
SOON_DAYS = 30.0  # what expires sooner is signed again
MAX_VERSION = (1 << 53) - 1
S = TypeVar("S", Timestamp, Snapshot, Targets)


@dataclass(frozen=True)
class State:
    """What a tree publishes; all empty in an empty tree. `stale` names the roles whose keys were replaced since."""

    timestamp_data: bytes | None = None
    timestamp: int = 0
    snapshot: Snapshot | None = None
    targets: Metadata[Targets] | None = None
    stale: frozenset[str] = frozenset()
    rollout: Rollout = field(default_factory=dict)


class Repository:
    """A tree and the keys to sign it. Raises TrustError (keys, damaged or foreign metadata), DeviceError (storage).

    `now` is the clock for expiry dates.
    """

    def __init__(self, storage: Storage, keys: KeyFolder, now: datetime | None = None) -> None:
        self.storage = storage
        self.keys = keys
        self._now = now or datetime.now(UTC)
        if keys.root.expires <= self._now:
            text = f"root metadata in {keys.home} expired {keys.root.expires:%Y-%m-%d}, devices take nothing under it"
            raise TrustError(f"{text}: run `qdeploy keys rotate --role root`")

    # --- what is there -----------------------------------------------------------------------------------------------

    def read(self) -> State:
        """The state in force, every signature verified."""
        data = self.storage.read(metadata_name("timestamp"))
        if data is None and self.storage.read(metadata_name("root", 1)) is not None:
            name = metadata_name("timestamp")
            raise TrustError(f"{self.storage.name} was published before, but {name} is gone: restore it from a mirror")
        if data is None:
            return State()
        stale: set[str] = set()
        timestamp = self._verified(Timestamp, data, stale)
        meta = timestamp.snapshot_meta
        snapshot = self._verified(Snapshot, self._need(metadata_name("snapshot", meta.version), meta), stale)
        meta = snapshot.meta["targets.json"]
        targets_data = self._need(metadata_name("targets", meta.version), meta)
        targets = self._verified(Targets, targets_data, stale)
        if "targets" in stale and targets_data != self._signed_last():
            text = f"the targets metadata in {self.storage.name} is not what {self.keys.home} signed last"
            raise TrustError(f"{text}, and its keys were replaced: restore the right one before it is signed again")
        entry = targets.targets.get(ROLLOUT_TARGET)
        if entry is None or set(entry.hashes) != {"sha256"}:
            raise TrustError(f"{self.storage.name} holds targets without a rollout: it is no tree of qdeploy")
        rollout = parse_rollout(self._need(rollout_name(entry.hashes["sha256"]), entry))
        signed = Metadata[Targets].from_bytes(targets_data)
        return State(data, timestamp.version, snapshot, signed, frozenset(stale), rollout)

    def _need(self, path: str, entry: MetaFile | TargetFile) -> bytes:
        """A file that must be there, of the signed length and digest."""
        data = self.storage.read(path)
        if data is None:
            raise TrustError(f"{self.storage.name} lacks {path}: restore it from a mirror")
        try:
            entry.verify_length_and_hashes(data)
        except RepositoryError as e:
            raise TrustError(f"{path} in {self.storage.name} is damaged ({e}): restore it from a mirror") from e
        return data

    def _verified(self, kind: type[S], data: bytes, stale: set[str]) -> S:
        """Metadata that the keys of any of our root versions signed; `stale` grows if it was not the newest's."""
        role, problem = kind.type, ""
        try:
            metadata: Metadata[Any] = Metadata.from_bytes(data)
            if not isinstance(metadata.signed, kind) or metadata.signed.version > MAX_VERSION:
                raise RepositoryError(f"it is not {role} metadata of a version up to {MAX_VERSION}")
        except RepositoryError as e:
            raise TrustError(f"{role} metadata in {self.storage.name} is damaged ({e}): restore it") from e
        for age, root in enumerate(reversed(self.keys.roots())):
            try:
                root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
            except RepositoryError as e:
                problem = problem or str(e)
                continue
            if age:
                stale.add(role)
            return metadata.signed
        text = f"{role} metadata in {self.storage.name} was not signed by the keys of {self.keys.home} ({problem})"
        raise TrustError(f"{text}: give the folder of its keys, or publish to another place")

    def _signed_last(self) -> bytes | None:
        path = self.keys.home / "targets.json"
        return read_bytes(path, "the targets metadata", TrustError) if path.exists() else None

    # --- its successor -----------------------------------------------------------------------------------------------

    def sign_targets(self, state: State, rollout: Rollout) -> Metadata[Targets]:
        """Targets metadata of the next version: a rollout, and the manifests that it names."""
        found = [TargetFile.from_data(ROLLOUT_TARGET, rollout_bytes(rollout), ["sha256"])]
        for channels in rollout.values():
            for entry in (channels.stable, channels.canary):
                if entry is not None:
                    found.append(TargetFile(entry.size, {"sha256": entry.sha256}, manifest_name(entry.sha256)))
        version = self._free("targets", 0 if state.targets is None else state.targets.signed.version)
        targets = {target.path: target for target in found}
        return self._sign(Targets(version=version, expires=expiry(TARGETS_DAYS, self._now), targets=targets))

    def must_sign_targets(self, state: State) -> bool:
        """True when targets metadata lacks the newest keys, or expires soon and its keys are at hand."""
        if state.targets is None or "targets" in state.stale:
            return state.targets is not None
        try:
            self.keys.signers(self.keys.root.roles["targets"], "targets metadata")
        except TrustError:
            return False
        return state.targets.signed.expires < expiry(SOON_DAYS, self._now)

    def commit(self, state: State, targets: Metadata[Targets] | None, days: float, pointer: Release | None) -> datetime:
        """Put `targets` in force (None: those that are), for `days` until the timestamp expires; timestamp last.

        `pointer` is the release that release.json is to name, None for no other. Everything that targets metadata
        names is there already. Returns when the timestamp expires.
        """
        meta = self._put_snapshot(state, targets)
        timestamp = Timestamp(state.timestamp + 1, None, expiry(days, self._now), meta)
        data = self._bytes(self._sign(timestamp))
        if self.storage.read(metadata_name("timestamp")) != state.timestamp_data:
            raise DeviceError(f"{self.storage.name}: {ANOTHER}")
        # late: until the timestamp follows, devices with a new root refuse the old one's signature
        for number in range(2, len(self.keys.history) + 1):
            self._put_root(number)
        if pointer is not None:
            self.storage.write(RELEASE_NAME, release_bytes(pointer))
        self.storage.write(metadata_name("timestamp"), data)
        self._put_root(1)  # no device asks for it: it is the sign that there was a timestamp
        if targets is not None:
            self.keys.keep_targets(self._bytes(targets))
        return timestamp.expires

    def _put_snapshot(self, state: State, targets: Metadata[Targets] | None) -> MetaFile:
        """Write targets, and the snapshot that names them if it is not there; what the timestamp says of it."""
        before = state.snapshot
        if targets is not None:
            data = self._bytes(targets)
            self.storage.create(metadata_name("targets", targets.signed.version), data)
            meta = {"targets.json": MetaFile.from_data(targets.signed.version, data, ["sha256"])}
        elif before is not None:
            meta = before.meta
            if "snapshot" not in state.stale and before.expires >= expiry(SOON_DAYS, self._now):
                return Metadata[Timestamp].from_bytes(state.timestamp_data or b"").signed.snapshot_meta
        version = self._free("snapshot", 0 if before is None else before.version)
        data = self._bytes(self._sign(Snapshot(version, None, expiry(TARGETS_DAYS, self._now), meta)))
        self.storage.create(metadata_name("snapshot", version), data)
        return MetaFile.from_data(version, data, ["sha256"])

    def _bytes(self, metadata: Metadata[S]) -> bytes:
        """The file; TrustError when devices would refuse its size."""
        data, role = metadata.to_bytes(), metadata.signed.type
        if len(data) > METADATA_LIMITS[role]:
            text = f"{role} metadata would have {len(data)} bytes, devices read {METADATA_LIMITS[role]}"
            raise TrustError(f"{text}: publish to a new place")
        return data

    def manifest_signatures(self, data: bytes) -> tuple[dict[str, str], ...]:
        """Ed25519 signatures of the targets keys over a manifest's bytes, for release.json (FORMAT.md)."""
        signers = self.keys.signers(self.keys.root.roles["targets"], "the manifest")
        signatures = [signer.sign(data) for signer in signers]
        return tuple({"keyid": s.keyid, "signature": s.signature} for s in signatures)

    def _sign(self, signed: S) -> Metadata[S]:
        metadata = Metadata(signed)
        for signer in self.keys.signers(self.keys.root.roles[signed.type], f"{signed.type} metadata"):
            metadata.sign(signer, append=True)
        return metadata

    def _free(self, role: str, version: int) -> int:
        """The next version whose file name is free: a crash may have left one, and caches may hold it."""
        version += 1
        while self.storage.read(metadata_name(role, version)) is not None:
            version += 1
        return version

    def _put_root(self, number: int) -> None:
        data, path = self.keys.history[number - 1], metadata_name("root", number)
        there = self.storage.read(path)
        if there is None:
            self.storage.create(path, data)
        elif there != data:
            raise TrustError(f"{path} in {self.storage.name} is not the one of {self.keys.home}: restore it")
