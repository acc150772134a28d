"""Post-training quantization of networks with published weights and of seeded ones: accuracy, error, ladders.

    python tools/bench_ptq.py --data-dir CIFAR --weights-dir WEIGHTS [--images 2000] [--rows PATTERN] [-o FOLDER]

Networks with published ImageNet weights read enlarged CIFAR-10 images of 128 x 128 pixels; "groups" is the percent of
test images whose best class among those of ten groups of ImageNet classes belongs to the right one. "error" is the
relative root-mean-square difference from the float network's output on the same images, "same" the percent of them with
its class. ONNX Runtime's file is its static quantization (per channel, min-max) from the same calibration images.

Each row is a cell that is kept in the output folder: what is there is not measured again, the table shows all of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from bench_mixquant import processor
from claims_post import weight_bits

from qdeploy.data import load
from qdeploy.errors import DataError
from qdeploy.files import canonical_json, parse_json, read_bytes, write_atomic
from qdeploy.ptq import mixquant, quantize
from qdeploy.ptq.graph import outputs_of
from qdeploy.ptq.prepare import prepare
from qdeploy.ptq.quantize import Calibrated, build, build_ladder, calibrate, compare, ladder_widths
from qdeploy.ptq.reconstruct import reconstruct, reconstruct_ladder
from qdeploy.ptq.settings import Settings
from qdeploy.qdq import load_model, parse_model

SIZE = 128  # pixels of the networks for ImageNet
CALIBRATION = zoo.CALIBRATION
SEEDED_IMAGES = 1000  # test images of networks without published weights
STEPS = 30  # of reconstruction, a block and turn
LADDER = (4, 6, 8)
LOW = LADDER[0]  # mixed widths are half a bit a weight above it
LOWEST_FIRST = -8.0  # JOINT_POWER at which the lowest level alone decides, and the others refine it
FORMAT = 1

Files = dict[str, bytes]


def _classes(*parts: int | tuple[int, int]) -> list[int]:
    return [i for part in parts for i in ([part] if isinstance(part, int) else range(part[0], part[1] + 1))]


GROUPS = (  # ImageNet classes of CIFAR-10's ten classes, in its order
    _classes(404, 895),
    _classes(436, 468, 511, 609, 627, 656, 661, 751, 817),
    _classes((7, 24), (80, 100), (127, 146)),
    _classes((281, 285)),
    _classes((351, 353)),
    _classes((151, 268)),
    _classes((30, 32)),
    _classes(339),
    _classes(403, 510, 554, 625, 628, 724, 780, 814, 833, 871, 914),
    _classes(555, 569, 675, 717, 734, 864, 867),
)


@dataclass
class Subject:
    """A float network with its images."""

    name: str
    images: zoo.Images
    weights: Path | None
    folder: Path
    count: int

    @cached_property
    def path(self) -> Path:
        """The float ONNX file, exported once."""
        path = self.folder / f"{self.name}.float.onnx"
        if not path.is_file():
            zoo.export_float(self.name, self.weights, self.images, path)
        return path

    @cached_property
    def calibrated(self) -> Calibrated:
        """Prepared and observed, 8 bits."""
        inputs = np.concatenate(list(self.images.inputs(self.name, "train", CALIBRATION)))
        return calibrate(prepare(self.path), inputs, Settings())

    @cached_property
    def inputs(self) -> np.ndarray:
        """Test images, float32."""
        return np.concatenate(list(self.images.inputs(self.name, "test", self.count)))

    @cached_property
    def expected(self) -> np.ndarray:
        """The float network's outputs."""
        graph = self.calibrated.graph
        return outputs_of(graph.model(), self.inputs, graph.output_names[0])

    def at(self, bits: int) -> Calibrated:
        """With weights of so many bits; first and last layer 8."""
        return replace(self.calibrated, settings=replace(self.calibrated.settings, weight_bits=bits))

    def levels(self, ladder: tuple[int, ...] = LADDER) -> dict[str, dict[str, int]]:
        """Widths of the levels of a ladder."""
        return {f"{bits} bits": ladder_widths(self.calibrated, bits) for bits in ladder}

    def figures(self, data: bytes | None, labels: np.ndarray) -> dict[str, float]:
        """Of a built file, or of the float network."""
        name = self.calibrated.graph.output_names[0]
        found = self.expected if data is None else outputs_of(parse_model(data), self.inputs, name)
        effect = compare(self.expected, found)
        figures = {} if data is None else {"error %": 100 * effect.error, "same %": effect.agreement}
        if self.weights is not None:
            best = np.stack([found[:, group].max(1) for group in GROUPS], 1).argmax(1)
            figures["groups %"] = 100 * float((best == labels[: self.count]).mean())
        return figures


