"""How much each layer suffers from few bits: one layer's weights quantized at a time, everything else in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from qdeploy.ptq.graph import run, session
from qdeploy.ptq.quantize import Calibrated, compare, layer_at

IMAGES = 32  # on which each layer is tried at each width


def measure(calibrated: Calibrated, widths: Sequence[int], echo: Callable[[str], None] | None = None) -> dict[str, Any]:
    """{"layers": rows in graph order, "types": rows by type of layer, "widths", "images", "float"}.

    A layer's row has at each width: `weight`, the squared error of its weights over their squares; `output`, the
    relative root-mean-square error of the network's output; `agreement`, percent of images with the same largest
    output. A type's row has the means of its layers.
    """
    say = echo or (lambda text: None)
    graph, images = calibrated.graph, calibrated.images[:IMAGES]
    weights = [layer.weight for layer in calibrated.placement.layers]
    runner = session(graph.model(editable=weights))
    name = graph.output_names[0]
    stored = {weight: graph.arrays[weight] for weight in weights}
    expected = np.concatenate([values[0] for values in run(runner, images, [name], **stored)])
    layers = []
    for layer in calibrated.placement.layers:
        row: dict[str, Any] = {"name": layer.name, "type": layer.kind, "operator": layer.op}
        row["weights"] = int(stored[layer.weight].size)
        for bits in widths:
            real = layer_at(calibrated, layer, bits).real(layer)
            feeds = stored | {layer.weight: real}
            outputs = np.concatenate([values[0] for values in run(runner, images, [name], **feeds)])
            effect = compare(expected, outputs)
            size = float(np.sum(stored[layer.weight].astype(np.float64) ** 2)) or 1.0
            error = float(np.sum((real.astype(np.float64) - stored[layer.weight]) ** 2)) / size
            row[str(bits)] = {"weight": error, "output": effect.error, "agreement": effect.agreement}
        errors = [f"{row[str(bits)]['output']:.2%} at {bits}" for bits in widths]
        say(f"{layer.name}: output error {', '.join(errors)} bits")
        layers.append(row)
    return {
        "layers": layers,
        "types": by_type(layers, widths),
        "widths": list(widths),
        "images": len(images),
        "float": [{"operator": op, "name": node, "reason": why} for op, node, why in calibrated.placement.floats],
    }


def by_type(layers: Sequence[dict[str, Any]], widths: Sequence[int]) -> list[dict[str, Any]]:
    """Means over the layers of each type, in order of their first layer."""
    rows = []
    for kind in dict.fromkeys(row["type"] for row in layers):
        same = [row for row in layers if row["type"] == kind]
        merged: dict[str, Any] = {"type": kind, "layers": len(same), "weights": sum(row["weights"] for row in same)}
        for bits in map(str, widths):
            keys = same[0][bits]
            merged[bits] = {key: float(np.mean([row[bits][key] for row in same])) for key in keys}
        rows.append(merged)
    return rows


def page(report: dict[str, Any], model: str) -> str:
    """The report as one HTML file that needs nothing else."""
    from qdeploy.report.page import document

    parts = [
        f"<p>One layer's weights quantized at a time, everything else in float, on {report['images']} images. The "
        "numbers are the relative error of the network's output; below them, in small, the relative error of the "
        "layer's weights. The darker, the more harm.</p>",
        "<h2>By type of layer</h2>",
        _table(report["types"], report["widths"], lambda row: (row["type"], f"{row['layers']} layers")),
        "<h2>By layer</h2>",
        _table(report["layers"], report["widths"], lambda row: (row["name"], row["type"])),
    ]
    if report["float"]:
        items = "".join(
            f"<li>{escape(row['operator'])} {escape(row['name'])}: {escape(row['reason'])}</li>"
            for row in report["float"]
        )
        parts += ["<h2>Operators that stay in float</h2>", f"<ul>{items}</ul>"]
    return document(f"Sensitivity of {model}", parts)


def _table(
    rows: Sequence[dict[str, Any]], widths: Sequence[int], label: Callable[[dict[str, Any]], tuple[str, str]]
) -> str:
    """Cells shaded by output error, on a logarithmic scale from 0.1% to 100%."""
    head = "".join(f"<th scope=col>{bits} bits</th>" for bits in widths)
    body = []
    for row in rows:
        name, kind = label(row)
        cells = [f"<td>{escape(name)}</td><td>{escape(kind)}</td><td>{row['weights']:,}</td>"]
        for bits in map(str, widths):
            found = row[bits]
            shade = float(np.clip((np.log10(max(found["output"], 1e-6)) + 3) / 3, 0, 1))
            cells.append(
                f'<td style="background:rgba(200,60,30,{shade * 0.8:.2f})" title="{found["agreement"]:.1f}% of images '
                f'with the same class">{found["output"]:.2%}<br><small>{found["weight"]:.2%}</small></td>'
            )
        body.append(f"<tr>{''.join(cells)}</tr>")
    top = f"<tr><th scope=col>layer</th><th scope=col>type</th><th scope=col>weights</th>{head}</tr>"
    return f"<div class=wide><table><thead>{top}</thead><tbody>{''.join(body)}</tbody></table></div>"
