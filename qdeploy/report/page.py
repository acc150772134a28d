"""One self-contained HTML page: blocks of text, plots and tables under a fixed order of sections."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from qdeploy.report.style import WIDTH, css
from qdeploy.report.svg import Marks, page_svg, plain, svg

LISTED = 400  # rows of a table on the page
POINTS_AN_INCH = 72
WORD, SENTENCE = re.compile(r"[^\W\d_]{3}"), 24
COMMAND = re.compile(r"`([^`]+)`")
HINT = (
    "Point at a mark of a plot for its figures, or reach it with Tab and go on with the arrow keys. "
    "Below each plot are its data as a table."
)
Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of figures or text; a column of text stands to the left."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawn figure, what it shows in one sentence, its data, and what its marks say. `name` is that of its files."""

    name: str
    figure: Figure
    caption: str
    data: Table
    marks: Marks = field(default_factory=Marks)

    @cached_property
    def svg(self) -> bytes:
        """The plot as an SVG file."""
        return svg(self.figure)


@dataclass(frozen=True)
class Block:
    """What one source has to say in one section (a key of SECTIONS)."""

    section: str
    source: str
    text: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Section:
    """A heading, what a newcomer must know to read it, and how to make what it shows."""

    title: str
    lead: str
    made_by: str


SEARCHING = "`qdeploy search RUN --target TARGET --objective accuracy --objective latency -o DIR`"
SECTIONS = {
    "front": Section(
        "What the search found",
        "Each point is one subnet: one choice of widths, and of shapes where the network has a choice. On a Pareto "
        "front nothing is better in one objective without being worse in another. The knee is where the front bends: "
        "past it, a little more of the one costs much of the other.",
        SEARCHING,
    ),
    "bits": Section(
        "Bits of each layer",
        "A layer at b bits has at most 2^b different weights. Fewer bits: fewer bytes to send and to hold, and more "
        "error. Rows are networks, columns are layers in the order in which data passes them; an empty cell is a "
        "layer that this network does not have.",
        "`qdeploy search`, `qdeploy bundle`, `qdeploy subnet` and `qdeploy quantize` write folders that have them",
    ),
    "sensitivity": Section(
        "Which layers suffer from few bits",
        "One layer at a time has its weights quantized, everything else stays in float. The more a cell stands "
        "out from the page, the more its layer needs its bits; one that hardly does can give some away.",
        "`qdeploy sensitivity MODEL.onnx --data IMAGES -o DIR`",
    ),
    "time": Section(
        "Where the time goes",
        "How long a run of the compiled network takes, and which of its operators take it. An operator that has no "
        "integer kernel is computed in float: its data is converted before and after, which costs time, too.",
        "`qdeploy profile ARTIFACT --model LEVEL.onnx --layers -o ARTIFACT/profile.json`",
    ),
    "ladder": Section(
        "What a climb costs",
        "Weights are sent as bit planes: the first rung brings the most significant bits of every weight, the next "
        "rung one bit more, and so on. A device that climbs fetches the planes that it lacks and keeps those that "
        "it has, so no bit is sent twice; going down fetches nothing.",
        "`qdeploy bundle LOW.onnx HIGH.onnx -o DIR`",
    ),
    "agreement": Section(
        "Predicted against measured",
        "What the search believed of a subnet before it was built, against what was then measured. On the dashed "
        "line both are equal. Only predictions that were written down before the measurement count.",
        "`qdeploy search RUN --target TARGET --objective accuracy --objective latency --measure 8 -o DIR`",
    ),
    "hypervolume": Section(
        "How the search went",
        "Hypervolume is how much of the space of objectives the front dominates: a curve that has become flat says "
        "that more generations would hardly find more.",
        SEARCHING,
    ),
    "training": Section(
        "Training",
        "The loss of each epoch: one panel for each phase, since the losses of phases cannot be compared.",
        "`qdeploy train RECIPE.toml -o RUN`",
    ),
}


def number(value: float) -> str:
    """Five digits, thousands apart, no exponent in the middle of the range."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"


def cell(value: Cell) -> str:
    """A table's cell as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    return plain(value) if isinstance(value, str) else number(value)


def rounded(value: float) -> float:
    """Three digits, for figures that are not known better."""
    return float(f"{value:.3g}")


def rows_text(pairs: Iterable[tuple[str, Cell]]) -> str:
    """What a mark says: a line for each pair, without those that have no value."""
    return "\n".join(f"{name}: {cell(value)}" if name else cell(value) for name, value in pairs if value is not None)


