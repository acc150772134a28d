"""What a conditional or Range request asks for: pure functions on header values (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=[ \t]*(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))[ \t]*", re.IGNORECASE | re.ASCII)
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` (exclusive) of a file."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


class UnsatisfiableRange(ValueError):
    """The range lies behind the end of the file: status 416."""


def parse_range(header: str | None, size: int) -> Span | None:
    """The one span that `header` asks of a file of `size` bytes; None when the whole file is to be sent.

    A malformed header, another unit and several ranges count as no Range (section 14.2 allows it).
    Raises UnsatisfiableRange when the range begins at or behind the end.
    """
    match = _RANGE.fullmatch(header) if header is not None else None
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        if int(suffix) == 0 or size == 0:
            raise UnsatisfiableRange(header)
        return Span(max(0, size - int(suffix)), size)
    start = int(first)
    if last is not None and int(last) < start:
        return None  # malformed, not unsatisfiable
    if start >= size:
        raise UnsatisfiableRange(header)
    return Span(start, size if last is None else min(int(last) + 1, size))


def not_modified(if_none_match: str | None, tag: str) -> bool:
    """True when the reader holds the entity `tag` already: status 304 (weak comparison)."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or tag in _TAG.findall(if_none_match)


def range_applies(if_range: str | None, tag: str) -> bool:
    """False when If-Range names another entity (or a date, or a weak tag): the whole file is then sent."""
    return if_range is None or if_range.strip() == f'"{tag}"'
