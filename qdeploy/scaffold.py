"""`qdeploy init`: look at images of one's own, write a recipe for `qdeploy train` with a comment for each choice."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any

from qdeploy.errors import DataError, DeviceError, RecipeError
from qdeploy.files import write_atomic
from qdeploy.image_folder import Images, find_images
from qdeploy.pictures import picture_shape
from qdeploy.recipe import FOLDER, load_recipe

RECIPE = "recipe.toml"
TEST_PERCENT = 20
LEAST = 272  # images to train on: 256 for calibration (quant/calibrate.py), and some, since hashes choose
BATCH = 128
STEPS = 200  # that a phase should have at least, where images are few


@dataclass(frozen=True)
class Written:
    """What was found and what was written. `size` is [H, W]; with `resize` pictures are brought to it."""

    recipe: Path
    data: Path
    images: int
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    resize: bool
    network: str

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"recipe": str(self.recipe), "data": str(self.data)}

    def text(self) -> str:
        """For people."""
        height, width = self.size
        kind = "grey" if self.channels == 1 else "colour"
        fit = ", scaled and cut" if self.resize else ""
        return (
            f"{self.data}: {self.images} {kind} images of {len(self.classes)} classes, {height} x {width}{fit}\n"
            f"{self.recipe}: read it, then qdeploy train {self.recipe} -o RUN"
        )


TEMPLATE = Template("""\
# Images of your own, from trained network to device. `qdeploy train $name -o RUN` reads this file.
# Every key and what it may be: qdeploy/recipe.py. What is left out has the default that is said here.

seed = 0   # the same seed, recipe and images give the same weights, bit for bit

[network]
$network

[data]
name = "$kind"
folder = $folder
classes = [$classes]   # class 0, 1, ...: the order of the network's outputs
channels = $channels   # 1: grey, 3: colour
size = [$height, $width]   # height and width in pixels that the network reads
$resize
test_percent = $test   # of the images, chosen by the hash of each file: they judge the result and are never trained on
augment = "flip-shift"   # "flip-shift": mirrored and moved by some pixels at random; "none" where left and right matter
# held_out = $held   # training images that `qdeploy evaluate` and `qdeploy search` judge subnets by

[quantization]
method = "vertical"   # all widths in one training, whose weights nest; also: batchquant, eqnet, differentiable
widths = [2, 3, 4]   # bits of weights: the levels that a device climbs
activation_bits = "same"   # as the layer's weights; 8: always 8 bits, which costs less accuracy and more time
first_last = 8   # bits of the first and the last layer

[float_phase]   # first the network in floating point: SGD, the rate falls along a cosine
epochs = $epochs
learning_rate = 0.1   # lower it where the loss stops being finite
weight_decay = 5e-4
batch = $batch   # images a step
nesterov = true

