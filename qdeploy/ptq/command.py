"""What `qdeploy quantize` and `qdeploy sensitivity` do between their options and their printed lines."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.errors import RecipeError
from qdeploy.files import canonical_json, check_free, new_folder, sha256, write_atomic
from qdeploy.ptq import mixquant
from qdeploy.ptq.graph import FloatGraph
from qdeploy.ptq.images import Reading, load_calibration
from qdeploy.ptq.prepare import prepare
from qdeploy.ptq.quantize import Calibrated, build, build_ladder, calibrate, effect, ladder_widths
from qdeploy.ptq.sensitivity import measure, page
from qdeploy.ptq.settings import MAX_BITS, MIN_BITS, Settings, load_settings
from qdeploy.qdq import graph_digest

SIDECAR_FORMAT = "qdeploy-model/1"

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Search:
    """How MixQuant picks widths: a multiplier, or the one that meets a bound on size or accuracy; none: it does not."""

    qem: float | None = None
    max_kib: float | None = None
    min_accuracy: float | None = None
    criterion: str = "mse"

    @property
    def wanted(self) -> bool:
        """True when widths are searched at all."""
        return (self.qem, self.max_kib, self.min_accuracy) != (None, None, None)


@dataclass(frozen=True)
class Learning:
    """Block reconstruction (of reconstruct.py, which loads torch) of one width or a ladder, so many steps a block."""

    run: Callable[[Calibrated, Mapping[str, int] | None, int, Path, Echo], bytes]
    ladder: Callable[[Calibrated, Mapping[str, Mapping[str, int]], int, Path, Echo], dict[str, bytes]]
    iterations: int


@dataclass(frozen=True)
class Rung:
    """A level that a ladder is asked for: `bits` for all layers, or MixQuant's widths at the multiplier `qem`."""

    name: str
    bits: int = MAX_BITS
    qem: float | None = None


def settings_of(path: Path | None, given: Mapping[str, Any]) -> Settings:
    """Settings from a TOML file; options that were `given` (not None) win."""
    values = load_settings(path) if path is not None else {}
    return Settings(**(values | {name: value for name, value in given.items() if value is not None}))


def open_calibrated(
    model: Path, data: str, reading: Reading, settings: Settings, shape: tuple[str, tuple[int, ...]] | None, echo: Echo
) -> tuple[Calibrated, np.ndarray | None]:
    """A network observed on its images, and their labels where there are any."""
    graph: FloatGraph = prepare(model, shape, echo)
    images, labels = load_calibration(data, graph.shape, reading)
    return calibrate(graph, images, settings, echo), labels


