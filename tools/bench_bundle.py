"""Bytes of bit planes against their entropy, and how fast they decode, on synthetic weights of real networks' shapes.

    python tools/bench_bundle.py [--repeat N]

Prints the machine, then a line for each network, weight model and top width: how far base and all planes lie above
their entropy without and with framing (the manifest's bytes that describe a plane), and the time to split and to join.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.bundle.codec import decode
from qdeploy.bundle.planes import CodedPiece, PackedPart, entropy_bytes, gather, join, split_cheapest
from qdeploy.files import canonical_json, write_atomic

Shape = tuple[int, ...]
BASE = 2  # bits of the lowest level


def resnet18() -> list[Shape]:
    """Convolutions and classifier of ResNet-18 for ImageNet: 11.7M weights."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, before, 3, 3), (width, width, 3, 3)]
            if block == 0 and before != width:
                shapes.append((width, before, 1, 1))
            before = width
    return [*shapes, (1000, 512)]


def mobilenet_v2() -> list[Shape]:
    """Convolutions and classifier of MobileNetV2 for ImageNet: 3.5M weights, many small tensors."""
    shapes: list[Shape] = [(32, 3, 3, 3)]
    before = 32
    for expand, width, count in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(count):
            inner = before * expand
            shapes += [(inner, before, 1, 1)] * (expand > 1) + [(inner, 1, 3, 3), (width, inner, 1, 1)]
            before = width
    return [*shapes, (1280, 320, 1, 1), (1000, 1280)]


def resnet20_wide() -> list[Shape]:
    """ResNet-20 for CIFAR at twice the width: 1.1M weights."""
    shapes: list[Shape] = [(32, 3, 3, 3)]
    before = 32
    for width in (32, 64, 128):
        for block in range(3):
            shapes += [(width, before, 3, 3), (width, width, 3, 3)]
            if block == 0 and before != width:
                shapes.append((width, before, 1, 1))
            before = width
    return [*shapes, (10, 128)]


