"""Images of one's own: which are taken, which are for testing, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdeploy.errors import DataError, RecipeError
from qdeploy.image_folder import find_images, load_split
from qdeploy.recipe import DataChoice

CHOICE = DataChoice("folder", folder="x", classes=("cats", "dogs"), size=(6, 5), channels=3, test_percent=20)


def pictures(
    folder: Path, count: int, size: tuple[int, int], seed: int = 0, name: str = "", mode: str = "RGB",
    classes: Sequence[str] = ("cats", "dogs"),
) -> None:  # fmt: skip
    """Noise, darker or lighter by class, as PNG; `size` is (H, W)."""
    noise = np.random.default_rng(seed)
    for i in range(count):
        own = folder / classes[i % len(classes)]
        own.mkdir(parents=True, exist_ok=True)
        shape = (*size, 3) if mode == "RGB" else size
        base = 60 + 130 * (i % len(classes)) / max(1, len(classes) - 1)
        pixels = np.clip(noise.normal(base, 20, shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(own / f"{name}{i:04}.png")


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, 200, (6, 5))
    (tmp_path / "cats" / "deeper").mkdir()
    (tmp_path / "cats" / "0000.png").rename(tmp_path / "cats" / "deeper" / "0000.png")
    for path in (tmp_path / "notes.txt", tmp_path / "cats" / "notes.txt", tmp_path / "dogs" / ".hidden.png"):
        path.write_text("no picture")
    train, test = (load_split(CHOICE, split, tmp_path) for split in ("train", "test"))
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 6, 5) and train.classes == test.classes == 2
    assert len(train) + len(test) == 200 and 20 <= len(test) <= 65
    assert (train.images.mean((1, 2, 3)) > 125).astype(int).tolist() == train.labels.tolist()
    first = train.labels[:60]  # calibration takes a first part
    assert 10 < first.sum() < 50
    again = load_split(replace(CHOICE, folder=str(tmp_path)), "train", None)
    assert np.array_equal(again.images, train.images)


def test_the_split_never_changes_and_copies_stay_on_one_side(tmp_path: Path) -> None:
    pictures(tmp_path, 100, (6, 5))
    before = {image.tobytes() for image in load_split(CHOICE, "test", tmp_path).images}
    pictures(tmp_path, 60, (6, 5), seed=5, name="more")
    for path in sorted((tmp_path / "cats").glob("00*.png")):
        (tmp_path / "cats" / f"copy-{path.name}").write_bytes(path.read_bytes())
    test = [image.tobytes() for image in load_split(CHOICE, "test", tmp_path).images]
    train = {image.tobytes() for image in load_split(CHOICE, "train", tmp_path).images}
    assert before <= set(test) and not train & set(test) and len(test) > len(set(test))


@pytest.mark.parametrize("form", ["nhw", "nhwc", "nchw", "npz"])
def test_arrays(tmp_path: Path, form: str) -> None:
    noise = np.random.default_rng(0)
    grey = noise.integers(0, 256, (50, 6, 5), np.uint8)
    colour = noise.integers(0, 256, (50, 3, 6, 5), np.uint8)
    images = {"nhw": grey, "npz": grey, "nhwc": colour.transpose(0, 2, 3, 1), "nchw": colour}[form]
    labels = np.arange(50, dtype=np.int16) % 3
    source = tmp_path / "pack.npz" if form == "npz" else tmp_path
    if form == "npz":
        np.savez(source, images=images, labels=labels)
    else:
        np.save(tmp_path / "images.npy", images)
        np.save(tmp_path / "labels.npy", labels)
    assert find_images(source).classes == ("0", "1", "2")
    channels = 1 if images.ndim == 3 else 3
    choice = replace(CHOICE, classes=("2", "0"), channels=channels)
    splits = [load_split(choice, split, source) for split in ("train", "test")]
    expected = (grey[:, None] if channels == 1 else colour)[labels != 1]
    have = sorted(image.tobytes() for split in splits for image in split.images)
    assert have == sorted(image.tobytes() for image in expected)
    by_image = {image.tobytes(): label for image, label in zip(expected, labels[labels != 1], strict=True)}
    for split in splits:
        assert [("2", "0").index(str(by_image[image.tobytes()])) for image in split.images] == split.labels.tolist()
    with pytest.raises(DataError, match="the recipe says .*: mend channels and size"):
        load_split(replace(choice, size=(5, 6)), "train", source)


def test_pictures_are_scaled_and_cut_where_the_recipe_says_so(tmp_path: Path) -> None:
    pictures(tmp_path, 40, (6, 5))
    wide = np.zeros((12, 40, 3), np.uint8)
    wide[:, 10:30] = 200  # the centre
    Image.fromarray(wide).save(tmp_path / "dogs" / "wide.png")
    with pytest.raises(DataError, match=r'wide.png is 12 x 40, the recipe says 6 x 5: .* resize = "crop"'):
        load_split(CHOICE, "train", tmp_path)
    crop = replace(CHOICE, resize="crop")
    images = np.concatenate([load_split(crop, split, tmp_path).images for split in ("train", "test")])
    assert (images == 200).all((1, 2, 3)).sum() == 1


def test_grey_and_colour(tmp_path: Path) -> None:
    pictures(tmp_path, 40, (6, 5), mode="L")
    grey = load_split(replace(CHOICE, channels=1), "train", tmp_path).images
    colour = load_split(CHOICE, "train", tmp_path).images
    assert grey.shape[1] == 1 and np.array_equal(np.repeat(grey, 3, 1), colour)


def test_files_that_change_are_read_again(tmp_path: Path) -> None:
    pictures(tmp_path, 40, (6, 5))
    before = load_split(CHOICE, "train", tmp_path).images.copy()
    pictures(tmp_path, 40, (6, 5), seed=9)
    assert not np.array_equal(load_split(CHOICE, "train", tmp_path).images, before)


@pytest.mark.parametrize("kind", ["cut", "noise", "empty", "text"])
def test_a_damaged_picture_is_named(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, 40, (6, 5))
    path = tmp_path / "dogs" / "0001.png"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:60], "noise": random.Random(0).randbytes(99), "empty": b"", "text": b"dog"}[kind])
    with pytest.raises(DataError, match=r"0001.png is a damaged picture .*: remove it or make it again"):
        load_split(CHOICE, "train", tmp_path)


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder of images and no .npz file"):
        find_images(tmp_path / "absent")
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="holds no images: put .png"):
        find_images(tmp_path)
    pictures(tmp_path, 4, (6, 5), classes=("cats",))
    with pytest.raises(DataError, match="holds images of one class, cats"):
        find_images(tmp_path)
    pictures(tmp_path, 4, (6, 5), classes=("dogs", "cows"))
    with pytest.raises(DataError, match="has no class birds .it has cats, cows, dogs.: mend classes"):
        load_split(replace(CHOICE, classes=("cats", "birds")), "train", tmp_path)
    one = tmp_path / "one"
    pictures(one, 2, (6, 5))
    with pytest.raises(DataError, match="has 2 images, none of them for (testing|training)"):
        for split in ("train", "test"):
            load_split(CHOICE, split, one)


@pytest.mark.parametrize(
    ("images", "labels", "problem"),
    [
        (np.zeros((4, 6, 5), np.float32), np.arange(4), "are float32: save pixels from 0 to 255 as uint8"),
        (np.zeros((4, 6, 5, 2), np.uint8), np.arange(4), "with 1 or 3|C being 1 or 3"),
        (np.zeros((4, 6), np.uint8), np.arange(4), "C being 1 or 3"),
        (np.zeros((4, 6, 5), np.uint8), np.arange(3), "a whole number for each image"),
        (np.zeros((4, 6, 5), np.uint8), np.arange(4) / 2, "a whole number for each image"),
        (np.zeros((4, 6, 5), np.uint8), np.arange(4) - 1, "count classes from 0"),
        (np.zeros((4, 6, 5), np.uint8), np.zeros(4, int), "one class, 0"),
        (np.zeros((0, 6, 5), np.uint8), np.zeros(0, int), "holds no images"),
        (np.array([{}]), np.arange(4), "holds no readable arrays"),
        (np.zeros((4, 6, 5), np.uint8), None, "holds no readable arrays"),
    ],
)
def test_arrays_that_cannot_be_taken(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray | None, problem: str
) -> None:
    np.save(tmp_path / "images.npy", images, allow_pickle=True)
    if labels is not None:
        np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError, match=problem):
        find_images(tmp_path)


def test_a_damaged_pack(tmp_path: Path) -> None:
    for data in (b"", b"PK\x03\x04 and no more", b"junk"):
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(DataError, match="holds no readable arrays"):
            find_images(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"folder": None}, "lacks data.folder"),
        ({"classes": ()}, "lacks data.classes"),
        ({"size": ()}, "lacks data.size"),
        ({"channels": None}, "lacks data.channels"),
        ({"test_percent": None}, "lacks data.test_percent"),
        ({"classes": ("a",)}, "two classes or more"),
        ({"classes": ("a", "a")}, "none of them twice"),
        ({"size": (3,)}, "height, width"),
        ({"size": (0, 3)}, "height, width"),
        ({"test_percent": 0}, "choose from 1 to 90"),
        ({"test_percent": 91}, "choose from 1 to 90"),
        ({"split": "sample"}, 'the split "train" alone'),
        ({"name": "fashion-mnist"}, 'for images of your own: set name = "folder"'),
    ],
)
def test_recipes_that_make_no_sense(changes: dict, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        replace(CHOICE, **changes)
