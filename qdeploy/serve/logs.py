"""Lines appended to a file while a server runs. A full disk costs lines, which are counted, and never an answer."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from qdeploy.errors import DeviceError


def complain(text: str) -> None:
    """One line on standard error; nobody is left to tell when that fails too."""
    with contextlib.suppress(OSError, ValueError):
        print(f"qdeploy serve: {text}", file=sys.stderr, flush=True)


class LineFile:
    """Appends lines to a file, each with one write, flushed at once; a context manager.

    A write that fails (no space, I/O error) loses its line: `lost` counts them, and standard error says when that
    begins and when it is over. A torn line is ended, so that the next one stands for itself. `-` is standard error.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._standard = str(path) == "-"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.dup(2) if self._standard else os.open(path, flags, 0o644)
        except OSError as e:
            raise DeviceError(f"cannot write the {what} {path}: {e.strerror or e}") from e
        self.lost = 0
        self._failing = self._torn = False

    def write(self, line: str) -> None:
        """Append `line` (without its end)."""
        data = b"\n" * self._torn + line.encode("ascii", "backslashreplace") + b"\n"
        try:
            written = os.write(self._fd, data)
        except OSError as e:
            self._lose(e.strerror or str(e))
            return
        self._torn = written < len(data)
        if self._torn:
            self._lose("no space for a whole line")
        elif self._failing:
            self._failing = False
            complain(f"the {self._what} {self._path} is written again; {self.lost} lines were lost so far")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if not self._failing:
            self._failing = True
            if not self._standard:
                complain(f"cannot write the {self._what} {self._path} ({why}): serving goes on, lines are lost")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def common_line(remote: str, request: str, status: int, sent: int) -> str:
    """A line in the common log format (NCSA), in UTC; `request` is the request line."""
    text = request.replace("\\", "\\\\").replace('"', '\\"')
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    when = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime())
    return f'{remote} - - [{when}] "{text}" {status} {sent}'
