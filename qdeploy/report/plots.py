"""Plots as inline SVG: one figure a function, plain values in, text out, the same bytes for the same values."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

mpl.rcParams.update({"svg.hashsalt": "qdeploy", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False,
                     "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})  # fmt: skip
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774", "#cb912f", "#337ea9")


def new_figure(width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """An empty plot, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False)


def svg(figure: Figure) -> str:
    """A figure as text that HTML can hold."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def accuracy_against_bytes(levels: Sequence[str], total_bytes: Sequence[int], accuracy: Sequence[float]) -> str:
    """A point a level: bytes fetched in all (KiB) and top-1 accuracy (%)."""
    figure, axes = new_figure()
    kib = [value / 1024 for value in total_bytes]
    axes.plot(kib, accuracy, "-o", color=COLOURS[0])
    for name, x, y in zip(levels, kib, accuracy, strict=True):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, -12))
    axes.set_xlabel("bytes fetched in all (KiB)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.margins(x=0.1, y=0.2)
    return svg(figure)


def bits_per_layer(layers: Sequence[str], levels: Sequence[str], bits: Sequence[Sequence[int]]) -> str:
    """Grouped bars: `bits[level][layer]`, the weight width of every layer at every level."""
    figure, axes = new_figure(7.0, 1.2 + 0.32 * len(layers))
    height = 0.8 / len(levels)
    for i, (name, row) in enumerate(zip(levels, bits, strict=True)):
        places = [y + (i - (len(levels) - 1) / 2) * height for y in range(len(layers))]
        axes.barh(places, row, height * 0.9, label=name, color=COLOURS[i % len(COLOURS)])
    axes.set_yticks(range(len(layers)), layers)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("weight width (bits)")
    _legend(axes)
    return svg(figure)


def stacked_bytes(names: Sequence[str], kinds: Sequence[str], sizes: Sequence[Sequence[int]]) -> str:
    """Stacked bars: `sizes[kind][name]`, bytes of every kind that each step fetched (KiB)."""
    figure, axes = new_figure()
    base = [0.0] * len(names)
    for i, (kind, row) in enumerate(zip(kinds, sizes, strict=True)):
        kib = [value / 1024 for value in row]
        axes.bar(names, kib, 0.6, bottom=base, label=kind, color=COLOURS[i % len(COLOURS)])
        base = [a + b for a, b in zip(base, kib, strict=True)]
    axes.set_ylabel("fetched in this step (KiB)")
    _legend(axes)
    return svg(figure)


def bytes_against_bound(planes: Sequence[str], coded: Sequence[int], bound: Sequence[float]) -> str:
    """Paired bars: coded bytes of each plane beside its entropy given the higher planes (KiB)."""
    figure, axes = new_figure()
    places = range(len(planes))
    axes.bar([p - 0.2 for p in places], [v / 1024 for v in coded], 0.4, label="coded, as sent", color=COLOURS[0])
    axes.bar([p + 0.2 for p in places], [v / 1024 for v in bound], 0.4, label="entropy bound", color=COLOURS[1])
    axes.set_xticks(list(places), planes)
    axes.set_xlabel("planes, most significant first")
    axes.set_ylabel("KiB")
    _legend(axes)
    return svg(figure)


def latency(levels: Sequence[str], rows: Sequence[tuple[str, Sequence[float], Sequence[tuple[float, float]]]]) -> str:
    """Grouped bars with quartiles: (runtime, medians in ms, (lower, upper quartile) in ms) for every level."""
    figure, axes = new_figure()
    width = 0.8 / len(rows)
    for i, (name, medians, quartiles) in enumerate(rows):
        places = [x + (i - (len(rows) - 1) / 2) * width for x in range(len(levels))]
        low = [m - q[0] for m, q in zip(medians, quartiles, strict=True)]
        high = [q[1] - m for m, q in zip(medians, quartiles, strict=True)]
        axes.bar(places, medians, width * 0.9, yerr=[low, high], capsize=3, label=name, color=COLOURS[i % len(COLOURS)])
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylabel("latency, one thread (ms)")
    _legend(axes)
    return svg(figure)


def search_front(front: Sequence[tuple[float, float]], limit: float, picks: Sequence[float]) -> str:
    """`front`: (ms, predicted accuracy in %) of subnets; a line at the limit and one at each pick's measured time."""
    figure, axes = new_figure()
    axes.scatter([ms for ms, _ in front], [accuracy for _, accuracy in front], 14, color=COLOURS[0], label="front")
    axes.axvline(limit, color=COLOURS[4], label="limit")
    for number, ms in enumerate(picks):
        axes.axvline(ms, color=COLOURS[2], linestyle="--", label="pick, measured" if not number else None)
    axes.set_xlabel("milliseconds an image")
    axes.set_ylabel("predicted top-1 accuracy (%)")
    _legend(axes)
    return svg(figure)
