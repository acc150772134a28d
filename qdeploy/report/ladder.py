"""Plots of levels: what each rung fetches, what accuracy it has, how well planes are coded, how fast it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qdeploy.report.page import Cell, Plot, Table, rows_text
from qdeploy.report.style import COLOURS, MARKERS, RAMP, SOFT, WIDTH, legend, new_figure
from qdeploy.report.svg import Marks, plain

NAMED = 18
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++")
Quartiles = tuple[float, float]


@dataclass(frozen=True)
class Rung:
    """A level: bytes of each kind that a device one rung below fetches to get here, and its accuracy in per cent."""

    name: str
    fetched: Mapping[str, int]
    accuracy: float | None = None

    @property
    def bytes(self) -> int:
        """All that it fetches."""
        return sum(self.fetched.values())


def climb_plot(rungs: Sequence[Rung]) -> Plot:
    """Bytes on the device at every rung: those it kept from the rung below, and those that the climb fetched."""
    figure, axes = new_figure(WIDTH, 1.3 + 0.5 * len(rungs))
    kinds = list(
        dict.fromkeys(kind for rung in rungs for kind in rung.fetched if any(r.fetched.get(kind) for r in rungs))
    )
    marks, held = Marks(), 0
    rows: list[list[Cell]] = []
    top = sum(rung.bytes for rung in rungs) / 1024
    for i, rung in enumerate(rungs):
        if held:
            kept = axes.barh(i, held / 1024, 0.6, color=RAMP[2], label="kept, not sent again" if i == 1 else None)
            marks.add(kept[0], [rows_text([("", rung.name), ("kept (KiB)", held / 1024), ("sent again", 0)])])
        start = held
        for n, kind in enumerate(kinds):
            if size := rung.fetched.get(kind, 0):
                bar = axes.barh(i, size / 1024, 0.6, left=start / 1024, color=COLOURS[n % len(COLOURS)], label=kind,
                                hatch=HATCHES[n % len(HATCHES)], linewidth=0)  # fmt: skip
                marks.add(bar[0], [rows_text([("", rung.name), (f"{kind}, fetched (KiB)", size / 1024)])])
                start += size
        axes.annotate(f"+{rung.bytes / 1024:,.1f} KiB", (start / 1024, i), xytext=(4, 0), va="center",
                      textcoords="offset points", fontsize=9)  # fmt: skip
        held += rung.bytes
        rows.append([rung.name, *(rung.fetched.get(kind, 0) for kind in kinds), rung.bytes, held, rung.accuracy])
    axes.set_yticks(range(len(rungs)), [plain(rung.name, NAMED) for rung in rungs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * top if top else 1)
    axes.grid(False, axis="y")
    axes.set_xlabel("on the device (KiB), and what this rung fetches")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2,
                handlelength=1.4)  # fmt: skip
    head = ["rung", *(f"{kind} (bytes)" for kind in kinds), "fetched (bytes)", "fetched in all (bytes)", "accuracy (%)"]
    return Plot(
        "climb", figure, "What each rung fetches, and what it finds on the device already.", Table(head, rows), marks
    )


def accuracy_plot(rungs: Sequence[Rung]) -> Plot:
    """Accuracy against the bytes that a device has fetched to get there; rungs without an accuracy are left out."""
    figure, axes = new_figure()
    total, places = 0, []
    for rung in rungs:
        total += rung.bytes
        if rung.accuracy is not None:
            places.append((total / 1024, rung.accuracy, rung.name))
    axes.step([x for x, _, _ in places], [y for _, y, _ in places], where="post", color=RAMP[4], zorder=1)
    artist = axes.scatter([x for x, _, _ in places], [y for _, y, _ in places], 40, color=COLOURS[0], zorder=2)
    marks = Marks()
    marks.add(
        artist, [rows_text([("", name), ("fetched in all (KiB)", x), ("accuracy (%)", y)]) for x, y, name in places]
    )
    for x, y, name in places:
        axes.annotate(plain(name, NAMED), (x, y), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xlabel("bytes fetched in all (KiB)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.margins(x=0.12, y=0.25)
    rows: list[list[Cell]] = [[name, x, y] for x, y, name in places]
    head = ["rung", "fetched in all (KiB)", "accuracy (%)"]
    return Plot(
        "accuracy", figure, "Accuracy of each rung against the bytes fetched to get there.", Table(head, rows), marks
    )


def planes_plot(planes: Sequence[str], coded: Sequence[float], bound: Sequence[float]) -> Plot:
    """Coded bytes of each plane beside their entropy given the higher planes (KiB)."""
    figure, axes = new_figure()
    marks = Marks()
    kinds = (("as sent", coded, -0.2), ("entropy", bound, 0.2))
    for n, (label, sizes, shift) in enumerate(kinds):
        bars = axes.bar([p + shift for p in range(len(planes))], [v / 1024 for v in sizes], 0.38, label=label,
                        color=COLOURS[n], hatch=HATCHES[n], linewidth=0)  # fmt: skip
        for bar, name, size in zip(bars, planes, sizes, strict=True):
            marks.add(bar, [rows_text([("planes", name), (f"{label} (bytes)", round(size))])])
    axes.set_xticks(range(len(planes)), [plain(name, NAMED) for name in planes])
    axes.grid(False, axis="x")
    axes.set_xlabel("planes, most significant first")
    axes.set_ylabel("KiB")
    legend(axes)
    rows: list[list[Cell]] = [[name, round(a), round(b)] for name, a, b in zip(planes, coded, bound, strict=True)]
    said = "Bytes of each plane as sent, beside their entropy given the planes above: what an ideal code would take."
    return Plot("planes", figure, said, Table(["planes", "as sent (bytes)", "entropy (bytes)"], rows), marks)


def latency_plot(levels: Sequence[str], rows: Sequence[tuple[str, Sequence[float], Sequence[Quartiles]]]) -> Plot:
    """(runtime, medians in ms, quartiles in ms) for every level, as bars from 0."""
    figure, axes = new_figure()
    width, marks = 0.8 / len(rows), Marks()
    data: list[list[Cell]] = []
    for i, (name, medians, quartiles) in enumerate(rows):
        places = [x + (i - (len(rows) - 1) / 2) * width for x in range(len(levels))]
        low = [max(0.0, m - q[0]) for m, q in zip(medians, quartiles, strict=True)]
        high = [max(0.0, q[1] - m) for m, q in zip(medians, quartiles, strict=True)]
        bars = axes.bar(places, medians, width * 0.92, label=name, color=COLOURS[i], hatch=HATCHES[i],
                        linewidth=0)  # fmt: skip
        axes.errorbar(places, medians, yerr=[low, high], fmt="none", ecolor=SOFT, capsize=3, elinewidth=1)
        for bar, level, median, quarter in zip(bars, levels, medians, quartiles, strict=True):
            said: list[tuple[str, Cell]] = [
                ("", f"{level}, {name}"),
                ("median (ms)", median),
                ("quartiles from", quarter[0]),
                ("to", quarter[1]),
            ]
            marks.add(bar, [rows_text(said)])
            data.append([level, name, median, *quarter])
    axes.set_xticks(range(len(levels)), [plain(level, NAMED) for level in levels])
    axes.grid(False, axis="x")
    axes.set_ylabel("latency, one thread (ms)")
    legend(axes)
    head = ["level", "runtime", "median (ms)", "lower quartile (ms)", "upper quartile (ms)"]
    return Plot("latency", figure, "Median latency with quartiles, measured side by side.", Table(head, data), marks)


def levels_plot(names: Sequence[str], sizes: Sequence[float], accuracy: Sequence[float | None]) -> Plot:
    """Accuracy (%) of quantized files against the bytes of their weights before coding."""
    figure, axes = new_figure()
    marks = Marks()
    kept = [(s / 1024, a, n) for n, s, a in zip(names, sizes, accuracy, strict=True) if a is not None]
    artist = axes.scatter([x for x, _, _ in kept], [y for _, y, _ in kept], 40, color=COLOURS[0], marker=MARKERS[0])
    marks.add(artist, [rows_text([("", n), ("weights (KiB)", x), ("per cent", y)]) for x, y, n in kept])
    for x, y, name in kept:
        axes.annotate(plain(name, NAMED), (x, y), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xlabel("bytes of the weights, before coding (KiB)")
    axes.set_ylabel("images with the float\nnetwork's class (%)")
    axes.margins(x=0.15, y=0.25)
    rows: list[list[Cell]] = [[n, s, a] for n, s, a in zip(names, sizes, accuracy, strict=True)]
    head = ["file", "weights (bytes)", "images with the float network's class (%)"]
    return Plot(
        "levels", figure, "How often each quantized file agrees with the float network.", Table(head, rows), marks
    )
