"""Images from files and arrays -> what the model reads. Files are told apart by their first bytes, not their names."""

from __future__ import annotations

import gzip
import io
import math
import re
import zlib
from pathlib import Path

import numpy as np

from qdeploy.errors import DataError
from qdeploy.files import read_bytes

_NPY, _GZIP, _PNG = b"\x93NUMPY", b"\x1f\x8b", b"\x89PNG\r\n\x1a\n"
_GAP = rb"(?:\s|#[^\n]*\n)+"
_NETPBM = re.compile(rb"P([56])" + 2 * (_GAP + rb"(\d{1,9})") + _GAP + rb"(\d{1,3})\s")
FORMS = "give .npy (uint8 or float32), IDX (also .gz), PGM, PPM or PNG"


def load_images(path: Path) -> np.ndarray:
    """Array in a file: .npy as it is, IDX uint8 [n, H, W], PGM/PPM/PNG uint8 [C, H, W]. Raises DataError."""
    data = read_bytes(Path(path), "the image file", DataError)
    if data.startswith(_NPY):
        return _read_npy(data, path)
    if data.startswith((_GZIP, b"\0\0\x08")):
        return _read_idx(data, path)
    if data.startswith((b"P5", b"P6")):
        return _read_netpbm(data, path)
    if data.startswith(_PNG):
        return _read_png(data, path)
    raise DataError(f"{path} is not an image file that can be read: {FORMS}")


def load_labels(path: Path) -> np.ndarray:
    """int64 [n] class numbers from an .npy or IDX file (also .gz). Raises DataError."""
    labels = load_images(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path} holds {labels.dtype} {list(labels.shape)}: labels are whole numbers [n]")
    return labels.astype(np.int64)


def _read_npy(data: bytes, path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, MemoryError, OSError, TypeError) as e:
        raise DataError(f"{path} is not a usable .npy file ({e}): save it again with numpy.save") from e


def _read_idx(data: bytes, path: Path) -> np.ndarray:
    stream: io.BufferedIOBase = io.BytesIO(data)
    if data.startswith(_GZIP):
        stream = gzip.GzipFile(fileobj=stream)
    try:
        head = stream.read(4)
        if len(head) != 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
            raise DataError(f"{path} is not an IDX file of bytes: {FORMS}")
        axes = stream.read(4 * head[3])
        shape = tuple(int(n) for n in np.frombuffer(axes, ">u4"))
        size = math.prod(shape)
        body = stream.read(size + 1) if size < 1 << 31 else b""
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise DataError(f"{path} is damaged ({e}): fetch it again") from e
    if len(shape) != head[3] or len(body) != size:
        raise DataError(f"{path} does not hold the {list(shape)} bytes that its head announces: fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read_netpbm(data: bytes, path: Path) -> np.ndarray:
    match = _NETPBM.match(data)
    if match is None or int(match[4]) != 255:
        raise DataError(f"{path} is not a PGM or PPM file of 8 bits: convert it (largest value 255)")
    channels, width, height = (1 if match[1] == b"5" else 3), int(match[2]), int(match[3])
    body = data[match.end() :]
    if len(body) != channels * width * height:
        raise DataError(f"{path} holds {len(body)} bytes, its head announces {width} x {height}: make it again")
    return np.frombuffer(body, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


def _read_png(data: bytes, path: Path) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as e:
        raise DataError(f"{path} is a PNG, which needs the package pillow: install it, or convert to PGM or PPM") from e
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in ("L", "RGB"):
                raise DataError(f"{path} is a PNG of mode {image.mode}: convert it to 8-bit grey or RGB")
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise DataError(f"{path} is a damaged PNG ({e}): make it again") from e
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def to_input(images: np.ndarray, sample: tuple[int, ...]) -> np.ndarray:
    """float32 [n, *sample] for a model that reads `sample` = (C, H, W).

    uint8 pixels become pixel / 255; floats pass through. One image may come without its first axis, images of one
    channel without that axis. Raises DataError that names the shape expected and the one found.
    """
    plain = sample[1:] if sample[:1] == (1,) else sample
    if images.shape in (sample, plain):
        shape = (1, *sample)
    elif images.ndim and images.shape[1:] in (sample, plain) and len(images):
        shape = (len(images), *sample)
    else:
        raise DataError(f"images have shape {list(images.shape)}: the model reads [n, {', '.join(map(str, sample))}]")
    if images.dtype == np.uint8:
        return (images.astype(np.float32) / np.float32(255)).reshape(shape)
    if images.dtype.kind != "f":
        raise DataError(f"images are {images.dtype}: give uint8 pixels (0..255) or float32")
    with np.errstate(over="ignore"):  # what is too large becomes infinity, which is refused below
        values = images.astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise DataError("images hold values that are not finite numbers")
    return values
