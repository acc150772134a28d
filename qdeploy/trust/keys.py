"""Folders of keys: Ed25519 private keys, and every version of the root metadata that names them.

```
KEYS/N.root.json         signed root metadata, each version; the newest is what devices pin
KEYS/<role>-<keyid>.pem  private keys (PKCS 8, mode 0600), the first 12 digits of their TUF key id in the name
KEYS/targets.json        the targets metadata that was last signed with this folder
```

Several folders may be given, the first with the root metadata: key holders bring theirs on a medium of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Role, Root

from qdeploy.errors import DeviceError, TrustError
from qdeploy.files import fsync_dir, new_folder, read_bytes, write_atomic

ROLES = ("root", "targets", "online")  # `online` signs TUF's timestamp and snapshot
MAX_KEYS = 16
ROOT_DAYS = 365


@dataclass(frozen=True)
class Quorum:
    """`threshold` of `keys` signatures are needed."""

    threshold: int
    keys: int

    @classmethod
    def parse(cls, text: str) -> Quorum:
        """ "2/3" -> 2 of 3 keys; raises TrustError."""
        needed, _, keys = text.partition("/")
        if not (needed.isdecimal() and keys.isdecimal() and 1 <= int(needed) <= int(keys) <= MAX_KEYS):
            raise TrustError(f"{text!r} is no quorum: write N/M, N signatures of M keys, 1 <= N <= M <= {MAX_KEYS}")
        return cls(int(needed), int(keys))


def expiry(days: float, now: datetime | None = None) -> datetime:
    """The time in so many days, in whole seconds as TUF wants it."""
    return ((now or datetime.now(UTC)) + timedelta(days=days)).astimezone(UTC).replace(microsecond=0)


def tuf_roles(role: str) -> tuple[str, ...]:
    """The roles of TUF that one of ROLES signs."""
    return ("timestamp", "snapshot") if role == "online" else (role,)


class KeyFolder:
    """Keys and root metadata in one or several folders. Raises TrustError for what is missing or does not fit."""

    def __init__(self, folders: Sequence[Path], passphrase: bytes | None = None) -> None:
        self.folders = [Path(folder) for folder in folders]
        self._passphrase = passphrase

    @property
    def home(self) -> Path:
        """The folder with the root metadata."""
        return self.folders[0]

    @property
    def root(self) -> Root:
        """The newest root metadata."""
        return Metadata[Root].from_bytes(self.history[-1]).signed

    def roots(self) -> list[Root]:
        """All versions, from the first on."""
        return [Metadata[Root].from_bytes(data).signed for data in self.history]

    @cached_property
    def history(self) -> list[bytes]:
        """Every version of the root metadata, each signed by the one before it."""
        found: list[bytes] = []
        while (path := self.home / f"{len(found) + 1}.root.json").exists():
            found.append(read_bytes(path, "the root metadata", TrustError))
        if not found:
            raise TrustError(f"{self.home} holds no 1.root.json: make keys with `qdeploy keys init {self.home}`")
        try:
            for number, data in enumerate(found):
                metadata = Metadata[Root].from_bytes(data)
                metadata.verify_delegate(Root.type, metadata)
                if number:
                    Metadata[Root].from_bytes(found[number - 1]).verify_delegate(Root.type, metadata)
        except (RepositoryError, ValueError) as e:
            raise TrustError(f"{self.home}/{number + 1}.root.json is damaged ({e}): restore it from a copy") from e
        return found

    def signers(self, role: Role, name: str) -> list[CryptoSigner]:
        """A signer for each key of a TUF role that is in the folders; TrustError when they are too few."""
        found = [signer for keyid in role.keyids if (signer := self._signer(keyid)) is not None]
        if len(found) < role.threshold:
            where = ", ".join(map(str, self.folders))
            text = f"{name} needs {role.threshold} signatures, {where} hold {len(found)} of its keys"
            raise TrustError(f"{text}: add the folders of other key holders with --keys")
        return found

    def keep_targets(self, data: bytes) -> None:
        """Record the targets metadata that was signed last. Raises DeviceError."""
        write_atomic(self.home / "targets.json", data)

    def _signer(self, keyid: str) -> CryptoSigner | None:
        for folder in self.folders:
            for path in sorted(folder.glob(f"*-{keyid[:12]}.pem")):
                signer = CryptoSigner(self._private_key(path))
                if signer.public_key.keyid == keyid:
                    return signer
        return None

    def _private_key(self, path: Path) -> Ed25519PrivateKey:
        data = read_bytes(path, "the private key", TrustError)
        try:
            encrypted = b"ENCRYPTED" in data.partition(b"\n")[0]
            if encrypted and self._passphrase is None:
                raise TrustError(f"{path} is encrypted: give its passphrase with --passphrase-file")
            key = load_pem_private_key(data, self._passphrase if encrypted else None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise TrustError(f"cannot read the private key {path}: wrong passphrase, or the file is damaged") from e
        if not isinstance(key, Ed25519PrivateKey):
            raise TrustError(f"{path} is no Ed25519 key")
        return key


# --- making keys -----------------------------------------------------------------------------------------------------


def _new_key(folder: Path, role: str, passphrase: bytes | None) -> SSlibKey:
    """A fresh key pair; the private half goes to a file that only its owner can read."""
    signer = CryptoSigner.generate_ed25519()
    # the online key signs without a person beside it
    wrap: KeySerializationEncryption = NoEncryption()
    if passphrase is not None and role != "online":
        wrap = BestAvailableEncryption(passphrase)
    data = load_pem_private_key(signer.private_bytes, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, wrap)
    path = folder / f"{role}-{signer.public_key.keyid[:12]}.pem"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsync_dir(folder)
    except OSError as e:
        raise DeviceError(f"cannot write {path}: {e.strerror or e}") from e
    return signer.public_key


def _replace_keys(root: Root, folder: Path, role: str, quorum: Quorum, passphrase: bytes | None) -> None:
    """Give a role fresh keys; the keys it had go."""
    for name in tuf_roles(role):
        for keyid in list(root.roles[name].keyids):
            root.revoke_key(keyid, name)
    for _ in range(quorum.keys):
        key = _new_key(folder, role, passphrase)
        for name in tuf_roles(role):
            root.add_key(key, name)
    for name in tuf_roles(role):
        root.roles[name].threshold = quorum.threshold


def _signed(root: Root, keys: KeyFolder, before: Root | None) -> bytes:
    """Root metadata signed by its own threshold, and by that of the version before it."""
    metadata = Metadata(root)
    signers = {}
    for version in (root,) if before is None else (before, root):
        for signer in keys.signers(version.roles["root"], f"root version {root.version}"):
            signers[signer.public_key.keyid] = signer
    for signer in signers.values():
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def init_keys(folder: Path, root: Quorum, targets: Quorum, passphrase: bytes | None, days: float = ROOT_DAYS) -> Path:
    """Make a folder of fresh keys and root metadata version 1; returns the file that devices pin.

    With a `passphrase` the keys of root and targets are encrypted. Raises DeviceError when `folder` is not empty.
    """
    with new_folder(folder) as made:
        os.chmod(made, 0o700)
        first = Root(version=1, expires=expiry(days), consistent_snapshot=True)
        for role, quorum in (("root", root), ("targets", targets), ("online", Quorum(1, 1))):
            _replace_keys(first, made, role, quorum, passphrase)
        write_atomic(made / "1.root.json", _signed(first, KeyFolder([made], passphrase), None))
    return Path(folder) / "1.root.json"


def rotate_keys(
    keys: KeyFolder, role: str, quorum: Quorum | None, passphrase: bytes | None, days: float = ROOT_DAYS
) -> Path:
    """Replace all keys of a role (as many again without a `quorum`) by root metadata of the next version.

    Devices take it with their next refresh once it is published (`publish.refresh`); what the old keys signed counts
    no more. Returns the new root metadata's file. Raises TrustError when root keys are missing.
    """
    before = keys.root
    keys.signers(before.roles["root"], f"root version {before.version + 1}")  # before any key is made
    after = keys.root
    known = after.roles[tuf_roles(role)[0]]
    _replace_keys(after, keys.home, role, quorum or Quorum(known.threshold, len(known.keyids)), passphrase)
    after.version, after.expires = before.version + 1, expiry(days)
    path = keys.home / f"{after.version}.root.json"
    data = _signed(after, keys, before)
    write_atomic(path, data)
    keys.history.append(data)
    return path
