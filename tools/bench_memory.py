"""Predicted against measured memory of whole processes that run networks of a million weights and more.

    python tools/bench_memory.py [MODEL...] [--target FILE] [--runner FILE] [-o JSON]

For each QDQ model two processes: qdeploy-run with the level inside its artifact, and qdeploy-run on a pulled folder (a
level is assembled from its planes and packed). Measured is the greatest resident set (VmHWM) less that of the same
process on a network of one value; predicted is `qdeploy.profile.memory.footprint`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.bundle.write import write_bundle
from qdeploy.client.pull import pull
from qdeploy.compile.artifact import read_description
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.files import write_atomic
from qdeploy.ladder import read_ladder
from qdeploy.profile.latency import machine
from qdeploy.profile.memory import footprint
from qdeploy.profile.report import machine_line
from qdeploy.serve.app import serving
from qdeploy.target import Target, load_target

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("resnet18", "mobilenetv2", "mobilenetv3-large", "efficientnet-lite0")
MODELS = [ROOT / "build" / "bench" / f"{name}.qdq.onnx" for name in NETWORKS]
REPEAT = 5  # processes of each kind; the median counts
EMPTY = "one value"


@dataclass(frozen=True)
class Row:
    """One process on one network; bytes."""

    network: str
    process: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def empty_network(path: Path) -> None:
    """A convolution of one value by one weight: what a process takes whatever it runs."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    arrays = {
        "scale": np.float32(0.1), "zero": np.uint8(0), "signed": np.int8(0), "none": np.int32(0),
        "weight": np.ones((1, 1, 1, 1), np.int8), "bias": np.zeros(1, np.int32), "product": np.float32(0.1) ** 2,
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "signed"], ["w"]),
        helper.make_node("DequantizeLinear", ["bias", "product", "none"], ["b"]),
        helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[1, 1]),
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["out"]),
        helper.make_node("DequantizeLinear", ["out", "scale", "zero"], ["output"]),
    ]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1]) for name in ("input", "output")]
    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "empty", edges[:1], edges[1:], held),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def median_of(command: list[str], read: Any) -> int:
    """Median over REPEAT processes of what `read` makes of their output."""
    outputs = [subprocess.run(command, capture_output=True, check=True, text=True).stdout for _ in range(REPEAT)]
    return int(np.median([read(text) for text in outputs]))


def measured(model: Path, target: Target, runner: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """{process: (predicted bytes, bytes of its greatest resident set)}."""
    inside, plain = folder / "inside", folder / "plain"
    compile_model(model, target, inside, options=Options(constant=True))
    compile_model(model, target, plain)
    write_bundle(read_ladder([model]), [plain], folder / "tree")
    with serving(folder / "tree") as url:
        pull(url, folder / "device", target=target.name, unsigned=True)
    shape = read_description(plain)["inputs"][0]["shape"]
    np.save(folder / "x.npy", np.random.default_rng(0).random(shape, np.float32))
    x, peak = str(folder / "x.npy"), lambda text: json.loads(text)["memory"]["peak_bytes"]
    run = [str(runner), "--input", x, "--json"]
    own, pulled = (int(footprint(where)["peak"].value) for where in (inside, plain))
    return {
        "runner, own level": (own, median_of([*run, str(inside)], peak)),
        "runner, pulled": (pulled, median_of([*run, str(folder / "device")], peak)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", default=MODELS)
    parser.add_argument("--target", type=Path, default=ROOT / "targets" / "host.toml")
    parser.add_argument("--runner", type=Path, default=Path(sys.prefix) / "device" / "x86_64" / "qdeploy-run")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if not args.runner.is_file():
        raise SystemExit(f"{args.runner} is missing: run make cross")
    if missing := [path for path in args.models if not path.is_file()]:
        raise SystemExit(f"{missing[0]} is missing: tools/bench_compile.py makes the models of build/bench")
    target, rows = load_target(args.target), []
    print(machine_line(machine()))
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "empty"
        folder.mkdir()
        empty_network(folder / "empty.onnx")
        empty = measured(folder / "empty.onnx", target, args.runner, folder)
        print("network of one value: " + ", ".join(f"{k} {v / 1e6:.2f} MB" for k, (_, v) in empty.items()))
        print(f"{'network':20} {'process':20} {'predicted':>10} {'measured':>10} {'error':>7}")
        for i, model in enumerate(args.models):
            folder, name = Path(where) / str(i), model.name.removesuffix(".qdq.onnx")
            folder.mkdir()
            for process, (predicted, peak) in measured(model, target, args.runner, folder).items():
                row = Row(name, process, predicted, peak - empty[process][1])
                rows.append(row)
                figures = f"{row.predicted / 1e6:10.3f} {row.measured / 1e6:10.3f} {row.error:+7.1%}"
                print(f"{row.network:20} {row.process:20} {figures}", flush=True)
    if args.out:
        write_atomic(args.out, json.dumps([asdict(row) for row in rows], indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
