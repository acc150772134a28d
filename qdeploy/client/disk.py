"""The edge to the disk: every write, fsync, rename and removal of the client goes through `disk`, one object.

A test of faults replaces it (`disk.disk = Faulty()`), and so sees and may fail each step. Methods raise OSError, and do
no more than the system call that they are named after; `write_file` and `sync_folder` are made of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from qdeploy.errors import DeviceError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Disk:
    """System calls that change a file system."""

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor; new files are 0644."""
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def pwrite(self, fd: int, data: bytes | memoryview, at: int) -> int:
        """Bytes written at `at`, perhaps fewer than given."""
        return os.pwrite(fd, data, at)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Bytes written at the descriptor's place, perhaps fewer than given."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Until it returns, what was written may be lost."""
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` in one step."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make one folder."""
        os.mkdir(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)


disk = Disk()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError from writing below `path` into a DeviceError that says what to do."""
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            hint = "make room (`qdeploy evict`) and run the same command again; the level in use is untouched"
            raise DeviceError(f"the disk is full while writing {path}: {hint}") from e
        raise DeviceError(f"cannot write {path}: {e.strerror or e}; the level in use is untouched") from e


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.fsync(fd)
    finally:
        disk.close(fd)


def make_folder(path: Path) -> None:
    """Make `path` and the folders above it, their names durable."""
    if not path.is_dir():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
        sync_folder(path.parent)


def write_all(fd: int, data: bytes | memoryview, at: int | None = None) -> None:
    """Write all of `data`, at `at` or at the descriptor's place."""
    view = memoryview(data)
    while view:
        done = disk.write(fd, view) if at is None else disk.pwrite(fd, view, at)
        view, at = view[done:], at if at is None else at + done


def write_file(path: Path, data: bytes) -> None:
    """`path` holds `data` or what it held before: temporary file, fsync, rename, fsync of the folder. DeviceError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with writing(path):
        make_folder(path.parent)
        try:
            fd = disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                write_all(fd, data)
                disk.fsync(fd)
            finally:
                disk.close(fd)
            disk.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.unlink(temporary)
            raise
        sync_folder(path.parent)
