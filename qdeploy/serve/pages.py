"""Pages that ship with the package (qdeploy/web/NAME/): static files under a prefix, and what a browser may do there.

A page runs scripts of its own folder and talks to the server it came from, nothing else (Content-Security-Policy).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from aiohttp import web

from qdeploy.errors import DeviceError
from qdeploy.files import sha256
from qdeploy.serve.ranges import not_modified
from qdeploy.serve.tree import REVALIDATE, open_beneath

INDEX = "index.html"
TYPES = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8", "wasm": "application/wasm", "json": "application/json",
    "svg": "image/svg+xml", "png": "image/png", "jpg": "image/jpeg", "ico": "image/x-icon",
    "bin": "application/octet-stream", "npy": "application/octet-stream",
}  # fmt: skip
BESIDE = frozenset({"root.json", "sample/images.npy", "sample/labels.npy", "sample/classes.npy"})  # an operator's own
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
_PATH = re.compile(rf"(?:{_PART}/){{0,3}}{_PART}\.({'|'.join(TYPES)})", re.ASCII)


def policy(wasm: bool) -> str:
    """The Content-Security-Policy of a page; `wasm` also lets it compile WebAssembly."""
    rules = {
        "default-src": "'none'",
        "script-src": "'self' 'wasm-unsafe-eval'" if wasm else "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data: blob:" if wasm else "'self'",
        "worker-src": "'self'" if wasm else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


@dataclass(frozen=True)
class PageFile:
    """One file of a page: the folder, path parts below it, media type."""

    folder: Path
    parts: tuple[str, ...]
    media: str


class Pages:
    """The files of `folder` at `prefix`, which begins and ends with a slash. Raises DeviceError without an index.html.

    Only names of TYPES are served, matched undecoded; symbolic links are not followed, hidden files not shown. Files
    named in BESIDE come from the folder `beside`, if there is one.
    """

    def __init__(self, folder: Path, prefix: str, wasm: bool = False, beside: Path | None = None) -> None:
        if not (folder / INDEX).is_file():
            raise DeviceError(f"{folder / INDEX} is not there: install qdeploy again, with its pages")
        if beside is not None and not (beside / "root.json").is_file():
            raise DeviceError(f"{beside / 'root.json'} is not there: copy 1.root.json of the keys' folder to it")
        self.folder, self.prefix, self.beside = folder, prefix, beside
        self._headers = {
            "Cache-Control": REVALIDATE,
            "Content-Security-Policy": policy(wasm),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        self._tags: dict[tuple[int, int, int, int], str] = {}

    def find(self, raw_path: str) -> PageFile | None:
        """The file that a request's raw path names, or None; it may be missing on disk."""
        path = raw_path.partition("?")[0]
        if not path.startswith(self.prefix):
            return None
        match = _PATH.fullmatch(path[len(self.prefix) :] or INDEX)
        if match is None:
            return None
        folder = self.beside if self.beside is not None and match[0] in BESIDE else self.folder
        return PageFile(folder, tuple(match[0].split("/")), TYPES[match[1]])

    def wants_slash(self, raw_path: str) -> bool:
        """True for the prefix without its last slash, under which a page's relative links would miss."""
        return raw_path.partition("?")[0] == self.prefix[:-1]

    def open(self, page: PageFile) -> int:
        """Open the file for reading; raises OSError."""
        return open_beneath(page.folder, page.parts)

    def headers_of(self, page: PageFile, fd: int, size: int) -> tuple[str, dict[str, str]]:
        """Entity tag (SHA-256 of the content, remembered while the file stays as it is) and headers."""
        stat = os.fstat(fd)
        key = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, size)
        if key not in self._tags:
            if len(self._tags) > 1000:  # files that were replaced again and again
                self._tags.clear()
            self._tags[key] = sha256(os.pread(fd, size, 0))
        tag = self._tags[key]
        return tag, self._headers | {"ETag": f'"{tag}"', "Content-Type": page.media}

    def answer(self, request: web.BaseRequest) -> web.Response | None:
        """The whole answer to a request below the prefix, for small files; None for other names."""
        if self.wants_slash(request.raw_path):
            return web.Response(status=308, headers={"Location": self.prefix})
        page = self.find(request.raw_path)
        if page is None:
            return None
        try:
            fd = self.open(page)
        except OSError:
            return None
        try:
            size = os.fstat(fd).st_size
            tag, headers = self.headers_of(page, fd, size)
            if not_modified(request.headers.get("If-None-Match"), tag):
                return web.Response(status=304, headers=headers)
            return web.Response(body=os.pread(fd, size, 0), headers=headers)
        finally:
            os.close(fd)


def packaged(name: str, prefix: str, wasm: bool = False, beside: Path | None = None) -> Pages:
    """The pages of qdeploy/web/`name`; raises DeviceError."""
    return Pages(Path(str(files("qdeploy"))) / "web" / name, prefix, wasm, beside)
