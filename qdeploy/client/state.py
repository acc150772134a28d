"""The device folder: what is held, which level is chosen. All its reading and writing is here.

```
DIR/current.json             the one pointer: URL, manifest, level, compiled artifact, the choice before it
DIR/device.json              its id, what it was told (mirrors, channel, quota), the policy last heard (settings.py)
DIR/trust/                   signed metadata and the root of trust, where there is one (trust.py)
DIR/manifests/<sha256>.json  verified manifests, as published
DIR/objects/<sha256>         packs, perhaps with gaps: pieces stand at their offsets
DIR/journal                  which extents of them were verified (journal.py)
DIR/artifacts/<sha256>/      the compiled artifact, unpacked
DIR/lock                     held by the one process that writes
```

A file's length or presence proves nothing. Bytes count as held when the journal says so, and the journal is written
after they are durable; whoever reads them checks their digest again. `current.json` changes in one rename, last. All
writing goes through disk.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from qdeploy.bundle.manifest import Manifest, parse_manifest
from qdeploy.bundle.store import ReadPiece, decode_piece, manifest_name, object_name
from qdeploy.client import disk as edge
from qdeploy.client.disk import make_folder, sync_folder, write_all, write_file, writing
from qdeploy.client.journal import format_records, parse_journal
from qdeploy.client.plan import Extent
from qdeploy.errors import BundleError, DeviceError
from qdeploy.files import canonical_json, parse_json, read_bytes, sha256

FORMAT = "qdeploy-device/1"
READ_BYTES = 1 << 20
PULL_AGAIN = "run `qdeploy pull` again to mend it"


@dataclass(frozen=True)
class Current:
    """The choice in force. `artifact` is the index of the compiled artifact in the manifest, None if none fits;
    `target` the hardware class that was asked for by name; `previous` the (manifest, level) in force before."""

    url: str
    manifest: str
    level: str
    artifact: int | None = None
    target: str | None = None
    previous: tuple[str, str] | None = None


def current_bytes(current: Current) -> bytes:
    """Canonical JSON; inverse of `parse_current`."""
    return canonical_json({"format": FORMAT} | asdict(current))


def parse_current(data: bytes) -> Current:
    """Inverse of `current_bytes`; raises BundleError."""
    value = parse_json(data, "current.json of the device folder", BundleError)
    try:
        if value.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if set(value) != {field.name for field in fields(Current)}:
            raise ValueError("its keys are not those of this format")
        if value["previous"] is not None:
            manifest, level = value["previous"]
            value["previous"] = (manifest, level)
        current = Current(**value)
        texts = [current.url, current.manifest, current.level, current.target or "", *(current.previous or ())]
        if not all(isinstance(text, str) for text in texts) or type(current.artifact) not in (int, type(None)):
            raise ValueError("a field has the wrong type")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(f"current.json of the device folder is damaged ({e}): {PULL_AGAIN}") from e
    return current


class DeviceFolder:
    """Reads a device folder. Raises BundleError for what is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def object_path(self, digest: str) -> Path:
        """File of an object."""
        return self.path / object_name(digest)

    def current(self) -> Current | None:
        """The choice in force; None before the first pull has ended."""
        if not (self.path / "current.json").exists():
            return None
        return parse_current(read_bytes(self.path / "current.json", "the device state", BundleError))

    def chosen(self) -> Current:
        """The choice in force; BundleError when there is none yet."""
        current = self.current()
        if current is None:
            raise BundleError(f"{self.path} holds no level yet: run `qdeploy pull URL {self.path}`")
        return current

    def manifest(self, digest: str) -> Manifest:
        """A manifest that an earlier pull verified, verified again."""
        data = read_bytes(self.path / manifest_name(digest), "the manifest", BundleError)
        if sha256(data) != digest:
            raise BundleError(f"the manifest {digest} in {self.path} is damaged: {PULL_AGAIN}")
        return parse_manifest(data)

    def journal(self) -> set[Extent]:
        """Extents that were verified when they were written."""
        try:
            return parse_journal((self.path / "journal").read_bytes())
        except FileNotFoundError:
            return set()
        except OSError as e:
            raise DeviceError(f"cannot read {self.path / 'journal'}: {e.strerror or e}") from e

    def object_size(self, digest: str) -> int:
        """Length of an object's file, 0 when there is none; it proves nothing."""
        try:
            return os.stat(self.object_path(digest)).st_size
        except OSError:
            return 0

    def intact(self, extent: Extent) -> bool:
        """True when the bytes on disk have the extent's digest."""
        digest = hashlib.sha256()
        left = extent.stop - extent.start
        try:
            with open(self.object_path(extent.object), "rb") as file:
                file.seek(extent.start)
                while left and (block := file.read(min(left, READ_BYTES))):
                    digest.update(block)
                    left -= len(block)
        except OSError:
            return False
        return left == 0 and digest.hexdigest() == extent.sha256

    def verified_bytes(self, extent: Extent) -> bytes | None:
        """The bytes on disk if they have the extent's digest."""
        try:
            with open(self.object_path(extent.object), "rb") as file:
                file.seek(extent.start)
                data = file.read(extent.stop - extent.start)
        except OSError:
            return None
        return data if sha256(data) == extent.sha256 else None

    def reader(self, manifest: Manifest) -> ReadPiece:
        """Reads, verifies and decodes pieces into memory of their own; BundleError names the object at fault."""

        def read(index: int) -> bytes:
            piece = manifest.pieces[index]
            digest = manifest.objects[piece.object].sha256
            try:
                with open(self.object_path(digest), "rb") as file:
                    file.seek(piece.offset)
                    coded = file.read(piece.size)
            except OSError as e:
                raise BundleError(f"cannot read object {digest} in {self.path}: {PULL_AGAIN}") from e
            if sha256(coded) != piece.sha256:
                end = piece.offset + piece.size
                raise BundleError(f"object {digest} in {self.path} is damaged in {piece.offset}..{end}: {PULL_AGAIN}")
            return decode_piece(piece, coded, f"piece {index} of object {digest}")

        return read


