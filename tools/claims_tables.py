"""Tables of the claims: figures of rows side by side, and the goals that they are held to."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from claims_post import ACCURACY, WEIGHT_KIB
from claims_rows import GRANULARITIES, POST_WIDTHS, SCALINGS, SYMMETRIES, WIDTHS, lsq_name, rows

NOISE = 0.3  # points by which trainings that differ in the seed alone easily differ
ACTIVATION_KIB = "activation KiB"
NESTED = 0.5  # points that nesting may cost
INHERITED = 1.0  # points that a subnet may lose against the same one trained alone
GRADIENT, FINITE = "gradient norm", "finite"  # figures of a training itself; the second is 0 where it met a NaN
Cells = dict[tuple[str, int], dict[str, Any]]  # by row and seed


@dataclass(frozen=True)
class Figure:
    """Figure `name` of a row's cells; with `minus`, the difference from another one, seed by seed."""

    row: str
    name: str
    minus: Figure | None = None

    def of(self, cells: Cells, seed: int) -> float | None:
        """None where the cell or the figure is missing; minus infinity for the accuracy of a training that diverged."""
        figures = cells[self.row, seed]["figures"] if (self.row, seed) in cells else {}
        value = figures.get(self.name, -math.inf if figures.get(FINITE) == 0 else None)
        if value is None or self.minus is None:
            return value
        other = self.minus.of(cells, seed)
        return None if other is None else value - other

    def values(self, cells: Cells) -> list[float]:
        """Of every seed that is there."""
        known = (self.of(cells, seed) for seed in sorted({seed for _, seed in cells}))
        return [value for value in known if value is not None]

    def over_seeds(self, values: Sequence[float]) -> float:
        """Their mean; of gradient norms the greatest, and one NaN is a NaN."""
        kinds = {GRADIENT: max, FINITE: min}
        return kinds[self.name](values) if self.name in kinds else statistics.fmean(values)

    def text(self, value: float) -> str:
        """As it stands in the table."""
        if self.name == FINITE:
            return "no" if value else "yes"
        if not math.isfinite(value):
            return "diverged"
        if self.name == GRADIENT:
            return f"{value:.3g}"
        return f"{value:.2f}" if self.minus is None else f"{value:+.2f}"


@dataclass(frozen=True)
class Goal:
    """What a table should show: every figure, as mean over the seeds, is at least `least`."""

    text: str
    figures: tuple[Figure, ...]
    least: float


