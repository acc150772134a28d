"""File layers that fail: full and broken disks, and power cuts that lose, tear and reorder what was not synced."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from qdeploy.client import disk as edge

SECTOR = 512


class PowerLost(BaseException):
    """The machine is off: nothing catches it, and nothing more reaches the disk."""


class Quick(edge.Disk):
    """Does not wait for the disk: a killed process, other than a machine, loses nothing that it wrote."""

    def fsync(self, fd: int) -> None:
        pass


class Failing(Quick):
    """Raises an OSError at call number `at` (from 1). `stays`: at every later call that takes room, too.

    A write that fails has written half of its data. `calls` counts what may fail.
    """

    def __init__(self, at: int, code: int, stays: bool) -> None:
        self.at, self.code, self.stays = at, code, stays
        self.calls = 0

    def _step(self, before: Callable[[], object] | None = None) -> None:
        self.calls += 1
        if self.calls == self.at or (self.stays and self.calls > self.at):
            if before is not None:
                before()
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_CREAT:
            self._step()
        return super().open(path, flags)

    def pwrite(self, fd: int, data: bytes | memoryview, at: int) -> int:
        self._step(lambda: os.pwrite(fd, data[: len(data) // 2], at))
        return super().pwrite(fd, data, at)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._step(lambda: os.write(fd, data[: len(data) // 2]))
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._step()

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)

    def unlink(self, path: Path) -> None:
        if self.code == errno.EIO:
            self._step()
        super().unlink(path)

    def rmdir(self, path: Path) -> None:
        if self.code == errno.EIO:
            self._step()
        super().rmdir(path)


class PowerCut(edge.Disk):
    """Remembers what is durable below `root`, and turns the power off before call number `at` (from 1; 0: never).

    A file's bytes become durable when it is synced, a name when its folder is: nothing else is promised. `after(rng)`
    then says what a disk may hold: of each file that was not synced, each sector old or new and any length between; of
    each name that was not synced, the old or the new one. All that lies in `root` at the start is durable.
    """

    def __init__(self, root: Path, at: int = 0, deaf: Callable[[Path], bool] | None = None) -> None:
        """`deaf` picks paths whose fsync is ignored."""
        self.root, self.at, self.calls, self.dead = root, at, 0, False
        self._deaf = deaf or (lambda _: False)
        self._bytes: dict[int, bytes] = {}  # durable, by inode
        self._names: dict[Path, dict[str, int]] = {}  # durable, by folder; -1 is a folder
        self._pins: dict[int, int] = {}  # an open descriptor for each inode, so that its number is not used again
        self._lost: tuple[dict[Path, dict[str, int]], dict[int, bytes]] = ({}, {})
        if root.exists():
            names, found = self._look()
            self._names, self._bytes = names, found

    def _look(self) -> tuple[dict[Path, dict[str, int]], dict[int, bytes]]:
        """Names and bytes as a running machine sees them."""
        names: dict[Path, dict[str, int]] = {}
        found: dict[int, bytes] = {}
        for folder, folders, files in os.walk(self.root):
            here = names.setdefault(Path(folder), {})
            here |= dict.fromkeys(folders, -1)
            for name in files:
                path = Path(folder) / name
                here[name] = self._pin(path)
                found[here[name]] = path.read_bytes()
        return names, found

    def _pin(self, path: Path) -> int:
        number = os.stat(path).st_ino
        if number not in self._pins:
            self._pins[number] = os.open(path, os.O_RDONLY)
        return number

    def release(self) -> None:
        """Close what is held open."""
        while self._pins:
            os.close(self._pins.popitem()[1])

    def _step(self) -> None:
        if self.dead:
            raise PowerLost
        self.calls += 1
        if self.calls == self.at:
            self.cut()
            raise PowerLost

    def cut(self) -> None:
        """The power is gone now."""
        self._lost, self.dead = self._look(), True

    # --- calls -------------------------------------------------------------------------------------------------------

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_CREAT:
            self._step()
        fd = super().open(path, flags)
        if os.path.isfile(path) and self.root in Path(path).parents:
            self._pin(path)
        return fd

    def pwrite(self, fd: int, data: bytes | memoryview, at: int) -> int:
        self._step()
        return super().pwrite(fd, data, at)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._step()
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._step()
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if self._deaf(path):
            return
        if path.is_dir():
            rows = os.scandir(path)
            self._names[path] = {row.name: -1 if row.is_dir() else self._pin(Path(row.path)) for row in rows}
            for folder in [row.path for row in os.scandir(path) if row.is_dir()]:
                self._names.setdefault(Path(folder), {})
        else:
            number = self._pin(path)  # `fd` may not be readable
            self._bytes[number] = os.pread(self._pins[number], os.fstat(fd).st_size, 0)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        self._pin(source)
        if os.path.exists(target):
            self._pin(target)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step()
        self._pin(path)
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)

    def rmdir(self, path: Path) -> None:
        self._step()
        super().rmdir(path)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def after(self, rng: random.Random, out: Path) -> None:
        """Write what the disk may hold when the power comes back to `out`, which must not exist."""
        assert self.dead
        mood = rng.choice((0.0, 0.5, 0.5, 1.0, rng.random()))  # how much of it was written back in time
        names, _ = self._lost
        self._rebuild(rng, self.root, out, mood, names)

    def _rebuild(
        self, rng: random.Random, folder: Path, out: Path, mood: float, names: dict[Path, dict[str, int]]
    ) -> None:
        out.mkdir(parents=True)
        old, new = self._names.get(folder, {}), names.get(folder, {})
        for name in sorted(old.keys() | new.keys()):
            entry = old.get(name)
            if entry != new.get(name) and rng.random() < mood:
                entry = new.get(name)
            if entry == -1:
                self._rebuild(rng, folder / name, out / name, mood, names)
            elif entry is not None:
                (out / name).write_bytes(self._sectors(rng, entry, mood))

    def _sectors(self, rng: random.Random, number: int, mood: float) -> bytes:
        """Bytes of a file, each sector as it was synced or as it was last."""
        old = self._bytes.get(number, b"")
        size = os.fstat(self._pins[number]).st_size
        new = os.pread(self._pins[number], size, 0)
        if old == new:
            return old
        length = rng.choice((len(old), len(new), rng.randint(min(len(old), size), max(len(old), size))))
        if mood == 1.0:
            length = len(new)
        data = bytearray(length)
        for start in range(0, length, SECTOR):
            stop = min(start + SECTOR, length)
            part = (new if rng.random() < mood else old)[start:stop]
            data[start : start + len(part)] = part
        return bytes(data)