@contextmanager
def power(value: float) -> Iterator[None]:
    """Another weighting of a ladder's levels."""
    before, quantize.JOINT_POWER = quantize.JOINT_POWER, value
    try:
        yield
    finally:
        quantize.JOINT_POWER = before


def onnx_runtime(subject: Subject) -> Files:
    """ONNX Runtime's own static quantization."""
    path = subject.folder / f"{subject.name}.qdq.onnx"
    if not path.is_file():
        zoo.quantize(subject.name, subject.images, subject.path, path)
    return {"": load_model(path)[1].SerializeToString()}


def learned(subject: Subject, bits: int, widths: Mapping[str, int] | None = None) -> Files:
    """One width, or mixed ones, reconstructed."""
    with tempfile.TemporaryDirectory() as folder:
        return {"": reconstruct(subject.at(bits), widths, STEPS, Path(folder) / "blocks")}


def halfway(calibrated: Calibrated) -> int:
    """Weight bits between those of uniform LOW bits and of one more."""
    low = ladder_widths(calibrated, LOW)
    return (weight_bits(calibrated, low) + weight_bits(calibrated, {name: bits + 1 for name, bits in low.items()})) // 2


def mixquant_widths(subject: Subject) -> dict[str, int]:
    """MixQuant's widths at most `halfway` large."""
    calibrated = subject.at(LOW)
    table = mixquant.error_table({layer.name: calibrated.weight(layer) for layer in calibrated.placement.layers})
    return mixquant.choose(table, mixquant.for_size(table, partial(weight_bits, calibrated), halfway(calibrated)))


def front_widths(subject: Subject) -> dict[str, int]:
    """The same size without a criterion: one bit more for layers in the order of the graph, as long as they fit."""
    calibrated = subject.at(LOW)
    widths = ladder_widths(calibrated, LOW)
    for name in list(widths):
        wider = {**widths, name: widths[name] + 1}
        if weight_bits(calibrated, wider) <= halfway(calibrated):
            widths = wider
    return widths


def learned_ladder(subject: Subject) -> Files:
    """All levels reconstructed together."""
    with tempfile.TemporaryDirectory() as folder:
        return reconstruct_ladder(subject.calibrated, subject.levels(), STEPS, Path(folder) / "blocks")


def lowest_first(subject: Subject) -> Files:
    """NestQuant's order, two levels: the low one rounded for itself, the high one refines it."""
    with power(LOWEST_FIRST):
        return build_ladder(replace(subject.calibrated, done={}), subject.levels((LADDER[0], LADDER[-1])))


