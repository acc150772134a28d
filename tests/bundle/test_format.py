"""A second decoder, written from FORMAT.md in plain Python: bits one by one, no numpy, nothing of qdeploy's."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.write import write_bundle
from qdeploy.ladder import read_ladder
from tests.bundle.small import write_levels

ITEM = {"bool": 1, "int8": 1, "uint8": 1, "int32": 4, "float32": 4, "int64": 8}


def product(shape: list[int]) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count


class Decoder:
    """Reads one published tree."""

    def __init__(self, root: Path) -> None:
        release = json.loads((root / "release.json").read_bytes())
        self.m = json.loads((root / "manifests" / (release["manifest"]["sha256"] + ".json")).read_bytes())
        self.root = root

    def piece(self, index: int) -> bytes:
        number, offset, size, raw, codec, digest = self.m["pieces"][index]
        pack = (self.root / "objects" / self.m["objects"][number]["sha256"]).read_bytes()
        coded = pack[offset : offset + size]
        assert hashlib.sha256(coded).hexdigest() == digest
        data = coded if codec == "raw" else zlib.decompress(coded, -15)
        assert len(data) == raw
        return data

    @staticmethod
    def symbols(data: bytes, start: int, count: int, bits: int, layout: str) -> list[int]:
        stream = "".join(f"{byte:08b}" for byte in data[start:])
        if layout == "spaced":
            per = 8 // bits
            spots = [8 * (i // per) + bits * (i % per) for i in range(count)]
        else:
            spots = [i * bits for i in range(count)]
        return [int(stream[spot : spot + bits], 2) for spot in spots]

    def codes(self, tensor: dict, count: int, level: list[int]) -> list[int]:
        wanted, shift, offset = level
        prefix, held = [0] * count, 0
        for bits, layout, index, start in tensor["parts"]:
            if held == wanted:
                break
            stored = self.symbols(self.piece(index), start, count, bits, layout)
            if layout == "sorted":
                half = 2 ** (held - 1)
                cells = [p - half if p >= half else half - 1 - p for p in prefix]
                order = sorted(range(count), key=lambda i: min(cells[i], 7))
                for bit, i in zip(stored, order, strict=True):
                    prefix[i] = prefix[i] * 2 + (bit if prefix[i] >= half else 1 - bit)
            else:
                prefix = [p << bits | s for p, s in zip(prefix, stored, strict=True)]
            held += bits
        return [(p - (2**wanted >> 1)) * 2**shift + offset for p in prefix]

    def level(self, name: str) -> bytes:
        (level,) = [entry for entry in self.m["levels"] if entry["name"] == name]
        rest, side = self.piece(self.m["skeleton"]), b"" if level["side"] is None else self.piece(level["side"])
        weights = iter(zip(self.m["tensors"], level["tensors"], strict=True))
        out = b""
        for _, dtype, shape, offset, kind in self.m["initializers"]:
            if kind == "fixed":
                continue
            gap = offset - len(out)
            out, rest = out + rest[:gap], rest[gap:]
            if kind == "planes":
                tensor, entry = next(weights)
                out += bytes(code & 0xFF for code in self.codes(tensor, product(shape), entry))
            else:
                length = product(shape) * ITEM[dtype]
                out, side = out + side[:length], side[length:]
        return out + rest


@pytest.mark.parametrize("spread", [1.0, 3.0, 30.0])  # raw planes; joint base and sorted planes; nearly empty planes
def test_the_page_is_enough_to_decode(tmp_path: Path, spread: float) -> None:
    real = np.random.default_rng(1).normal(-0.5, 8 / spread, (40, 300))
    paths = write_levels(tmp_path, (2, 3, 4), np.clip(np.rint(real), -8, 7).astype(np.int64))
    manifest = write_bundle(read_ladder(paths), [], tmp_path / "tree")
    if spread == 3.0:
        assert {part.layout for part in manifest.tensors[0].parts} == {"tight", "sorted"}
    decoder = Decoder(tmp_path / "tree")
    for path in paths:
        assert decoder.level(path.stem) == path.read_bytes()
