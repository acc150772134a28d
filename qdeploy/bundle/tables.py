"""What a manifest says, as frozen dataclasses, and the limits of FORMAT.md. Import these names from `manifest`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qdeploy.errors import BundleError

FORMAT = "qdeploy-bundle/1"
RELEASE_FORMAT = "qdeploy-release/1"
LEAF_BYTES = 65536
MAX_MANIFEST = 16 << 20
MAX_RELEASE = 64 << 10
MAX_BYTES = (1 << 31) - 1  # of an object, a piece, the ONNX file; elements of a tensor
MAX_COUNTS = {
    "objects": 65536,
    "pieces": 262144,
    "initializers": 65536,
    "tensors": 16384,
    "levels": 64,
    "artifacts": 64,
}
MAX_FILES = 64
MAX_SIGNATURES = 16
MAX_INFO = 32
MAX_AXES = 8
CODECS = ("raw", "deflate")
KINDS = ("planes", "side", "fixed")
LAYOUTS: dict[str, tuple[int, ...]] = {"tight": (1, 2, 3, 4, 5, 6, 7, 8), "spaced": (3, 5, 6, 7), "sorted": (1,)}
ITEM_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2,
    "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Object:
    """A pack: file ROOT/objects/<sha256> of `size` bytes; `leaves` are digests of 64 KiB leaves if it has several."""

    sha256: str
    size: int
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """`size` coded bytes at `offset` of object number `object`, with their digest; they decode to `raw` bytes."""

    object: int
    offset: int
    size: int
    raw: int
    codec: str
    sha256: str


@dataclass(frozen=True)
class Initializer:
    """Where the ONNX file holds an initializer's raw data, and what brings it: planes, a side piece, the skeleton."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    kind: str

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Bytes."""
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Part:
    """`bits` consecutive planes of a tensor, from byte `start` of a piece's raw bytes on."""

    bits: int
    layout: str
    piece: int
    start: int


@dataclass(frozen=True)
class Tensor:
    """A weight tensor of `bits` planes; `parts` most significant first; `caps` limits planes per index of axis 0."""

    name: str
    bits: int
    parts: tuple[Part, ...]
    caps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorLevel:
    """Container code at a level = prefix of `bits` bits * 2^shift + offset (with caps: offset[cap of the channel])."""

    bits: int
    shift: int
    offset: int | tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """One precision: digest of its ONNX file, an entry per tensor of the manifest, its side piece."""

    name: str
    sha256: str
    tensors: tuple[TensorLevel, ...]
    side: int | None
    golden: Mapping[str, str] | None = None
    info: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A compiled form of the graph for one hardware class: (file name, piece) pairs."""

    target: Mapping[str, Any]
    files: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Manifest:
    """See FORMAT.md. `parse_manifest` only returns manifests without problems."""

    model: str
    release: int
    graph: str
    size: int
    objects: tuple[Object, ...]
    pieces: tuple[Piece, ...]
    skeleton: int
    initializers: tuple[Initializer, ...]
    tensors: tuple[Tensor, ...]
    levels: tuple[Level, ...]
    artifacts: tuple[Artifact, ...] = ()

    def level(self, name: str) -> Level:
        """The level of this name; BundleError lists the levels that there are."""
        for level in self.levels:
            if level.name == name:
                return level
        raise BundleError(f"no level {name!r} in {self.model}: levels are {', '.join(x.name for x in self.levels)}")

    def of_kind(self, *kinds: str) -> list[Initializer]:
        """Initializers of these kinds in file order; those of kind `planes` match `tensors` one to one."""
        return [entry for entry in self.initializers if entry.kind in kinds]


@dataclass(frozen=True)
class Release:
    """The pointer release.json: digest and size of the current manifest, release number, signatures (see FORMAT.md)."""

    sha256: str
    size: int
    release: int
    signatures: tuple[Mapping[str, str], ...] = ()


def is_below(low: Level, high: Level) -> bool:
    """True when no tensor has more bits in `low` than in `high` (a level is below itself)."""
    return all(a.bits <= b.bits for a, b in zip(low.tensors, high.tensors, strict=True))


def levels_below(manifest: Manifest, name: str) -> list[Level]:
    """The levels that a device at level `name` can drop to, in fetch order; includes the level itself."""
    top = manifest.level(name)
    return [level for level in manifest.levels if is_below(level, top)]
