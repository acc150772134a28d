"""What a published tree offers, for those who run it: releases, levels, the objects that hold them, and the rollout.

Read from one's own disk: lengths and digests are checked from the timestamp down, as a device does, signatures are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.bundle.manifest import Manifest, parse_manifest, parse_release
from qdeploy.bundle.rollout import (
    MAX_ROLLOUT,
    ROLLOUT_TARGET,
    Channels,
    Entry,
    metadata_name,
    parse_rollout,
    rollout_name,
)
from qdeploy.bundle.store import RELEASE_NAME, artifact_pieces, manifest_name, pieces_of
from qdeploy.errors import BundleError
from qdeploy.files import parse_json, read_bytes, sha256
from qdeploy.serve.tree import TIMESTAMP

OBJECTS = 100  # rows of the table of objects; the largest come first
AGAIN = "publish again"


@dataclass(frozen=True)
class Signed:
    """The metadata in force: the rollout, and by role the version and the time of expiry (ISO 8601, UTC)."""

    rollout: dict[str, Channels]
    versions: Mapping[str, int]
    expires: Mapping[str, str]


def _named(root: Path, path: str, entry: Mapping[str, Any], what: str) -> bytes:
    """A file with the length and SHA-256 that `entry` gives."""
    data = read_bytes(root / path, what, BundleError)
    if len(data) != entry.get("length", len(data)) or sha256(data) != entry["hashes"]["sha256"]:
        raise BundleError(f"{what} {root / path} is damaged: {AGAIN}")
    return data


def read_signed(root: Path) -> Signed:
    """timestamp -> snapshot -> targets -> rollout of a tree of one's own; raises BundleError."""
    root = Path(root)
    if not (root / TIMESTAMP).is_file():
        raise BundleError(f"{root} has no signed rollout: make one with `qdeploy publish`")
    data = read_bytes(root / TIMESTAMP, "the timestamp", BundleError)
    versions, expires, names = {}, {}, {"timestamp": "snapshot.json", "snapshot": "targets.json", "targets": ""}
    try:
        for role, below in names.items():
            signed = parse_json(data, f"the {role} metadata of {root}", BundleError)["signed"]
            versions[role], expires[role] = int(signed["version"]), str(signed["expires"])
            if below:
                entry = signed["meta"][below]
                data = _named(
                    root, metadata_name(below[:-5], int(entry["version"])), entry, f"the {below[:-5]} metadata"
                )
        target = signed["targets"][ROLLOUT_TARGET]
        data = _named(root, rollout_name(str(target["hashes"]["sha256"])), target, "the rollout")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(f"the metadata of {root} is not what qdeploy writes ({e!r}): {AGAIN}") from e
    if len(data) > MAX_ROLLOUT:
        raise BundleError(f"the rollout of {root} is damaged: {AGAIN}")
    return Signed(parse_rollout(data), versions, expires)


@dataclass(frozen=True)
class Summary:
    """A release for people. All bytes are coded ones, as they cross the network.

    `levels` {"name", "bytes" that a device at this level has fetched, "step": those that a climb from the level before
    it in the manifest costs}; `artifacts` {"name", "bytes"}; `objects` {"sha256", "size", "of": who needs it first}.
    """

    model: str
    release: int
    levels: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)


def summary_of(manifest: Manifest) -> Summary:
    """What of a manifest an operator looks at."""
    sizes = [piece.size for piece in manifest.pieces]
    found = Summary(manifest.model, manifest.release)
    needed: dict[int, list[str]] = {}
    before: set[int] = set()
    taken: set[int] = set()

    def place(pieces: set[int], name: str) -> None:
        for index in sorted({manifest.pieces[piece].object for piece in pieces - taken}):
            needed.setdefault(index, []).append(name)
        taken.update(pieces)

    for level in manifest.levels:
        pieces = set(pieces_of(manifest, level.name))
        total, step = (sum(sizes[piece] for piece in group) for group in (pieces, pieces - before))
        found.levels.append({"name": level.name, "bytes": total, "step": step})
        place(pieces, level.name)
        before = pieces
    for index, artifact in enumerate(manifest.artifacts):
        pieces = set(artifact_pieces(manifest, index))
        name = str(artifact.target.get("name", index))
        found.artifacts.append({"name": name, "bytes": sum(sizes[piece] for piece in pieces)})
        place(pieces, f"program for {name}")
    for index, entry in enumerate(manifest.objects):
        found.objects.append({"sha256": entry.sha256, "size": entry.size, "of": needed.get(index, [])})
    return found


