"""Plots of a training: losses of each phase by epoch."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from qdeploy.report.page import Plot, Table, rows_text, thinned
from qdeploy.report.style import COLOURS, DASHES, MARKERS, legend, panels
from qdeploy.report.svg import Marks, plain

MOST_PHASES, MOST_LOSSES, MOST_MARKS = 6, 6, 40
Row = tuple[str, int, dict[str, float], float]  # phase, epoch, losses by name, images a second


def training_plot(rows: Sequence[Row]) -> Plot:
    """A panel for each phase, a curve for each loss; an epoch that lacks a loss is a gap of its curve."""
    phases = list(dict.fromkeys(row[0] for row in rows))
    shown = phases[:MOST_PHASES]
    figure, grids = panels(len(shown), height=2.7)
    marks = Marks()
    for axes, phase in zip(grids, shown, strict=True):
        part = [row for row in rows if row[0] == phase]
        names = list(dict.fromkeys(name for row in part for name in row[2]))[:MOST_LOSSES]
        for n, name in enumerate(names):
            points = [(epoch, losses[name]) for _, epoch, losses, _ in part if name in losses]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], color=COLOURS[n], linestyle=DASHES[n % len(DASHES)]
            )
            some = [points[i] for i in thinned(len(points), MOST_MARKS)]
            artist = axes.scatter([x for x, _ in some], [y for _, y in some], 16, color=COLOURS[n], marker=MARKERS[n],
                                  label=plain(name, 30))  # fmt: skip
            marks.add(artist, [rows_text([("", f"phase {phase}"), ("epoch", x), (name, y)]) for x, y in some])
        axes.set_ylabel("value at the last step")
        axes.set_xlabel(plain(f"epoch of phase {phase}", 60))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(names) > 1:
            legend(axes, 3)
    names = list(dict.fromkeys(name for row in rows for name in row[2]))[:20]
    data = [[phase, epoch, *(losses.get(name) for name in names), rate] for phase, epoch, losses, rate in rows]
    head = ["phase", "epoch", *names, "images a second"]
    said = "Losses, and where a method bounds it the norm of the gradient, at the last step of each epoch."
    if len(shown) < len(phases):
        said += f" The first {len(shown)} of {len(phases)} phases."
    return Plot("training", figure, said, Table(head, data), marks)
