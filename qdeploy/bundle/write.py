"""Ladder -> published tree: code the planes, pack them in fetch order, check every level, then name the folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdeploy.bundle.codec import encode
from qdeploy.bundle.manifest import manifest_bytes, release_bytes
from qdeploy.bundle.planes import PackedPart, gather, split_cheapest
from qdeploy.bundle.store import RELEASE_NAME, leaf_digests, manifest_name, object_name, verify_tree
from qdeploy.bundle.tables import (
    FILE_NAME,
    Artifact,
    Level,
    Manifest,
    Object,
    Part,
    Piece,
    Release,
    Tensor,
)
from qdeploy.bundle.validate import check
from qdeploy.errors import BundleError
from qdeploy.files import new_folder, parse_json, read_bytes, sha256, write_atomic
from qdeploy.ladder import Ladder
from qdeploy.nesting import lowest

PACK_BYTES = 1 << 20  # an object is closed when it has reached this size
ARTIFACT_FORMAT = "qdeploy-artifact/2"
Echo = Callable[[str], None]


@dataclass(frozen=True)
class _Coded:
    """A piece before it has its place. Pieces of one `group` are fetched together; groups sort in fetch order."""

    key: tuple[Any, ...]
    group: tuple[int, ...]
    codec: str
    data: bytes
    raw: int


def write_bundle(
    ladder: Ladder,
    artifacts: Sequence[Path],
    out: Path,
    force: bool = False,
    release: int = 1,
    echo: Echo | None = None,
) -> Manifest:
    """Write ladder and artifact folders as a published tree at `out`; return its manifest.

    Every level is rebuilt from the written packs and compared with its ONNX file before the folder gets its name.
    Raises BundleError when an artifact belongs to another graph or is damaged, DeviceError when `out` cannot be
    written.
    """
    say = echo or (lambda text: None)
    compiled = [_read_artifact(Path(folder), ladder.graph, i) for i, folder in enumerate(artifacts)]
    targets = [target for target, _ in compiled]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            raise BundleError(f"{artifacts[i]} and another artifact are for the same target: leave one out")
    planes, parts = _planes(ladder)
    coded = [_skeleton(ladder), *planes, *_sides(ladder)]
    coded += [piece for _, pieces in compiled for piece in pieces]
    coded.sort(key=lambda piece: piece.group)  # stable: inside a group, the order above
    manifest, packs = _lay_out(ladder, coded, parts, targets, release)
    with new_folder(out, force) as folder:
        _write_tree(folder, manifest, packs)
        say(f"{len(manifest.objects)} objects, {sum(len(pack) for pack in packs)} bytes; rebuilding every level")
        if verify_tree(folder) != manifest:
            raise BundleError("the manifest does not read back as it was written")
    return manifest


# --- pieces ----------------------------------------------------------------------------------------------------------


def _group(members: Sequence[bool]) -> tuple[int, ...]:
    """Fetch order of pieces that these levels hold: by the first level that does, most widely used first."""
    return tuple(0 if member else 1 for member in members)


def _is_below(ladder: Ladder, low: str, high: str) -> bool:
    return all(tensor.levels[low].bits <= tensor.levels[high].bits for tensor in ladder.tensors)


def _skeleton(ladder: Ladder) -> _Coded:
    data, kept, end = ladder.levels[0].data, [], 0
    for area in ladder.initializers:
        if area.kind != "fixed":
            kept.append(data[end : area.offset])
            end = area.offset + area.length
    raw = b"".join([*kept, data[end:]])
    return _Coded(("skeleton",), _group([True] * len(ladder.levels)), *encode(raw), len(raw))


def _planes(ladder: Ladder) -> tuple[list[_Coded], list[list[Part]]]:
    """Pieces of planes, and the parts of every tensor; their `piece` counts these pieces.

    Planes that are fetched together share pieces, plane by plane.
    """
    packed = [split_cheapest(tensor.u, tensor.bits, lowest(tensor), tensor.caps) for tensor in ladder.tensors]
    together: dict[tuple[tuple[int, ...], int], list[tuple[int, PackedPart]]] = {}
    for number, (tensor, parts) in enumerate(zip(ladder.tensors, packed, strict=True)):
        held = 0
        for part in parts:
            group = _group([tensor.levels[level.name].bits >= held + part.bits for level in ladder.levels])
            together.setdefault((group, held), []).append((number, part))
            held += part.bits
    pieces: list[_Coded] = []
    placed: list[list[Part]] = [[] for _ in packed]
    for (group, _), members in sorted(together.items(), key=lambda item: item[0]):
        queue = iter(members)
        for piece in gather([part for _, part in members]):
            for start in piece.starts:
                number, part = next(queue)
                placed[number].append(Part(part.bits, part.layout, len(pieces), start))
            pieces.append(_Coded(("planes", len(pieces)), group, piece.codec, piece.data, piece.raw))
    return pieces, placed


def _sides(ladder: Ladder) -> list[_Coded]:
    areas = [area for area in ladder.initializers if area.kind == "side"]
    pieces = []
    for level in ladder.levels if areas else ():
        raw = b"".join(level.data[area.offset : area.offset + area.length] for area in areas)
        members = [_is_below(ladder, level.name, other.name) for other in ladder.levels]
        pieces.append(_Coded(("side", level.name), _group(members), *encode(raw), len(raw)))
    return pieces


def _read_artifact(folder: Path, graph: str, index: int) -> tuple[dict[str, Any], list[_Coded]]:
    """(target, pieces) of an artifact folder: artifact.json and the files that it names, each checked."""
    head_data = read_bytes(folder / "artifact.json", "the artifact's", BundleError)
    head = parse_json(head_data, str(folder / "artifact.json"), BundleError)
    if not isinstance(head, dict) or head.get("format") != ARTIFACT_FORMAT:
        raise BundleError(f"{folder} is not an artifact folder ({ARTIFACT_FORMAT}): compile it again")
    if head.get("graph") != graph:
        raise BundleError(f"artifact {folder} was compiled from another graph than this ladder's: compile it again")
    files, target = head.get("files"), head.get("target")
    if not isinstance(files, dict) or not files or not isinstance(target, dict) or not target:
        raise BundleError(f"{folder}/artifact.json names no files or no target: compile it again")
    contents = {"artifact.json": head_data}
    for name, digest in sorted(files.items()):
        if not FILE_NAME.fullmatch(name) or name in contents:
            raise BundleError(f"{folder}/artifact.json names the file {name!r}: only plain file names are allowed")
        contents[name] = read_bytes(folder / name, "the artifact's file", BundleError)
        if sha256(contents[name]) != digest:
            raise BundleError(f"{folder / name} is not the file that artifact.json names: compile it again")
    pieces = []
    for name, data in sorted(contents.items()):
        pieces.append(_Coded(("artifact", index, name), (2, index), *encode(data), len(data)))
    return target, pieces


# --- packs and manifest ----------------------------------------------------------------------------------------------


def _pack(coded: Sequence[_Coded]) -> tuple[list[bytes], list[Piece]]:
    """Objects of about PACK_BYTES that never mix groups, and the place of every piece."""
    packs: list[bytes] = []
    pieces: list[Piece] = []
    left = Counter[tuple[int, ...]]()  # bytes of a group that have no place yet
    for piece in coded:
        left[piece.group] += len(piece.data)
    current: list[bytes] = []
    size = 0
    for i, piece in enumerate(coded):
        pieces.append(Piece(len(packs), size, len(piece.data), piece.raw, piece.codec, sha256(piece.data)))
        current.append(piece.data)
        size += len(piece.data)
        left[piece.group] -= len(piece.data)
        full = size >= PACK_BYTES and left[piece.group] >= PACK_BYTES // 4  # a small rest is no object of its own
        if full or i + 1 == len(coded) or coded[i + 1].group != piece.group:
            packs.append(b"".join(current))
            current, size = [], 0
    return packs, pieces


def _lay_out(
    ladder: Ladder,
    coded: Sequence[_Coded],
    parts: Sequence[Sequence[Part]],
    targets: Sequence[dict[str, Any]],
    release: int,
) -> tuple[Manifest, list[bytes]]:
    """Manifest and packs of pieces that are in fetch order."""
    packs, pieces = _pack(coded)
    place = {piece.key: i for i, piece in enumerate(coded)}
    tensors = [
        Tensor(own.name, own.bits, tuple(replace(part, piece=place["planes", part.piece]) for part in row), own.caps)
        for own, row in zip(ladder.tensors, parts, strict=True)
    ]
    levels = tuple(
        Level(
            level.name,
            sha256(level.data),
            tuple(tensor.levels[level.name] for tensor in ladder.tensors),
            place.get(("side", level.name)),
            level.golden,
            level.info,
        )
        for level in ladder.levels
    )
    compiled = []
    for i, target in enumerate(targets):
        files = tuple((key[2], place[key]) for key in place if key[:2] == ("artifact", i))
        compiled.append(Artifact(target, files))
    objects = tuple(Object(sha256(pack), len(pack), leaf_digests(pack)) for pack in packs)
    manifest = Manifest(
        ladder.model,
        release,
        ladder.graph,
        len(ladder.levels[0].data),
        objects,
        tuple(pieces),
        place["skeleton",],
        ladder.initializers,
        tuple(tensors),
        levels,
        tuple(compiled),
    )
    return check(manifest), packs


def _write_tree(folder: Path, manifest: Manifest, packs: Sequence[bytes]) -> None:
    data = manifest_bytes(manifest)
    digest = sha256(data)
    for entry, pack in zip(manifest.objects, packs, strict=True):
        write_atomic(folder / object_name(entry.sha256), pack)
    write_atomic(folder / manifest_name(digest), data)
    write_atomic(folder / RELEASE_NAME, release_bytes(Release(digest, len(data), manifest.release)))
