"""Batches of images: order and augmentation are pure functions of (seed, phase, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from qdeploy.data import Dataset
from qdeploy.files import sha256

MAX_SHIFT = 2  # pixels, for 28x28 and 32x32 images


def generator(seed: int, *position: int | str) -> np.random.Generator:
    """A random generator for one place in a run."""
    text = ":".join(str(part) for part in (seed, *position))
    return np.random.default_rng(int(sha256(text.encode())[:16], 16))


def as_input(images: np.ndarray) -> Tensor:
    """uint8 [n, C, H, W] -> float32 in [0, 1]."""
    return torch.from_numpy(images).float().div_(255.0)


def augment(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Mirror half of the images and shift each by up to MAX_SHIFT pixels, black outside. uint8 [n, C, H, W]."""
    n, _, height, width = images.shape
    flip = np.asarray(random.random(n) < 0.5)  # noqa: PLR2004
    rows, columns = random.integers(0, 2 * MAX_SHIFT + 1, (2, n))
    images = np.where(flip[:, None, None, None], images[..., ::-1], images)
    padded = np.pad(images, ((0, 0), (0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return np.ascontiguousarray(windows[np.arange(n), :, rows, columns])


def batches(
    data: Dataset, batch: int, seed: int, epoch: int, first: int, flip_shift: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled full batches of one epoch from step `first` on; the incomplete last batch is left out."""
    order = generator(seed, "order", epoch).permutation(len(data.labels))
    for step in range(first, len(order) // batch):
        index = order[step * batch : (step + 1) * batch]
        images = data.images[index]
        if flip_shift:
            images = augment(images, generator(seed, "augment", epoch, step))
        yield as_input(images), torch.from_numpy(data.labels[index])
