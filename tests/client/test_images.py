from __future__ import annotations

import contextlib
import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.client.images import load_images, load_labels, to_input
from qdeploy.errors import DataError

PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def npy(array: np.ndarray, **options: bool) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def load(tmp_path: Path, data: bytes) -> np.ndarray:
    (tmp_path / "file").write_bytes(data)
    return load_images(tmp_path / "file")


def test_arrays_and_idx_files(tmp_path: Path) -> None:
    for data in (npy(PIXELS), idx(PIXELS), gzip.compress(idx(PIXELS))):
        np.testing.assert_array_equal(load(tmp_path, data), PIXELS)


def test_pictures(tmp_path: Path) -> None:
    grey = PIXELS[0]
    np.testing.assert_array_equal(load(tmp_path, b"P5 4 3 255\n" + grey.tobytes()), grey[None])
    np.testing.assert_array_equal(load(tmp_path, b"P5\n# made by hand\n4\n#x\n3 255\n" + grey.tobytes()), grey[None])
    colour = np.stack([grey, grey + 1, grey + 2], -1)
    np.testing.assert_array_equal(load(tmp_path, b"P6 4 3 255\n" + colour.tobytes()), colour.transpose(2, 0, 1))


def test_png(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for mode, array in (("L", PIXELS[0]), ("RGB", np.stack([PIXELS[0]] * 3, -1))):
        image.fromarray(array).save(tmp_path / "x.png")
        expected = array[None] if mode == "L" else array.transpose(2, 0, 1)
        np.testing.assert_array_equal(load_images(tmp_path / "x.png"), expected)
    image.fromarray(PIXELS[0]).convert("RGBA").save(tmp_path / "x.png")
    with pytest.raises(DataError, match="mode RGBA: convert it"):
        load_images(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:40])
    with pytest.raises(DataError, match="damaged PNG"):
        load_images(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not an image file"),
        (b"GIF89a", "not an image file"),
        (npy(PIXELS)[:-1], r"not a usable \.npy"),
        (npy(np.array([{}]), allow_pickle=True), r"not a usable \.npy"),
        (idx(PIXELS)[:-1], "does not hold the"),
        (idx(PIXELS) + b"x", "does not hold the"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "does not hold the"),
        (b"\0\0\x08\x03\0", "damaged"),
        (b"\0\0\x08\x09" + b"\0" * 40, "not an IDX file"),
        (gzip.compress(idx(PIXELS))[:-10], "damaged"),
        (gzip.compress(b"hello, world"), "not an IDX file"),
        (b"\x1f\x8b\x08junk", "damaged"),
        (b"P5 4 3 65535\n" + b"x" * 24, "8 bits"),
        (b"P5 4 3 255\n" + b"x" * 11, "holds 11 bytes"),
        (b"P5" + b" " * 5000, "PGM"),
    ],
)
def test_files_that_are_none(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises(DataError, match=match):
        load(tmp_path, data)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the image file"):
        load_images(tmp_path / "none")


@given(st.binary(max_size=60), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\0\0\x08", b"P5 ", b"\x1f\x8b\x08\0"]))
def test_noise_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, noise: bytes, start: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(start + noise)
    with contextlib.suppress(DataError):
        assert isinstance(load_images(path), np.ndarray)


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "y").write_bytes(gzip.compress(idx(np.array([3, 1], np.uint8))))
    assert load_labels(tmp_path / "y").tolist() == [3, 1]
    (tmp_path / "y").write_bytes(npy(PIXELS))
    with pytest.raises(DataError, match="labels are whole numbers"):
        load_labels(tmp_path / "y")


@pytest.mark.parametrize(
    ("shape", "sample", "count"),
    [
        ((5, 3, 8, 9), (3, 8, 9), 5),
        ((3, 8, 9), (3, 8, 9), 1),
        ((8, 9), (1, 8, 9), 1),
        ((5, 8, 9), (1, 8, 9), 5),
        ((1, 8, 9), (1, 8, 9), 1),
        ((1, 1, 8, 9), (1, 8, 9), 1),
        ((8, 8, 9), (1, 8, 9), 8),
    ],
)
def test_shapes_that_fit(shape: tuple[int, ...], sample: tuple[int, ...], count: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batch = to_input(images, sample)
    assert batch.shape == (count, *sample) and batch.dtype == np.float32
    np.testing.assert_array_equal(np.rint(batch.reshape(-1) * 255), images.reshape(-1))


@pytest.mark.parametrize("shape", [(), (8,), (9, 8), (5, 8, 9, 3), (0, 3, 8, 9), (2, 2, 3, 8, 9), (3, 9, 8)])
def test_shapes_that_do_not(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"images have shape \[.*\]: the model reads \[n, 3, 8, 9\]"):
        to_input(np.zeros(shape, np.uint8), (3, 8, 9))


def test_values() -> None:
    floats = np.array([[[0.5, -3.0]]], np.float64)
    np.testing.assert_array_equal(to_input(floats, (1, 1, 2)), floats[None].astype(np.float32))
    with pytest.raises(DataError, match="not finite"):
        to_input(np.array([[[0.5, np.nan]]]), (1, 1, 2))
    with pytest.raises(DataError, match="int32: give uint8 pixels"):
        to_input(np.zeros((1, 1, 2), np.int32), (1, 1, 2))