def thinned(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` things, spread evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _kind(table: Table, column: int) -> str:
    """The class of a column: figures stand to the right, words to the left, sentences have room."""
    cells = [row[column] for row in table.rows[:LISTED]]
    words = [one for one in cells if isinstance(one, str) and WORD.search(one)]
    if any(len(word) > SENTENCE for word in words):
        return " class=sentence"
    return " class=text" if words or not column else ""


def _table(table: Table) -> str:
    """A table element; every cell is escaped."""
    kinds = [_kind(table, column) for column in range(len(table.head))]
    top = "".join(
        f"<th scope=col{kind}>{escape(plain(name))}</th>" for name, kind in zip(table.head, kinds, strict=True)
    )
    lines = []
    for row in table.rows[:LISTED]:
        cells = (f"<td{kind}>{escape(cell(value))}</td>" for value, kind in zip(row, kinds, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    left = len(table.rows) - LISTED
    said = table.caption + (f" The first {LISTED} of {len(table.rows):,} rows." if left > 0 else "")
    caption = f"<caption>{escape(plain(said.strip()))}</caption>" if said else ""
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class=scroll tabindex=0 role=group aria-label="table"><table>{caption}{body}</table></div>'


def _text(text: str) -> str:
    """Text with `commands`, escaped."""
    return COMMAND.sub(r"<code>\1</code>", escape(plain(text, 4000)))


def _figure(plot: Plot, number_: int) -> str:
    """A plot with its caption and its data."""
    wide = plot.figure.get_figwidth() > 1.2 * WIDTH
    picture = page_svg(plot.svg, f"p{number_}", plain(plot.caption), plot.marks)
    least = round(plot.figure.get_figwidth() * POINTS_AN_INCH * (1.0 if wide else 0.8))
    most = round(plot.figure.get_figwidth() * 96 * 1.2)
    picture = picture.replace("<svg ", f'<svg style="min-width: {least}px; max-width: {most}px" ', 1)
    around = f'<div class="plot{" wide" if wide else ""}">{picture}</div>'
    caption = f"<figcaption>{escape(plain(plot.caption, 1000))}</figcaption>"
    return f"<figure>{around}{caption}<details><summary>Data</summary>{_table(plot.data)}</details></figure>"


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML `parts`. It may load nothing, and run no script but its own, if it has plots."""
    script = _asset("page.js") if any("<svg" in part for part in parts) else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    policy += f"; script-src 'sha256-{digest}'" if script else ""
    head = (
        f'<meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">'
        '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">'
        f"<title>{escape(plain(title))}</title><style>{css()}{_asset('page.css')}</style>"
    )
    body = f"<h1>{escape(plain(title))}</h1>{''.join(parts)}"
    end = f"<script>{script}</script>" if script else ""
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}{end}</body></html>\n"


def report_page(title: str, sources: Sequence[str], blocks: Sequence[Block], missing: Mapping[str, str]) -> str:
    """Blocks under their sections, in the order of SECTIONS; `missing`: {title or source: why, and what to do}.

    `sources` are lines about what was read.
    """
    parts, links, count = [], [], 0
    for key, section in SECTIONS.items():
        members = [block for block in blocks if block.section == key]
        if not members:
            continue
        links.append(f'<li><a href="#{key}">{escape(section.title)}</a></li>')
        parts.append(f'<section id="{key}"><h2>{escape(section.title)}</h2><p class=lead>{escape(section.lead)}</p>')
        for block in members:
            parts.append(f"<h3>{escape(plain(block.source))}</h3>")
            said = [f"<p>{_text(text)}</p>" for text in block.text] + [_table(table) for table in block.tables]
            parts.append(f"<div class=plots><div>{''.join(said)}</div>" if said else "<div class=plots>")
            for plot in block.plots:
                parts.append(_figure(plot, count))
                count += 1
            parts.append("</div>")
        parts.append("</section>")
    if missing:
        links.append('<li><a href="#missing">Not in this report</a></li>')
        rows = "".join(f"<li>{_text(f'{what}: {why}')}</li>" for what, why in missing.items())
        parts.append(f'<section id="missing"><h2>Not in this report</h2><ul>{rows}</ul></section>')
    read = "".join(f"<li>{_text(line)}</li>" for line in sources)
    hint = f"<p class=lead>{escape(HINT)}</p>" if count else ""
    top = f"<ul>{read}</ul>{hint}<nav aria-label=Sections><ul>{''.join(links)}</ul></nav><main>"
    return document(title, [top, *parts, "</main>"])


def lacking(blocks: Sequence[Block], missing: Iterable[str]) -> dict[str, str]:
    """{title: the command that makes it} of each section that no block has and of which `missing` says nothing."""
    held = {block.section for block in blocks}
    left = {section.title: section.made_by for key, section in SECTIONS.items() if key not in held}
    return {title: made_by for title, made_by in left.items() if not any(one.startswith(title) for one in missing)}


def names(plots: Iterable[Plot]) -> dict[str, Plot]:
    """File stems, each once: NAME, then NAME-2, ..."""
    found: dict[str, Plot] = {}
    for plot in plots:
        name, turn = plot.name, 1
        while name in found:
            turn += 1
            name = f"{plot.name}-{turn}"
        found[name] = plot
    return found
