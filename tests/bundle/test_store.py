from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.manifest import Manifest, manifest_bytes, release_bytes
from qdeploy.bundle.store import (
    ReadPiece,
    artifact_pieces,
    assemble,
    decode_piece,
    level_tensors,
    load_tree,
    manifest_name,
    object_name,
    pieces_of,
    tree_reader,
    verify_tree,
)
from qdeploy.bundle.tables import Release
from qdeploy.errors import BundleError
from qdeploy.files import sha256
from qdeploy.qdq import arrays, parse_model
from tests.bundle.small import small_tree


def test_level_tensors_are_the_initializers(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    read = tree_reader(tmp_path / "tree", manifest)
    for name in ("w2", "w3", "w4"):
        expected = arrays(parse_model((tmp_path / f"{name}.onnx").read_bytes()))
        found = level_tensors(manifest, name, read)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and found[key].shape == value.shape
            assert np.array_equal(found[key], value)


def test_capped_and_constant_tensors_are_left_to_numpy(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    read, asked = tree_reader(tmp_path / "tree", manifest), []

    def compiled(parts: Iterable[tuple[int, str, bytes]], count: int, shift: int, bias: int, planes: int) -> np.ndarray:
        assert planes == sum(bits for bits, _, _ in parts)
        asked.append((planes, shift, bias))
        return np.zeros(count, np.uint8)

    entry = manifest.level("w3").tensors[0]
    found = level_tensors(manifest, "w3", read, compiled)
    assert asked == [(3, entry.shift, entry.offset - (4 << entry.shift))] and not found["w.weight"].any()
    (tensor,), w3 = manifest.tensors, manifest.level("w3")
    capped = replace(tensor, caps=(tensor.bits,) * manifest.of_kind("planes")[0].shape[0])
    for one, level in ((capped, replace(entry, offset=(0,) * 5)), (tensor, replace(entry, bits=0))):
        changed = replace(manifest, tensors=(one,), levels=(replace(w3, tensors=(level,)),))
        level_tensors(changed, "w3", read, compiled)
    assert len(asked) == 1


def test_a_climb_fetches_the_difference_and_a_drop_nothing(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    asked: list[int] = []
    reader = tree_reader(tmp_path / "tree", manifest)

    def read(piece: int) -> bytes:
        asked.append(piece)
        return reader(piece)

    held = set(pieces_of(manifest, "w2"))
    for level in ("w2", "w3", "w4"):
        lacking = set(pieces_of(manifest, level)) - held
        assert bool(lacking) == (level != "w2")
        held |= lacking
        asked.clear()
        assemble(manifest, level, read)
        assert set(asked) <= held and len(asked) == len(set(asked))
    for level in ("w2", "w3"):
        assert set(pieces_of(manifest, level)) < held
    assert not held & set(artifact_pieces(manifest, 0))
    assert held | set(artifact_pieces(manifest, 0)) == set(range(len(manifest.pieces)))
    first = {manifest.pieces[piece].object for piece in pieces_of(manifest, "w2")}
    assert first == {0}  # the first inference: one sequential fetch


def test_unknown_level(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    for function in (pieces_of, lambda m, n: assemble(m, n, lambda piece: b"")):
        with pytest.raises(BundleError, match="no level 'w5' in w4: levels are w2, w3, w4"):
            function(manifest, "w5")


def load_everything(root: Path) -> Manifest:
    """What a device does, reading piece by piece."""
    manifest = load_tree(root)
    read = tree_reader(root, manifest)
    for level in manifest.levels:
        assemble(manifest, level.name, read)
        level_tensors(manifest, level.name, read)
    for i in range(len(manifest.artifacts)):
        for piece in artifact_pieces(manifest, i):
            read(piece)
    return manifest


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    small_tree(tmp_path)
    root = tmp_path / "tree"
    load_everything(root)
    for path in sorted(root.rglob("*.*")) + sorted((root / "objects").iterdir()):
        data = path.read_bytes()
        for i in range(len(data)):
            damaged = bytearray(data)
            damaged[i] ^= 1 << (i % 8)
            path.write_bytes(damaged)
            with pytest.raises(BundleError):
                load_everything(root)
        path.write_bytes(data)
    load_everything(root)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    root = tmp_path / "tree"
    for path in [p for p in root.rglob("*") if p.is_file()]:
        data = path.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(BundleError):
                load_everything(root)
        path.unlink()
        with pytest.raises(BundleError, match=r"cannot read"):
            load_everything(root)
        path.write_bytes(data)
    longer = root / object_name(manifest.objects[0].sha256)
    longer.write_bytes(longer.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="damaged"):
        verify_tree(root)


def republish(root: Path, manifest: Manifest) -> None:
    """Write a manifest as an attacker who can write the whole tree would: consistent names, no check."""
    data = manifest_bytes(manifest)
    (root / manifest_name(sha256(data))).write_bytes(data)
    (root / "release.json").write_bytes(release_bytes(Release(sha256(data), len(data), manifest.release)))


def test_swapped_pieces_do_not_assemble(tmp_path: Path) -> None:
    """Legal manifest, right digests, wrong content: the level's own digest tells."""
    manifest = small_tree(tmp_path)
    root = tmp_path / "tree"
    first, second = manifest.levels[0], manifest.levels[1]
    republish(root, replace(manifest, levels=(replace(first, side=second.side), second, *manifest.levels[2:])))
    with pytest.raises(BundleError, match=r"(piece \d+ is not used|does not assemble)"):
        load_everything(root)
    both = (replace(first, side=second.side), replace(second, side=first.side), *manifest.levels[2:])
    republish(root, replace(manifest, levels=both))
    with pytest.raises(BundleError, match="level w2 does not assemble"):
        load_everything(root)


def test_release_number_must_agree(tmp_path: Path) -> None:
    manifest = small_tree(tmp_path)
    data = manifest_bytes(manifest)
    (tmp_path / "tree" / "release.json").write_bytes(release_bytes(Release(sha256(data), len(data), 2)))
    with pytest.raises(BundleError, match="release.json says release 2, the manifest 1"):
        load_tree(tmp_path / "tree")


def test_the_digest_is_checked_before_decoding(tmp_path: Path) -> None:
    piece = replace(small_tree(tmp_path).pieces[0], codec="no such codec")
    with pytest.raises(BundleError, match="SHA-256"):
        decode_piece(piece, bytes(piece.size))
    read: ReadPiece = tree_reader(tmp_path / "nowhere", load_tree(tmp_path / "tree"))
    with pytest.raises(BundleError, match="cannot read the object"):
        read(0)
