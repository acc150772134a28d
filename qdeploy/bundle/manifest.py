"""The manifest of a bundle and the release pointer: strict parser and serialiser (FORMAT.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qdeploy.bundle.tables import (
    DIGEST,
    FORMAT,
    LEAF_BYTES,
    MAX_AXES,
    MAX_BYTES,
    MAX_COUNTS,
    MAX_FILES,
    MAX_MANIFEST,
    MAX_RELEASE,
    MAX_SIGNATURES,
    RELEASE_FORMAT,
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
    is_below,
    levels_below,
)
from qdeploy.bundle.validate import check, problems
from qdeploy.errors import BundleError
from qdeploy.files import canonical_json, parse_json

__all__ = [
    "LEAF_BYTES",
    "Artifact",
    "Initializer",
    "Level",
    "Manifest",
    "Object",
    "Part",
    "Piece",
    "Release",
    "Tensor",
    "TensorLevel",
    "check",
    "is_below",
    "levels_below",
    "manifest_bytes",
    "parse_manifest",
    "parse_release",
    "problems",
    "release_bytes",
]

# --- serialise -------------------------------------------------------------------------------------------------------


def manifest_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON of a manifest; inverse of `parse_manifest`."""
    return canonical_json(
        {
            "format": FORMAT,
            "model": manifest.model,
            "release": manifest.release,
            "graph": manifest.graph,
            "size": manifest.size,
            "objects": [{"sha256": o.sha256, "size": o.size, "leaves": list(o.leaves)} for o in manifest.objects],
            "pieces": [[p.object, p.offset, p.size, p.raw, p.codec, p.sha256] for p in manifest.pieces],
            "skeleton": manifest.skeleton,
            "initializers": [[i.name, i.dtype, list(i.shape), i.offset, i.kind] for i in manifest.initializers],
            "tensors": [_tensor_json(tensor) for tensor in manifest.tensors],
            "levels": [_level_json(level) for level in manifest.levels],
            "artifacts": [{"target": dict(a.target), "files": [list(f) for f in a.files]} for a in manifest.artifacts],
        }
    )


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": tensor.name,
        "bits": tensor.bits,
        "parts": [[part.bits, part.layout, part.piece, part.start] for part in tensor.parts],
    }
    return value if tensor.caps is None else value | {"caps": list(tensor.caps)}


def _level_json(level: Level) -> dict[str, Any]:
    value: dict[str, Any] = {"name": level.name, "sha256": level.sha256, "side": level.side}
    value["tensors"] = [
        [t.bits, t.shift, t.offset if isinstance(t.offset, int) else list(t.offset)] for t in level.tensors
    ]
    if level.golden is not None:
        value["golden"] = dict(level.golden)
    if level.info:
        value["info"] = dict(level.info)
    return value


def release_bytes(release: Release) -> bytes:
    """Canonical JSON of release.json; inverse of `parse_release`."""
    return canonical_json(
        {
            "format": RELEASE_FORMAT,
            "manifest": {"sha256": release.sha256, "size": release.size},
            "release": release.release,
            "signatures": [dict(entry) for entry in release.signatures],
        }
    )


# --- parse -----------------------------------------------------------------------------------------------------------


class _Shape(Exception):
    """A value of the wrong type or with the wrong keys; becomes a BundleError at the edge."""


def _want(condition: bool, text: str) -> None:
    if not condition:
        raise _Shape(text)


def _int(value: Any, what: str) -> int:
    _want(isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53, f"{what} is not an integer")
    return int(value)


def _text(value: Any, what: str) -> str:
    _want(isinstance(value, str), f"{what} is not a text")
    return str(value)


def _list(value: Any, what: str, limit: int, length: int | None = None) -> list[Any]:
    _want(isinstance(value, list), f"{what} is not a list")
    _want(len(value) <= limit, f"{what} has {len(value)} entries, the limit is {limit}")
    _want(length is None or len(value) == length, f"{what} does not have {length} entries")
    return list(value)


def _dict(value: Any, what: str, keys: str, optional: str = "") -> dict[str, Any]:
    _want(isinstance(value, dict), f"{what} is not an object")
    required, allowed = set(keys.split()), set(keys.split()) | set(optional.split())
    if missing := required - set(value):
        raise _Shape(f"{what} lacks the key {min(missing)!r}")
    if unknown := set(value) - allowed:
        raise _Shape(f"{what} has the unknown key {min(unknown)[:80]!r}")
    return dict(value)


