"""Small published trees for the client's tests: real planes, packs and manifests around an invented ONNX file.

Nothing in the client reads ONNX, so the file is just random bytes with holes; its levels nest as a real ladder's do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.bundle.codec import encode
from qdeploy.bundle.manifest import (
    Artifact,
    Initializer,
    Level,
    Manifest,
    Object,
    Part,
    Piece,
    Release,
    Tensor,
    TensorLevel,
    check,
    manifest_bytes,
    release_bytes,
)
from qdeploy.bundle.planes import pack
from qdeploy.bundle.store import RELEASE_NAME, leaf_digests, manifest_name, object_name
from qdeploy.files import sha256, write_atomic

SIDE_BYTES = 40


@dataclass(frozen=True)
class Tree:
    """A published tree, its manifest, and each level's file as it must come out."""

    root: Path
    manifest: Manifest
    files: Mapping[str, bytes] = field(repr=False)

    @property
    def digest(self) -> str:
        return sha256(manifest_bytes(self.manifest))

    def object_path(self, index: int) -> Path:
        return self.root / object_name(self.manifest.objects[index].sha256)


Row = tuple[Any, str, bytes, int]  # key of a piece, codec, coded bytes, raw length


@dataclass(frozen=True)
class _Ladder:
    """What a tree is made of: top codes and side tensors, and where they lie in the invented file."""

    levels: tuple[int, ...]
    codes: tuple[np.ndarray, ...]  # uint8, each weight tensor at the top width
    sides: Mapping[int, np.ndarray]  # float32 [tensors, SIDE_BYTES / 4] of each level
    areas: tuple[Initializer, ...]
    skeleton: bytes

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.skeleton) + sum(area.length for area in self.areas)

    @property
    def widths(self) -> list[int]:
        """Planes of each part: the lowest level's together, then one by one."""
        return [self.levels[0]] + [1] * (max(self.levels) - self.levels[0])

    def plane(self, u: np.ndarray, k: int) -> tuple[str, bytes, int]:
        """Part `k` of codes `u`: codec, coded bytes, raw length."""
        width, behind = self.widths[k], sum(self.widths[k + 1 :])
        symbols = (u >> np.uint8(behind)) & np.uint8((1 << width) - 1)
        raw = pack(symbols.reshape(-1), width, "tight")
        return (*encode(raw), len(raw))

    def packs(self) -> list[list[Row]]:
        """The pieces of each level beyond the one below it."""
        found: list[list[Row]] = []
        for step, bits in enumerate(self.levels):
            rows: list[Row] = [] if step else [("skeleton", *encode(self.skeleton), len(self.skeleton))]
            below = self.levels[step - 1] if step else 0
            for k in range(len(self.widths)):
                if below < sum(self.widths[: k + 1]) <= bits:
                    rows += [((i, k), *self.plane(u, k)) for i, u in enumerate(self.codes)]
            raw = self.sides[bits].tobytes()
            found.append([*rows, (("side", bits), *encode(raw), len(raw))])
        return found

    def file(self, bits: int) -> bytes:
        """The whole file of a level."""
        top, tensors = max(self.levels), {}
        for i, u in enumerate(self.codes):
            prefix = (u >> np.uint8(top - bits)).astype(np.int64)
            tensors[f"layer{i}.weight"] = ((prefix - (1 << (bits - 1))) << (7 - bits)).astype(np.int8).tobytes()
            tensors[f"layer{i}.scale"] = self.sides[bits][i].tobytes()
        data, kept, end = b"", 0, 0
        for area in self.areas:
            step = area.offset - end
            data += self.skeleton[kept : kept + step] + tensors[area.name]
            kept, end = kept + step, area.offset + area.length
        return data + self.skeleton[kept:]