class Catalogue:
    """Reads a tree again and again; summaries of manifests are remembered by their digest."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._summaries: dict[str, Summary] = {}
        self._stored: tuple[int, dict[str, int]] = (-1, {})

    def _summary(self, digest: str) -> Summary:
        if digest not in self._summaries:
            data = read_bytes(self._root / manifest_name(digest), "the manifest", BundleError)
            if sha256(data) != digest:
                raise BundleError(f"manifest {digest} is damaged: {AGAIN}")
            self._summaries[digest] = summary_of(parse_manifest(data))
        return self._summaries[digest]

    def read(self) -> tuple[dict[str, Any], dict[str, Channels] | None]:
        """JSON of what is in force: `releases` (a row a channel), `objects`, and of a signed tree `versions` and
        `expires`; and its rollout, None of an unsigned one. Raises BundleError."""
        rollout = None
        if (self._root / TIMESTAMP).is_file():
            signed = read_signed(self._root)
            rollout = signed.rollout
            channels: list[tuple[str, str | None, Entry]] = [
                (model, name, entry)
                for model, found in sorted(signed.rollout.items())
                for name, entry in (("stable", found.stable), ("canary", found.canary))
                if entry is not None
            ]
            more: dict[str, Any] = {"versions": dict(signed.versions), "expires": dict(signed.expires)}
        else:
            pointer = parse_release(read_bytes(self._root / RELEASE_NAME, "the release", BundleError))
            entry = Entry(pointer.release, pointer.sha256, pointer.size)
            channels, more = [(self._summary(entry.sha256).model, None, entry)], {"versions": {}, "expires": {}}
        rows = [self._row(model, name, entry) for model, name, entry in channels]
        objects = self._objects([(f"{row['model']} {row['release']}", row["sha256"]) for row in rows])
        kept = {row["sha256"] for row in rows}
        self._summaries = {digest: found for digest, found in self._summaries.items() if digest in kept}
        return {"signed": rollout is not None, "releases": rows, "objects": objects, **more}, rollout

    def _row(self, model: str, channel: str | None, entry: Entry) -> dict[str, Any]:
        found = self._summary(entry.sha256)
        row = asdict(entry) | {"model": model, "channel": channel, "levels": found.levels, "artifacts": found.artifacts}
        sizes = [entry["size"] for entry in found.objects]
        return row | {"classes": dict(entry.levels), "objects": len(sizes), "objects_bytes": sum(sizes)}

    def _objects(self, releases: list[tuple[str, str]]) -> dict[str, Any]:
        """Objects of the releases in force, with who shares them, and how much lies on disk in all."""
        rows: dict[str, dict[str, Any]] = {}
        for name, digest in dict.fromkeys(releases):
            for entry in self._summary(digest).objects:
                row = rows.setdefault(entry["sha256"], entry | {"releases": []})
                row["releases"] = sorted({*row["releases"], name})
        stored = self._on_disk()
        shared = [row for row in rows.values() if len(row["releases"]) > 1]
        return {
            "rows": sorted(rows.values(), key=lambda row: (-row["size"], row["sha256"]))[:OBJECTS],
            "count": len(rows),
            "bytes": sum(row["size"] for row in rows.values()),
            "shared": len(shared),
            "shared_bytes": sum(row["size"] for row in shared),
            "missing": sorted(set(rows) - set(stored))[:OBJECTS],
            "stored": len(stored),
            "stored_bytes": sum(stored.values()),
        }

    def _on_disk(self) -> dict[str, int]:
        """{name: bytes} of the folder of objects, listed again when it has changed."""
        folder = self._root / "objects"
        try:
            changed = folder.stat().st_mtime_ns
            if changed != self._stored[0]:
                with_size = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
                self._stored = (changed, {name: size for name, size in with_size.items() if not name.startswith(".")})
        except FileNotFoundError:
            return {}
        except OSError as e:
            raise BundleError(f"cannot list {folder}: {e.strerror or e}") from e
        return self._stored[1]
