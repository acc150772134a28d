"""Time of MixQuant's error table: all widths of all layers of real networks' shapes, on one core.

    python tools/bench_mixquant.py [--repeat N]

Prints the machine, then a line for each network and criterion: the median and the least time of one table, what
choosing widths for ten QEMs adds, and the average width at a QEM in the middle of the useful range. Weights are
synthetic: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.files import write_atomic
from qdeploy.ptq import mixquant

Shape = tuple[int, ...]
MIDDLE = {"mse": 40.0, "relative": 3.0}


def resnet50() -> list[Shape]:
    """Convolutions and classifier of ResNet-50 for ImageNet: 25.5M weights."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, before, 1, 1))
            before = 4 * width
    return [*shapes, (1000, 2048)]


def efficientnet_lite0() -> list[Shape]:
    """Convolutions and classifier of EfficientNet-Lite0 for ImageNet: 4.6M weights."""
    shapes: list[Shape] = [(32, 3, 3, 3)]
    before = 32
    stages = (
        (1, 3, 1, 16),
        (2, 3, 6, 24),
        (2, 5, 6, 40),
        (3, 3, 6, 80),
        (3, 5, 6, 112),
        (4, 5, 6, 192),
        (1, 3, 6, 320),
    )
    for blocks, kernel, expand, width in stages:
        for _ in range(blocks):
            inner = before * expand
            shapes += [(inner, before, 1, 1)] * (expand > 1) + [(inner, 1, kernel, kernel), (width, inner, 1, 1)]
            before = width
    return [*shapes, (1280, 320, 1, 1), (1000, 1280)]


NETWORKS: dict[str, Callable[[], list[Shape]]] = {"efficientnet-lite0": efficientnet_lite0, "resnet-50": resnet50}


def processor() -> str:
    """The processor's name as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def bench(name: str, shapes: list[Shape], criterion: str, repeat: int) -> dict[str, Any]:
    """One row: seconds of the table and of ten choices by it, mean bits at one QEM."""
    random = np.random.default_rng(0)
    weights = {str(i): random.standard_normal(shape, np.float32) for i, shape in enumerate(shapes)}
    times, chosen = [], {}
    for _ in range(repeat):
        start = time.perf_counter()
        table = mixquant.error_table(weights, criterion)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for factor in np.geomspace(0.2, 5, 10):
        mixquant.choose(table, max(1.0, MIDDLE[criterion] * factor))
    more = time.perf_counter() - start
    chosen = mixquant.choose(table, MIDDLE[criterion])
    sizes = {layer: weight.size for layer, weight in weights.items()}
    total = sum(sizes.values())
    average = mixquant.size_bits(chosen, sizes) / total
    return {
        "network": name, "criterion": criterion, "weights": total, "table_s": float(np.median(times)),
        "least_s": min(times), "ten_s": more, "bits": average, "qem": MIDDLE[criterion],
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row, for people."""
    table = f"table {row['table_s']:.3f} s, least {row['least_s']:.3f}  ten QEMs {row['ten_s'] * 1e3:.2f} ms"
    start = f"{row['network']:20} {row['criterion']:9} {row['weights'] / 1e6:5.1f}M weights"
    return f"{start}  {table}  {row['bits']:.2f} bits at {row['qem']:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("-o", "--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{processor()}, one thread, numpy {np.__version__}, median of {args.repeat}")
    for name, shapes in NETWORKS.items():
        for criterion in mixquant.CRITERIA:
            rows.append(bench(name, shapes(), criterion, args.repeat))
            print(line(rows[-1]), flush=True)
    if args.out:
        write_atomic(args.out, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
