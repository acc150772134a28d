"""Writing files so that a crash leaves the old one or the new one, and naming bytes by their hash."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdeploy.errors import DeviceError, QDeployError

MARKERS = (
    "release.json",
    "frozen.json",
    "artifact.json",
    "recipe.json",
    "demo.json",
    "test_batch.bin",
)  # in our folders


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, ASCII, no NaN, one newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def parse_json(data: bytes, what: str, error: type[QDeployError]) -> Any:
    """Parse JSON strictly: duplicate keys, NaN and trailing bytes are errors of class `error` about `what`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a key appears twice")
        return keys

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not allowed")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise error(f"{what} is not valid JSON ({e}): fetch or make it again") from e


def fsync_dir(path: Path) -> None:
    """Make the names in folder `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked_folder(path: Path, busy: str) -> Iterator[None]:
    """Hold the existing folder `path` alone; DeviceError with the text `busy` when another process has it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DeviceError(busy) from e
        yield
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path`: temporary file in the same folder, fsync, rename, fsync the folder.

    A symbolic link is followed. Raises DeviceError when the disk is full, the folder cannot be written or `path` is a
    folder, a device or a pipe; `path` is then unchanged.
    """
    path = Path(path)
    temporary = None
    try:
        if path.is_symlink():
            path = path.resolve()
        if path.exists() and not path.is_file():
            raise DeviceError(f"{path} is not a regular file: name another file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as e:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise DeviceError(f"cannot write {path}: {e.strerror or e}") from e


def check_free(path: Path, force: bool = False) -> Path:
    """The resolved `path` if `new_folder` may write it; call it before long work that ends in one.

    With `force` a folder that qdeploy made (it holds one of MARKERS) is replaced, and no other. Raises DeviceError.
    """
    try:
        path = Path(path).resolve()
        if path.exists() and not path.is_dir():
            raise DeviceError(f"{path} is a file: choose another output folder")
        if path.is_dir() and any(path.iterdir()):
            if not force:
                raise DeviceError(f"{path} exists and is not empty: choose another output folder or add --force")
            if path == Path.cwd() or not any((path / name).is_file() for name in MARKERS):
                raise DeviceError(
                    f"{path} is not an output of qdeploy: --force does not replace it, remove it yourself"
                )
    except OSError as e:
        raise DeviceError(f"cannot write {path}: {e.strerror or e}") from e
    return path


def _exchange(new: Path, path: Path) -> None:
    """Put folder `new` at `path`; what stood there goes away last, and comes back if the rename fails."""
    if not path.is_dir():
        os.replace(new, path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    try:
        os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Build a folder aside and rename it to `path` when the block ends without an error.

    An existing folder that is not empty is refused unless `force`, which replaces one of ours. On an error nothing is
    left. Raises DeviceError when `path` cannot be written.
    """
    path = check_free(path, force)
    if path == Path.cwd():
        raise DeviceError(f"{path} is the current folder: name a folder below it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as e:
        raise DeviceError(f"cannot write {path}: {e.strerror or e}") from e
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        _exchange(temporary, path)
        fsync_dir(path.parent)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DeviceError(f"cannot write {path}: {e.strerror or e}") from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_bytes(path: Path, what: str, error: type[QDeployError]) -> bytes:
    """Read a whole file; a missing or unreadable one is an `error` that names `what` it should have been."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise error(f"cannot read {what} {path}: {e.strerror or e}") from e
