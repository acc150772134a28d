"""Calibration images: a folder of .npy, .npz or image files, or a dataset that qdeploy.data knows -> network inputs.

uint8 pixels become pixel / 255; then (x - mean) / std of each channel where given. float32 arrays are taken as they are
unless mean and std are given. labels.npy in the folder, whole numbers [n], are the right classes.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.data import SPLITS, load
from qdeploy.errors import DataError
from qdeploy.pictures import read_picture

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm")
LABELS = "labels.npy"


@dataclass(frozen=True)
class Reading:
    """How images become inputs. layout: axes of arrays. resize: scale the shorter side, then cut out the centre."""

    layout: str = "nchw"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: bool = False
    count: int = 256
    data_dir: Path | None = None


def load_calibration(
    data: str, shape: tuple[int, ...], reading: Reading | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(images float32 [n, *shape[1:]], labels int64 [n] or None) for a network that reads `shape`, batch first.

    `data` is a folder or the name of a dataset; `reading.count` images at most are taken, evenly spread. Raises
    DataError for a folder without images, files of unlike or wrong shapes, and files that are damaged.
    """
    reading = reading or Reading()
    if len(reading.mean) != len(reading.std) or any(s <= 0 for s in reading.std):
        raise DataError("--mean and --std go together: one number a channel each, std above 0")
    folder, labels = Path(data), None
    if data in SPLITS and not folder.is_dir():
        split = "sample" if "sample" in SPLITS[data] else "train"
        dataset = load(data, split, reading.data_dir)
        images, labels = dataset.images, dataset.labels
    elif folder.is_dir():
        images, labels = _folder(folder, shape, reading)
    else:
        raise DataError(f"{data} is no folder and none of {', '.join(sorted(SPLITS))}: name a folder with images")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{LABELS} in {data} has {len(labels)} labels for {len(images)} images")
    taken = np.arange(min(len(images), reading.count)) * len(images) // max(1, min(len(images), reading.count))
    return _normalized(images[taken], shape, reading), None if labels is None else labels[taken]


def _folder(folder: Path, shape: tuple[int, ...], reading: Reading) -> tuple[np.ndarray, np.ndarray | None]:
    """All arrays of a folder, or as many of its pictures as are asked for."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    arrays = [path for path in files if path.suffix in (".npy", ".npz") and path.name != LABELS]
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    labels = _array(folder / LABELS) if (folder / LABELS).is_file() else None
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise DataError(f"{folder / LABELS} holds {labels.dtype} {list(labels.shape)}: labels are whole numbers [n]")
    whole = None if labels is None else labels.astype(np.int64)
    if arrays:
        parts = [_laid_out(part, path, shape, reading) for path in arrays for part in _arrays(path)]
        if unlike := next((p for p in parts if p.shape[1:] != parts[0].shape[1:] or p.dtype != parts[0].dtype), None):
            raise DataError(
                f"the arrays in {folder} are unlike: {parts[0].dtype} {list(parts[0].shape)} and "
                f"{unlike.dtype} {list(unlike.shape)}"
            )
        return np.concatenate(parts), whole
    if not pictures:
        raise DataError(f"{folder} holds no images: give .npy or .npz arrays, or {', '.join(PICTURES)} files")
    if whole is None:  # labels are for all pictures; without them only those that are taken are read
        count = min(len(pictures), reading.count)
        pictures = [pictures[i * len(pictures) // count] for i in range(count)]
    return np.stack([_picture(path, shape, reading) for path in pictures]), whole


def _array(path: Path) -> np.ndarray:
    return _arrays(path)[0]


def _arrays(path: Path) -> list[np.ndarray]:
    """The array of an .npy file or all of an .npz, in order of their names."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return [found]
        with found:
            parts = [found[name] for name in sorted(found.files)]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError) as e:
        raise DataError(f"{path} is not a usable file of arrays ({e}): save it again with numpy.save") from e
    if not parts:
        raise DataError(f"{path} holds no array: save it again with numpy.savez")
    return parts


def _laid_out(array: np.ndarray, path: Path, shape: tuple[int, ...], reading: Reading) -> np.ndarray:
    """[n, *sample] with the network's order of axes; raises DataError for another type or shape."""
    if array.dtype not in (np.uint8, np.float32, np.float64):
        raise DataError(f"{path} holds {array.dtype}: give uint8 pixels or float32")
    if array.ndim and array.shape[1:] == shape[2:] and shape[1] == 1:
        array = array[:, None]
    if reading.layout == "nhwc" and array.ndim == 4:  # noqa: PLR2004
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1:] != shape[1:]:
        swapped = array.ndim == 4 and array.transpose(0, 3, 1, 2).shape[1:] == shape[1:]  # noqa: PLR2004
        hint = ": its axes look like [n, H, W, C], add --layout nhwc" if swapped else ""
        raise DataError(f"{path} is {list(array.shape)}, the model reads [n, {', '.join(map(str, shape[1:]))}]{hint}")
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def _picture(path: Path, shape: tuple[int, ...], reading: Reading) -> np.ndarray:
    """uint8 [C, H, W], or [H, W, C] for a network that reads that."""
    if len(shape) != 4 or not {shape[1], shape[3]} & {1, 3}:  # noqa: PLR2004
        raise DataError(f"the model reads {list(shape)}, which is no picture: give .npy arrays of that shape")
    last = shape[1] not in (1, 3)
    channels, height, width = (shape[3], shape[1], shape[2]) if last else shape[1:]
    otherwise = f"the model reads {height} x {width}: add --resize to scale and cut pictures, or give them in that size"
    pixels = read_picture(path, (height, width), channels, reading.resize, otherwise)
    return pixels.transpose(1, 2, 0) if last else pixels


def _normalized(images: np.ndarray, shape: tuple[int, ...], reading: Reading) -> np.ndarray:
    """float32, (x - mean) / std along the channels' axis."""
    if images.shape[1:] != shape[1:]:
        raise DataError(f"images are {list(images.shape)}, the model reads [n, {', '.join(map(str, shape[1:]))}]")
    values = images.astype(np.float32)
    if images.dtype == np.uint8:
        values /= np.float32(255)
    if reading.mean:
        axis = 1 if len(shape) != 4 or shape[1] == len(reading.mean) else 3  # noqa: PLR2004
        if len(reading.mean) not in (1, shape[axis] if axis < len(shape) else 0):
            raise DataError(f"--mean has {len(reading.mean)} numbers, the model reads {list(shape)}")
        form = [-1 if i == axis else 1 for i in range(len(shape))]
        mean, std = (np.array(numbers, np.float32).reshape(form) for numbers in (reading.mean, reading.std))
        values = (values - mean) / std
    if not np.isfinite(values).all():
        raise DataError("the images hold NaN or infinity: check the files, --mean and --std")
    return values


def parse_numbers(text: str | None) -> tuple[float, ...]:
    """ "0.5,0.5,0.5" -> numbers; none for None. Raises DataError."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        raise DataError(f"{text!r} is no list of numbers: write for instance 0.485,0.456,0.406") from e
