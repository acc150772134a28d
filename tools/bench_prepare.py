"""Going to another level, on this machine and one core: packing ResNet-18's weights, and bit planes to codes.

    python tools/bench_prepare.py [--target FILE]... [--model FILE] [--repeat N]

For each target that this machine can run: milliseconds of `prepare` (median of N, quartiles), and nanoseconds for each
of the weights; then, for parts of a tensor with as many weights, bytes of codes that the kernel `join` makes a second
beside a memory copy of as many bytes, taken in turns. Times are those of the thread: other processes do not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tvm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.bundle.planes import pack, sort_bits
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.codegen import ENTRY_PHASES, link, linker, write_object
from qdeploy.compile.kernels.join import LAYOUTS, join_kernel
from qdeploy.compile.llvm import Resolved, resolve
from qdeploy.compile.pipeline import compile_model
from qdeploy.errors import QDeployError
from qdeploy.files import write_atomic
from qdeploy.profile.latency import machine
from qdeploy.profile.report import machine_line
from qdeploy.qdq import arrays, load_model
from qdeploy.target import load_target, missing_features, request_tiles

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("x86-64", "x86-64-avx512", "x86-64-amx")
PARTS = (
    (0, 2, "tight"),
    (0, 3, "spaced"),
    (0, 4, "tight"),
    (2, 1, "tight"),
    (1, 1, "sorted"),
    (2, 1, "sorted"),
    (3, 1, "sorted"),
)


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """Processor time of one call."""
    start = time.thread_time()
    run(*args)
    return time.thread_time() - start


def prepare_times(model: Path, target: Path, repeat: int) -> np.ndarray:
    """Seconds of `Artifact.prepare`, first call not counted; raises CompileError."""
    with tempfile.TemporaryDirectory() as folder:
        compile_model(model, load_target(target), Path(folder) / "artifact")
        artifact = load_artifact(Path(folder) / "artifact")
        params = arrays(load_model(model)[1])
        artifact.prepare(params)
        return np.array([seconds(artifact.prepare, params) for _ in range(repeat)])


def join_function(resolved: Resolved) -> Any:
    """The kernel `join` by itself."""
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder) / "join.o", Path(folder) / "join.so"
        write_object({"join": join_kernel("join", resolved.features)}, ENTRY_PHASES, resolved.tvm, path, None)
        link(linker(), [path], "00", library)
        return tvm.runtime.load_module(str(library))["join"]


def join_rates(join: Any, count: int, repeat: int) -> list[tuple[str, float, float]]:
    """(part, bytes of codes a second, those of a memory copy) for PARTS of a tensor of `count` 4-bit weights."""
    u = np.clip(np.random.default_rng(0).normal(8, 2.5, count), 0, 15).astype(np.uint8)
    source, target = np.zeros(count, np.uint8), np.ones(count, np.uint8)
    rows = []
    for held, bits, layout in PARTS:
        prefix, symbols = u >> np.uint8(4 - held), u >> np.uint8(4 - held - bits) & np.uint8((1 << bits) - 1)
        packed = layout == "sorted" and np.packbits(sort_bits(symbols, prefix, held)[0]).tobytes()
        raw = tvm.runtime.tensor(np.frombuffer(packed or pack(symbols, bits, layout), np.uint8))
        shift = 8 - held - bits
        times = []
        for _ in range(repeat):
            codes = tvm.runtime.tensor(prefix << np.uint8(8 - held) if held else np.zeros(count, np.uint8))
            made = seconds(join, raw, codes, bits, LAYOUTS.index(layout), held, shift, 0, 0)
            times.append((made, seconds(np.copyto, target, source)))
            if not np.array_equal(codes.numpy() >> np.uint8(shift), u >> np.uint8(4 - held - bits)):
                raise SystemExit(f"join made wrong codes of {layout} planes")
        made, copied = np.median(times, 0)
        rows.append((f"{layout}, {bits} behind {held}", count / made, count / copied))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, action="append", help="a target file, again for more")
    parser.add_argument("--model", type=Path, default=ROOT / "build" / "bench" / "resnet18.qdq.onnx")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("-o", "--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    if not args.model.is_file():
        raise SystemExit(f"{args.model} is missing: make it by tools/bench_compile.py --networks resnet18")
    print(machine_line(machine()))
    weights = sum(a.size for a in arrays(load_model(args.model)[1]).values() if a.ndim > 1 and a.dtype.itemsize == 1)
    rows: list[dict[str, Any]] = []
    for path in args.target or [ROOT / "targets" / f"{name}.toml" for name in TARGETS]:
        try:
            resolved = resolve(load_target(path))
            lacking = missing_features(resolved.features)
            if lacking or (resolved.dot.tiles and not request_tiles()):
                print(f"{path.stem}: not measured, this machine lacks {', '.join(lacking) or 'tiles'}")
                continue
            low, median, high = np.percentile(prepare_times(args.model, path, args.repeat), (25, 50, 75)) * 1e3
        except QDeployError as e:
            print(f"{path.stem}: not measured ({e})")
            continue
        print(
            f"{path.stem}: {args.model.name}: {weights} weights packed in {median:.1f} ms ({low:.1f} .. {high:.1f}), "
            f"{median * 1e6 / weights:.2f} ns a weight"
        )
        row: dict[str, Any] = {"target": path.stem, "model": args.model.name, "weights": weights, "ms": median}
        rows.append(row | {"low_ms": low, "high_ms": high, "joins": {}})
        for label, made, copied in join_rates(join_function(resolved), weights, args.repeat):
            rows[-1]["joins"][label] = {"bytes_s": made, "copy_bytes_s": copied}
            print(
                f"    {label:20} {made / 1e9:5.1f} GB/s, copy {copied / 1e9:5.1f} GB/s: {100 * made / copied:3.0f}%",
                flush=True,
            )
    if args.out:
        write_atomic(args.out, (json.dumps(rows, indent=1, default=float) + "\n").encode())


if __name__ == "__main__":
    main()