def gaussian(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Independent normal weights, a scale per output channel."""
    return rng.standard_normal(shape) * np.exp(0.4 * rng.standard_normal((shape[0], *[1] * (len(shape) - 1))))


def trained_like(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Heavier tails: a scale per output and per input channel, and Laplace weights, as in trained convolutions."""
    ones = [1] * (len(shape) - 2)
    weights = rng.laplace(size=shape) * np.exp(0.3 * rng.standard_normal((1, shape[1], *ones)))
    return weights * np.exp(0.5 * rng.standard_normal((shape[0], 1, *ones)))


def quantized(weights: np.ndarray, bits: int, to_maximum: bool) -> np.ndarray:
    """Offset binary codes, a scale per output channel: at the maximum, or the best of some clips by squared error."""
    rows = weights.reshape(weights.shape[0], -1)
    peak, half = np.abs(rows).max(1, keepdims=True), 1 << (bits - 1)
    best, error = peak, np.full_like(peak, np.inf)
    for part in (1.0,) if to_maximum else (1.0, 0.85, 0.7, 0.55, 0.45, 0.35):
        step = peak * part / half
        wrong = ((np.clip(np.floor(rows / step), -half, half - 1) + 0.5) * step - rows) ** 2
        total = wrong.sum(1, keepdims=True)
        best = np.where(total < error, peak * part, best)
        error = np.minimum(error, total)
    codes = np.clip(np.floor(rows / (best / half)), -half, half - 1) + half
    return codes.astype(np.uint8).reshape(weights.shape)


def framing(piece: CodedPiece, parts: int) -> int:
    """Bytes of JSON that a manifest spends on a piece of so many parts: its row, and the tensors' entries."""
    row = [8, 524288, len(piece.data), piece.raw, piece.codec, "0" * 64]
    return len(canonical_json(row)) + parts * len(canonical_json([1, "sorted", 100, 50000]))


def by_plane(tensors: list[list[PackedPart]]) -> dict[int, list[tuple[int, PackedPart]]]:
    """First plane -> (tensor, part) of all parts that begin there, in order."""
    found: dict[int, list[tuple[int, PackedPart]]] = {}
    for number, parts in enumerate(tensors):
        first = 0
        for part in parts:
            found.setdefault(first, []).append((number, part))
            first += part.bits
    return dict(sorted(found.items()))


def measure(
    shapes: list[Shape], model: Callable[..., np.ndarray], bits: int, to_maximum: bool, repeat: int
) -> dict[str, float]:
    """One row: weights, bits a weight by entropy, per cent above it without and with framing, seconds."""
    rng = np.random.default_rng(0)
    codes = [quantized(model(rng, shape), bits, to_maximum) for shape in shapes]
    start = time.perf_counter()
    split_codes = [split_cheapest(u, bits, BASE) for u in codes]
    pieces = [gather([part for _, part in plane]) for plane in by_plane(split_codes).values()]
    split_time = time.perf_counter() - start
    start = time.perf_counter()
    for plane in pieces:
        for piece in plane:
            decode(piece.codec, piece.data, piece.raw, "a piece")
    inflate_time = time.perf_counter() - start
    join_time = sum(min(_join_times(parts, u, repeat)) for parts, u in zip(split_codes, codes, strict=True))
    firsts = np.array(list(by_plane(split_codes)))
    coded = np.array([sum(len(piece.data) for piece in plane) for plane in pieces])
    framed = coded + [sum(framing(piece, len(piece.starts)) for piece in plane) for plane in pieces]
    bound = np.sum([entropy_bytes(u, bits, [BASE, bits - BASE]) for u in codes], axis=0)
    weights = sum(u.size for u in codes)
    over = [100 * (value[firsts < BASE].sum() / bound[0] - 1) for value in (coded, framed)]
    over += [100 * (value.sum() / bound.sum() - 1) for value in (coded, framed)]
    names = ("base_over", "base_over_framed", "all_over", "all_over_framed")
    row = {"weights": weights, "base_bits": 8 * bound[0] / weights, "all_bits": 8 * bound.sum() / weights}
    row |= dict(zip(names, over, strict=True))
    return row | {"split_s": split_time, "inflate_s": inflate_time, "join_s": join_time}


def line(row: dict[str, float]) -> str:
    """One row, for people."""
    over = "".join(f"{row[name]:8.2f}%" for name in ("base_over", "base_over_framed", "all_over", "all_over_framed"))
    figures = f"{row['base_bits']:6.3f} {row['all_bits']:6.3f}{over}"
    return f"{row['weights'] / 1e6:6.2f}M {figures} {row['split_s']:7.2f} {row['inflate_s']:7.3f} {row['join_s']:7.3f}"


def _join_times(parts: list[PackedPart], u: np.ndarray, repeat: int) -> Iterator[float]:
    raw = [(part.bits, part.layout, b"".join(part.segments)) for part in parts]
    for _ in range(repeat):
        start = time.perf_counter()
        joined = join(raw, u.shape)
        yield time.perf_counter() - start
        if not np.array_equal(joined, u):
            raise SystemExit("join is not the inverse of split")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--repeat", type=int, default=3, help="joins per tensor; the fastest counts")
    parser.add_argument("-o", "--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}; seconds on one core")
    print(f"{'':42}bits a weight   base over entropy   all over entropy")
    print(f"{'':34} weights   base    all    coded   framed    coded   framed   split inflate    join")
    networks = {"ResNet-18": resnet18(), "MobileNetV2": mobilenet_v2(), "ResNet-20 x2": resnet20_wide()}
    for name, shapes in networks.items():
        for model in (gaussian, trained_like):
            for bits, to_maximum in ((4, False), (4, True), (8, False)):
                label = f"{name} {model.__name__} {bits} bits {'max' if to_maximum else ''}"
                rows.append({"case": label.strip(), **measure(shapes, model, bits, to_maximum, args.repeat)})
                print(f"{label:34} {line(rows[-1])}", flush=True)
    if args.out:
        write_atomic(args.out, (json.dumps(rows, indent=1, default=float) + "\n").encode())


if __name__ == "__main__":
    main()
