"""Planes that the library cannot join, those of tensors with caps, joined by the runner itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from qdeploy.bundle.manifest import Manifest, manifest_bytes
from qdeploy.bundle.planes import split
from qdeploy.bundle.store import leaf_digests, level_tensors, tensor_prefix
from qdeploy.bundle.tables import Object, Part, Piece, Tensor
from qdeploy.client.state import Current, DeviceFolder, current_bytes
from qdeploy.compile.artifact import load_artifact
from qdeploy.files import sha256
from tests.runner.conftest import Demo
from tests.runner.programs import run


def capped(device: Path, to: Path, rng: np.random.Generator) -> tuple[DeviceFolder, Manifest]:
    """A copy of a device folder whose weight tensors have random caps: low planes of some channels are gone."""
    shutil.copytree(device, to)
    held = DeviceFolder(device)
    current = held.chosen()
    manifest = held.manifest(current.manifest)
    read, pieces, blob = held.reader(manifest), [], b""

    def add(raw: bytes) -> int:
        nonlocal blob
        pieces.append(Piece(0, len(blob), len(raw), len(raw), "raw", sha256(raw)))
        blob += raw
        return len(pieces) - 1

    tensors, areas = [], manifest.of_kind("planes")
    for tensor, area in zip(manifest.tensors, areas, strict=True):
        widths = [part.bits for part in tensor.parts]
        steps = [0, *np.cumsum(widths).tolist()]
        caps = tuple(rng.choice(steps, area.shape[0] - 1).tolist()) + (tensor.bits,)
        u = tensor_prefix(tensor, area, tensor.bits, read)
        for channel, cap in enumerate(caps):
            u[channel] &= (0xFF << (tensor.bits - cap)) & 0xFF
        packed = split(u, tensor.bits, widths, caps)
        parts = [Part(p.bits, p.layout, add(b"".join(p.segments)), 0) for p in packed if b"".join(p.segments)]
        tensors.append(Tensor(tensor.name, tensor.bits, tuple(parts), caps))
    skeleton = add(read(manifest.skeleton))
    levels = []
    for level in manifest.levels:
        rows = zip(level.tensors, tensors, strict=True)
        entries = [replace(row, offset=(row.offset,) * (tensor.bits + 1)) for row, tensor in rows]
        side = None if level.side is None else add(read(level.side))
        levels.append(replace(level, tensors=tuple(entries), side=side))
    objects = (Object(sha256(blob), len(blob), leaf_digests(blob)),)
    changed = replace(
        manifest, objects=objects, pieces=tuple(pieces), tensors=tuple(tensors), levels=tuple(levels), artifacts=(),
        skeleton=skeleton,
    )  # fmt: skip
    data = manifest_bytes(changed)
    (to / "objects" / sha256(blob)).write_bytes(blob)
    (to / "manifests" / f"{sha256(data)}.json").write_bytes(data)
    (to / "current.json").write_bytes(current_bytes(Current("", sha256(data), current.level)))
    folder = DeviceFolder(to)
    return folder, folder.manifest(sha256(data))


def test_channels_with_fewer_planes_give_the_outputs_of_python(demo: Demo, tmp_path: Path) -> None:
    folder, manifest = capped(demo.device, tmp_path / "device", np.random.default_rng(2))
    loaded = load_artifact(demo.artifact)
    np.save(tmp_path / "x.npy", demo.images[:40])
    real = demo.images[:40].astype(np.float32) / np.float32(255)
    for level in ("w2", "w4"):
        packed = loaded.prepare(level_tensors(manifest, level, folder.reader(manifest)))
        outputs = np.concatenate([loaded.run(image[None], packed) for image in real])
        assert not np.array_equal(outputs, demo.outputs[level][:40])
        np.save(tmp_path / "y.npy", outputs)
        args = ("--artifact", demo.artifact, "--level", level, "--input", tmp_path / "x.npy", "--json")
        found = run(folder.path, *args, "--expect", tmp_path / "y.npy").report
        assert found["expect"] == {"compared": 400, "differing": 0}
