"""A decoder of bundles written from FORMAT.md alone: standard library only, slow and strict, nothing of qdeploy's.

    python tests/bundle/independent_decoder.py TREE [OUT]

Checks a published tree and decodes every level; with OUT, writes each as OUT/<level>.onnx. Anything that FORMAT.md
forbids raises ValueError.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import zlib
from pathlib import Path
from typing import Any

ITEM = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("int16", "uint16", "float16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}
LEAF = 65536
DIGEST = re.compile("[0-9a-f]{64}")
TOP = {
    *("format", "model", "release", "graph", "size", "objects", "pieces", "skeleton", "initializers", "tensors"),
    *("levels", "artifacts"),
}


def must(condition: bool, text: str) -> None:
    """What FORMAT.md demands."""
    if not condition:
        raise ValueError(text)


def digest(data: bytes) -> str:
    """SHA-256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def canonical(data: bytes, limit: int) -> Any:
    """The JSON value, if these are its canonical bytes."""
    must(len(data) <= limit, f"{len(data)} bytes are more than {limit}")
    value = json.loads(data)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
    must(text.encode() == data, "not canonical JSON")
    return value


class Bits:
    """Reads a run of bytes bit by bit, the most significant bit of each byte first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> int:
        """The next `count` bits as a number."""
        value = 0
        for _ in range(count):
            value = value << 1 | self.data[self.at >> 3] >> (7 - (self.at & 7)) & 1
            self.at += 1
        return value

    def spare(self) -> None:
        """The rest of the byte is unused: 0."""
        while self.at & 7:
            must(self.take(1) == 0, "an unused bit is set")


class Bundle:
    """One published tree, its manifest read and its objects checked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        pointer = canonical((root / "release.json").read_bytes(), 64 << 10)
        must(set(pointer) == {"format", "manifest", "release", "signatures"}, "keys of release.json")
        must(pointer["format"] == "qdeploy-release/1", "format of release.json")
        name, size = pointer["manifest"]["sha256"], pointer["manifest"]["size"]
        data = (root / "manifests" / f"{name}.json").read_bytes()
        must((digest(data), len(data)) == (name, size), "the manifest is not the one that release.json names")
        self.manifest = canonical(data, 16 << 20)
        must(set(self.manifest) == TOP and self.manifest["format"] == "qdeploy-bundle/1", "keys of the manifest")
        must(self.manifest["release"] == pointer["release"] >= 1, "release numbers")
        self.objects = [self._object(entry) for entry in self.manifest["objects"]]
        self._check_pieces()

    def _object(self, entry: dict[str, Any]) -> bytes:
        must(DIGEST.fullmatch(entry["sha256"]) is not None, "a digest")
        data = (self.root / "objects" / entry["sha256"]).read_bytes()
        must((digest(data), len(data)) == (entry["sha256"], entry["size"]), "an object")
        leaves = [digest(data[at : at + LEAF]) for at in range(0, len(data), LEAF)] if len(data) > LEAF else []
        must(leaves == entry["leaves"], "leaves of an object")
        return data

    def _check_pieces(self) -> None:
        number = end = 0
        for piece in self.manifest["pieces"]:
            if piece[0] != number:
                must(piece[0] == number + 1 and end == len(self.objects[number]), "pieces do not fill their object")
                number, end = number + 1, 0
            must(piece[1] == end, "a gap between pieces")
            end += piece[2]
        must((number + 1, end) == (len(self.objects), len(self.objects[-1])), "pieces do not fill the last object")
        used = {self.manifest["skeleton"]} | {level["side"] for level in self.manifest["levels"]}
        used |= {part[2] for tensor in self.manifest["tensors"] for part in tensor["parts"]}
        used |= {index for artifact in self.manifest["artifacts"] for _, index in artifact["files"]}
        must(used - {None} == set(range(len(self.manifest["pieces"]))), "a piece that nothing uses")

    def piece(self, index: int) -> bytes:
        """The raw bytes of a piece."""
        number, offset, size, raw, codec, name = self.manifest["pieces"][index]
        coded = self.objects[number][offset : offset + size]
        must(digest(coded) == name, "digest of a piece")
        if codec == "raw":
            must(size == raw, "length of a raw piece")
            return coded
        must(codec == "deflate", f"codec {codec}")
        inflate = zlib.decompressobj(-15)
        data = inflate.decompress(coded, raw + 1)
        must(len(data) == raw and inflate.eof and not inflate.unused_data, "length of an inflated piece")
        return data

    # --- weight tensors ----------------------------------------------------------------------------------------------

    def _symbols(self, tensor: dict[str, Any], number: int, prefix: list[int], held: int) -> list[int]:
        """One symbol for each weight of a part, in C order; `prefix` are the `held` bits of these weights so far."""
        bits, layout, index, start = tensor["parts"][number]
        per = 8 // bits
        spaced = layout == "spaced"
        length = -(-len(prefix) // per) if spaced else -(-len(prefix) * bits // 8)
        reader = Bits(self.piece(index)[start : start + length])
        must(len(reader.data) == length, "a part leaves its piece")
        if layout == "sorted":
            must(bits == 1 and held >= 1, "a sorted part")
            return self._unsorted(reader, prefix, held)
        must(layout == "tight" or (spaced and bits in (3, 5, 6, 7)), f"layout {layout}")
        found = []
        for i in range(len(prefix)):
            if spaced and i % per == 0:
                reader.spare()
            found.append(reader.take(bits))
        reader.spare()
        must(reader.at == 8 * length, "bytes left in a part")
        return found

    @staticmethod
    def _unsorted(reader: Bits, prefix: list[int], held: int) -> list[int]:
        half = 1 << (held - 1)
        cells = [p - half if p >= half else half - 1 - p for p in prefix]
        found = [0] * len(prefix)
        for context in range(8):
            for i, cell in enumerate(cells):
                if min(cell, 7) == context:
                    stored = reader.take(1)
                    found[i] = stored if prefix[i] >= half else 1 - stored
        reader.spare()
        return found

    def codes(self, number: int, shape: list[int], dtype: str, entry: list[Any]) -> bytes:
        """Container codes of weight tensor `number` at a level."""
        tensor, (wanted, shift, offset) = self.manifest["tensors"][number], entry
        channels = shape[0] if shape else 1
        each, caps = math.prod(shape) // channels if channels else 0, tensor.get("caps")
        must((caps is None) == isinstance(offset, int), "offsets and caps")
        of = [tensor["bits"] if caps is None else caps[i // each] for i in range(channels * each)]  # cap of each weight
        prefix, held = [0] * len(of), 0
        for i, part in enumerate(tensor["parts"]):
            if held == wanted:
                break
            member = [j for j, cap in enumerate(of) if cap > held]
            symbols = self._symbols(tensor, i, [prefix[j] for j in member], held)
            for j, symbol in zip(member, symbols, strict=True):
                prefix[j] = prefix[j] << part[0] | symbol
            held += part[0]
        must(held == wanted, "a level's bits are no sum of parts")
        low, high = (-128, 127) if dtype == "int8" else (0, 255)
        out = bytearray()
        for cap, u in zip(of, prefix, strict=True):
            bits = min(cap, wanted)
            middle = 1 << (bits - 1) if bits else 0
            plus = offset if isinstance(offset, int) else offset[cap]
            code = ((u - middle) << (shift + wanted - bits)) + plus
            must(low <= code <= high, "a code outside its type")
            out.append(code & 255)
        return bytes(out)

    def level(self, name: str) -> bytes:
        """The ONNX file of a level."""
        (level,) = [entry for entry in self.manifest["levels"] if entry["name"] == name]
        skeleton = self.piece(self.manifest["skeleton"])
        side = b"" if level["side"] is None else self.piece(level["side"])
        out, kept, used, number = b"", 0, 0, 0
        for _, dtype, shape, offset, kind in self.manifest["initializers"]:
            if kind == "fixed":
                continue
            gap = offset - len(out)
            must(gap >= 0, "areas overlap")
            out, kept = out + skeleton[kept : kept + gap], kept + gap
            if kind == "planes":
                out += self.codes(number, shape, dtype, level["tensors"][number])
                number += 1
            else:
                length = math.prod(shape) * ITEM[dtype]
                out, used = out + side[used : used + length], used + length
        out += skeleton[kept:]
        must(used == len(side) and number == len(self.manifest["tensors"]), "something is left over")
        must((len(out), digest(out)) == (self.manifest["size"], level["sha256"]), f"level {name} has another digest")
        return out

    def levels(self) -> dict[str, bytes]:
        """{name: ONNX file} of all levels."""
        return {entry["name"]: self.level(entry["name"]) for entry in self.manifest["levels"]}


def main() -> None:
    bundle = Bundle(Path(sys.argv[1]))
    for name, data in bundle.levels().items():
        print(f"{name}: {len(data)} bytes, {digest(data)}")
        if len(sys.argv) > 2:
            (Path(sys.argv[2]) / f"{name}.onnx").write_bytes(data)


if __name__ == "__main__":
    main()
