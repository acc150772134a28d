"""Plots of a search: its front, predicted against measured, hypervolume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qdeploy.report.page import Cell, Plot, Table, rows_text, thinned
from qdeploy.report.style import COLOURS, DASHES, INK, LINE, MARKERS, PAPER, SOFT, legend, new_figure, panels
from qdeploy.report.svg import Marks

MOST_PANELS = 4
MOST_POINTS = 800  # of a front in one panel
BARRED = 80  # predicted points beyond which their error bars would hide the front
FAR = 0.6  # a limit farther from the points than this many times their range is not drawn to scale
MOST_MARKS = 60  # of a curve
Bar = tuple[float | None, float | None]
Pair = tuple[float, float, Bar]  # predicted, measured, error bar of the prediction


@dataclass(frozen=True)
class Point:
    """A subnet: {quantity: value} predicted, measured (empty: it was not), error bars of what was predicted."""

    name: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    bars: Mapping[str, Bar] = field(default_factory=dict)

    def value(self, key: str) -> float:
        """Measured where it was, else predicted."""
        return self.measured.get(key, self.predicted[key])


@dataclass(frozen=True)
class FrontView:
    """What the plot of a front needs: quantities to plot (the first one upwards), points, limits, points with a name.

    `labels`: {quantity: text with its unit}; `limits`: {quantity: value}; `chosen`: {"pick": number of a point}.
    """

    quantities: Sequence[str]
    labels: Mapping[str, str]
    points: Sequence[Point]
    limits: Mapping[str, float] = field(default_factory=dict)
    chosen: Mapping[str, int] = field(default_factory=dict)

    def label(self, key: str) -> str:
        """Text with its unit."""
        return self.labels.get(key, key)


def error_ends(values: Sequence[float], bars: Sequence[Bar | None]) -> list[list[float]]:
    """Lengths below and above `values` as matplotlib has them; 0 where there is no bar or no such end."""
    below, above = [], []
    for value, bar in zip(values, bars, strict=True):
        low, high = bar or (value, value)
        below.append(max(0.0, value - (value if low is None else low)))
        above.append(max(0.0, (value if high is None else high) - value))
    return [below, above]


def point_text(view: FrontView, point: Point) -> str:
    """All that is known of a subnet, a line for each quantity."""
    lines: list[tuple[str, Cell]] = [("", point.name)]
    for key in view.labels:
        if key not in point.predicted:
            continue
        said, low_high = rows_text([("", point.predicted[key])]), point.bars.get(key)
        if low_high and None not in low_high:
            said += f" ({rows_text([('', low_high[0])])} to {rows_text([('', low_high[1])])})"
        if point.measured:
            lines.append((f"{view.label(key)}, measured", point.measured.get(key)))
            if key in point.bars:
                lines.append(("    predicted", said))
        else:
            lines.append((f"{view.label(key)}, predicted", said))
    return rows_text(lines)


def front_plot(view: FrontView) -> Plot:
    """The first quantity against each other one; filled points were measured, hollow ones predicted."""
    others = list(view.quantities[1 : 1 + MOST_PANELS]) or [view.quantities[0]]
    shown = [view.points[i] for i in thinned(len(view.points), MOST_POINTS)]
    figure, grids = panels(len(others), height=3.5)
    marks = Marks()
    for axes, other in zip(grids, others, strict=True):
        _points(axes, view, other, shown, marks)
        _limits(axes, view, other, shown)
        for name, index in view.chosen.items():
            _name(axes, name, view.points[index], other, view.quantities[0])
        axes.set_xlabel(view.label(other))
        axes.set_ylabel(view.label(view.quantities[0]))
        axes.margins(x=0.08, y=0.12)
    legend(grids[0], 2)
    keys = list(view.labels)
    head = ["subnet", *(f"{view.label(key)}{end}" for key in keys for end in (", predicted", ", measured"))]
    rows = [[p.name, *(v for key in keys for v in (p.predicted.get(key), p.measured.get(key)))] for p in view.points]
    measured = sum(1 for point in view.points if point.measured)
    said = f"{len(view.points):,} subnets of the front, {measured:,} of them measured. Error bars: of the prediction."
    if len(shown) < len(view.points):
        said += f" {len(shown):,} of them are drawn, evenly spread."
    return Plot("front", figure, said, Table(head, rows), marks)


def _points(axes: Axes, view: FrontView, x: str, points: Sequence[Point], marks: Marks) -> None:
    y = view.quantities[0]
    for kind, measured in (("predicted", False), ("measured", True)):
        part = [point for point in points if bool(point.measured) == measured]
        if not part:
            continue
        said = [[point.predicted[key] for point in part] for key in (x, y)]
        if len(part) <= BARRED:
            ends = [error_ends(at, [p.bars.get(key) for p in part]) for at, key in zip(said, (x, y), strict=True)]
            axes.errorbar(
                said[0],
                said[1],
                xerr=ends[0],
                yerr=ends[1],
                fmt="none",
                ecolor=SOFT,
                alpha=0.6,
                elinewidth=0.8,
                zorder=1,
            )
            for point in part if measured else []:
                axes.plot([point.predicted[x], point.measured[x]], [point.predicted[y], point.measured[y]],
                          color=SOFT, linewidth=0.8, zorder=2)  # fmt: skip
        places = [[point.value(key) for point in part] for key in (x, y)]
        colour = COLOURS[1] if measured else COLOURS[0]
        size, marker = (44, "s") if measured else (30, "o")
        artist = axes.scatter(places[0], places[1], size, marker=marker, label=kind, zorder=3,
                              facecolor=colour if measured else PAPER, edgecolor=colour, linewidth=1.2)  # fmt: skip
        marks.add(artist, [point_text(view, point) for point in part])
    if y == "accuracy" and x != y:
        ordered, best = [], -np.inf
        for point in sorted(points, key=lambda point: (point.value(x), -point.value(y))):
            if point.value(y) > best:
                best = point.value(y)
                ordered.append((point.value(x), best))
        axes.step([at for at, _ in ordered], [at for _, at in ordered], where="post", color=LINE, zorder=0)


def _limits(axes: Axes, view: FrontView, x: str, points: Sequence[Point]) -> None:
    """A line at each limit, or a note where it lies far from all points."""
    for key, draw in ((x, axes.axvline), (view.quantities[0], axes.axhline)):
        if key not in view.limits or (draw == axes.axhline and key == x):
            continue
        limit, values = view.limits[key], [point.value(key) for point in points]
        low, high = min(values, default=limit), max(values, default=limit)
        said = f"limit {rows_text([('', limit)])}"
        upright = draw == axes.axvline
        if low - FAR * (high - low) <= limit <= high + FAR * (high - low):
            draw(limit, color=COLOURS[3], linestyle="--", linewidth=1.2, zorder=1)
            place = {"xy": (limit, 0), "xycoords": axes.get_xaxis_transform()} if upright else {
                "xy": (0, limit), "xycoords": axes.get_yaxis_transform()}  # fmt: skip
            axes.annotate(said, xytext=(-3, 4) if upright else (3, 3), textcoords="offset points", color=COLOURS[3],
                          rotation=90 if upright else 0, ha="right" if upright else "left", fontsize=9,
                          va="bottom", **place)  # type: ignore[arg-type]  # fmt: skip
        else:
            arrow = ("\N{RIGHTWARDS ARROW}" if limit > high else "\N{LEFTWARDS ARROW}") if upright else (
                "\N{UPWARDS ARROW}" if limit > high else "\N{DOWNWARDS ARROW}")  # fmt: skip
            axes.annotate(f"{said} {arrow}", (0.99, 0.02 if upright else 0.1), xycoords="axes fraction", ha="right",
                          color=COLOURS[3], fontsize=9)  # fmt: skip


def _name(axes: Axes, name: str, point: Point, x: str, y: str) -> None:
    place = (point.value(x), point.value(y))
    axes.plot(*place, "o", markersize=13, fillstyle="none", color=INK, markeredgewidth=1.2, zorder=4)
    axes.annotate(name, place, xytext=(9, -13), textcoords="offset points", color=INK, fontweight="bold", zorder=5)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b: how often two orders agree about a pair, from -1 to 1; None where one order is all ties."""
    a, b = np.asarray(first), np.asarray(second)
    one, two = np.sign(a[:, None] - a[None]), np.sign(b[:, None] - b[None])
    scale = float(np.sqrt((one**2).sum() * (two**2).sum()))
    return float((one * two).sum()) / scale if scale else None