def _object(value: Any, what: str) -> Object:
    row = _dict(value, what, "sha256 size leaves")
    leaves = _list(row["leaves"], f"{what} leaves", MAX_BYTES // LEAF_BYTES + 1)
    return Object(_text(row["sha256"], what), _int(row["size"], what), tuple(_text(leaf, what) for leaf in leaves))


def _piece(value: Any, what: str) -> Piece:
    row = _list(value, what, 6, 6)
    numbers = [_int(entry, what) for entry in row[:4]]
    return Piece(numbers[0], numbers[1], numbers[2], numbers[3], _text(row[4], what), _text(row[5], what))


def _initializer(value: Any, what: str) -> Initializer:
    name, dtype, shape, offset, kind = _list(value, what, 5, 5)
    axes = tuple(_int(axis, what) for axis in _list(shape, f"{what} shape", MAX_AXES))
    return Initializer(_text(name, what), _text(dtype, what), axes, _int(offset, what), _text(kind, what))


def _tensor(value: Any, what: str) -> Tensor:
    row = _dict(value, what, "name bits parts", "caps")
    parts = []
    for entry in _list(row["parts"], f"{what} parts", 8):
        bits, layout, piece, start = _list(entry, f"{what} part", 4, 4)
        parts.append(Part(_int(bits, what), _text(layout, what), _int(piece, what), _int(start, what)))
    caps = None
    if "caps" in row:
        caps = tuple(_int(cap, what) for cap in _list(row["caps"], f"{what} caps", MAX_BYTES))
    return Tensor(_text(row["name"], what), _int(row["bits"], what), tuple(parts), caps)


def _level(value: Any, what: str) -> Level:
    row = _dict(value, what, "name sha256 side tensors", "golden info")
    tensors = []
    for entry in _list(row["tensors"], f"{what} tensors", MAX_COUNTS["tensors"]):
        bits, shift, offset = _list(entry, f"{what} tensor", 3, 3)
        if isinstance(offset, list):
            offsets = tuple(_int(x, what) for x in _list(offset, what, 9))
            tensors.append(TensorLevel(_int(bits, what), _int(shift, what), offsets))
        else:
            tensors.append(TensorLevel(_int(bits, what), _int(shift, what), _int(offset, what)))
    golden = None
    if "golden" in row:
        pair = _dict(row["golden"], f"{what} golden", "input_sha256 output_sha256")
        golden = {key: _text(text, what) for key, text in pair.items()}
    info = row.get("info", {})
    _want(isinstance(info, dict) and ("info" not in row or bool(info)), f"{what} info is not an object with entries")
    side = None if row["side"] is None else _int(row["side"], what)
    return Level(_text(row["name"], what), _text(row["sha256"], what), tuple(tensors), side, golden, info)


def _artifact(value: Any, what: str) -> Artifact:
    row = _dict(value, what, "target files")
    _want(isinstance(row["target"], dict), f"{what} target is not an object")
    files = []
    for entry in _list(row["files"], f"{what} files", MAX_FILES):
        name, piece = _list(entry, f"{what} file", 2, 2)
        files.append((_text(name, what), _int(piece, what)))
    return Artifact(row["target"], tuple(files))


def _rows(top: Mapping[str, Any], key: str, read: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    name = key.removesuffix("s")
    return tuple(read(value, f"{name} {i}") for i, value in enumerate(_list(top[key], key, MAX_COUNTS[key])))


def parse_manifest(data: bytes) -> Manifest:
    """Inverse of `manifest_bytes`. Raises BundleError with every problem; returns only manifests without any."""
    if len(data) > MAX_MANIFEST:
        raise BundleError(f"the manifest has {len(data)} bytes, the limit is {MAX_MANIFEST}")
    value = parse_json(data, "the manifest", BundleError)
    try:
        _want(isinstance(value, dict) and value.get("format") == FORMAT, f"its format is not {FORMAT}")
        keys = "format model release graph size objects pieces skeleton initializers tensors levels artifacts"
        top = _dict(value, "it", keys)
        manifest = Manifest(
            model=_text(top["model"], "model"),
            release=_int(top["release"], "release"),
            graph=_text(top["graph"], "graph"),
            size=_int(top["size"], "size"),
            objects=_rows(top, "objects", _object),
            pieces=_rows(top, "pieces", _piece),
            skeleton=_int(top["skeleton"], "skeleton"),
            initializers=_rows(top, "initializers", _initializer),
            tensors=_rows(top, "tensors", _tensor),
            levels=_rows(top, "levels", _level),
            artifacts=_rows(top, "artifacts", _artifact),
        )
    except _Shape as e:
        raise BundleError(f"the manifest is damaged: {e}") from e
    check(manifest)
    if manifest_bytes(manifest) != data:
        raise BundleError("the manifest is damaged: it is not canonical JSON")
    return manifest


def parse_release(data: bytes) -> Release:
    """Inverse of `release_bytes`; raises BundleError."""
    if len(data) > MAX_RELEASE:
        raise BundleError(f"release.json has {len(data)} bytes, the limit is {MAX_RELEASE}")
    value = parse_json(data, "release.json", BundleError)
    try:
        _want(isinstance(value, dict) and value.get("format") == RELEASE_FORMAT, f"its format is not {RELEASE_FORMAT}")
        top = _dict(value, "it", "format manifest release signatures")
        pointer = _dict(top["manifest"], "manifest", "sha256 size")
        signatures = []
        for entry in _list(top["signatures"], "signatures", MAX_SIGNATURES):
            pair = _dict(entry, "a signature", "keyid signature")
            signatures.append({key: _text(text, "a signature") for key, text in pair.items()})
            _want(all(len(text) <= 1024 for text in signatures[-1].values()), "a signature is too long")
        release = Release(
            _text(pointer["sha256"], "sha256"),
            _int(pointer["size"], "size"),
            _int(top["release"], "release"),
            tuple(signatures),
        )
        _want(bool(DIGEST.fullmatch(release.sha256)), "its digest is not 64 hex digits")
        _want(0 < release.size <= MAX_MANIFEST, f"manifest size {release.size} is not 1..{MAX_MANIFEST}")
        _want(release.release >= 1, f"release number {release.release} is below 1")
        _want(release_bytes(release) == data, "it is not canonical JSON")
    except _Shape as e:
        raise BundleError(f"release.json is damaged: {e}") from e
    return release
