"""What `qdeploy demo` measured, as a page and as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.report.grids import bits_plot
from qdeploy.report.ladder import Rung, accuracy_plot, climb_plot, latency_plot, planes_plot
from qdeploy.report.page import Block, Table, number, report_page
from qdeploy.report.pareto import FrontView, Point, front_plot

HEAD = (
    "level",
    "bits a weight",
    "bytes, this step",
    "bytes, in all",
    "accuracy %",
    "TVM ms",
    "ONNX Runtime ms",
    "parity",
)
KINDS = {"manifest": "contents", "skeleton": "graph", "artifact": "program", "side": "scales and biases"}
LATENCY, DOWNLOAD = ("latency_ms", "ms", 4), ("download_kib", "KiB", 1)
LABELS = {"latency_ms": "milliseconds an image", "accuracy": "top-1 accuracy (%)", "download_kib": "download (KiB)"}


def level_cells(row: Mapping[str, Any]) -> list[str]:
    """One table row of a demo result, shared by the terminal and the page."""
    measured = row["profile"]
    parity = row["parity"]
    return [
        row["level"],
        f"{row['bits_per_weight']:.2f}",
        f"{row['bytes']:,}",
        f"{row['total_bytes']:,}",
        f"{row['accuracy']:.2f}",
        f"{measured['artifact']['median']:.3f}",
        f"{measured['onnxruntime']['median']:.3f}",
        f"{parity['differing']} of {parity['outputs']:,} differ",
    ]


def demo_page(result: Mapping[str, Any]) -> str:
    """The page of a demo's result."""
    return report_page("qdeploy demo", demo_sources(result), demo_blocks(result), {})


def demo_sources(result: Mapping[str, Any]) -> list[str]:
    """One line about what ran where."""
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores; batch 1, one thread"
    return [f"{result['model']} on {where}. Every figure was measured by this run."]


def demo_blocks(result: Mapping[str, Any]) -> list[Block]:
    """Blocks of a demo's result."""
    name, rows = f"demo: {result['model']}", result["levels"]
    levels = [row["level"] for row in rows]
    rungs = [
        Rung(row["level"], {KINDS.get(k, k): size for k, size in row["fetched"].items()}, row["accuracy"])
        for row in rows
    ]
    dropped = (
        f"Dropping back to {result['drop']['level']} fetched {result['drop']['bytes']} bytes; "
        f"{result['fetched_twice']} bytes of any object were sent twice, by the server's own log."
    )
    widths = [{entry["layer"]: entry["weight_bits"] for entry in row["layers"]} for row in rows]
    inputs = [{entry["layer"]: entry["activation_bits"] for entry in row["layers"]} for row in rows]
    planes = [entry for entry in result["planes"] if entry["planes"] != "all"]
    runtimes = [
        (label, [row["profile"][key]["median"] for row in rows], [row["profile"][key]["quartiles"] for row in rows])
        for label, key in (("TVM, compiled", "artifact"), ("ONNX Runtime", "onnxruntime"))
    ]
    layers = [entry["layer"] for entry in rows[0]["layers"]]
    coded = planes_plot([e["planes"] for e in planes], [e["coded"] for e in planes], [e["bound"] for e in planes])
    figures = Table(HEAD, [level_cells(row) for row in rows])
    first = "The first rung also brings the graph and the compiled program, once."
    return [
        _search_block(name, result["search"]),
        Block("bits", name, [], [bits_plot(levels, widths, inputs, layers)]),
        Block("time", name, [], [latency_plot(levels, runtimes)]),
        Block("ladder", name, [dropped, first], [climb_plot(rungs), accuracy_plot(rungs), coded], [figures]),
    ]


def _search_block(name: str, search: Mapping[str, Any]) -> Block:
    """The demo's search: what was predicted of each pick, what was measured, and the front that it was picked from."""
    limits, keys = search["limits"], (LATENCY, DOWNLOAD)
    head = ["pick", *(f"{unit}{end}" for _, unit, _ in keys for end in ("", ", predicted", ", limit")), "keeps both"]
    rows: list[Sequence[str]] = [
        [pick["spec_id"], *(f"{value:.{digits}f}" for key, _, digits in keys
                            for value in (pick["measured"][key], pick["predicted"][key], limits[key])),
         "yes" if pick["kept"] else "no"]
        for pick in search["attempts"]
    ]  # fmt: skip
    pick, samples = search["pick"], search["samples"]
    text = (
        f"Search for the most accurate subnet under two limits of this machine: NSGA-II, {search['population']} x "
        f"{search['generations']} evaluations, {search['seconds']} s with all measuring. Accuracy is predicted from "
        f"{samples['samples']} scored subnets (Kendall tau {samples['kendall_tau']:.2f} on subnets left out); latency "
        f"from subnets measured on {search['measured_elsewhere']}, corrected by subnets measured here. The pick has "
        f"{pick['measured']['accuracy']:.2f}% on the test images."
    )
    return Block("front", name, [text], [front_plot(_view(search))], [Table(head, rows)])


def _view(search: Mapping[str, Any]) -> FrontView:
    """Predicted points of the front, and the last pick as it was measured."""
    points = [Point(f"front {number(i + 1)}", row, {}) for i, row in enumerate(search["front"])]
    pick = search["pick"]
    said = {"accuracy": pick["measured"]["accuracy"]} | dict(pick["predicted"])
    points.append(Point(pick["spec_id"], said, pick["measured"]))
    limits = {"latency_ms": search["limits"]["latency_ms"]}
    return FrontView(["accuracy", "latency_ms"], LABELS, points, limits, {"pick": len(points) - 1})
