"""The names of a published tree (qdeploy/bundle/FORMAT.md, docs/serving.md) and the files that they stand for.

A request for any other name is 404, so there is nothing to traverse, list or escape to.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from qdeploy.errors import BundleError
from qdeploy.files import sha256

RELEASE = "release.json"
TIMESTAMP = "metadata/timestamp.json"
FOREVER = "public, max-age=31536000, immutable"
REVALIDATE = "no-cache"
DOCUMENT_LIMIT = 16 << 20  # files that are hashed at each request; FORMAT.md's limit of a manifest

_DIGEST = "[0-9a-f]{64}"
# kind -> pattern of the undecoded path, Cache-Control; a file is tagged by the digest in its name, else by its content
_KINDS = {
    "release": (r"/release\.json", REVALIDATE),
    "manifest": (rf"/manifests/({_DIGEST})\.json", FOREVER),
    "object": (rf"/objects/({_DIGEST})", FOREVER),
    "timestamp": (r"/metadata/timestamp\.json", REVALIDATE),
    "metadata": (r"/metadata/[1-9][0-9]{0,15}\.(?:root|snapshot|targets)\.json", FOREVER),
    "rollout": (rf"/rollout/({_DIGEST})\.json", FOREVER),
}
_PATTERNS = [(kind, re.compile(pattern, re.ASCII), cache) for kind, (pattern, cache) in _KINDS.items()]
KINDS = tuple(_KINDS)


@dataclass(frozen=True)
class Name:
    """A file of a published tree: kind, path parts below the root, Cache-Control, the digest that it is named by."""

    kind: str
    parts: tuple[str, ...]
    cache: str
    digest: str | None


def split_path(raw_path: str) -> Name | None:
    """The tree's name that a request's raw path stands for, or None.

    The undecoded path is matched, so an encoded slash or dot never becomes one.
    """
    path = raw_path.partition("?")[0]
    for kind, pattern, cache in _PATTERNS:
        if match := pattern.fullmatch(path):
            return Name(kind, tuple(path[1:].split("/")), cache, match[1] if pattern.groups else None)
    return None


def open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """Open a regular file below `root` for reading, following no symbolic link; raises OSError otherwise."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: opening a fifo must not hang the server; the check below refuses it
        fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def headers_of(name: Name, fd: int, size: int) -> tuple[str, dict[str, str]]:
    """Entity tag and the headers that every answer for this file carries; OSError when it is too long to be hashed."""
    tag = name.digest
    if tag is None:
        if size > DOCUMENT_LIMIT:
            raise OSError(errno.EFBIG, "too long for a document of a published tree")
        tag = sha256(os.pread(fd, size, 0))
    return tag, {
        "ETag": f'"{tag}"',
        "Cache-Control": name.cache,
        "Content-Type": "application/octet-stream" if name.kind == "object" else "application/json",
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
    }


def is_published(root: Path) -> bool:
    """True when `root` holds a release, signed or not."""
    for name in (TIMESTAMP, RELEASE):
        try:
            os.close(open_beneath(root, tuple(name.split("/"))))
        except OSError:
            continue
        return True
    return False


def check_published(root: Path) -> Path:
    """The absolute `root`; raises BundleError when it holds no release."""
    root = Path(root).absolute()
    if not is_published(root):
        raise BundleError(f"{root} holds no {RELEASE}: make a published tree with `qdeploy bundle`")
    return root
