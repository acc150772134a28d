"""Room on the disk of a device: what its folder takes, its quota, and eviction, which nothing does by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qdeploy.bundle.manifest import Manifest
from qdeploy.bundle.store import manifest_name, object_name
from qdeploy.client import disk as edge
from qdeploy.client.artifact import artifact_folder
from qdeploy.client.disk import sync_folder, writing
from qdeploy.client.plan import Layout, piece_kinds
from qdeploy.client.state import Current, DeviceFolder, open_choice, write_folder
from qdeploy.errors import BundleError, DeviceError


@dataclass(frozen=True)
class Evicted:
    """What went: files and bytes on disk."""

    files: int
    bytes: int


def taken(path: Path) -> int:
    """Bytes that a file takes, holes left out; 0 when it is gone."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return min(found.st_size, found.st_blocks * 512)


def used(folder: Path) -> int:
    """Bytes that all files of a device folder take."""
    return sum(taken(path) for path in Path(folder).rglob("*") if path.is_file())


def _keeps(current: Current, manifest: Manifest) -> set[str]:
    """Files and folders, below the device folder, that the level in force needs, and lower ones."""
    kinds = piece_kinds(manifest, current.level, current.artifact)
    names = {object_name(manifest.objects[manifest.pieces[piece].object].sha256) for piece in kinds}
    names.add(manifest_name(current.manifest))
    if current.artifact is not None:
        names.add(artifact_folder(manifest, current.artifact))
    return names


def evictable(folder: DeviceFolder) -> list[Path]:
    """Files that neither the level in force nor a lower one needs."""
    current, manifest = open_choice(folder)
    keep = _keeps(current, manifest)
    found = [*folder.path.glob("objects/*"), *folder.path.glob("manifests/*"), *folder.path.glob("artifacts/*/*")]
    return sorted(p for p in found if not {str(x.relative_to(folder.path)) for x in (p, p.parent)} & keep)


def check_quota(folder: DeviceFolder, manifest: Manifest, layout: Layout, quota: int | None, more: int) -> None:
    """Raise DeviceError when what is missing and `more` bytes beside it would not fit in `quota` bytes."""
    if quota is None:
        return
    needed = layout.missing_bytes(folder.journal()) + more
    have = used(folder.path)
    if not needed or have + needed <= quota:
        return
    try:
        free = sum(taken(path) for path in evictable(folder))
    except BundleError:  # nothing is in force yet
        free = 0
    raise DeviceError(
        f"{manifest.model} release {manifest.release} needs {needed} bytes more, {folder.path} takes {have} and may "
        f"take {quota}: `qdeploy evict {folder.path}` would free {free}, or raise --quota; nothing was fetched"
    )


def foresee(folder: Path) -> Evicted:
    """What `evict` would remove now. Raises BundleError."""
    gone = evictable(DeviceFolder(folder))
    return Evicted(len(gone), sum(taken(path) for path in gone))


def evict(folder: Path) -> Evicted:
    """Remove planes above the level in force, other releases and other artifacts. The level before goes with them if it
    needs any of that. Raises BundleError, DeviceError.

    A crash leaves files that nothing refers to, which the next eviction removes.
    """
    with write_folder(folder) as writer:
        current, manifest = open_choice(writer)
        gone, keep = evictable(writer), _keeps(current, manifest)
        if current.previous is not None and not _still_there(current, manifest, keep):
            writer.point(replace(current, previous=None))
        writer.keep_only({extent for extent in writer.held if object_name(extent.object) in keep})
        freed = sum(taken(path) for path in gone)
        with writing(writer.path):
            for path in gone:
                edge.disk.unlink(path)
            for parent in sorted({path.parent for path in gone}):
                if parent.parent.name == "artifacts" and not any(parent.iterdir()):
                    edge.disk.rmdir(parent)
                else:
                    sync_folder(parent)
    return Evicted(len(gone), freed)


def _still_there(current: Current, manifest: Manifest, keep: set[str]) -> bool:
    """Whether the choice before needs no more than what is kept."""
    assert current.previous is not None
    digest, level = current.previous
    if digest != current.manifest or level not in [entry.name for entry in manifest.levels]:
        return False
    return _keeps(replace(current, level=level), manifest) <= keep
