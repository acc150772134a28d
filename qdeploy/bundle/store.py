"""From pieces to ONNX files and arrays: pure functions of a manifest and a reader of decoded, verified pieces."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from qdeploy.bundle.codec import decode
from qdeploy.bundle.manifest import parse_manifest, parse_release
from qdeploy.bundle.planes import container, join
from qdeploy.bundle.tables import LEAF_BYTES, Initializer, Level, Manifest, Piece, Tensor, levels_below
from qdeploy.bundle.validate import packed_weights, part_bytes
from qdeploy.errors import BundleError
from qdeploy.files import read_bytes, sha256

ReadPiece = Callable[[int], bytes]  # index of a piece -> its decoded bytes; raises BundleError unless they verify
RawPart = tuple[int, str, bytes]  # planes, layout, bytes
# (parts, weights, shift, bias, planes) -> uint8 codes; `Artifact.join` of qdeploy/compile/artifact.py is one
Join = Callable[[Iterable[RawPart], int, int, int, int], np.ndarray]

RELEASE_NAME = "release.json"


def manifest_name(digest: str) -> str:
    """Path of a manifest below the tree's root."""
    return f"manifests/{digest}.json"


def object_name(digest: str) -> str:
    """Path of an object below the tree's root."""
    return f"objects/{digest}"


# --- which pieces ----------------------------------------------------------------------------------------------------


def pieces_of(manifest: Manifest, level: str) -> list[int]:
    """Pieces that a device at `level` holds, in fetch order: skeleton, planes, side tensors of it and those below."""
    target = manifest.level(level)
    found = {manifest.skeleton}
    for tensor, entry in zip(manifest.tensors, target.tensors, strict=True):
        held = 0
        for part in tensor.parts:
            held += part.bits
            if held <= entry.bits:
                found.add(part.piece)
    found |= {low.side for low in levels_below(manifest, level) if low.side is not None}
    return sorted(found)


def artifact_pieces(manifest: Manifest, artifact: int) -> list[int]:
    """Pieces of a compiled artifact, in fetch order."""
    return sorted({piece for _, piece in manifest.artifacts[artifact].files})


# --- from pieces to a level ------------------------------------------------------------------------------------------


def decode_piece(piece: Piece, coded: bytes, what: str = "a piece") -> bytes:
    """Coded bytes -> raw bytes; the digest is checked before anything is decoded. Raises BundleError."""
    if len(coded) != piece.size or sha256(coded) != piece.sha256:
        raise BundleError(f"{what} is damaged (its SHA-256 is not the manifest's): fetch it again")
    return decode(piece.codec, coded, piece.raw, what)


def _codes(
    manifest: Manifest, index: int, level: Level, area: Initializer, read: ReadPiece, compiled: Join | None = None
) -> np.ndarray:
    """Container codes of tensor number `index` at a level, in the tensor's shape; by `compiled` where it can."""
    tensor, entry = manifest.tensors[index], level.tensors[index]
    if compiled is None or not isinstance(entry.offset, int) or not entry.bits:
        return container(tensor_prefix(tensor, area, entry.bits, read), entry, area.dtype, tensor.caps)
    bias = entry.offset - ((1 << entry.bits >> 1) << entry.shift)
    codes = compiled(each_part(tensor, area, entry.bits, read), area.count, entry.shift, bias, entry.bits)
    return codes.view(area.dtype).reshape(area.shape)


def each_part(tensor: Tensor, area: Initializer, bits: int, read: ReadPiece) -> Iterator[RawPart]:
    """The parts of a weight tensor that hold its first `bits` planes, each read when it is asked for."""
    held = 0
    for part in tensor.parts:
        if held + part.bits > bits:
            break
        length = part_bytes(part, packed_weights(tensor, area.shape, held))
        yield part.bits, part.layout, read(part.piece)[part.start : part.start + length]
        held += part.bits


def tensor_parts(tensor: Tensor, area: Initializer, bits: int, read: ReadPiece) -> list[RawPart]:
    """The parts of a weight tensor that hold its first `bits` planes."""
    return list(each_part(tensor, area, bits, read))


