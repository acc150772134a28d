"""What `qdeploy sensitivity` measured, as a block of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdeploy.report.grids import sensitivity_plot
from qdeploy.report.page import Block, Cell, Table, rounded


def sensitivity_block(found: Mapping[str, Any], name: str) -> Block:
    """`found`: sensitivity.json ("layers", "types", "widths", "images", "float"), about the model `name`."""
    widths, layers = found["widths"], found["layers"]
    text = [f"{len(layers)} layers, one at a time, on {found['images']} images."]
    head = ["type of layer", "layers", *(f"output error at {bits} bits (%)" for bits in widths)]
    types: list[list[Cell]] = [
        [row["type"], row["layers"], *(rounded(100 * row[str(bits)]["output"]) for bits in widths)]
        for row in found["types"]
    ]
    tables = [Table(head, types, "Means by type of layer.")]
    if floats := [[row["name"], row["operator"], row["reason"]] for row in found["float"]]:
        tables.append(Table(["stays in float", "operator", "why"], floats))
    return Block("sensitivity", name, text, [sensitivity_plot(layers, widths)], tables)