def quantize_file(
    model: Path, data: str, out: Path, reading: Reading, settings: Settings, search: Search,
    shape: tuple[str, tuple[int, ...]] | None, force: bool, echo: Echo, learning: Learning | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write one QDQ ONNX file and its sidecar; returns the sidecar. Raises RecipeError when a file is there.

    With `learning`, finished blocks are kept in OUT.blocks until all are learned.
    """
    for path in (out, Path(f"{out}.json")):
        if path.is_dir() or (path.exists() and not force):
            raise RecipeError(f"{path} exists: choose another name or add --force")
    calibrated, labels = open_calibrated(model, data, reading, settings, shape, echo)
    widths, qem = search_widths(calibrated, search, labels, echo)
    kept = Path(f"{out}.blocks")
    if learning is None:
        built = build(calibrated, widths)
    else:
        built = learning.run(calibrated, widths, learning.iterations, kept, echo)
    choices = calibrated.settings.choices(calibrated.layers, widths)
    bits = {name: choice.weight_bits for name, choice in choices.items()}
    sidecar = describe(calibrated, built, model, bits, bits, labels)
    if qem is not None:
        sidecar["mixquant"] = {"qem": qem, "criterion": search.criterion}
    if learning is not None:
        sidecar["reconstruction"] = {"iterations": learning.iterations}
    write_atomic(out, built)
    write_atomic(Path(f"{out}.json"), canonical_json(sidecar))
    if learning is not None:
        shutil.rmtree(kept)
    return sidecar


def quantize_ladder(  # noqa: PLR0913, PLR0917
    model: Path, data: str, out: Path, reading: Reading, settings: Settings, ladder: Sequence[Rung], nesting: str,
    criterion: str, shape: tuple[str, tuple[int, ...]] | None, force: bool, echo: Echo,
    learning: Learning | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write a folder with one QDQ ONNX file a level, NAME.onnx, and their sidecars; returns these by name.

    With `learning`, finished blocks are kept in OUT.blocks until all are learned.
    """
    check_free(out, force)
    calibrated, labels = open_calibrated(model, data, reading, settings, shape, echo)
    widths, kept = ladder_levels(calibrated, ladder, criterion), Path(f"{out}.blocks")
    if learning is None:
        files = build_ladder(calibrated, widths, nesting, echo)
    else:
        files = learning.ladder(calibrated, widths, learning.iterations, kept, echo)
    tops = {name: max(level[name] for level in widths.values()) for name in calibrated.layers}
    sidecars = {}
    with new_folder(out, force) as folder:
        for name, built in files.items():
            sidecar = describe(calibrated, built, model, widths[name], tops, labels)
            if learning is not None:
                sidecar["reconstruction"] = {"iterations": learning.iterations}
            write_atomic(folder / f"{name}.onnx", built)
            write_atomic(folder / f"{name}.onnx.json", canonical_json(sidecar))
            sidecars[name] = sidecar
    if learning is not None:
        shutil.rmtree(kept)
    return sidecars


def ladder_levels(calibrated: Calibrated, ladder: Sequence[Rung], criterion: str) -> dict[str, dict[str, int]]:
    """{level: {layer: weight bits}}, fewest bits first; raises RecipeError when two levels are the same."""
    table: dict[str, np.ndarray] = {}
    if any(rung.qem is not None for rung in ladder):
        weights = {layer.name: calibrated.weight(layer) for layer in calibrated.placement.layers}
        table = mixquant.error_table(weights, criterion)
    found: dict[str, dict[str, int]] = {}
    for rung in ladder:
        widths = ladder_widths(calibrated, rung.bits if rung.qem is None else mixquant.choose(table, rung.qem))
        same = next((name for name, other in found.items() if other == widths), None)
        if same is not None:
            raise RecipeError(
                f"levels {same} and {rung.name} are the same, each layer has one width in both: leave one out, or give "
                "--first-last same where only the first and the last layer have weights"
            )
        found[rung.name] = widths
    sizes = calibrated.sizes()
    return dict(sorted(found.items(), key=lambda level: mixquant.size_bits(level[1], sizes)))


def describe(
    calibrated: Calibrated, built: bytes, model: Path, bits: Mapping[str, int], tops: Mapping[str, int],
    labels: np.ndarray | None,
) -> dict[str, Any]:  # fmt: skip
    """The sidecar of a built file (docs/handovers.md), with what was measured on the calibration images.

    `bits` and `tops` are each layer's width, and the width whose codes its own are prefixes of.
    """
    measured = effect(calibrated, built, labels)
    sizes = calibrated.sizes()
    total = mixquant.size_bits(bits, sizes)
    return {
        "format": SIDECAR_FORMAT,
        "model": sha256(built),
        "graph": graph_digest(built),
        "name": model.stem,
        "weights": {name: {"bits": bits[name], "top": tops[name], "container": 8} for name in bits},
        "accuracy": measured.accuracy,
        "float_output": {"error": measured.error, "agreement": measured.agreement, "images": len(calibrated.images)},
        "average_bits": total / sum(sizes.values()),
        "weight_bytes": -(-total // 8),
        "float": [{"operator": op, "name": name, "reason": why} for op, name, why in calibrated.placement.floats],
    }


def search_widths(
    calibrated: Calibrated, search: Search, labels: np.ndarray | None, echo: Echo
) -> tuple[dict[str, int] | None, float | None]:
    """(widths of all layers, the QEM) by MixQuant; (None, None) when nothing is searched."""
    if not search.wanted:
        return None, None
    if sum(bound is not None for bound in (search.qem, search.max_kib, search.min_accuracy)) > 1:
        raise RecipeError("give one of --mixquant, --max-kib and --min-accuracy")
    table = mixquant.error_table(
        {layer.name: calibrated.weight(layer) for layer in calibrated.placement.layers}, search.criterion
    )
    sizes = calibrated.sizes()

    def bits(widths: Mapping[str, int]) -> int:
        choices = calibrated.settings.choices(calibrated.layers, widths)
        return mixquant.size_bits({name: choice.weight_bits for name, choice in choices.items()}, sizes)

    def accuracy(widths: Mapping[str, int]) -> float:
        measured = effect(calibrated, build(calibrated, widths), labels)
        found = measured.agreement if measured.accuracy is None else measured.accuracy
        echo(f"{bits(widths) / sum(sizes.values()):.2f} bits a weight: {measured.line()}")
        return found

    if search.qem is not None:
        qem = search.qem
    elif search.max_kib is not None:
        qem = mixquant.for_size(table, bits, int(search.max_kib * 1024 * 8))
    else:
        assert search.min_accuracy is not None
        qem = mixquant.for_accuracy(table, accuracy, search.min_accuracy)
    widths = mixquant.choose(table, qem)
    echo(f"MixQuant: QEM {qem:.3g} by {search.criterion}, {bits(widths) / sum(sizes.values()):.2f} bits a weight")
    return widths, qem


def lines(sidecar: Mapping[str, Any], out: Path) -> list[str]:
    """What is printed about a written file."""
    measured = sidecar["float_output"]
    right = "" if sidecar["accuracy"] is None else f", {sidecar['accuracy']:.2f}% right"
    return [
        f"{out}: {len(sidecar['weights'])} layers, {sidecar['average_bits']:.2f} bits a weight, "
        f"{sidecar['weight_bytes']:,} bytes of weights; output error {measured['error']:.2%}, "
        f"{measured['agreement']:.2f}% of {measured['images']} images with the float network's class{right}"
    ]


def float_lines(sidecar: Mapping[str, Any]) -> list[str]:
    """One line for each operator that stays in float."""
    return [f"  in float: {row['operator']} {row['name']}: {row['reason']}" for row in sidecar["float"]]


# Sensitivity ---------------------------------------------------------------------------------------------------------


def sensitivity_folder(
    model: Path, data: str, out: Path, reading: Reading, settings: Settings, widths: Sequence[int],
    shape: tuple[str, tuple[int, ...]] | None, force: bool, echo: Echo,
) -> list[str]:  # fmt: skip
    """Write sensitivity.html and sensitivity.json; returns lines that sum up the types of layers."""
    check_free(out, force)
    calibrated, _ = open_calibrated(model, data, reading, settings, shape, echo)
    report = measure(calibrated, widths, echo)
    with new_folder(out, force) as folder:
        write_atomic(folder / "sensitivity.json", canonical_json(report))
        write_atomic(folder / "sensitivity.html", page(report, model.name).encode("utf-8"))
    found = [f"{out}: {len(report['layers'])} layers on {report['images']} images; output error"]
    for row in report["types"]:
        errors = ", ".join(f"{row[str(bits)]['output']:.2%} at {bits}" for bits in widths)
        found.append(f"  {row['type']:>10} ({row['layers']} layers): {errors} bits")
    return found


def parse_widths(text: str) -> list[int]:
    """ "2,4,8" -> distinct ascending widths; raises RecipeError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and MIN_BITS <= int(part) <= MAX_BITS for part in parts):
        raise RecipeError(f"{text!r} is no list of widths from {MIN_BITS} to {MAX_BITS}: write for instance 2,4,8")
    return sorted({int(part) for part in parts})


def parse_ladder(text: str) -> list[Rung]:
    """ "2,4,q68" -> levels w2, w4 and q68 (MixQuant with QEM 68), at least two; raises RecipeError."""
    rungs = []
    for part in dict.fromkeys(part.strip() for part in text.split(",")):
        if part.isdecimal() and MIN_BITS <= int(part) <= MAX_BITS:
            rungs.append(Rung(f"w{part}", int(part)))
        elif re.fullmatch(r"q\d+(\.\d+)?", part) and float(part[1:]) >= 1:
            rungs.append(Rung(part, qem=float(part[1:])))
        else:
            raise RecipeError(
                f"{part!r} of --ladder {text} is no level: give widths from {MIN_BITS} to {MAX_BITS}, or q and a QEM "
                "of at least 1, for instance 2,4,8 or q280,q68,8"
            )
    if len(rungs) < 2:  # noqa: PLR2004
        raise RecipeError(f"--ladder {text} has one level: give at least two, for instance 2,4,8")
    return rungs
