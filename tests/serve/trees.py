"""A small published tree and plain HTTP for the server's tests."""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from qdeploy.files import sha256

CONTENT = bytes(range(256)) * 4000  # an object larger than what goes out in one piece
NAME = sha256(CONTENT)
RELEASE = b'{"format":"qdeploy-release/1"}\n'


def make_root(folder: Path) -> Path:
    """One object, a manifest, a release, signed metadata, and files that are not to be served."""
    root = folder / "root"
    for name in ("objects", "manifests", "metadata", "rollout"):
        (root / name).mkdir(parents=True)
    (root / "release.json").write_bytes(RELEASE)
    (root / "objects" / NAME).write_bytes(CONTENT)
    (root / "manifests" / f"{NAME}.json").write_bytes(CONTENT)
    (root / "rollout" / f"{NAME}.json").write_bytes(CONTENT)
    (root / "metadata" / "timestamp.json").write_bytes(b"timestamp")
    (root / "metadata" / "3.targets.json").write_bytes(b"targets")
    (root / "objects" / ".hidden").write_bytes(b"secret")
    (root / "metadata" / "keys.json").write_bytes(b"secret")
    (root / "other.txt").write_bytes(b"secret")
    (folder / "outside").write_bytes(b"secret")
    return root


def ask(  # noqa: PLR0913, PLR0917
    url: str,
    path: str,
    headers: dict[str, str] | None = None,
    method: str = "GET",
    body: bytes | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower-case names) and body; the path goes out as it is."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    connection = (
        http.client.HTTPConnection(host, parts.port, timeout=10)
        if tls is None
        else http.client.HTTPSConnection(host, parts.port, timeout=10, context=tls)
    )
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for key, value in (headers or {}).items():
            connection.putheader(key, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def connect(url: str) -> socket.socket:
    """A bare connection."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def read_all(line: socket.socket) -> bytes:
    """Everything until the other side closes or breaks off."""
    data = bytearray()
    try:
        while chunk := line.recv(1 << 16):
            data += chunk
    except ConnectionError:
        pass
    return bytes(data)