def errors(pairs: Sequence[Pair], per_cent: bool) -> dict[str, Cell]:
    """Errors of predictions, relative or in points of `per_cent`; whether they order subnets as measurements do; how
    many measurements lie inside the error bar of their prediction."""
    said, measured = np.array([p for p, _, _ in pairs]), np.array([m for _, m, _ in pairs])
    relative = not per_cent and bool((measured != 0).all())
    apart = 100 * (said - measured) / measured if relative else said - measured
    unit = "%" if relative else " points" if per_cent else ""
    tau = kendall_tau(said[:MOST_POINTS].tolist(), measured[:MOST_POINTS].tolist())
    barred = [(m, low, high) for _, m, (low, high) in pairs if low is not None]
    inside = sum(1 for m, low, high in barred if low is not None and low <= m and (high is None or m <= high))
    return {
        "subnets": len(pairs),
        "mean error": f"{np.abs(apart).mean():.3g}{unit}",
        "largest error": f"{np.abs(apart).max():.3g}{unit}",
        "bias": f"{apart.mean():+.2g}{unit}",
        "Kendall tau": None if tau is None else round(tau, 2),
        "inside the error bar": f"{inside} of {len(barred)}" if barred else None,
    }


def errors_table(compared: Mapping[str, Sequence[Pair]], labels: Mapping[str, str]) -> Table:
    """`errors` of each quantity, a row each."""
    rows = {labels.get(key, key): errors(pairs, key == "accuracy") for key, pairs in compared.items() if pairs}
    head = list(next(iter(rows.values()), {}))
    return Table(["quantity", *head], [[name, *row.values()] for name, row in rows.items()])