def tensor_prefix(tensor: Tensor, area: Initializer, bits: int, read: ReadPiece) -> np.ndarray:
    """The first `bits` planes of a weight tensor as prefixes (see `planes.join`)."""
    return join(tensor_parts(tensor, area, bits, read), area.shape, tensor.caps)


def remembering(read: ReadPiece) -> ReadPiece:
    """`read`, each piece once: small tensors share pieces."""
    return cache(read)


def level_tensors(
    manifest: Manifest, level: str, read: ReadPiece, compiled: Join | None = None
) -> dict[str, np.ndarray]:
    """{name: array} of every numeric initializer at a level: weights from planes, side tensors, fixed ones.

    `compiled` joins planes in place of numpy where it can: tensors whose channels all have the level's bits.
    """
    target, read = manifest.level(level), remembering(read)
    skeleton = memoryview(read(manifest.skeleton))
    side = memoryview(b"" if target.side is None else read(target.side))
    arrays: dict[str, np.ndarray] = {}
    weights = cut = used = 0  # weight tensors so far, bytes cut out of the skeleton so far, bytes of `side` used
    for area in manifest.initializers:
        if area.kind == "planes":
            arrays[area.name] = _codes(manifest, weights, target, area, read, compiled)
            weights += 1
        else:
            source, start = (side, used) if area.kind == "side" else (skeleton, area.offset - cut)
            values = np.frombuffer(source[start : start + area.length], np.dtype(area.dtype).newbyteorder("<"))
            arrays[area.name] = values.astype(np.dtype(area.dtype)).reshape(area.shape)
            used += area.length if area.kind == "side" else 0
        cut += area.length if area.kind != "fixed" else 0
    return arrays


def level_reader(
    manifest: Manifest, level: str, read: ReadPiece, compiled: Join | None = None
) -> Callable[[str], np.ndarray]:
    """`level_tensors`, one at a time: name of an initializer -> its array, made anew at each call.

    It keeps the skeleton, the side piece and what the weight tensor that was asked for last shares with others. Raises
    KeyError for a name that the level does not have.
    """
    target, weights = manifest.level(level), 0
    skeleton = memoryview(read(manifest.skeleton))
    side = memoryview(b"" if target.side is None else read(target.side))
    places: dict[str, tuple[Initializer, int]] = {}  # with the tensor's number, or where its bytes begin
    cut = used = 0
    for area in manifest.initializers:
        places[area.name] = area, {"planes": weights, "side": used}.get(area.kind, area.offset - cut)
        weights += area.kind == "planes"
        used += area.length if area.kind == "side" else 0
        cut += area.length if area.kind != "fixed" else 0
    recent = _recent(manifest, read)

    def load(name: str) -> np.ndarray:
        area, at = places[name]
        if area.kind == "planes":
            return _codes(manifest, at, target, area, recent(at), compiled)
        source = side if area.kind == "side" else skeleton
        values = np.frombuffer(source[at : at + area.length], np.dtype(area.dtype).newbyteorder("<"))
        return values.astype(np.dtype(area.dtype)).reshape(area.shape)

    return load


def _recent(manifest: Manifest, read: ReadPiece) -> Callable[[int], ReadPiece]:
    """Number of a weight tensor -> a reader of its pieces, which keeps those that other tensors share, no others."""
    users = Counter(piece for tensor in manifest.tensors for piece in {part.piece for part in tensor.parts})
    kept: dict[int, bytes] = {}

    def reader(tensor: int) -> ReadPiece:
        for piece in set(kept) - {part.piece for part in manifest.tensors[tensor].parts}:
            del kept[piece]

        def one(piece: int) -> bytes:
            if users[piece] == 1:
                return read(piece)
            if piece not in kept:
                kept[piece] = read(piece)
            return kept[piece]

        return one

    return reader


