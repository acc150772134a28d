"""A search folder as blocks of a report, and the report that a search writes into its own folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdeploy.errors import ModelError, QDeployError, RecipeError
from qdeploy.files import read_bytes
from qdeploy.report.grids import bits_plot
from qdeploy.report.page import SECTIONS, Block, number
from qdeploy.report.pareto import FrontView, Pair, Point, agreement_plot, errors_table, front_plot, hypervolume_plot
from qdeploy.report.reading import expecting, load, load_lines, sane
from qdeploy.report.write import write_page
from qdeploy.search.folder import FORETOLD, HISTORY, REQUEST, SCORES
from qdeploy.search.front import NAME, Foretold, Front, Member, agreement, knee, pick, read_front
from qdeploy.search.objectives import KEYS, Bound, parse_bounds
from qdeploy.space import SubnetSpec

AGAIN = "run the same `qdeploy search` again, it resumes"
BESIDE = ("latency_ms", "download_kib", "weights_kib", "bitops")  # what a single objective is plotted against
SIGNS = {"<=": "\N{LESS-THAN OR EQUAL TO}", ">=": "\N{GREATER-THAN OR EQUAL TO}"}
UNITS = {"ms": "ms", "kib": "KiB"}
Missing = dict[str, str]


def label(key: str) -> str:
    """A quantity, such as latency_ms@host, as the axis of a plot has it."""
    name, _, target = key.partition("@")
    if name == "accuracy":
        return "top-1 accuracy (%)"
    quantity = KEYS.get(name)
    text = quantity.name.replace("_", " ") if quantity else name
    unit = f" ({UNITS.get(quantity.unit, quantity.unit)})" if quantity and quantity.unit else ""
    return f"{text}{f' on {target}' if target else ''}{unit}"


def search_blocks(folder: Path, text: Sequence[str] = ()) -> tuple[list[Block], Missing]:
    """Front, bits, agreement and hypervolume of a search folder; `text` stands before the front in place of ours.

    Raises ModelError when there is no front, or it is damaged; other files that are absent or damaged are `missing`.
    """
    if not (folder / NAME).is_file():
        raise ModelError(f"{folder}: the search has not ended, there is no {NAME}: {AGAIN}")
    load(folder / NAME)
    front = read_front(folder)
    if not front.members:
        raise ModelError(f"{folder / NAME} has no subnet: search with easier limits")
    missing: Missing = {}
    with expecting(folder / NAME, "search again"):
        members = sorted(front.members, key=lambda m: m.value(front.objectives[0]))
        name = f"{folder.name or folder}: {members[0].spec.network}"
        bounds = _bounds(folder, front, missing)
        blocks = [_front_block(name, front, members, bounds, text), _bits_block(name, front, members)]
    _try(
        missing,
        f"{SECTIONS['agreement'].title} ({folder.name})",
        lambda: blocks.append(_agreement(name, folder, front)),
    )
    _try(missing, f"{SECTIONS['hypervolume'].title} ({folder.name})", lambda: blocks.append(_history(name, folder)))
    return blocks, missing


def _try(missing: Missing, what: str, make: Any) -> None:
    try:
        make()
    except QDeployError as e:
        missing[what] = str(e)


def _bounds(folder: Path, front: Front, missing: Missing) -> list[Bound]:
    """The limits that the search was given."""
    try:
        with expecting(folder / REQUEST, AGAIN):
            asked = load(folder / REQUEST)
            return parse_bounds(list(asked["limits"]), front.targets, list(asked["floors"]))
    except QDeployError as e:
        missing[f"Limits of the search ({folder.name})"] = str(e)
        return []


def _front_block(
    name: str, front: Front, members: Sequence[Member], bounds: Sequence[Bound], text: Sequence[str]
) -> Block:
    known = [key for key in members[0].predicted if all(key in m.predicted for m in members)]
    quantities = [key for key in front.objectives if key in known]
    if not quantities:
        raise KeyError(f"no objective of {', '.join(front.objectives)}")
    if len(quantities) == 1:
        others = [key for wanted in BESIDE for key in known if key.partition("@")[0] == wanted and key != quantities[0]]
        quantities += others[:1]
    quantities += [b.what.key for b in bounds if b.what.key in known and b.what.key not in quantities]
    chosen: dict[str, int] = {}
    said = []
    try:
        limits = [f"{b.what.key}={b.limit!r}" for b in bounds if not b.what.quantity.maximised]
        floors = [f"{b.what.key}={b.limit!r}" for b in bounds if b.what.quantity.maximised]
        chosen["pick"] = members.index(pick(front, limits, False, floors))
    except RecipeError as e:
        said.append(f"No pick: {e}.")
    chosen["knee"] = members.index(knee(front.measured, front.objectives))
    if len(set(chosen.values())) < len(chosen):
        chosen = {"pick and knee": chosen["pick"]}
    points = [Point(m.spec.id, m.predicted, m.measured, m.bars) for m in members]
    labels = {key: label(key) for key in [*quantities, *(key for key in known if key not in quantities)]}
    limits_ = {b.what.key: b.limit for b in bounds}
    view = FrontView(quantities, labels, points, limits_, chosen)
    asked = ", ".join(f"{label(b.what.key)} {SIGNS[b.sign]} {number(b.limit)}" for b in bounds) or "none"
    ours = [f"Objectives: {', '.join(label(key) for key in front.objectives)}. Limits: {asked}."]
    ours.append("Accuracy is that on held-out images; its error bar is one standard deviation of the predictor.")
    ours += [f"The {title} is {points[i].name}: {_values(view, points[i])}." for title, i in chosen.items()]
    return Block("front", name, [*text, *ours, *said], [front_plot(view)])


def _values(view: FrontView, point: Point) -> str:
    how = "measured" if point.measured else "predicted"
    return ", ".join(f"{view.label(k)} {number(point.value(k))}" for k in view.quantities) + f", {how}"


def _bits_block(name: str, front: Front, members: Sequence[Member]) -> Block:
    first = front.objectives[0]
    names = [
        f"{m.value(first):.2f}% \N{MIDDLE DOT} {m.spec.id}"
        if first == "accuracy"
        else f"{m.value(first):.4g} \N{MIDDLE DOT} {m.spec.id}"
        for m in members
    ]
    weights = [{entry.layer: float(entry.weight_bits) for entry in m.spec.layers} for m in members]
    activations = [{entry.layer: float(entry.activation_bits) for entry in m.spec.layers} for m in members]
    order = merged([list(one) for one in weights])
    text = f"Subnets of the front by {label(first)}, which stands before their ids."
    return Block("bits", name, [text], [bits_plot(names, weights, activations, order)])


def merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """All names of some lists, each once, in an order that keeps theirs where they do not contradict each other."""
    found: list[str] = []
    known: set[str] = set()
    for order in sorted(orders, key=len, reverse=True):
        at = 0
        for name in order:
            if name in known:
                at = found.index(name) + 1
            else:
                found.insert(at, name)
                known.add(name)
                at += 1
    return found


def _agreement(name: str, folder: Path, front: Front) -> Block:
    """Predictions that were written down before the measurement, and what was then measured."""
    with expecting(folder / FORETOLD, AGAIN):
        scores = {}
        if (folder / SCORES).is_file():
            scores = {row["spec_id"]: float(row["accuracy"]) for row in load_lines(folder / SCORES)}
        compared: dict[str, list[Pair]] = {"accuracy": []} if scores else {}
        devices = {}
        for target in front.targets:
            devices[target] = {row["spec_id"]: row for row in load_lines(folder / f"{target}.jsonl")}
            compared[f"latency_ms@{target}"] = []
        known = []
        for row in load_lines(folder / FORETOLD):
            spec = SubnetSpec.from_json(row["spec"]).id
            if (scores and spec not in scores) or any(spec not in held for held in devices.values()):
                continue
            measured = {f"latency_ms@{target}": float(held[spec]["latency_ms"]) for target, held in devices.items()}
            measured |= {"accuracy": scores[spec]} if scores else {}
            known.append(Foretold(row["round"], spec, row["predicted"], measured))
            for key, pairs in compared.items():
                low, high = row["bars"].get(key, (None, None))
                pairs.append((float(row["predicted"][key]), measured[key], (low, high)))
        if not known:
            raise ModelError(f"no subnet of a front was measured: {SECTIONS['agreement'].made_by}")
        lines = [f"{line[0].upper()}{line[1:]}." for line in agreement(known, front, list(compared))]
        labels = {key: label(key) for key in compared}
        for key, text in labels.items():
            lines = [line.replace(key, text) for line in lines]
        return Block("agreement", name, lines, [agreement_plot(compared, labels)], [errors_table(compared, labels)])


def _history(name: str, folder: Path) -> Block:
    path = folder / HISTORY
    with expecting(path, AGAIN):
        rows = list(csv.DictReader(io.StringIO(read_bytes(path, "the history", ModelError).decode("utf-8"))))
        found = [(int(r["round"]), int(r["generation"]), int(r["evaluations"]), float(r["hypervolume"])) for r in rows]
        found = [row for row in found if not math.isnan(row[3])]  # of many objectives it is not computed each time
        sane([list(row) for row in found], path)
        if not found:
            raise ValueError("no generation")
        return Block("hypervolume", name, [], [hypervolume_plot(found)])


def write_report(folder: Path, title: str, text: str) -> None:
    """report.html of a search and its plots as PNG and SVG, in its own folder; `text` stands before the front."""
    blocks, missing = search_blocks(folder, [text])
    write_page(title, [], blocks, missing, folder / "report.html", folder)
