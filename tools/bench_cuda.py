"""Compiled networks on this machine's GPU beside ONNX Runtime's TensorRT and CUDA providers, on the same QDQ files.

    python tools/bench_cuda.py [--networks NAME,...] [--batches 1,32] [--rounds N] [--data-dir DIR] [-o JSON]

Prints the machine, then for each network and batch the medians (quartiles) of interleaved rounds in milliseconds, from
host memory to host memory, how many of the runs give another output than the artifact for the processor, and how long
packing and uploading a level takes. What is not installed is "not measured".
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo import ROOT, ZOO, Images, make

from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import QDeployError
from qdeploy.files import canonical_json, write_atomic
from qdeploy.profile.latency import machine, rounds, summary
from qdeploy.profile.report import machine_line
from qdeploy.qdq import arrays, load_model
from qdeploy.target import LocalGpu, Target, local_gpu

PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "onnxruntime": "CUDAExecutionProvider"}
Run = Callable[[], Any]


def batched(path: Path, batch: int, folder: Path) -> tuple[Path, tuple[str, tuple[int, ...]]]:
    """The file with its batch left open where it is not 1, and the input's name and shape."""
    model = onnx.load(path)
    info = model.graph.input[0]
    sizes = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    shape = (batch, *sizes[1:])
    if batch == 1:
        return path, (info.name, shape)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    out = folder / f"{path.stem}-{batch}.onnx"
    out.write_bytes(model.SerializeToString())
    return out, (info.name, shape)


def peers(model: bytes, x: np.ndarray) -> dict[str, Run]:
    """ONNX Runtime with each provider that works here."""
    import onnxruntime

    found: dict[str, Run] = {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for label, provider in PROVIDERS.items():
        if provider in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(model, options, providers=[provider])
            if provider in session.get_providers():
                feed = {session.get_inputs()[0].name: x}
                found[label] = partial(session.run, None, feed)
    return found


def measured(name: str, batch: int, gpu: LocalGpu, images: Images, args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    source = make(name, images, args.weights_dir, ROOT / "build" / "bench").qdq
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        path, shape = batched(source, batch, folder)
        options = Options(shape=shape if batch > 1 else None)
        arch = platform.machine()
        compile_model(path, Target("gpu", arch, "cuda", "host", gpu=gpu.arch), folder / "gpu", options=options)
        compile_model(path, Target("cpu", arch, "llvm", "host"), folder / "cpu", options=options)
        ours, host = load_artifact(folder / "gpu"), load_artifact(folder / "cpu")
        data, model = load_model(path)
        values = arrays(model)
        start = time.perf_counter()
        packed = ours.prepare(values)
        upload = (time.perf_counter() - start) * 1e3
        several = list(images.inputs(name, "test", batch * args.images))
        inputs = [np.concatenate(several[i : i + batch]) for i in range(0, len(several), batch)]
        theirs = host.prepare(values)
        wrong = sum(int((ours.run(x, packed) != host.run(x, theirs)).any()) for x in inputs)
        runners: dict[str, Run] = {"artifact": ours.runner(inputs[0], packed)}
        runners |= peers(data, inputs[0])
        times = {
            label: summary(row) for label, row in zip(runners, rounds(list(runners.values()), args.rounds), strict=True)
        }
    return {"network": name, "batch": batch, "times": times, "differ": wrong, "images": len(inputs), "prepare": upload}


def row_text(row: dict[str, Any]) -> str:
    """A line for people."""
    parts = [f"{row['network']:20} batch {row['batch']:3}"]
    for label in ("artifact", *PROVIDERS):
        text = "not measured"
        if (found := row["times"].get(label)) is not None:
            low, high = found["quartiles"]
            text = f"{found['median']:.3f} ({low:.3f} .. {high:.3f})"
        parts.append(f"{label} {text}")
    parts.append(f"{row['differ']} of {row['images']} runs differ from the processor's")
    parts.append(f"level in {row['prepare']:.1f} ms")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(ZOO))
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--images", type=int, default=4, help="batches that are compared with the processor")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--weights-dir", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="the rows as JSON")
    args = parser.parse_args()
    gpu = local_gpu()
    if isinstance(gpu, str):
        print(f"not measured: {gpu}")
        return
    what = f"{gpu.arch}, {gpu.processors} processors, driver for CUDA {gpu.driver}"
    print(f"{gpu.name} ({what}); {machine_line(machine())}")
    images, rows = Images(args.data_dir), []
    for name in args.networks.split(","):
        for batch in map(int, args.batches.split(",")):
            try:
                rows.append(measured(name, batch, gpu, images, args))
                print(row_text(rows[-1]), flush=True)
            except QDeployError as e:
                print(f"{name:20} batch {batch:3}: not measured ({e})", flush=True)
    if args.out is not None:
        head = {"gpu": gpu.name, "arch": gpu.arch, "driver": gpu.driver, "machine": machine(), "rows": rows}
        write_atomic(args.out, canonical_json(head))


if __name__ == "__main__":
    main()
