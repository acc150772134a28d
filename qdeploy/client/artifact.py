"""The compiled artifact of a release: which one suits this machine, and its files on disk."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.bundle.manifest import Artifact, Manifest
from qdeploy.bundle.store import ReadPiece
from qdeploy.client.disk import write_file
from qdeploy.errors import BundleError
from qdeploy.files import canonical_json, sha256


def _features(target: Mapping[str, Any]) -> list[str]:
    value = target.get("features", ())
    return [str(name) for name in value] if isinstance(value, list | tuple) else [str(value)]


def unsuited(target: Mapping[str, Any], machine: str | None = None) -> str | None:
    """Why a machine (default: this one, whose GPU always counts) cannot run code for `target`; None when it can."""
    from qdeploy.target import gpu_problem, missing_features

    machine = machine or platform.machine()
    if target.get("arch") != machine:
        return f"it is for {target.get('arch')}, this machine is {machine}"
    if lacking := missing_features(_features(target)):
        return f"this machine's cpu lacks {', '.join(lacking)}"
    gpu = target.get("gpu")
    return None if gpu is None else gpu_problem(str(gpu))


def describe(artifact: Artifact) -> str:
    """Name of an artifact's hardware class."""
    return str(artifact.target.get("name", artifact.target.get("arch", "unnamed")))


def choose_artifact(manifest: Manifest, target: str | None) -> tuple[int | None, str | None]:
    """(index of the artifact to fetch, None) or (None, why there is none).

    `target` names a hardware class and is taken without looking at this machine, which may be a gateway; BundleError
    when the release has none of that name. Otherwise the suited one with the most features wins, those for a GPU first.
    """
    if target is not None:
        for index, artifact in enumerate(manifest.artifacts):
            if artifact.target.get("name") == target:
                return index, None
        names = ", ".join(describe(a) for a in manifest.artifacts) or "none"
        raise BundleError(f"no compiled artifact for {target!r} in {manifest.model}: there are {names}")
    if not manifest.artifacts:
        return None, "the release has no compiled artifact"
    reasons = [unsuited(artifact.target) for artifact in manifest.artifacts]
    suited = [index for index, reason in enumerate(reasons) if reason is None]
    if not suited:
        rows = zip(manifest.artifacts, reasons, strict=True)
        return None, "; ".join(f"{describe(artifact)}: {reason}" for artifact, reason in rows)

    def rank(index: int) -> tuple[bool, int, int]:
        wanted = manifest.artifacts[index].target
        return "gpu" in wanted, len(_features(wanted)), -index

    return max(suited, key=rank), None


def artifact_folder(manifest: Manifest, index: int) -> str:
    """Path below the device folder of an unpacked artifact: equal for equal files."""
    rows = [[name, manifest.pieces[piece].sha256] for name, piece in manifest.artifacts[index].files]
    return f"artifacts/{sha256(canonical_json(rows))}"


def unpack_artifact(folder: Path, manifest: Manifest, index: int, read: ReadPiece) -> Path:
    """Folder below `folder` with the artifact's files, each compared with its verified piece and mended if it differs.

    Raises BundleError when a piece is damaged, DeviceError when a file cannot be written.
    """
    files = manifest.artifacts[index].files
    target = Path(folder) / artifact_folder(manifest, index)
    for name, piece in files:
        data = read(piece)
        try:
            same = (target / name).read_bytes() == data
        except OSError:
            same = False
        if not same:
            write_file(target / name, data)
    return target
