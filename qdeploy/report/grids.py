"""Maps of cells: widths of layers, and how layers suffer from few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from qdeploy.report.page import Cell, Plot, Table, rounded, rows_text, thinned
from qdeploy.report.style import INK, LINE, PAPER, RAMP, WIDTH, ink_on, panels, ramp
from qdeploy.report.svg import Marks, tail

MOST_ROWS, MOST_COLUMNS = 24, 100
CELL = 0.24  # inches
NAMED = 30  # characters of a layer's name beside a plot
Widths = Mapping[str, float]  # {layer: bits}


def _cells(
    axes: Axes, values: Sequence[Sequence[float | None]], steps: Sequence[Sequence[int]], texts: Sequence[Sequence[str]]
) -> list[tuple[int, int, Rectangle]]:
    """A rectangle for each value, [row][column], with its colour's number in RAMP and the text in it."""
    found = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is None:
                continue
            step = steps[i][j]
            shape = Rectangle(
                (j - 0.5, i - 0.5), 1, 1, facecolor=RAMP[step], edgecolor=PAPER, linewidth=0.8, clip_on=False
            )
            axes.add_patch(shape)
            found.append((i, j, shape))
            if texts[i][j]:
                axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=8, color=ink_on(step))
    axes.set_xlim(-0.5, max(map(len, values)) - 0.5)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    return found


def bits_plot(
    names: Sequence[str], weights: Sequence[Widths], activations: Sequence[Widths] | None, order: Sequence[str]
) -> Plot:
    """Widths in bits of the weights, and of the activations that go into them, of every layer of some networks.

    `names` of the networks, {layer: bits} of each, and all layers in graph `order`.
    """
    rows = thinned(len(names), MOST_ROWS)
    layers = [order[i] for i in thinned(len(order), MOST_COLUMNS)]
    kinds = [("weights", weights)] + ([] if activations is None else [("activations", activations)])
    label_width = 0.075 * min(NAMED, max((len(names[i]) for i in rows), default=0)) + 0.5
    below = 0.07 * min(NAMED, max(map(len, layers), default=0)) + 0.2
    height = 0.4 + CELL * len(rows) + below / len(kinds)
    figure, grids = panels(len(kinds), max(WIDTH, label_width + CELL * len(layers)), height)
    marks = Marks()
    for axes, (kind, widths) in zip(grids, kinds, strict=True):
        values = [[widths[i].get(layer) for layer in layers] for i in rows]
        steps = [[min(8, max(0, round(v or 0))) for v in row] for row in values]
        texts = [
            ["" if v is None else f"{v:g}" if float(v).is_integer() else f"{v:.1f}" for v in row] for row in values
        ]
        for i, j, shape in _cells(axes, values, steps, texts):
            pairs: list[tuple[str, Cell]] = [
                ("", names[rows[i]]),
                ("layer", layers[j]),
                (f"bits of its {kind}", values[i][j]),
            ]
            marks.add(shape, [rows_text(pairs)])
        axes.set_yticks(range(len(rows)), [tail(names[i], NAMED) for i in rows])
        axes.set_title(f"{kind} (bits)")
        axes.set_xticks([])
    grids[-1].set_xticks(range(len(layers)), [tail(layer, NAMED) for layer in layers], rotation=90, fontsize=8)
    head = ["network", "of", *layers]
    table = [[names[i], kind, *(widths[i].get(layer) for layer in layers)] for kind, widths in kinds
             for i in range(len(names))]  # fmt: skip
    said = "Width of every layer" + ("'s weights." if activations is None else "'s weights, and of what goes into it.")
    if len(rows) < len(names):
        said += f" {len(rows)} of {len(names):,} networks, evenly spread; the table has more."
    if len(layers) < len(order):
        said += f" {len(layers)} of {len(order):,} layers, evenly spread."
    return Plot("bits", figure, said, Table(head, table), marks)


def sensitivity_plot(layers: Sequence[Mapping[str, object]], widths: Sequence[int]) -> Plot:
    """Relative error of the network's output with one layer's weights at each width; shades are logarithmic.

    A row of `layers` has "name", "type" and at each width {"output", "weight": ratios, "agreement": per cent}.
    """
    kept = [layers[i] for i in thinned(len(layers), MOST_COLUMNS)]
    errors = [[_figure_of(row, bits, "output") for bits in widths] for row in kept]
    names = [tail(row["name"], NAMED) for row in kept]
    positive = [value for row in errors for value in row if value > 0]
    low, high = math.log10(min(positive, default=1e-3)), math.log10(max(positive, default=1.0))
    low = max(low, high - 6)
    span = max(high - low, 1e-9)
    steps = [[ramp((math.log10(value) - low) / span) if value > 0 else 0 for value in row] for row in errors]
    texts = [[f"{100 * value:.2g}%" if value < 1 else f"{100 * value:,.0f}%" for value in row] for row in errors]
    figure, (axes,) = panels(1, max(WIDTH, 2.6 + 0.62 * len(widths)), 1.1 + CELL * len(kept))
    marks = Marks()
    for i, j, shape in _cells(axes, errors, steps, texts):
        row, bits = kept[i], widths[j]
        pairs: list[tuple[str, Cell]] = [
            ("", str(row["name"])), ("type", str(row["type"])), ("weight width (bits)", bits),
            ("output error (%)", 100 * errors[i][j]), ("weight error (%)", 100 * _figure_of(row, bits, "weight")),
            ("images with the same class (%)", _figure_of(row, bits, "agreement")),
        ]  # fmt: skip
        marks.add(shape, [rows_text(pairs)])
    axes.set_yticks(range(len(kept)), names)
    axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("width of this layer's weights (bits)")
    for share, said in (
        (0.0, f"{100 * 10**low:.2g}%"),
        (0.5, f"{100 * 10 ** (low + span / 2):.2g}%"),
        (1.0, f"{100 * 10**high:.2g}%"),
    ):
        axes.add_patch(Rectangle((0, -9), 0, 0, facecolor=RAMP[ramp(share)], edgecolor=LINE, label=said))
    box = axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.01), ncols=3, title="relative error of the output",
                      alignment="left", borderaxespad=0.1)  # fmt: skip
    box.get_title().set_color(INK)
    head = ["layer", "type", *(f"output error at {bits} bits (%)" for bits in widths)]
    data: list[list[Cell]] = [
        [str(row["name"]), str(row["type"]), *(rounded(100 * _figure_of(row, bits, "output")) for bits in widths)]
        for row in layers
    ]
    said = "Relative error of the network's output when this layer alone has so few bits. Shades are logarithmic."
    if len(kept) < len(layers):
        said += f" {len(kept)} of {len(layers):,} layers, evenly spread."
    return Plot("sensitivity", figure, said, Table(head, data), marks)


def _figure_of(row: Mapping[str, object], bits: int, name: str) -> float:
    found = row[str(bits)]
    assert isinstance(found, Mapping)
    return float(found[name])
