"""What the pages of the documentation take as given: a folder with models, images, keys, a published tree, a device."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from qdeploy.data import load
from qdeploy.files import sha256
from qdeploy.ptq.torch_source import export
from tests.docs.documents import ROOT, Session

SIDE = 224
PHASE = "epochs = 1\nlearning_rate = 0.02\nweight_decay = 1e-4\nbatch = 128\n"
DATA = '[data]\nname = "fashion-mnist"\nsplit = "sample"\ntrain_images = 256\n'
RECIPES = {  # trainings of two steps a phase
    "vertical.toml": '[network]\nname = "tiny"\nwidth = 8\n[quantization]\nmethod = "vertical"\n',
    "elastic.toml": '[network]\nname = "tiny"\nwidth = 8\n[quantization]\nmethod = "eqnet"\n'
    "weight_bits = [2, 3, 4, 5, 6, 8]\nactivation_bits = [2, 4, 8]\n",
    "RECIPE.toml": '[network]\nname = "tiny"\nwidth = 8\n[quantization]\nmethod = "differentiable"\n'
    "weight_kib = 0.7\nactivation_kib = 2.9\nupdate_steps = 1\n"
    f"[quantization.uniform_phase]\n{PHASE}[quantization.precision_phase]\n{PHASE}",
}
REPORT = """import sys

from qdeploy.client.status import DeviceState, report

state = DeviceState(device="cam-17", model="model", target="host", release=1, wanted="w4", reached="w2")
sys.exit(report(sys.argv[1], state, token=open("token").read().strip()))
"""
MODULE = """from torch import nn


def factory() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, 8, padding=3), nn.ReLU(), nn.Conv2d(8, 16, 5, 4, padding=2), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""


def make_workshop(folder: Path) -> None:
    """Fill an empty folder. Every page then starts from a copy of it."""
    for name in ("models", "targets", "data", "tools"):
        (folder / name).symlink_to(ROOT / name)
    _network(folder)
    for name, recipe in RECIPES.items():
        held = "held_out = 200\n" if name == "elastic.toml" else ""
        phases = f"[float_phase]\n{PHASE}[quantized_phase]\n{PHASE}"
        (folder / name).write_text(f"{DATA}{held}{recipe}{phases}")
    test = load("fashion-mnist", "test")
    np.save(folder / "images.npy", test.images[:16])
    for image, label in zip(test.images[:400], test.labels[:400] % 3, strict=True):
        path = folder / "pictures" / f"class{label}" / f"{sha256(image.tobytes())[:8]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    (folder / "words").write_text("correct horse battery staple\n")
    (folder / "report.py").write_text(REPORT)
    (folder / "token").write_text("a-secret-of-devices\n")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    with Session(folder) as session:
        for line in (
            "qdeploy train elastic.toml -o RUN",
            "qdeploy quantize model.onnx --data images --ladder 2,3,4,8 -o levels",
            "qdeploy quantize model.onnx --data images -o any.onnx",
            "qdeploy compile levels/w2.onnx --target host -o artifact",
            "qdeploy bundle levels/w2.onnx levels/w3.onnx levels/w4.onnx levels/w8.onnx --artifact artifact -o ladder",
            "qdeploy keys init keys",
            "qdeploy publish ladder --to site --keys keys",
        ):
            ended = session.run(line)
            assert ended.code == 0, f"{line}\n{ended.said}"
    for bits in (2, 4):
        shutil.copy(folder / "levels" / f"w{bits}.onnx", folder / f"w{bits}.onnx")
    shutil.copy(folder / "keys" / "1.root.json", folder / "root.json")


def _network(folder: Path) -> None:
    """A float network as ONNX, as a module and as weights, and images that it classifies."""
    torch.manual_seed(0)
    space: dict[str, object] = {}
    exec(MODULE, space)
    network: nn.Module = space["factory"]()  # type: ignore[operator]
    (folder / "package").mkdir()
    (folder / "package" / "module.py").write_text(MODULE)
    save_file(network.state_dict(), folder / "net.safetensors")
    shutil.copy(folder / "net.safetensors", folder / "w.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (16, 3, SIDE, SIDE), np.uint8)
    pixels = torch.tensor(images) / 255
    with torch.no_grad():
        classes = network.eval()(pixels).argmax(1).numpy()
    export(network, "package.module:factory", ("input", (1, 3, SIDE, SIDE)), folder / "model.onnx")
    (folder / "images").mkdir()
    np.save(folder / "images" / "images.npy", images)
    np.save(folder / "images" / "labels.npy", classes.astype(np.int64))
    np.save(folder / "x.npy", images[:4])
