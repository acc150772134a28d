"""The report of a search: front, hypervolume, predicted against measured, bits of each layer; PNG and one page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qdeploy.files import write_atomic
from qdeploy.report.page import document, figure, table
from qdeploy.report.plots import COLOURS, new_figure, svg

PNG_DPI = 120
LISTED = 12


def error_ends(values: Sequence[float], bars: Sequence[Sequence[float | None] | None]) -> list[list[float]]:
    """Lengths below and above `values` as matplotlib has them; 0 where there is no bar or no upper end."""
    below, above = [], []
    for value, bar in zip(values, bars, strict=True):
        low, high = bar or (value, value)
        below.append(max(0.0, value - (value if low is None else low)))
        above.append(max(0.0, (value if high is None else high) - value))
    return [below, above]


def front_plot(objectives: Sequence[str], members: Sequence[Mapping[str, Any]]) -> Figure:
    """The first objective against each other one: predicted members small, measured ones large.

    Those that were measured also show the error bars of what was predicted of them.
    """
    others = list(objectives[1:]) or list(objectives)
    found = Figure(figsize=(7.0, 3.4 * len(others)), layout="constrained")
    rows: list[Axes] = list(found.subplots(len(others), 1, squeeze=False)[:, 0])
    for axes, other in zip(rows, others, strict=True):
        for key, size, label in (("predicted", 8, "predicted"), ("measured", 36, "measured")):
            points = [m[key] for m in members if m[key]]
            axes.scatter([p[other] for p in points], [p[objectives[0]] for p in points], size, label=label,
                         color=COLOURS[0 if key == "predicted" else 1], zorder=2)  # fmt: skip
        barred = [m for m in members if m["measured"]]
        places = [[m["predicted"][name] for m in barred] for name in (other, objectives[0])]
        ends = [error_ends(at, [m["bars"].get(name) for m in barred])
                for at, name in zip(places, (other, objectives[0]), strict=True)]  # fmt: skip
        if barred:
            axes.errorbar(
                places[0],
                places[1],
                xerr=ends[0],
                yerr=ends[1],
                fmt="none",
                ecolor=COLOURS[5],
                elinewidth=0.8,
                zorder=1,
            )
        axes.set_xlabel(other)
        axes.set_ylabel(objectives[0])
    rows[0].legend(frameon=False)
    return found


def hypervolume_plot(history: Sequence[Sequence[float]]) -> Figure:
    """`history` rows as history.csv has them: one line a round."""
    found, axes = new_figure()
    for number in sorted({int(row[0]) for row in history}):
        rows = [row for row in history if int(row[0]) == number]
        axes.plot([row[1] for row in rows], [row[5] for row in rows], label=f"round {number + 1}",
                  color=COLOURS[number % len(COLOURS)])  # fmt: skip
    axes.set_xlabel("generation")
    axes.set_ylabel("hypervolume, first generation's ranges")
    axes.legend(frameon=False)
    return found


def agreement_plot(compared: Mapping[str, Sequence[tuple[float, float, Sequence[float | None]]]]) -> Figure:
    """(predicted, measured, error bar of the prediction) of each quantity, one panel each; on the line they agree."""
    found = Figure(figsize=(7.0, 3.4 * max(1, len(compared))), layout="constrained")
    panels = found.subplots(max(1, len(compared)), 1, squeeze=False)[:, 0]
    for axes, (name, pairs) in zip(panels, compared.items(), strict=False):
        predicted, measured = [p for p, _, _ in pairs], [q for _, q, _ in pairs]
        errors = error_ends(predicted, [bar for _, _, bar in pairs])
        axes.errorbar(predicted, measured, xerr=errors, fmt="o", markersize=4, color=COLOURS[0], ecolor=COLOURS[5])
        if pairs:
            ends = [min([*predicted, *measured]), max([*predicted, *measured])]
            axes.plot(ends, ends, "--", color=COLOURS[5], linewidth=1)
        else:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no subnet of a front was measured", ha="center", transform=axes.transAxes)
        axes.set_xlabel(f"predicted {name}")
        axes.set_ylabel(f"measured {name}")
    return found


def bits_plot(layers: Sequence[str], members: Sequence[Mapping[str, Any]]) -> Figure:
    """Weight width of every layer (columns) of every member (rows, in the order given); white: the layer is absent."""
    found, axes = new_figure(7.0, 1.5 + 0.12 * len(members))
    picture = [[m["bits"].get(layer, float("nan")) for layer in layers] for m in members]
    image = axes.imshow(picture, aspect="auto", interpolation="nearest", cmap="viridis")
    found.colorbar(image, ax=axes, label="weight width (bits)")
    axes.grid(False)
    axes.set_xlabel("layer, in graph order")
    axes.set_ylabel("subnet of the front")
    return found


def write_report(folder: Path, description: Mapping[str, Any]) -> None:
    """report.html, front.png, hypervolume.png, agreement.png and bits.png in `folder`.

    `description`: title, text, objectives, layers, history, compared ({name: [(predicted, measured,
    (low, high))]}), members [{id, predicted, measured, bars: {name: (low, high)}, bits: {layer: width}}].
    """
    members, objectives = description["members"], description["objectives"]
    plots = {
        "front": (front_plot(objectives, members), "The front. Large points were measured."),
        "hypervolume": (hypervolume_plot(description["history"]), "Hypervolume of each generation."),
        "agreement": (agreement_plot(description["compared"]), "Predicted, before it was measured, against measured."),
        "bits": (bits_plot(description["layers"], members), "Weight width of every layer."),
    }
    head = ["subnet", *(f"{name}{end}" for name in objectives for end in ("", ", predicted"))]
    rows = [
        [m["id"], *(f"{v:.5g}" for name in objectives for v in (m["measured"][name], m["predicted"][name]))]
        for m in members if m["measured"]
    ]  # fmt: skip
    parts = [f"<p>{description['text']}</p>", table(head, rows[:LISTED])]
    for name, (plot, caption) in plots.items():
        write_atomic(folder / f"{name}.png", png(plot))
        parts.append(figure(svg(plot), caption))
    write_atomic(folder / "report.html", document(description["title"], parts).encode())


def png(plot: Figure) -> bytes:
    """A figure as PNG, the same bytes for the same values."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()