def agreement_plot(compared: Mapping[str, Sequence[Pair]], labels: Mapping[str, str]) -> Plot:
    """Predicted and measured values of each quantity, one panel each; on the dashed line they are equal."""
    shown = {key: pairs for key, pairs in compared.items() if pairs}
    figure, grids = panels(len(shown), height=4.0)
    marks, rows = Marks(), []
    for axes, (key, pairs) in zip(grids, shown.items(), strict=True):
        label = labels.get(key, key)
        kept = [pairs[i] for i in thinned(len(pairs), MOST_POINTS)]
        said, measured = [p for p, _, _ in kept], [m for _, m, _ in kept]
        bars = error_ends(said, [bar for _, _, bar in kept])
        axes.errorbar(said, measured, xerr=bars, fmt="none", ecolor=SOFT, alpha=0.6, elinewidth=0.8, zorder=1)
        artist = axes.scatter(said, measured, 32, facecolor=COLOURS[0], edgecolor=PAPER, linewidth=0.6, zorder=3)
        marks.add(artist, [rows_text([("", label), ("predicted", p), ("measured", m)]) for p, m, _ in kept])
        barred = [end for _, _, bar in kept for end in bar if end is not None]
        low, high = min([*said, *measured, *barred]), max([*said, *measured, *barred])
        ends = [low - 0.08 * (high - low), high + 0.08 * (high - low)] if high > low else [low - 0.5, low + 0.5]
        axes.plot(ends, ends, "--", color=SOFT, linewidth=1, zorder=1)
        axes.set(xlim=ends, ylim=ends, aspect="equal", title=label, xlabel="predicted", ylabel="measured")
        rows += [[label, p, m, *bar] for p, m, bar in pairs]
    head = ["quantity", "predicted", "measured", "error bar from", "to"]
    said_ = "Each point is a subnet; on the dashed line it was measured as predicted. Error bars: of the prediction."
    return Plot("agreement", figure, said_, Table(head, rows), marks)


def hypervolume_plot(history: Sequence[tuple[int, int, int, float]]) -> Plot:
    """Rows of history.csv: (round, generation, evaluations, hypervolume); a curve a round."""
    figure, axes = new_figure()
    marks = Marks()
    for number in sorted({row[0] for row in history}):
        rows = [row for row in history if row[0] == number]
        colour, name = COLOURS[number % len(COLOURS)], f"round {number + 1}"
        axes.plot([row[1] for row in rows], [row[3] for row in rows], label=name, color=colour,
                  linestyle=DASHES[number % len(DASHES)])  # fmt: skip
        some = [rows[i] for i in thinned(len(rows), MOST_MARKS)]
        artist = axes.scatter([row[1] for row in some], [row[3] for row in some], 14, color=colour,
                              marker=MARKERS[number % len(MARKERS)])  # fmt: skip
        marks.add(artist, [rows_text([("", name), ("generation", g), ("evaluations", e), ("hypervolume", h)])
                           for _, g, e, h in some])  # fmt: skip
    axes.set_xlabel("generation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("hypervolume, relative to\nthe first generation's ranges")
    if len({row[0] for row in history}) > 1:
        legend(axes)
    head = ["round", "generation", "evaluations", "hypervolume"]
    data = [[row[0] + 1, *row[1:]] for row in history]
    return Plot("hypervolume", figure, "Hypervolume of the front after each generation.", Table(head, data), marks)
