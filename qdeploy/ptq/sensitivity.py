"""How much each layer suffers from few bits: one layer's weights quantized at a time, everything else in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qdeploy.progress import Counter
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
    counter = Counter(say, "sensitivity", len(weights), "layer", last=False)
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
        counter.at(len(layers))
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
    from qdeploy.report.page import report_page
    from qdeploy.report.sensitivity import sensitivity_block

    return report_page(f"Sensitivity of {model}", [], [sensitivity_block(report, model)], {})
