"""Plots of one compiled network: the time of each operator, and what of it is not integer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.patches import Rectangle

from qdeploy.report.page import Cell, Plot, Table, rounded, rows_text
from qdeploy.report.style import COLOURS, INK, legend, new_figure
from qdeploy.report.svg import Marks, tail

SLOWEST = 25  # operators with a bar of their own
NAMED = 30
KINDS = (("integer", COLOURS[0], ""), ("float", COLOURS[1], "////"))


def time_plot(layers: Sequence[Mapping[str, Any]]) -> Plot:
    """A bar for each of the slowest operators, quartiles on it.

    Rows as `qdeploy profile --layers` has them: layer, operator, ms, quartiles, share, arithmetic, reason, bound, ...
    """
    ordered = sorted(layers, key=lambda row: -row["ms"])
    shown, rest = ordered[:SLOWEST], ordered[SLOWEST:]
    figure, axes = new_figure(height=1.3 + 0.24 * len(shown))
    marks, bars = Marks(), dict[int, Rectangle]()
    for kind, colour, hatch in KINDS:
        part = [(i, row) for i, row in enumerate(shown) if (row["arithmetic"] == "integer") == (kind == "integer")]
        if not part:
            continue
        drawn = axes.barh([i for i, _ in part], [1e3 * row["ms"] for _, row in part], 0.7, color=colour, hatch=hatch,
                          linewidth=0, label=f"{kind} arithmetic")  # fmt: skip
        bars |= {i: bar for bar, (i, _) in zip(drawn, part, strict=True)}
    for i, row in enumerate(shown):
        marks.add(bars[i], [_text(row)])
    times, ends = [1e3 * row["ms"] for row in shown], [row["quartiles"] for row in shown]
    spread = [[max(0.0, t - 1e3 * q[0]) for t, q in zip(times, ends, strict=True)],
              [max(0.0, 1e3 * q[1] - t) for t, q in zip(times, ends, strict=True)]]  # fmt: skip
    axes.errorbar(times, range(len(shown)), xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    names = [tail(row["layer"], NAMED) for row in shown]
    for i, (row, right) in enumerate(zip(shown, ends, strict=True)):
        axes.annotate(f"{100 * row['share']:.1f}%", (max(1e3 * right[1], times[i]), i), xytext=(4, 0), va="center",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel("time in a run (\N{MICRO SIGN}s)")
    legend(axes)
    head = [
        "operator",
        "kind",
        "\N{MICRO SIGN}s",
        "share (%)",
        "GOPS",
        "share of peak (%)",
        "GB/s",
        "limit",
        "arithmetic",
        "why",
    ]
    rows: list[list[Cell]] = [
        [row["layer"], row["operator"], 1e3 * row["ms"], 100 * row["share"], row["gops"] if row["macs"] else None,
         100 * row["peak_share"] if row["macs"] else None, row["gbytes_s"], row["bound"], row["arithmetic"],
         row["reason"] or ""]
        for row in ordered
    ]  # fmt: skip
    said = "Where a run spends its time, slowest operators first: medians, quartiles, share of all time."
    if rest:
        said += f" {len(rest)} others take {sum(row['share'] for row in rest):.0%} together; they are in the table."
    return Plot("layers", figure, said, Table(head, rows), marks)


def _text(row: Mapping[str, Any]) -> str:
    lines: list[tuple[str, Cell]] = [
        ("", row["layer"]),
        ("kind", row["operator"]),
        ("time (\N{MICRO SIGN}s)", 1e3 * row["ms"]),
    ]
    lines += [("share of all (%)", 100 * row["share"]), ("arithmetic", row["arithmetic"]), ("why", row["reason"])]
    lines += [("nearest limit", row["bound"])]
    if row["macs"]:
        lines += [("GOPS", row["gops"]), ("share of this machine's peak (%)", 100 * row["peak_share"])]
    return rows_text(lines)


def lint_table(rows: Sequence[Mapping[str, Any]], shares: Mapping[str, float]) -> Table:
    """Operators that have no integer kernel, and why; `shares` of the time, of those that were measured by name."""
    found: list[list[Cell]] = []
    for row in rows:
        share = shares.get(str(row["name"]))
        found.append(
            [row["name"], row["operator"], None if share is None else rounded(100 * share), row["reason"] or ""]
        )
    head = ["in float", "operator", "share of the time (%)", "why"]
    return Table(head, found, "Operators that run in float, each with its reason.")
