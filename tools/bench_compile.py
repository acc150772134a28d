"""Latency of compiled networks beside ONNX Runtime on this machine, one line a network. Weights are random.

python tools/bench_compile.py [--target targets/host.toml] [--repeats 30]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.compile.pipeline import compile_model
from qdeploy.export.write import qdq_bytes
from qdeploy.files import write_atomic
from qdeploy.frozen import FrozenNet
from qdeploy.profile.latency import latency, machine
from qdeploy.profile.report import machine_line
from qdeploy.target import load_target
from tests.nets_frozen import Builder, random_frozen, random_images


def pair(shape: tuple[int, int, int, int], size: int, groups: int = 1) -> FrozenNet:
    """Two equal convolutions, a pool and a classifier; `shape` is a weight's, `size` the height and width."""
    b = Builder(np.random.default_rng(0), random_images(0, 1, (shape[1] * groups, size, size)))
    pad = [shape[2] // 2] * 4
    x = b.layer("conv1", "image", shape, 8, 8, relu=True, padding=pad, groups=groups)
    x = b.layer("conv2", x, shape, 8, 8, relu=True, padding=pad, groups=groups)
    x = b.flatten("flatten", b.pool("pool", x))
    return b.net(b.layer("fc", x, (10, shape[0]), 8, 8)).check()


NETS = {
    "resnet8 on 28x28": lambda: random_frozen(0, width=16, size=28, channels=1, blocks=3, images=1),
    "2 x 3x3, 16 ch, 32x32": lambda: pair((16, 16, 3, 3), 32),
    "2 x 3x3, 64 ch, 56x56": lambda: pair((64, 64, 3, 3), 56),
    "2 x 3x3, 256 ch, 14x14": lambda: pair((256, 256, 3, 3), 14),
    "2 x 1x1, 128 ch, 28x28": lambda: pair((128, 128, 1, 1), 28),
    "2 x depthwise, 144 ch, 56x56": lambda: pair((144, 1, 3, 3), 56, 144),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path(__file__).resolve().parents[1] / "targets" / "host.toml")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    target = load_target(args.target)
    print(machine_line(machine()))
    print(f"{'network':30} {'artifact ms':>12} {'ONNX Runtime ms':>16} {'ratio':>7}  quartiles")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in NETS.items():
            path, out = Path(folder) / "model.onnx", Path(folder) / "artifact"
            write_atomic(path, qdq_bytes(make()))
            compile_model(path, target, out, force=True)
            found = latency(out, path, args.repeats)
            low, high = found["ratio"]["quartiles"]
            print(
                f"{name:30} {found['artifact']['median']:12.3f} {found['onnxruntime']['median']:16.3f} "
                f"{found['ratio']['median']:7.2f}  {low:.2f} .. {high:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