def _areas(shapes: list[tuple[int, int]], gap: int) -> tuple[tuple[Initializer, ...], int]:
    """A weight and a side tensor for each shape with `gap` bytes around them, and the length of the file."""
    areas, at = [], gap
    for i, shape in enumerate(shapes):
        areas.append(Initializer(f"layer{i}.weight", "int8", shape, at, "planes"))
        at += areas[-1].length + gap
        areas.append(Initializer(f"layer{i}.scale", "float32", (SIDE_BYTES // 4,), at, "side"))
        at += areas[-1].length + gap
    return tuple(areas), at


def _ladder(levels: tuple[int, ...], weights: tuple[int, ...], gap: int, rng: np.random.Generator) -> _Ladder:
    top, shapes = max(levels), [(max(1, n // 10), 10) for n in weights]
    codes = [np.clip(rng.normal(1 << (top - 1), 1 << (top - 2), s), 0, (1 << top) - 1).astype(np.uint8) for s in shapes]
    areas, size = _areas(shapes, gap)
    skeleton = rng.integers(0, 256, size - sum(area.length for area in areas), np.uint8).tobytes()
    sides = {n: rng.normal(size=(len(shapes), SIDE_BYTES // 4)).astype("<f4") for n in levels}
    return _Ladder(levels, tuple(codes), sides, areas, skeleton)


def _write_packs(root: Path, packs: list[list[Row]]) -> tuple[dict[Any, int], list[Piece], list[Object]]:
    """Write one object a pack; {key: piece}, pieces, objects."""
    place, pieces, objects = {}, [], []
    for rows in packs:
        offset = 0
        for key, codec, coded, raw_size in rows:
            place[key] = len(pieces)
            pieces.append(Piece(len(objects), offset, len(coded), raw_size, codec, sha256(coded)))
            offset += len(coded)
        data = b"".join(row[2] for row in rows)
        objects.append(Object(sha256(data), len(data), leaf_digests(data)))
        write_atomic(root / object_name(objects[-1].sha256), data)
    return place, pieces, objects


def make_tree(
    root: Path,
    levels: tuple[int, ...] = (2, 3, 4),
    weights: tuple[int, ...] = (3000, 500),
    seed: int = 0,
    release: int = 1,
    model: str = "toy",
    artifact_bytes: int = 0,
    target: Mapping[str, Any] | None = None,
    gap: int = 100,
) -> Tree:
    """Publish a ladder at `root`: a level "wN" for each width, one pack for each level (and one for an artifact)."""
    rng = np.random.default_rng(seed)
    ladder = _ladder(levels, weights, gap, rng)
    packs = ladder.packs()
    if artifact_bytes:
        library = rng.integers(0, 256, artifact_bytes, np.uint8).tobytes()
        packs.append([("artifact", "raw", library, len(library))])
    place, pieces, objects = _write_packs(root, packs)
    files = {f"w{bits}": ladder.file(bits) for bits in levels}
    parts = [
        tuple(Part(width, "tight", place[i, k], 0) for k, width in enumerate(ladder.widths))
        for i in range(len(ladder.codes))
    ]
    rows = {bits: (TensorLevel(bits, 7 - bits, 0),) * len(parts) for bits in levels}
    artifacts = (Artifact(target or {"name": "toy"}, (("lib.so", place["artifact"]),)),) if artifact_bytes else ()
    manifest = Manifest(
        model=model,
        release=release,
        graph=hashlib.sha256(b"graph").hexdigest(),
        size=ladder.size,
        objects=tuple(objects),
        pieces=tuple(pieces),
        skeleton=place["skeleton"],
        initializers=ladder.areas,
        tensors=tuple(Tensor(f"layer{i}.weight", max(levels), own) for i, own in enumerate(parts)),
        levels=tuple(Level(f"w{n}", sha256(files[f"w{n}"]), rows[n], place["side", n]) for n in levels),
        artifacts=artifacts,
    )
    publish(root, check(manifest))
    return Tree(root, manifest, files)


def publish(root: Path, manifest: Manifest) -> None:
    """Write the manifest and point release.json at it."""
    data = manifest_bytes(manifest)
    write_atomic(root / manifest_name(sha256(data)), data)
    write_atomic(root / RELEASE_NAME, release_bytes(Release(sha256(data), len(data), manifest.release)))
