"""What the server sent, one JSON line a request: the proof that no byte was fetched twice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from qdeploy.errors import DataError, DeviceError


@dataclass(frozen=True)
class Sent:
    """One answered request. `start` is the file offset of the body's first byte; `sent` counts body bytes that
    were handed to the network: less than `size` when the reader went away early, 0 for HEAD."""

    method: str
    path: str
    range: str | None
    status: int
    start: int
    size: int
    sent: int


class ByteLog:
    """Appends `Sent` rows to a file, one line each, flushed at once; a context manager."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = open(path, "a", encoding="ascii", buffering=1)  # noqa: SIM115 - lives as long as the server
        except OSError as e:
            raise DeviceError(f"cannot write the byte log {path}: {e.strerror or e}") from e

    def write(self, row: Sent) -> None:
        """Append one row."""
        self._file.write(json.dumps(asdict(row)) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ByteLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_byte_log(path: Path) -> list[Sent]:
    """The rows of a byte log; raises DataError when a line is not one."""
    try:
        return [Sent(**json.loads(line)) for line in Path(path).read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError, TypeError) as e:
        raise DataError(f"cannot read the byte log {path}: {e}") from e
