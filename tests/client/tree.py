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
    top = max(levels)
    shapes = [(max(1, n // 10), 10) for n in weights]
    codes = [np.clip(rng.normal(1 << (top - 1), 1 << (top - 2), s), 0, (1 << top) - 1).astype(np.uint8) for s in shapes]
    widths = [levels[0]] + [1] * (top - levels[0])
    areas, at = [], gap
    for i, shape in enumerate(shapes):
        areas.append(Initializer(f"layer{i}.weight", "int8", shape, at, "planes"))
        at += areas[-1].length + gap
        areas.append(Initializer(f"layer{i}.scale", "float32", (SIDE_BYTES // 4,), at, "side"))
        at += areas[-1].length + gap
    size = at
    skeleton = rng.integers(0, 256, size - sum(area.length for area in areas), np.uint8).tobytes()
    sides = {n: rng.normal(size=(len(shapes), SIDE_BYTES // 4)).astype("<f4") for n in levels}
    starts = [sum(widths[:k]) for k in range(len(widths))]

    def plane(u: np.ndarray, k: int) -> tuple[str, bytes, int]:
        symbols = (u >> np.uint8(top - starts[k] - widths[k])) & np.uint8((1 << widths[k]) - 1)
        raw = pack(symbols.reshape(-1), widths[k], "tight")
        return (*encode(raw), len(raw))

    packs: list[list[tuple[Any, str, bytes, int]]] = []  # (key, codec, coded, raw) by pack
    first: list[tuple[Any, str, bytes, int]] = [("skeleton", *encode(skeleton), len(skeleton))]
    for step, bits in enumerate(levels):
        rows = first if step == 0 else []
        done = 0
        for k, width in enumerate(widths):
            done += width
            if (levels[step - 1] if step else 0) < done <= bits:
                rows += [((i, k), *plane(u, k)) for i, u in enumerate(codes)]
        raw = sides[bits].tobytes()
        rows.append((("side", bits), *encode(raw), len(raw)))
        packs.append(rows)
    library = rng.integers(0, 256, artifact_bytes, np.uint8).tobytes()
    if artifact_bytes:
        packs.append([("artifact", "raw", library, len(library))])

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

    files, entries = {}, []
    for bits in levels:
        entry = TensorLevel(bits, 7 - bits, 0)
        tensors = {}
        for i, u in enumerate(codes):
            prefix = (u >> np.uint8(top - bits)).astype(np.int64)
            tensors[f"layer{i}.weight"] = ((prefix - (1 << (bits - 1))) << (7 - bits)).astype(np.int8).tobytes()
            tensors[f"layer{i}.scale"] = sides[bits][i].tobytes()
        data, kept, end = b"", 0, 0
        for area in areas:
            step = area.offset - end
            data += skeleton[kept : kept + step] + tensors[area.name]
            kept, end = kept + step, area.offset + area.length
        files[f"w{bits}"] = data + skeleton[kept:]
        rows_ = tuple(entry for _ in shapes)
        entries.append(Level(f"w{bits}", sha256(files[f"w{bits}"]), rows_, place["side", bits]))
    library_row = Artifact(target or {"name": "toy"}, (("lib.so", place["artifact"]),)) if artifact_bytes else None
    manifest = check(
        Manifest(
            model=model,
            release=release,
            graph=hashlib.sha256(b"graph").hexdigest(),
            size=size,
            objects=tuple(objects),
            pieces=tuple(pieces),
            skeleton=place["skeleton"],
            initializers=tuple(areas),
            tensors=tuple(
                Tensor(f"layer{i}.weight", top, tuple(Part(w, "tight", place[i, k], 0) for k, w in enumerate(widths)))
                for i in range(len(shapes))
            ),
            levels=tuple(entries),
            artifacts=(library_row,) if library_row else (),
        )
    )
    publish(root, manifest)
    return Tree(root, manifest, files)


def publish(root: Path, manifest: Manifest) -> None:
    """Write the manifest and point release.json at it."""
    data = manifest_bytes(manifest)
    write_atomic(root / manifest_name(sha256(data)), data)
    write_atomic(root / RELEASE_NAME, release_bytes(Release(sha256(data), len(data), manifest.release)))
