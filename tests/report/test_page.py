from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from qdeploy.report.demo import demo_page
from qdeploy.report.page import SECTIONS, Block, Plot, Table, cell, lacking, names, report_page, thinned
from qdeploy.report.style import SCHEMES, new_figure
from qdeploy.report.svg import Marks, page_svg, plain, png, svg, tail
from tests.report.material import demo_result

NASTY = "</script><script>alert(1)</script> \x00\ud800 $\\frac$ \N{CJK UNIFIED IDEOGRAPH-4E2D} \"' & 5 < 6"


class Reader(HTMLParser):
    """Collects what a browser would load from elsewhere, ids, and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.loads += [f"{tag} {v}" for k, v in attrs if k in ("src", "href") and v and v[0] != "#" and v != "data:,"]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def plot(name: str = "points", text: str = "first") -> Plot:
    figure, axes = new_figure()
    marks = Marks()
    marks.add(axes.scatter([1, 2], [3, 4], color=SCHEMES["c0"][0]), [f"{text}\nx: 1", "second"])
    marks.add(axes.bar([1], [2], hatch="//", color=SCHEMES["c1"][0])[0], ["a bar"])
    axes.set_xlabel(plain(text))
    return Plot(name, figure, "What it shows.", Table(["x", text], [[1, 3.0], [2, None]]), marks)


def test_the_demo_page_stands_alone_and_escapes_names() -> None:
    page = demo_page(demo_result())
    found = read(page)
    assert found.loads == [] and found.tags.count("figure") == 6 and found.tags.count("script") == 1
    assert "another &lt;cpu&gt;" in page and "0.4500" in page and "88.50%" in page
    assert "m&lt;script&gt;" in page and "0 of 1,000 differ" in page and "<i>" not in page
    assert len(set(found.ids)) == len(found.ids)
    assert page == demo_page(demo_result())


def test_hostile_text_stays_text() -> None:
    block = Block("front", NASTY, [NASTY], [plot(text=NASTY)], [Table([NASTY], [[NASTY]], NASTY)])
    page = report_page(NASTY, [NASTY], [block], {NASTY: NASTY})
    found = read(page)
    assert found.tags.count("script") == 1 and found.loads == []
    assert page.encode("utf-8") and "\x00" not in page
    assert page.count("</script>") == 1  # our own


def test_marks_say_their_figures_and_take_focus_one_by_one() -> None:
    one = plot()
    root = ElementTree.fromstring(page_svg(one.svg, "p7", "a label", one.marks))
    shapes = [element for element in root.iter() if element.get("class") == "mark"]
    assert [shape.get("aria-label") for shape in shapes] == ["first\nx: 1", "second", "a bar"]
    assert [shape.get("tabindex") for shape in shapes] == ["0", "-1", "-1"]
    ids = [value for element in root.iter() if (value := element.get("id"))]
    assert ids and all(value.startswith("p7-") for value in ids)
    text = ElementTree.tostring(root, encoding="unicode")
    used = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert used and set(used) <= set(ids)


def test_colours_of_a_page_are_custom_properties_and_those_of_a_file_are_not() -> None:
    one = plot()
    page = page_svg(one.svg, "p0", "a label", one.marks)
    assert not re.findall(r"#[0-9a-f]{6}\b", page) and "var(--c0)" in page and "var(--c1)" in page
    assert SCHEMES["c0"][0].encode() in svg(one.figure)
    lights, darks = zip(*SCHEMES.values(), strict=True)
    assert len(set(lights)) == len(lights) and len(set(darks)) == len(darks)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_palette_can_be_read(scheme: int) -> None:
    def contrast(one: str, other: str) -> float:
        values = sorted(luminance(SCHEMES[role][scheme]) for role in (one, other))
        return (values[1] + 0.05) / (values[0] + 0.05)

    assert contrast("ink", "paper") > 12 and contrast("soft", "paper") > 4.5
    assert all(contrast(f"c{i}", "paper") > 3 for i in range(6))
    steps = [contrast(f"q{i}", "paper") for i in range(9)]
    assert steps == sorted(steps)
    assert min(contrast(f"q{i}", "ink") for i in range(5)) > 4.5
    assert min(contrast(f"q{i}", "paper") for i in range(5, 9)) > 3


def test_files_are_the_same_bytes_for_the_same_values() -> None:
    assert svg(plot().figure) == svg(plot().figure) and png(plot().figure) == png(plot().figure)
    assert b"<dc:date>" not in svg(plot().figure)


def test_a_mark_for_each_shape_or_none() -> None:
    figure, axes = new_figure()
    marks = Marks()
    marks.add(axes.scatter([1, 2], [3, 4]), ["only one"])
    with pytest.raises(ValueError, match="shorter"):
        page_svg(svg(figure), "p0", "a label", marks)


def test_sections_stand_in_one_order_and_absent_ones_name_their_command() -> None:
    blocks = [Block("training", "b"), Block("front", "a")]
    page = report_page("t", [], blocks, lacking(blocks, ["Bits of each layer (x)"]))
    heads = re.findall(r"<h2>([^<]*)</h2>", page)
    assert heads == [SECTIONS["front"].title, SECTIONS["training"].title, "Not in this report"]
    assert "<code>qdeploy bundle LOW.onnx HIGH.onnx -o DIR</code>" in page
    assert "Bits of each layer" not in page and "<script" not in page


def test_small_things() -> None:
    assert [cell(v) for v in (None, float("nan"), 1234567, 0.000123456, 1e6 / 3, "a\nb")] == [
        "\N{EN DASH}", "\N{EN DASH}", "1,234,567", "0.00012346", "333,333", "a\nb",
    ]  # fmt: skip
    assert thinned(5, 9) == [0, 1, 2, 3, 4] and thinned(1000, 3) == [0, 500, 999]
    assert list(names([plot("a"), plot("b"), plot("a")])) == ["a", "b", "a-2"]
    assert len(plain("x" * 9999)) <= 200
    assert tail("/stages/stages.0/first/conv/Conv", 22) == "\N{HORIZONTAL ELLIPSIS}first/conv/Conv"
