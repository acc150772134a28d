"""What the client's tests ask of a device folder and of a server's byte log."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qdeploy.bundle.store import assemble
from qdeploy.client.fetch import Patience
from qdeploy.client.pull import pull as client_pull
from qdeploy.client.state import DeviceFolder
from qdeploy.serve.byte_log import Sent

pull = partial(client_pull, unsigned=True)
QUICK = Patience(timeout_s=10, attempts=2, pause_s=0.001)


def file_of(folder: Path, level: str) -> bytes:
    """The assembled file of a level, from the folder alone."""
    device = DeviceFolder(folder)
    manifest = device.manifest(device.chosen().manifest)
    return assemble(manifest, level, device.reader(manifest))


def objects_asked(rows: list[Sent]) -> dict[str, list[tuple[int, int]]]:
    """{object: [(start, stop) sent]}"""
    found: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        if row.path.startswith("/objects/"):
            found.setdefault(row.path.split("/")[-1], []).append((row.start, row.start + row.sent))
    return found


def assert_nothing_twice(rows: list[Sent]) -> None:
    for spans in objects_asked(rows).values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)), spans


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
