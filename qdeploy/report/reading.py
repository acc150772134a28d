"""Reading what other commands wrote: whole, of sane size, with finite figures, or one error that says what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdeploy.errors import ModelError
from qdeploy.files import parse_json, read_bytes

MOST_BYTES = 64 << 20
MOST = 1e15  # no figure of a report is larger


def load(path: Path) -> Any:
    """A JSON file whose numbers are all finite; raises ModelError."""
    return sane(parse_json(_bytes(path), str(path), ModelError), path)


def load_lines(path: Path) -> list[Any]:
    """JSON values, one a line; a last line that its writer has not ended is left out. Raises ModelError."""
    lines = _bytes(path).split(b"\n")[:-1]
    return [sane(parse_json(line, f"{path} line {i}", ModelError), path) for i, line in enumerate(lines, 1) if line]


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
    except OSError as e:
        raise ModelError(f"cannot read {path}: {e.strerror or e}") from e
    if size > MOST_BYTES:
        raise ModelError(f"{path} has {size:,} bytes, more than any file that a report reads: name another folder")
    return read_bytes(path, "the report's input", ModelError)


def sane(value: Any, path: Path) -> Any:
    """`value` if all numbers in it are finite and of a size that can be drawn; ModelError otherwise."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif isinstance(one, int | float) and not (math.isfinite(one) and abs(one) <= MOST):
            raise ModelError(f"{path} holds the number {one:g}, which no measurement gives: make it again")
    return value


@contextmanager
def expecting(path: Path, remedy: str) -> Iterator[None]:
    """A ModelError about `path` and `remedy` for what a file lacks, or has in another form than its command writes."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as e:
        raise ModelError(f"{path} lacks what its command writes ({type(e).__name__}: {e}): {remedy}") from e
