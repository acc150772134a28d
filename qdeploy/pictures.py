"""Picture files as arrays of pixels, of the size that somebody reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

GREY = ("1", "L", "I", "I;16", "LA")  # Pillow's modes without colour
COLOURS = 3


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            yield opened
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise DataError(f"{path} is a damaged picture ({reason}): remove it or make it again") from e


def picture_shape(path: Path) -> tuple[tuple[int, int], int]:
    """((H, W), channels) of a picture, of which the head alone is read. Raises DataError."""
    with _opened(path) as opened:
        return (opened.height, opened.width), 1 if opened.mode in GREY else COLOURS


def read_picture(path: Path, size: tuple[int, int], channels: int, crop: bool, otherwise: str) -> np.ndarray:
    """uint8 [channels, *size] of a picture; 1 channel is its luma.

    With `crop` the shorter side of another size is scaled and the centre cut out. Raises DataError; without `crop`,
    where the size is another, it says `otherwise`.
    """
    from PIL import Image

    height, width = size
    with _opened(path) as opened:
        picture = opened.convert("RGB" if channels == COLOURS else "L")
    if picture.size != (width, height):
        if not crop:
            raise DataError(f"{path} is {picture.height} x {picture.width}, {otherwise}")
        scale = max(width / picture.width, height / picture.height)
        larger = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        left, top = (larger[0] - width) // 2, (larger[1] - height) // 2
        picture = picture.resize(larger, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return np.asarray(picture, np.uint8).reshape(height, width, -1).transpose(2, 0, 1)
