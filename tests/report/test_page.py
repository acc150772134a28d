from html.parser import HTMLParser
from typing import Any

from qdeploy.report import plots
from qdeploy.report.page import demo_page

LAYERS = [{"layer": name, "weight_bits": bits, "activation_bits": bits} for name, bits in (("stem", 8), ("<b>", 2))]


def row(level: str, total: int) -> dict[str, Any]:
    timing = {"median": 0.5, "quartiles": [0.4, 0.6]}
    return {
        "level": level,
        "layers": LAYERS,
        "bits_per_weight": 2.5,
        "fetched": {"planes": 1000, "side": total - 1000},
        "bytes": total,
        "total_bytes": total,
        "accuracy": 90.0,
        "profile": {"artifact": timing, "onnxruntime": timing},
        "parity": {"outputs": 1000, "differing": 0},
    }


LIMITS = {"latency_ms": 0.5, "download_kib": 90.0}
PICK = {"spec_id": "<i>", "predicted": {"latency_ms": 0.4, "download_kib": 80.0}, "kept": True}
PICK |= {"measured": {"latency_ms": 0.45, "download_kib": 81.0, "accuracy": 88.5}}
SEARCH = {
    "population": 10,
    "generations": 4,
    "seconds": 1.5,
    "samples": {"samples": 30, "kendall_tau": 0.8, "mae": 0.1},
    "measured_elsewhere": "another <cpu>",
    "limits": LIMITS,
    "front": [{"latency_ms": 0.1, "accuracy": 87.0}, {"latency_ms": 0.4, "accuracy": 88.0}],
    "attempts": [PICK],
    "pick": PICK,
}
RESULT = {
    "model": "m<script>",
    "machine": {"cpu": "a cpu", "cores": 2},
    "levels": [row("w2", 2000), row("w4", 3000)],
    "drop": {"level": "w2", "bytes": 0},
    "fetched_twice": 0,
    "planes": [{"planes": name, "coded": 10, "bound": 9.0} for name in ("base", "2", "all")],
    "search": SEARCH,
}


class Links(HTMLParser):
    """Collects what a browser would load from elsewhere, and the open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.figures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.figures += tag == "figure"
        self.loads += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]
        self.loads += [tag] if tag == "script" else []


def test_the_page_stands_alone_and_escapes_names() -> None:
    page = demo_page(RESULT)
    links = Links()
    links.feed(page)
    assert [load for load in links.loads if not load.startswith("use xlink")] == []
    assert links.figures == 6
    assert "another &lt;cpu&gt;" in page and "0.4500" in page and "88.50%" in page
    assert "m&lt;script&gt;" in page and "0 of 1,000 differ" in page
    assert page == demo_page(RESULT)


def test_plots_are_svg_with_their_units() -> None:
    svg = plots.accuracy_against_bytes(["w2", "w4"], [1024, 2048], [80.0, 90.0])
    assert svg.startswith("<svg") and "KiB" in svg and "accuracy (%)" in svg and "w4" in svg
