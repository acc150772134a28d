"""The demo's report: one HTML file that needs no network, light or dark as the reader's screen is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qdeploy.report import plots

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #f6f6f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #191919; --line: #3a3a3a; --soft: #242424; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: .5rem; }
figure svg { width: 100%; height: auto; }
figcaption { color: #444; font-size: .9rem; padding: .3rem .5rem; }
.wide { overflow-x: auto; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""  # noqa: E501


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; every cell is escaped."""
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def figure(svg: str, caption: str) -> str:
    """A plot with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page."""
    head = f'<meta charset=utf-8><meta name=viewport content="width=device-width"><title>{escape(title)}</title>'
    return f"<!doctype html><html lang=en>{head}<style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n"


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
    rows = result["levels"]
    levels = [row["level"] for row in rows]
    machine = result["machine"]
    kinds = [kind for kind in rows[0]["fetched"] if any(row["fetched"].get(kind) for row in rows)]
    sizes = [[row["fetched"].get(kind, 0) for row in rows] for kind in kinds]
    layers = [entry["layer"] for entry in rows[0]["layers"]]
    bits = [[entry["weight_bits"] for entry in row["layers"]] for row in rows]
    summary = [entry for entry in result["planes"] if entry["planes"] != "all"]
    runtimes = [
        (label, [row["profile"][key]["median"] for row in rows], [row["profile"][key]["quartiles"] for row in rows])
        for label, key in (("TVM, compiled", "artifact"), ("ONNX Runtime", "onnxruntime"))
    ]
    where = f"{machine['cpu']}, {machine['cores']} cores; batch 1, one thread"
    parts = [
        f"<p>{escape(result['model'])} on {escape(where)}. Every figure was measured by this run.</p>",
        table(HEAD, [level_cells(row) for row in rows]),
        f"<p>Dropping back to {escape(result['drop']['level'])} fetched {result['drop']['bytes']} bytes; "
        f"{result['fetched_twice']} bytes of any object were sent twice, by the server's own log.</p>",
        figure(plots.accuracy_against_bytes(levels, [r["total_bytes"] for r in rows], [r["accuracy"] for r in rows]),
               "Accuracy on the 10,000 test images against the bytes a device has fetched to get there."),
        figure(plots.stacked_bytes(levels, kinds, sizes),
               "What each step fetched. The first step also brings the graph and the compiled program, once."),
        figure(plots.bits_per_layer(layers, levels, bits), "Width of every layer's weights at every level."),
        figure(plots.bytes_against_bound([e["planes"] for e in summary], [e["coded"] for e in summary],
                                         [e["bound"] for e in summary]),
               "Bytes of each plane as sent, beside its entropy given the planes above it."),
        figure(plots.latency(levels, runtimes), "Median latency with quartiles, measured side by side."),
        *search_parts(result["search"]),
    ]  # fmt: skip
    return document("qdeploy demo", parts)


def search_parts(search: Mapping[str, Any]) -> list[str]:
    """The demo's search: what was predicted of each pick, what was measured, and the front that it was picked from."""
    limits, keys = search["limits"], (("latency_ms", "ms", 4), ("download_kib", "KiB", 1))
    head = ["pick", *(f"{unit}{end}" for _, unit, _ in keys for end in ("", ", predicted", ", limit")), "keeps both"]
    rows = [
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
    front = [(row["latency_ms"], row["accuracy"]) for row in search["front"]]
    picture = plots.search_front(front, limits["latency_ms"], [p["measured"]["latency_ms"] for p in search["attempts"]])
    caption = "Predicted front of the search, the limit in time, and what the picks took when they were measured."
    return ["<h2>Search</h2>", f"<p>{escape(text)}</p>", table(head, rows), figure(picture, caption)]