@dataclass(frozen=True)
class Table:
    """Its title, the columns' names, for each line its label and a figure a column, and its goals."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Figure, ...]], ...]
    goals: tuple[Goal, ...]


def figures(names: Iterable[str], wanted: Iterable[str]) -> tuple[Figure, ...]:
    """One of each row."""
    return tuple(Figure(name, figure) for name, figure in zip(names, wanted, strict=True))


def minus(left: Iterable[Figure], right: Iterable[Figure]) -> tuple[Figure, ...]:
    """Differences, one by one."""
    return tuple(replace(a, minus=b) for a, b in zip(left, right, strict=True))


def _vertical() -> Table:
    bits = [str(width) for width in WIDTHS]
    one = figures(["vertical"] * len(bits), bits)
    alone = figures([f"lsq{width}" for width in WIDTHS], bits)
    without = figures(["no-compensation"] * len(bits), bits)
    lines = (
        ("one vertical network", one),
        ("separately trained LSQ, a network a width", alone),
        ("nested less independent", minus(one, alone)),
        ("vertical without compensation", without),
        ("compensation's gain", minus(one, without)),
    )
    goals = (
        Goal(f"nested widths within {NESTED} points of independent ones", minus(one, alone), -NESTED),
        Goal("compensation gains at 2/2", minus(one, without)[:1], NOISE),
    )
    return Table("Vertical layering", tuple(f"{b}/{b}" for b in bits), lines, goals)


def _eqnet() -> Table:
    lines: list[tuple[str, tuple[Figure, ...]]] = []
    goals = []
    for granularity, symmetry in itertools.product(GRANULARITIES, SYMMETRIES):
        kind = f"per {granularity}, {symmetry}"
        names = [f"{width} {granularity} {symmetry}" for width in WIDTHS]
        elastic = figures(["eqnet"] * len(names), names)
        alone = figures([lsq_name(width, granularity, symmetry) for width in WIDTHS], names)
        lines += [(f"EQ-Net, {kind}", elastic), (f"LSQ alone, {kind}", alone), ("difference", minus(elastic, alone))]
        goals.append(Goal(f"EQ-Net within {INHERITED} points of LSQ, {kind}", minus(elastic, alone), -INHERITED))
    columns = tuple(f"{width}/{width}" for width in WIDTHS)
    return Table("EQ-Net beside separately trained LSQ", columns, tuple(lines), tuple(goals))


def _guidance() -> Table:
    bits = (2, 4, 8)
    names = [f"{width} channel symmetric" for width in bits]
    parts = {"0.1": "eqnet-lambda-0.1", "0.5": "eqnet", "0.9": "eqnet-lambda-0.9"}
    lines = {part: figures([row] * len(names), names) for part, row in parts.items()}
    goals = (
        Goal("lambda 0.9 is above 0.1 at 2/2", minus(lines["0.9"][:1], lines["0.1"][:1]), NOISE),
        Goal("lambda 0.1 is above 0.9 at 8/8", minus(lines["0.1"][-1:], lines["0.9"][-1:]), NOISE),
    )
    title = "EQ-Net: lambda of group progressive guidance, per channel, symmetric"
    labelled = tuple((f"lambda {part}", line) for part, line in lines.items())
    return Table(title, tuple(f"{width}/{width}" for width in bits), labelled, goals)


def _batchquant() -> Table:
    labels = {
        "eq8": "BatchQuant, eq. 8, two stages, crops",
        "eq7": "eq. 7: extremes of the whole batch",
        "no-gamma-beta": "without gamma and beta",
        "running": "running averages of minimum and maximum",
        "learned-steps": "learned steps",
        "one-stage": "one stage of as many epochs",
        "transform": "kernels by a learned matrix instead of crops",
        "nested": "nested weights instead of a step a width",
    }
    wanted = ("2", "4", GRADIENT, FINITE)
    lines = {key: figures([f"batchquant-{key}"] * len(wanted), wanted) for key in labels}
    lead = {key: minus(lines["eq8"][:2], line[:2]) for key, line in lines.items()}
    above = {
        "eq7": "eq. 8 is above eq. 7 at 2/2",
        "no-gamma-beta": "gamma and beta gain at 2/2",
        "running": "eq. 8 is above running averages at 2/2",
        "learned-steps": "eq. 8 is above learned steps at 2/2",
        "one-stage": "two stages are above one at 2/2",
    }
    nested = minus(lines["nested"][:2], lines["eq8"][:2])
    goals = [Goal("eq. 8 trains without a NaN", lines["eq8"][-1:], 1)]
    goals += [Goal(text, lead[key][:1], NOISE) for key, text in above.items()]
    goals += [
        Goal(f"crops within {NESTED} points of learned matrices", lead["transform"], -NESTED),
        Goal(f"nested weights within {NESTED} points of independent steps", nested, -NESTED),
    ]
    columns = ("2/2", "4/4", "largest gradient norm", "NaN")
    shown = tuple((labels[key], line) for key, line in lines.items())
    return Table("BatchQuant on an elastic MobileNetV3, its largest subnet", columns, shown, tuple(goals))


def _inherited(row: str, title: str) -> Table:
    lines, differences = [], []
    for number, spec in enumerate(rows()[row].specs, 1):
        inherited, alone = Figure(row, spec.id), Figure(f"{row}-alone-{number}", spec.id)
        differences.append(replace(inherited, minus=alone))
        lines.append((f"`{spec.id}`", (inherited, alone, differences[-1])))
    goal = Goal(f"each subnet within {INHERITED} points of itself trained alone", tuple(differences), -INHERITED)
    return Table(title, ("inherited", "trained alone", "difference"), tuple(lines), (goal,))


def _differentiable() -> Table:
    wanted = (ACCURACY, WEIGHT_KIB, ACTIVATION_KIB)
    labels = {
        "learned": "learned by gradient",
        "uniform": "3 bits everywhere",
        "mixquant": "MixQuant's widths, activations 3 bits",
        "learned-long": "learned by gradient, twice the epochs",
        "uniform-long": "3 bits everywhere, twice the epochs",
        "learned-between": "learned by gradient, between the sizes of 2 and 3 bits",
        "mixquant-between": "MixQuant's widths, between the sizes, activations 2 bits",
    }
    pairs = (
        ("learned", "uniform"),
        ("learned", "mixquant"),
        ("learned-long", "uniform-long"),
        ("learned-between", "mixquant-between"),
    )
    lines = {key: figures([f"diff-{key}"] * len(wanted), wanted) for key in labels}
    goals = tuple(
        Goal(f"{labels[one]} is above {labels[other]}", minus(lines[one][:1], lines[other][:1]), NOISE)
        for one, other in pairs
    )
    shown = tuple((labels[key], line) for key, line in lines.items())
    title = "Differentiable mixed precision: widths within a size, each pair trained as long"
    return Table(title, wanted, shown, goals)


def _scalings() -> Table:
    lines = {pair: figures([f"diff-2bit-{pair[0]}-{pair[1]}"], [ACCURACY]) for pair in SCALINGS}
    best, plain = lines["ewgs", "invtanh"], lines["ste", "ste"]
    goal = Goal("EWGS with inverse tanh is above the straight-through estimator", minus(best, plain), NOISE)
    shown = tuple((f"weights {pair[0]}, activations {pair[1]}", line) for pair, line in lines.items())
    return Table("Gradients through rounding, 2/2 bits everywhere", (ACCURACY,), shown, (goal,))


def _post() -> Table:
    wanted = (ACCURACY, WEIGHT_KIB)
    labels = {
        "uniform": "uniform",
        "brecq": "uniform, BRECQ",
        "mixquant": "MixQuant",
        "mixquant-brecq": "MixQuant, BRECQ",
    }
    names = {"uniform8": "uniform, 8 bits"}
    names |= {f"{key}{bits}": f"{label}, {bits} bits" for bits in POST_WIDTHS for key, label in labels.items()}
    lines = {key: figures([f"post-{key}"] * len(wanted), wanted) for key in names}
    at_3 = {key: lines[f"{key}3"][:1] for key in labels}
    goals = (
        Goal("MixQuant is above uniform 3 bits at equal size", minus(at_3["mixquant"], at_3["uniform"]), NOISE),
        Goal(
            "MixQuant with BRECQ is above uniform 3 bits with BRECQ at equal size",
            minus(at_3["mixquant-brecq"], at_3["brecq"]),
            NOISE,
        ),
        Goal("BRECQ gains at uniform 3 bits", minus(at_3["brecq"], at_3["uniform"]), NOISE),
        Goal(
            "BRECQ gains on MixQuant's widths at the size of 3 bits",
            minus(at_3["mixquant-brecq"], at_3["mixquant"]),
            NOISE,
        ),
        Goal("8 bits within 1 point of 4 bits or above", minus(lines["uniform8"][:1], lines["uniform4"][:1]), -1.0),
    )
    shown = tuple((label, lines[key]) for key, label in names.items())
    return Table("Quantized without training, 8-bit activations, MixQuant at most as large", wanted, shown, goals)


def tables() -> list[Table]:
    """The claims, in the order of the page."""
    return [
        _vertical(),
        _eqnet(),
        _guidance(),
        _batchquant(),
        _inherited("batchquant-nested", "Random subnets of the elastic MobileNetV3 with nested weights, by id"),
        _inherited("eqnet", "Random subnets of EQ-Net on ResNet-8, by id"),
        _differentiable(),
        _scalings(),
        _post(),
    ]