def level_parts(
    manifest: Manifest, level: str, read: ReadPiece, compiled: Join | None = None
) -> Iterator[bytes | memoryview]:
    """The ONNX file of a level, a weight tensor at a time; nothing is checked but the pieces."""
    target, recent = manifest.level(level), _recent(manifest, read)
    skeleton = memoryview(read(manifest.skeleton))
    side = memoryview(b"" if target.side is None else read(target.side))
    kept = used = weights = end = 0  # bytes of skeleton and side used, weight tensors so far, end of the last area
    for area in manifest.of_kind("planes", "side"):
        gap = area.offset - end
        yield skeleton[kept : kept + gap]
        kept += gap
        if area.kind == "planes":
            yield _codes(manifest, weights, target, area, recent(weights), compiled).reshape(-1).view(np.uint8).data
            weights += 1
        else:
            yield side[used : used + area.length]
            used += area.length
        end = area.offset + area.length
    yield skeleton[kept:]


def verify_parts(manifest: Manifest, level: str, read: ReadPiece, compiled: Join | None = None) -> None:
    """Raise BundleError unless the level assembles to its SHA-256; no more than a tensor of it is in memory."""
    digest, size = hashlib.sha256(), 0
    for part in level_parts(manifest, level, read, compiled):
        digest.update(part)
        size += len(part)
    if size != manifest.size or digest.hexdigest() != manifest.level(level).sha256:
        raise _not_assembled(level)


def _not_assembled(level: str) -> BundleError:
    return BundleError(f"level {level} does not assemble to the file that the manifest names: fetch the bundle again")


def assemble(manifest: Manifest, level: str, read: ReadPiece) -> bytes:
    """The ONNX file of a level, byte for byte as it was exported; raises BundleError unless its SHA-256 fits."""
    data = b"".join(level_parts(manifest, level, remembering(read)))
    if len(data) != manifest.size or sha256(data) != manifest.level(level).sha256:
        raise _not_assembled(level)
    return data


# --- a published tree on disk ----------------------------------------------------------------------------------------


def load_tree(root: Path) -> Manifest:
    """The current manifest of a published tree; BundleError when a file is missing or any byte of it was changed."""
    root = Path(root)
    release = parse_release(read_bytes(root / RELEASE_NAME, "the release pointer", BundleError))
    data = read_bytes(root / manifest_name(release.sha256), "the manifest", BundleError)
    if len(data) != release.size or sha256(data) != release.sha256:
        raise BundleError(f"the manifest in {root} is not the one that release.json names: publish or fetch it again")
    manifest = parse_manifest(data)
    if manifest.release != release.release:
        raise BundleError(f"release.json says release {release.release}, the manifest {manifest.release}")
    return manifest


def tree_reader(root: Path, manifest: Manifest) -> ReadPiece:
    """Reads, verifies and decodes pieces of a published tree; damaged or missing objects raise BundleError."""

    def read(index: int) -> bytes:
        piece = manifest.pieces[index]
        path = Path(root) / object_name(manifest.objects[piece.object].sha256)
        try:
            with open(path, "rb") as file:
                file.seek(piece.offset)
                coded = file.read(piece.size)
        except OSError as e:
            raise BundleError(f"cannot read the object {path}: {e.strerror or e}; fetch it again") from e
        return decode_piece(piece, coded, f"piece {index} in {path}")

    return read


def verify_tree(root: Path) -> Manifest:
    """Check a whole tree: manifest, every object's and leaf's digest, every level's assembly. Raises BundleError."""
    root = Path(root)
    manifest = load_tree(root)
    for entry in manifest.objects:
        path = root / object_name(entry.sha256)
        data = read_bytes(path, "the object", BundleError)
        if len(data) != entry.size or sha256(data) != entry.sha256 or leaf_digests(data) != entry.leaves:
            raise BundleError(f"{path} is damaged (its SHA-256 is not the manifest's): publish or fetch it again")
    read = tree_reader(root, manifest)
    for level in manifest.levels:
        assemble(manifest, level.name, read)
    for _, piece in (file for artifact in manifest.artifacts for file in artifact.files):
        read(piece)
    return manifest


def leaf_digests(data: bytes) -> tuple[str, ...]:
    """Digests of an object's leaves; none for an object of one leaf (FORMAT.md, Objects)."""
    if len(data) <= LEAF_BYTES:
        return ()
    view = memoryview(data)
    return tuple(sha256(view[start : start + LEAF_BYTES]) for start in range(0, len(data), LEAF_BYTES))
