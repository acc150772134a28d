"""Where a tree is published: a local folder, or any store that fsspec knows (s3://, gs://, sftp://, memory://).

A folder is held by a lock and every file is renamed into place. Stores have neither: an upload replaces its object
as a whole, and `create` refuses a name that is taken where the store can tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from qdeploy.errors import DeviceError
from qdeploy.files import locked_folder, sha256, write_atomic

ANOTHER = "another publisher is at work there: wait for it to end and run the same command again"


class Storage(Protocol):
    """A published tree that is written. `path` is below its root. Methods raise DeviceError."""

    name: str

    def read(self, path: str) -> bytes | None:
        """The file, None when it is not there."""

    def holds(self, path: str, digest: str, size: int) -> bool:
        """True when the file is there already."""

    def write(self, path: str, data: bytes) -> None:
        """Put or replace a file as a whole."""

    def create(self, path: str, data: bytes) -> None:
        """Put a file whose name no other publisher has taken."""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Alone, as far as the storage can promise it."""


class Folder:
    """A local folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.name = str(root)

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise DeviceError(f"cannot read {self.root / path}: {e.strerror or e}") from e

    def holds(self, path: str, digest: str, size: int) -> bool:
        data = self.read(path)
        return data is not None and len(data) == size and sha256(data) == digest

    def write(self, path: str, data: bytes) -> None:
        write_atomic(self.root / path, data)

    def create(self, path: str, data: bytes) -> None:
        write_atomic(self.root / path, data)  # the lock is held: what stands there was left by a crash

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise DeviceError(f"cannot publish to {self.root}: {e.strerror or e}") from e
        with locked_folder(self.root, f"{self.root}: {ANOTHER}"):
            yield


class Store:
    """A file system of fsspec, by URL."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self.name = url
        with self._naming(url):
            self._files, base = url_to_fs(url)
        self._base = str(base).rstrip("/")

    @contextlib.contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        """Turn what stores raise (their own classes, ImportError for a missing client) into one line."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as e:  # noqa: BLE001 - each store has error classes of its own
            raise DeviceError(f"cannot publish to {self.name} ({path}): {e or type(e).__name__}") from e

    def read(self, path: str) -> bytes | None:
        with self._naming(path):
            try:
                return bytes(self._files.cat_file(f"{self._base}/{path}"))
            except FileNotFoundError:
                return None

    def holds(self, path: str, digest: str, size: int) -> bool:
        with self._naming(path):
            try:
                info: dict[str, Any] = self._files.info(f"{self._base}/{path}")
            except FileNotFoundError:
                return False
            return info.get("type") == "file" and info.get("size") == size

    def write(self, path: str, data: bytes) -> None:
        with self._naming(path):
            self._files.pipe_file(f"{self._base}/{path}", data)

    def create(self, path: str, data: bytes) -> None:
        with self._naming(path):
            try:
                self._files.pipe_file(f"{self._base}/{path}", data, mode="create")
            except FileExistsError as e:
                raise DeviceError(f"{self.name}: {ANOTHER}") from e

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield


def open_storage(where: str) -> Storage:
    """A folder, or a store if `where` is a URL; raises DeviceError."""
    if "://" not in where:
        return Folder(Path(where))
    if where.startswith("file://"):
        return Folder(Path(where.removeprefix("file://")))
    return Store(where)
