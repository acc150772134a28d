"""Compiled networks beside ONNX Runtime and OpenVINO on the same QDQ files, on this machine: one thread, batch 1.

    python tools/bench_compile.py [--target FILE]... [--networks NAME,...] [--data-dir DIR] [--images N] [-o JSON]

For each target: compile time, bytes of code and of the arena (beside them the arena with the largest tensors placed
first, and what no plan can go below), what parameters as arguments cost beside constants (milliseconds to pack a level,
once, and the time of a run over that with the level of `--constant`), milliseconds (medians over interleaved rounds,
quartiles behind them), ratios (above 1: the artifact is faster) and how many of N real images give another output than
ONNX Runtime. A network that the compiler refuses is a row that says so and counts as missing. What this machine cannot
run is "not measured".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo import ROOT, ZOO, Images, Model, make

from qdeploy.compile.artifact import Artifact, Packed
from qdeploy.compile.fuse import fuse
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.compile.lower import lower
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.compile.plan import plan
from qdeploy.compile.read.handlers import read_graph
from qdeploy.errors import CompileError, DeviceError, QDeployError
from qdeploy.files import write_atomic
from qdeploy.profile.latency import load_pair, machine, ort_runner, rounds, summary
from qdeploy.profile.peak import fastest
from qdeploy.profile.report import machine_line
from qdeploy.qdq import arrays, load_model
from qdeploy.target import load_target, missing_features, request_tiles

SMALL = 64  # pixels; smaller networks are checked on more images
PEERS = {"onnxruntime": "ORT", "openvino": "OpenVINO", "float": "ORT fp32"}
ISA = "ONEDNN_MAX_CPU_ISA"  # holds OpenVINO's kernels to an instruction set


@dataclass(frozen=True)
class Runner:
    """One runtime with a network loaded: `run` on a bound input for timing, `output` of any input."""

    run: Callable[[], Any]
    output: Callable[[np.ndarray], np.ndarray]


def onnxruntime_runner(model: bytes, x: np.ndarray, optimize: bool = True) -> Runner:
    """Stock ONNX Runtime on one thread; without graph optimizations on request."""
    import onnxruntime

    run, _ = ort_runner(model, x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Runner(run, lambda image: session.run(None, {name: image})[0])


def openvino_runner(path: Path, x: np.ndarray) -> Runner:
    """OpenVINO on one thread and one stream, latency hint, its own choice of kernels."""
    import openvino

    core = openvino.Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = core.compile_model(core.read_model(str(path)), "CPU", options).create_infer_request()
    shared = np.array(x)
    request.set_input_tensor(openvino.Tensor(shared, shared_memory=True))

    def output(image: np.ndarray) -> np.ndarray:
        shared[...] = image
        request.infer()
        return request.get_output_tensor().data.copy()

    return Runner(request.infer, output)


def differing(ours: Callable[[np.ndarray], np.ndarray], model: Model, count: int, images: Images) -> dict[str, Any]:
    """How many of `count` test images give another output than ONNX Runtime; whom its own plain run agrees with."""
    data = model.qdq.read_bytes()
    first = next(images.inputs(model.name, "test", 1))
    theirs, plain = onnxruntime_runner(data, first), None
    found: dict[str, Any] = {"images": count, "differing": 0, "largest": 0.0, "plain_agrees_with_us": 0}
    for x in images.inputs(model.name, "test", count):
        a, b = ours(x), theirs.output(x)
        if not np.array_equal(a, b):
            plain = plain or onnxruntime_runner(data, first, optimize=False)
            found["differing"] += 1
            found["largest"] = max(found["largest"], float(np.abs(a - b).max()))
            found["plain_agrees_with_us"] += int(np.array_equal(a, plain.output(x)))
    return found


def compiled(model: Model, resolved: Resolved, folder: Path) -> tuple[dict[str, Any], Artifact, Packed]:
    """Compile, with its figures; raises CompileError."""
    start = time.perf_counter()
    description = compile_model(model.qdq, resolved.target, folder, force=True, options=Options(constant=True))
    seconds = time.perf_counter() - start
    artifact, packed, _ = load_pair(folder, model.qdq)
    values = arrays(load_model(model.qdq)[1])
    figures = {
        "prepare_ms": 1e3 * fastest(lambda: artifact.prepare(values)),
        "compile_seconds": seconds,
        "library_bytes": (folder / "lib.so").stat().st_size,
        "arena_bytes": description["variants"][0]["arena_bytes"],
        "packed_bytes": packed.nbytes,
    } | arenas(model, resolved)
    return figures, artifact, packed


def arenas(model: Model, resolved: Resolved) -> dict[str, int]:
    """Bytes of the arena when the largest tensors are placed first, and what no plan can go below."""
    program = lower(fuse(read_graph(load_model(model.qdq)[1]), resolved.dot.lookup != "none"), resolved.dot)
    found = plan(program.values, program.lives())
    return {"arena_by_size": found.by_size, "arena_bound": found.bound}


def measure(model: Model, resolved: Resolved, images: Images, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"network": model.name, "weights": model.weights, "images": model.images}
    with tempfile.TemporaryDirectory() as folder:
        try:
            figures, artifact, packed = compiled(model, resolved, Path(folder) / "artifact")
        except CompileError as e:
            reason = str(e).removeprefix("the model cannot be compiled: ")
            return row | {"refused": reason.split("; ")[0], "refusals": len(reason.split("; "))}
        x = next(images.inputs(model.name, "test", 1))
        runners = {"artifact": artifact.runner(x, packed), "constant": artifact.runner(x)}
        runners["onnxruntime"] = ort_runner(model.qdq.read_bytes(), x)[0]
        try:
            runners["openvino"] = openvino_runner(model.qdq, x).run
        except (ImportError, RuntimeError) as e:
            row["openvino"] = str(e).splitlines()[0]
            print(f"{model.name}: OpenVINO does not run it: {row['openvino']}", file=sys.stderr)
        if model.float_model is not None:
            runners["float"] = ort_runner(model.float_model.read_bytes(), x)[0]
        times = rounds(list(runners.values()), args.repeats)
        row |= figures
        row["ms"] = {name: summary(t) | {"least": float(t.min())} for name, t in zip(runners, times, strict=True)}
        mine = row["ms"]["artifact"]
        for key in ("median", "least"):
            row[f"ratio_{key}"] = {n: row["ms"][n][key] / mine[key] for n in runners if n != "artifact"}
        row["arguments_over_constants"] = mine["least"] / row["ms"]["constant"]["least"]
        row["ratio"] = row[f"ratio_{args.by}"]
        count = args.images or (1000 if ZOO[model.name].size <= SMALL else 100)
        row["outputs"] = differing(lambda image: artifact.run(image, packed), model, count, images)
    return row


def cell(row: dict[str, Any], name: str) -> str:
    """Median and quartiles."""
    found = row["ms"].get(name)
    if found is None:
        return "-"
    low, high = found["quartiles"]
    return f"{found['median']:.3f} ({low:.3f}-{high:.3f})"


HEAD = (
    f"{'network':19} {'weights':9} {'compile':>8} {'library':>9} {'arena':>9} {'by size':>9} {'bound':>9} "
    f"{'prepare ms':>10} {'/const':>6} "
    f"{'artifact ms (quartiles)':>24} "
    f"{'ORT int8 ms':>24} {'OpenVINO int8 ms':>24} {'ORT fp32 ms':>24} {'/ORT':>6} {'/OV':>6} {'/fp32':>6}  differing"
)


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    start = f"{row['network']:19} {row['weights']:9}"
    if "refused" in row:
        return f"{start} refused: {row['refused']} ({row['refusals']} in all)"
    outputs = row["outputs"]
    text = f"{start} {row['compile_seconds']:6.1f} s {row['library_bytes']:>9,} {row['arena_bytes']:>9,}"
    text += f" {row['arena_by_size']:>9,} {row['arena_bound']:>9,}"
    text += f" {row['prepare_ms']:>10.2f} {row['arguments_over_constants']:>6.3f}"
    text += "".join(f" {cell(row, name):>24}" for name in ("artifact", *PEERS))
    text += "".join(f" {row['ratio'][name]:6.2f}" if name in row["ratio"] else f" {'-':>6}" for name in PEERS)
    text += f"  {outputs['differing']} of {outputs['images']}"
    if outputs["differing"]:
        text += f" (by {outputs['largest']:.3g} at most; ONNX Runtime unoptimized agrees with us on "
        text += f"{outputs['plain_agrees_with_us']})"
    return text


def means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and least of each ratio over the networks that ran, and how many are missing."""
    found: dict[str, Any] = {"missing": [row["network"] for row in rows if "refused" in row]}
    for name in PEERS:
        values = [row["ratio"][name] for row in rows if name in row.get("ratio", {})]
        if values:
            found[name] = {"mean": float(np.exp(np.mean(np.log(values)))), "least": min(values), "of": len(values)}
    return found


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    found = {}
    for name in ("apache-tvm", "onnxruntime", "openvino", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def bench(target_path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All networks for one target."""
    target = load_target(target_path)
    print(f"\ntarget {target.name}: {target.description}")
    result: dict[str, Any] = {"target": target.name, "held": os.environ.get(ISA), "rows": []}
    resolved = resolve(target)
    if lacking := missing_features(resolved.features):
        print(f"not measured: this machine lacks {', '.join(lacking)}")
        return result | {"not_measured": lacking}
    if resolved.dot.tiles and not request_tiles():
        print("not measured: this system keeps AMX tiles from processes")
        return result | {"not_measured": ["tiles"]}
    result["dot"] = resolved.dot.instruction
    print(f"cpu {resolved.cpu}, dot product {resolved.dot.instruction}; OpenVINO held to {result['held'] or 'nothing'}")
    images = Images(args.data_dir)
    print(f"images: {images.label} (the demo's: Fashion-MNIST); ratios of {args.by} times")
    print(HEAD, flush=True)
    for name in args.networks.split(","):
        try:
            row = measure(make(name, images, args.weights_dir, args.cache), resolved, images, args)
        except DeviceError as e:
            row = {"network": name, "weights": "-", "refused": str(e), "refusals": 1}
        result["rows"].append(row)
        print(line(row), flush=True)
    result["means"] = means(result["rows"])
    for name, found in result["means"].items():
        if name != "missing":
            text = f"geometric mean {found['mean']:.2f}, least {found['least']:.2f}, of {found['of']} networks"
            print(f"against {PEERS[name]:10} {text}")
    print(f"missing: {', '.join(result['means']['missing']) or 'none'}")
    return result


def several(targets: list[Path], args: argparse.Namespace, rest: list[str]) -> list[dict[str, Any]]:
    """One process a target: what holds OpenVINO to an instruction set is read once, when it is loaded."""
    results = []
    for path in targets:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "one.json"
            held = {} if args.stock_openvino else hold(path)
            command = [sys.executable, __file__, "--one", str(path), *rest, "-o", str(out)]
            subprocess.run(command, check=True, env=os.environ | held)
            results += json.loads(out.read_text())["targets"]
    return results


def hold(path: Path) -> dict[str, str]:
    """The environment that gives OpenVINO no more than the target has."""
    features = set(resolve(load_target(path)).features)
    if "amx-int8" in features:
        return {}
    if "avx512f" in features:
        return {ISA: "AVX512_CORE_VNNI" if "avx512vnni" in features else "AVX512_CORE"}
    return {ISA: "AVX2_VNNI" if "avxvnni" in features else "AVX2"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", type=Path, action="append", help="target files (default: all of targets/)")
    p.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--networks", default=",".join(ZOO), help="comma-separated, of " + ", ".join(ZOO))
    p.add_argument("--data-dir", type=Path, help="folder with CIFAR-10 (default: Fashion-MNIST, which ships)")
    p.add_argument("--weights-dir", type=Path, default=ROOT / "build" / "bench" / "weights", help="see tools/zoo.py")
    p.add_argument("--cache", type=Path, default=ROOT / "build" / "bench", help="where the models are kept")
    p.add_argument("--images", type=int, default=0, help="images compared (default: 1000 small, 100 at 224 pixels)")
    p.add_argument("--repeats", type=int, default=20, help="interleaved rounds")
    by = "ratios of medians, or of least times (steadier where other work shares the cores)"
    p.add_argument("--by", choices=("median", "least"), default="median", help=by)
    p.add_argument("--stock-openvino", action="store_true", help="do not hold OpenVINO to the target's instructions")
    p.add_argument("-o", "--out", type=Path, help="write the figures as JSON")
    return p


def main(argv: list[str]) -> int:
    """Run, print, write."""
    args = parser().parse_args(argv)
    found: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    found["versions"] = versions()
    try:
        if args.one is not None:
            found["targets"] = [bench(args.one, args)]
        else:
            print(f"{found['date']}; {machine_line(found['machine'])}")
            print(", ".join(f"{name} {number}" for name, number in found["versions"].items()), flush=True)
            rest = []
            for key in ("networks", "data_dir", "weights_dir", "cache", "images", "repeats", "by"):
                if (value := getattr(args, key)) is not None:
                    rest += [f"--{key.replace('_', '-')}", str(value)]
            found["targets"] = several(args.target or sorted((ROOT / "targets").glob("*.toml")), args, rest)
    except QDeployError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as e:
        return e.returncode
    if args.out is not None:
        write_atomic(args.out, json.dumps(found, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
