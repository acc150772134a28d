"""The journal of verified extents: an append-only text file whose every line proves itself.

One line a record, ended by a newline: `+` (held) or `-` (held no longer), object, start, stop, SHA-256 of these bytes,
CRC-32 of the text before it as 8 hex digits. A line that does not parse (a torn last one, a damaged one) says nothing:
its bytes are fetched again.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from qdeploy.client.plan import Extent

_LINE = re.compile(rb"(([+-]) ([0-9a-f]{64}) ([0-9]{1,10}) ([0-9]{1,10}) ([0-9a-f]{64})) ([0-9a-f]{8})")


def format_record(extent: Extent, held: bool = True) -> bytes:
    """One line."""
    text = f"{'+' if held else '-'} {extent.object} {extent.start} {extent.stop} {extent.sha256}".encode("ascii")
    return text + b" %08x\n" % zlib.crc32(text)


def format_records(extents: Iterable[Extent], held: bool = True) -> bytes:
    """Several lines."""
    return b"".join(format_record(extent, held) for extent in extents)


def parse_journal(data: bytes) -> set[Extent]:
    """The extents that are held after all legal records of a journal."""
    held: set[Extent] = set()
    lines = data.split(b"\n")
    for line in lines[:-1]:  # what follows the last newline is torn
        match = _LINE.fullmatch(line)
        if match is None or int(match[7], 16) != zlib.crc32(match[1]):
            continue
        extent = Extent(match[3].decode(), int(match[4]), int(match[5]), match[6].decode())
        if match[2] == b"+":
            held.add(extent)
        else:
            held.discard(extent)
    return held
