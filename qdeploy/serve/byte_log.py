"""What the server sent, one JSON line a request: the proof that no byte was fetched twice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qdeploy.errors import DataError
from qdeploy.serve.logs import LineFile


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


class ByteLog(LineFile):
    """Appends `Sent` rows to a file, one line each, flushed at once; a context manager."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "byte log")

    def row(self, row: Sent) -> None:
        """Append one row."""
        self.write(json.dumps(asdict(row)))


def read_byte_log(path: Path) -> list[Sent]:
    """The rows of a byte log; raises DataError when a line is not one."""
    try:
        return [Sent(**json.loads(line)) for line in Path(path).read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError, TypeError) as e:
        raise DataError(f"cannot read the byte log {path}: {e}") from e