ROWS: dict[str, Callable[[Subject], Files]] = {
    "float": lambda subject: {},
    "8 bits, ONNX Runtime": onnx_runtime,
    "8 bits": lambda subject: {"": build(subject.at(8))},
}
MORE_ROWS: dict[str, Callable[[Subject], Files]] = {  # of networks with published weights
    f"{LOW} bits": lambda subject: {"": build(subject.at(LOW))},
    f"{LOW} bits, {STEPS} steps": lambda subject: learned(subject, LOW),
    "6 bits": lambda subject: {"": build(subject.at(6))},
    f"6 bits, {STEPS} steps": lambda subject: learned(subject, 6),
    f"8 bits, {STEPS} steps": lambda subject: learned(subject, 8),
    f"{LOW}.5 bits, front": lambda subject: {"": build(subject.at(LOW), front_widths(subject))},
    f"{LOW}.5 bits, MixQuant": lambda subject: {"": build(subject.at(LOW), mixquant_widths(subject))},
    f"{LOW}.5 bits, front, {STEPS} steps": lambda subject: learned(subject, LOW, front_widths(subject)),
    f"{LOW}.5 bits, MixQuant, {STEPS} steps": lambda subject: learned(subject, LOW, mixquant_widths(subject)),
    "ladder, truncated": lambda subject: build_ladder(subject.calibrated, subject.levels(), "truncate"),
    "ladder, lowest first": lowest_first,
    "ladder, joint": lambda subject: build_ladder(subject.calibrated, subject.levels()),
    f"ladder, joint, {STEPS} steps": learned_ladder,
}


def measure(subject: Subject, row: str, made: Callable[[Subject], Files], labels: np.ndarray) -> None:
    """One cell, unless it is there."""
    key = {"format": FORMAT, "network": subject.name, "row": row, "images": subject.count, "size": SIZE}
    path = subject.folder / f"{subject.name}-{row.replace(', ', '-').replace(' ', '-')}.json"
    if path.is_file():
        cell = parse_json(read_bytes(path, "the cell", DataError), str(path), DataError)
        if cell["key"] == key:
            return
    start = time.process_time()
    files = made(subject)
    seconds = time.process_time() - start
    levels = {level: subject.figures(data, labels) for level, data in files.items()}
    cell = {"key": key, "levels": levels or {"": subject.figures(None, labels)}, "cpu_seconds": round(seconds, 1)}
    write_atomic(path, canonical_json(cell))
    print(f"{subject.name}, {row}: {cell['levels']}, {seconds:.0f} CPU s", file=sys.stderr, flush=True)


def show(folder: Path) -> None:
    """Every cell of the folder as a table."""
    order = {row: i for i, row in enumerate((*ROWS, *MORE_ROWS))}
    cells = [parse_json(path.read_bytes(), str(path), DataError) for path in folder.glob("*.json")]
    cells.sort(key=lambda cell: (cell["key"]["network"], order.get(cell["key"]["row"], 0)))
    print(f"{processor()}, one thread; {CALIBRATION} calibration images")
    print("| network | images | | groups % | error % | same % | CPU s |\n|---|---|---|---|---|---|---|")
    for cell in cells:
        key = cell["key"]
        for level, figures in cell["levels"].items():
            row = f"{key['row']}: {level}" if level else key["row"]
            values = [f"{figures[name]:.2f}" if name in figures else "" for name in ("groups %", "error %", "same %")]
            print(f"| {key['network']} | {key['images']} | {row} | {' | '.join(values)} | {cell['cpu_seconds']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--weights-dir", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--networks", default="mobilenetv2,efficientnet-lite0,mobilenetv3-large,resnet18,resnet20")
    parser.add_argument("--rows", default="*", help="Shell pattern of the rows to measure.")
    parser.add_argument("-o", "--out", type=Path, default=zoo.ROOT / "build" / "bench-ptq")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images: Any = zoo.Images(options.data_dir)
    labels = load("cifar-10" if images.label.startswith("CIFAR") else "fashion-mnist", "test", options.data_dir).labels
    for name in options.networks.split(","):
        entry = zoo.ZOO[name]
        zoo.ZOO[name] = replace(entry, size=min(entry.size, SIZE))
        weights = zoo.find_weights(entry.weights, options.weights_dir)
        count = SEEDED_IMAGES if weights is None else options.images
        subject = Subject(name, images, weights, options.out, count)
        for row, made in (ROWS if weights is None else {**ROWS, **MORE_ROWS}).items():
            if fnmatchcase(row, options.rows):
                measure(subject, row, made, labels)
    show(options.out)


if __name__ == "__main__":
    main()