def open_choice(folder: DeviceFolder) -> tuple[Current, Manifest]:
    """The choice in force and its manifest, both checked; raises BundleError."""
    current = folder.chosen()
    manifest = folder.manifest(current.manifest)
    manifest.level(current.level)
    if current.artifact is not None and not 0 <= current.artifact < len(manifest.artifacts):
        raise BundleError(f"current.json in {folder.path} names an artifact that is not there: {PULL_AGAIN}")
    return current, manifest


class FolderWriter(DeviceFolder):
    """A device folder that this process may write; made by `write_folder`.

    `held` are the extents on record. New bytes go through `keep` and count after `commit`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held = self.journal()
        self._pending: list[Extent] = []
        self._open: dict[str, int] = {}

    # --- held bytes --------------------------------------------------------------------------------------------------

    def strike(self, extents: list[Extent]) -> None:
        """These are held no longer."""
        if extents:
            self._append(format_records(extents, held=False))
            self.held -= set(extents)

    def put(self, digest: str, start: int, data: bytes | bytearray) -> None:
        """Write bytes at their place in an object."""
        path = self.object_path(digest)
        with writing(path):
            if digest not in self._open:
                make_folder(path.parent)
                self._open[digest] = edge.disk.open(path, os.O_RDWR | os.O_CREAT)
            write_all(self._open[digest], memoryview(data), start)

    def note(self, extent: Extent) -> None:
        """These bytes were verified and put: the next `commit` records them."""
        self._pending.append(extent)

    def commit(self) -> None:
        """Make what was put durable, then record it."""
        with writing(self.path):
            for digest in {extent.object for extent in self._pending} - set(self._open):  # found on disk, not put
                self._open[digest] = edge.disk.open(self.object_path(digest), os.O_RDWR)
            for fd in self._open.values():
                edge.disk.fsync(fd)
            if self._open:
                sync_folder(self.path / "objects")
        self.close()
        if self._pending:
            self._append(format_records(self._pending))
            self.held |= set(self._pending)
            self._pending = []

    @property
    def verified(self) -> set[Extent]:
        """What is on record and what the next `commit` will record."""
        return self.held | set(self._pending)

    def close(self) -> None:
        """Close open objects; what was put and not committed does not count."""
        while self._open:
            edge.disk.close(self._open.popitem()[1])

    def _append(self, records: bytes) -> None:
        path = self.path / "journal"
        with writing(path):
            fd = edge.disk.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    records = b"\n" + records  # close a torn record, which then parses as none
                write_all(fd, records)
                edge.disk.fsync(fd)
                if not size:
                    sync_folder(self.path)
            finally:
                edge.disk.close(fd)

    def keep_only(self, held: set[Extent]) -> None:
        """Write the journal anew with these extents alone."""
        write_file(self.path / "journal", format_records(sorted(held)))
        self.held = held

    # --- the pointer -------------------------------------------------------------------------------------------------

    def save_manifest(self, digest: str, data: bytes) -> None:
        """Keep a verified manifest."""
        write_file(self.path / manifest_name(digest), data)

    def activate(self, chosen: Current) -> None:
        """Put a choice in force: one small file renamed. The choice before it is remembered in `previous`."""
        try:
            before = self.current()
        except BundleError:  # a damaged pointer is replaced
            before = None
        previous = None
        if before is not None:
            same = (before.manifest, before.level) == (chosen.manifest, chosen.level)
            previous = before.previous if same else (before.manifest, before.level)
        chosen = replace(chosen, previous=previous)
        if chosen != before:
            self.point(chosen)

    def point(self, current: Current) -> None:
        """Write the pointer as it is given."""
        write_file(self.path / "current.json", current_bytes(current))


@contextlib.contextmanager
def write_folder(path: Path, create: bool = False) -> Iterator[FolderWriter]:
    """The folder, for this process alone while the block runs. DeviceError when another process writes it."""
    path = Path(path)
    if not create and not path.is_dir():
        raise BundleError(f"{path} is no device folder: run `qdeploy pull URL {path}`")
    if path.exists() and not path.is_dir():
        raise DeviceError(f"{path} is a file: choose another device folder")
    with writing(path):
        make_folder(path)
        lock = edge.disk.open(path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DeviceError(f"another process is writing {path}: wait for it to end, or stop it") from e
        with writing(path):
            for pattern in (".*.tmp", "manifests/.*.tmp", "artifacts/*/.*.tmp"):  # of a process that was killed
                for leftover in path.glob(pattern):
                    edge.disk.unlink(leftover)
        writer = FolderWriter(path)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        os.close(lock)
