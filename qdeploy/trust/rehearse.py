"""Dry runs of publishing: everything is read, checked and signed, and nothing is written anywhere."""

from __future__ import annotations

import contextlib
from pathlib import Path

from qdeploy.files import sha256
from qdeploy.trust.keys import KeyFolder
from qdeploy.trust.storage import Folder, Storage


class Rehearsal:
    """A `Storage` whose writes stay in memory, in front of one that is only read."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.name = storage, storage.name
        self.written: dict[str, bytes] = {}

    def read(self, path: str) -> bytes | None:
        return self.written[path] if path in self.written else self.storage.read(path)

    def holds(self, path: str, digest: str, size: int) -> bool:
        if path in self.written:
            return sha256(self.written[path]) == digest
        return self.storage.holds(path, digest, size)

    def write(self, path: str, data: bytes) -> None:
        self.written[path] = data

    def create(self, path: str, data: bytes) -> None:
        self.written[path] = data

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """A folder that is there is held, so that what is read belongs together; none is made."""
        if isinstance(self.storage, Folder) and not self.storage.root.is_dir():
            return contextlib.nullcontext()
        return self.storage.locked()


class RehearsedKeys(KeyFolder):
    """Keys that sign and keep no record of it."""

    def keep_targets(self, data: bytes) -> None:
        """Nothing is written."""


def rehearse_rotation(keys: KeyFolder) -> Path:
    """The file that `rotate_keys` would write; raises TrustError when root keys are missing."""
    before = keys.root
    keys.signers(before.roles["root"], f"root version {before.version + 1}")
    return keys.home / f"{before.version + 1}.root.json"