[quantized_phase]   # then all widths together, from there
epochs = $epochs
learning_rate = 0.01
weight_decay = 1e-4
batch = $batch
""")


def write_recipe(folder: Path, data: Path, network: str, classes: str | None, size: str | None) -> Written:
    """Write `folder`/recipe.toml for the images in `data`; `network` names one of `qdeploy.nets` or a function.

    `classes` "a,b" are those to take, all by default; `size` "H,W" is what pictures are scaled to where theirs differ.
    Raises DataError for images that cannot be trained on, RecipeError for options, DeviceError when the file exists.
    """
    path = folder / RECIPE
    if path.exists():
        raise DeviceError(f"{path} exists and may have been edited: choose another folder, or remove it")
    found = find_images(data)
    names = _classes(found, classes, data)
    count, shapes = _shapes(found, names)
    if count * (100 - TEST_PERCENT) < LEAST * 100:
        enough = -(-LEAST * 100 // (100 - TEST_PERCENT))
        raise DataError(f"{data} has {count} images of {len(names)} classes: training takes {enough} or more")
    wanted = _size(size, shapes, data)
    channels = max(shape[0] for shape in shapes)
    resize = any(shape[1:] != wanted for shape in shapes)
    if resize and found.arrays is not None:
        raise RecipeError(f"--size {size}: arrays are taken as they are, {list(next(iter(shapes))[1:])}; leave it out")
    _check_network(network)
    written = Written(path, data, count, names, channels, wanted, resize, network)
    text = _text(written)
    write_atomic(path, text.encode())
    load_recipe(path)  # what was written is what `train` takes
    return written


def _classes(found: Images, asked: str | None, data: Path) -> tuple[str, ...]:
    names = found.classes if asked is None else tuple(name.strip() for name in asked.split(","))
    if absent := [name for name in names if name not in found.classes]:
        raise DataError(f"{data} has no class {absent[0]!r}: choose --classes from {', '.join(found.classes[:20])}")
    if len(names) < 2 or len(set(names)) != len(names):  # noqa: PLR2004
        raise RecipeError(f"--classes {asked}: name two classes or more, none of them twice")
    return names


def _shapes(found: Images, names: tuple[str, ...]) -> tuple[int, Counter[tuple[int, int, int]]]:
    """(number of images, how many of each [C, H, W]) of some classes."""
    if found.arrays is not None:
        images, labels = found.arrays
        count = sum(int((labels == int(name)).sum()) for name in names)
        channels, height, width = images.shape[1:]
        return count, Counter({(channels, height, width): count})
    shapes: Counter[tuple[int, int, int]] = Counter()
    for path, name in found.paths:
        if name in names:
            (height, width), channels = picture_shape(path)
            shapes[channels, height, width] += 1
    return shapes.total(), shapes


def _size(asked: str | None, shapes: Counter[tuple[int, int, int]], data: Path) -> tuple[int, int]:
    """[H, W] that the network is to read; DataError where pictures differ and none was asked for."""
    if asked is not None:
        if not re.fullmatch(r"[1-9]\d{0,4},[1-9]\d{0,4}", asked):
            raise RecipeError(f"--size {asked}: write height and width in pixels, for instance 32,32")
        numbers = [int(part) for part in asked.split(",")]
        return numbers[0], numbers[1]
    sizes = Counter[tuple[int, int]]()
    for (_, height, width), count in shapes.items():
        sizes[height, width] += count
    if len(sizes) > 1:
        (height, width), most = sizes.most_common(1)[0]
        raise DataError(
            f"pictures in {data} have {len(sizes)} sizes, {most} of {shapes.total()} are {height} x {width}: give "
            f"--size {height},{width}, or another one, to which all are scaled and cut"
        )
    return next(iter(sizes))


def _check_network(network: str) -> None:
    from qdeploy.nets import NETWORKS
    from qdeploy.nets.own import FUNCTION

    if network not in NETWORKS and FUNCTION.fullmatch(network) is None:
        names = ", ".join(sorted(NETWORKS))
        raise RecipeError(f"--network {network}: choose one of {names}, or your own as package.module:function")


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _network(found: Written) -> str:
    if ":" in found.network:
        comment = "called with (channels, classes), returns a torch.nn.Module; its module lies where you train"
        return f"name = {_quoted(found.network)}   # {comment}"
    large = min(found.size) >= 64  # noqa: PLR2004
    fixed = found.network.endswith("-imagenet")
    lines = [f"name = {_quoted(found.network)}   # also: resnet20, resnet18, mobilenetv2, mobilenetv3-small, ..."]
    lines.append("# width = 16   # channels behind the first convolution; every layer grows with it")
    if not fixed:
        lines.append(f"stem_stride = {2 if large else 1}   # 2: a fourth of the work, for images of 64 pixels and more")
    return "\n".join(lines)


def _text(found: Written) -> str:
    training = max(1, found.images * (100 - TEST_PERCENT) // 100)
    batch = max(2, min(BATCH, 1 << max(1, (training // 2).bit_length() - 1)))
    steps = max(1, training // batch)
    resize = '# resize = "crop"   # for pictures of other sizes: scale the shorter side, cut out the centre'
    if found.resize:
        resize = 'resize = "crop"   # pictures have other sizes: the shorter side is scaled, the centre cut out'
    return TEMPLATE.substitute(
        name=found.recipe.name,
        kind=FOLDER,
        network=_network(found),
        folder=_quoted(str(found.data.resolve())),
        classes=", ".join(map(_quoted, found.classes)),
        channels=found.channels,
        height=found.size[0],
        width=found.size[1],
        resize=resize,
        test=TEST_PERCENT,
        held=max(1, training // 10),
        epochs=max(6, min(100, -(-STEPS // steps))),
        batch=batch,
    )
