"""Images of one's own as a dataset: a folder with one of pictures for each class, or arrays; and a recipe's images.

    pictures/CLASS/anything.png        PNG, JPEG, BMP, PGM or PPM, grey or colour, as deep below CLASS as one likes
    arrays/images.npy, labels.npy      uint8 [n, H, W], [n, H, W, C] or [n, C, H, W], C = 1 or 3; whole numbers [n]
    arrays.npz                         the same two arrays, named images and labels

Which images are for testing is decided by the SHA-256 of each file (of each array's image), so it never changes when
others are added, and copies of one image are never on both sides.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.data import Dataset, load
from qdeploy.errors import DataError
from qdeploy.files import read_bytes, sha256
from qdeploy.pictures import COLOURS, read_picture
from qdeploy.recipe import FOLDER, DataChoice

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm")


def load_split(choice: DataChoice, split: str, data_dir: Path | None) -> Dataset:
    """A recipe's images of split "train" or "test", or of another that its dataset has.

    `data_dir` stands for the folder of the recipe where that has moved. Raises as `data.load`; DataError for pictures
    that are damaged, of no class, of another size or too few.
    """
    if choice.name != FOLDER:
        return load(choice.name, split, data_dir)
    source = Path(data_dir or choice.folder or "")
    files = find_images(source)
    images, labels, chosen = _read(source, files, choice)
    wanted = chosen if split == "test" else ~chosen
    found = Dataset(FOLDER, split, images[wanted], labels[wanted], choice.classes)
    if not len(found):
        part = "testing" if split == "test" else "training"
        raise DataError(f"{source} has {len(labels)} images, none of them for {part}: add images")
    return found


# ---- what a folder holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What `find_images` found: `paths` of pictures by class, or the `arrays` (images, labels)."""

    classes: tuple[str, ...]
    paths: tuple[tuple[Path, str], ...] = ()
    arrays: tuple[np.ndarray, np.ndarray] | None = None
    stamp: tuple[tuple[str, int, int], ...] = ()  # names, sizes and times of all files, to notice changes

    def __hash__(self) -> int:
        return hash(self.stamp)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Images) and self.stamp == other.stamp


def find_images(source: Path) -> Images:
    """The images of a folder or an .npz file, pictures unread. Raises DataError for none, and for one class alone."""
    try:
        if source.suffix == ".npz" or (source / "images.npy").is_file():
            return _arrays(source)
        if not source.is_dir():
            raise DataError(f"{source} is no folder of images and no .npz file: name an existing one")
        found = [
            (path, folder.name)
            for folder in sorted(source.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file()
        ]
        stamp = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p, _ in found)
    except OSError as e:
        raise DataError(f"cannot read {e.filename or source}: {e.strerror or e}") from e
    classes = tuple(dict.fromkeys(name for _, name in found))
    if not found:
        raise DataError(
            f"{source} holds no images: put {', '.join(PICTURES)} files into a folder for each class, or name a folder "
            "with images.npy and labels.npy"
        )
    _check_classes(source, classes)
    return Images(classes, tuple(found), None, stamp)


def _check_classes(source: Path, classes: Sequence[str]) -> None:
    if len(classes) < 2:  # noqa: PLR2004
        raise DataError(f"{source} holds images of one class, {classes[0]}: two or more are needed to tell apart")


def _arrays(source: Path) -> Images:
    """images and labels of `source`, checked, as uint8 [n, C, H, W] and int64 [n]."""
    files = [source] if source.suffix == ".npz" else [source / "images.npy", source / "labels.npy"]
    try:
        if source.suffix == ".npz":
            with source.open("rb") as stream, np.load(stream, allow_pickle=False) as pack:
                images, labels = pack["images"], pack["labels"]
        else:
            images, labels = (np.load(path, allow_pickle=False) for path in files)
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as e:
        raise DataError(
            f"{source} holds no readable arrays ({e}): save uint8 images and whole labels as images.npy and labels.npy"
        ) from e
    images = _laid_out(images, source)
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(f"labels of {source} are {labels.dtype} {list(labels.shape)}: a whole number for each image")
    labels = labels.astype(np.int64)
    if not len(labels):
        raise DataError(f"{source} holds no images: save some")
    if labels.min() < 0:
        raise DataError(f"labels of {source} go down to {labels.min()}: count classes from 0")
    classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    _check_classes(source, classes)
    stamp = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return Images(classes, (), (images, labels), stamp)


def _laid_out(images: np.ndarray, source: Path) -> np.ndarray:
    """uint8 [n, C, H, W] of an array in one of the orders that are known."""
    if images.dtype != np.uint8:
        raise DataError(f"images of {source} are {images.dtype}: save pixels from 0 to 255 as uint8")
    if images.ndim == 3:  # noqa: PLR2004
        return images[:, None]
    if images.ndim == 4:  # noqa: PLR2004
        if images.shape[1] in (1, COLOURS):
            return images
        if images.shape[3] in (1, COLOURS):
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise DataError(
        f"images of {source} are {list(images.shape)}: save [n, H, W], [n, H, W, C] or [n, C, H, W], C being 1 or 3"
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # training asks for both splits, one after the other
def _read(source: Path, found: Images, choice: DataChoice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images uint8 [n, C, H, W], labels [n], bool [n]: for testing) of the classes that `choice` has."""
    if absent := [name for name in choice.classes if name not in found.classes]:
        has = ", ".join(found.classes[:20])
        raise DataError(f"{source} has no class {absent[0]} (it has {has}): mend classes under [data] in the recipe")
    number = {name: i for i, name in enumerate(choice.classes)}
    if found.arrays is not None:
        images, labels = found.arrays
        wanted = np.array([str(label) in number for label in labels])
        images, labels = images[wanted], np.array([number[str(label)] for label in labels[wanted]], np.int64)
        if images.shape[1:] != (choice.channels, *choice.size):
            raise DataError(
                f"images of {source} are {list(images.shape[1:])}, the recipe says {[choice.channels, *choice.size]}: "
                "mend channels and size under [data]"
            )
        return _mixed(images, labels, [sha256(image.tobytes()) for image in images], choice)
    paths = [(path, number[name]) for path, name in found.paths if name in number]
    try:
        images = np.empty((len(paths), choice.channels or 1, *choice.size), np.uint8)
    except MemoryError as e:
        raise DataError(f"{len(paths)} images of {source} do not fit into memory: choose a smaller size") from e
    digests = []
    for i, (path, _) in enumerate(paths):
        images[i] = _picture(path, choice)
        digests.append(sha256(read_bytes(path, "the picture", DataError)))
    return _mixed(images, np.array([label for _, label in paths], np.int64), digests, choice)


def _mixed(
    images: np.ndarray, labels: np.ndarray, digests: Sequence[str], choice: DataChoice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images in the order of their hashes, so that any first part has all classes; by the hashes, too, those of
    `test_percent` of a hundred values are for testing."""
    order = np.argsort(np.array(digests), kind="stable")
    testing = np.array([int(digests[i][-12:], 16) % 100 < (choice.test_percent or 0) for i in order], bool)
    return images[order], labels[order], testing


def _picture(path: Path, choice: DataChoice) -> np.ndarray:
    """uint8 [C, H, W] of one picture, scaled and cut where the recipe says so."""
    height, width = choice.size
    otherwise = (
        f"the recipe says {height} x {width}: give pictures of one size, or set "
        'resize = "crop" under [data] to scale the shorter side and cut out the centre'
    )
    return read_picture(path, (height, width), choice.channels or 1, choice.resize is not None, otherwise)
