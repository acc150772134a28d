"""A figure as files (SVG, PNG) and as SVG for a page: colours by custom properties, marks that say their figures.

The same bytes for the same values, always.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from qdeploy.report.style import LIGHT

PNG_DPI = 144
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
FONT = re.compile(r"font: (?:(italic|oblique|\d+) )?(?:(\d+) )?([\d.]+)px [^;]*")
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
LONGEST = 200  # characters of a name
ROLES = {colour: f"var(--{role})" for role, colour in LIGHT.items()}
LONG = re.compile(r"-?\d+\.\d{3,}")
COLOUR = re.compile(r"#[0-9a-f]{6}")


class Marks(dict[str, list[str]]):
    """What the shapes of a plot say when a reader points at them: {group id: a text for each of its shapes}."""

    def add(self, artist: Artist, texts: Sequence[str]) -> None:
        """`artist` draws one shape for each text, in their order; lines of a text are divided by newlines."""
        name = f"mark{len(self)}"
        artist.set_gid(name)
        self[name] = [plain(text) for text in texts]


def plain(text: object, longest: int | None = None) -> str:
    """Text from a file as XML and UTF-8 can hold it, newlines kept; the middle left out of what is too long."""
    found = "\n".join(CONTROLS.sub("\N{REPLACEMENT CHARACTER}", line) for line in str(text).split("\n"))
    most = longest or LONGEST * (1 + found.count("\n"))
    return found if len(found) <= most else f"{found[: most // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{found[-(most // 2) :]}"


def tail(text: object, longest: int) -> str:
    """The end of a name, which tells layers apart."""
    found = plain(text).replace("\n", " ")
    if len(found) <= longest:
        return found
    end = found[1 - longest :]
    head, slash, rest = end.partition("/")
    return "\N{HORIZONTAL ELLIPSIS}" + (rest if slash and len(head) < longest // 2 else end)


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in any script: the reader's browser has the fonts
        figure.savefig(buffer, **options)
    figure.set_layout_engine("none")  # the places of axes are found: once is enough
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """A figure as an SVG file, in the light scheme."""
    return _saved(figure, format="svg", metadata={"Date": None, "Creator": None})


def png(figure: Figure) -> bytes:
    """A figure as a PNG file, in the light scheme."""
    return _saved(figure, format="png", dpi=PNG_DPI, metadata={"Software": None})


def page_svg(drawn: bytes, name: str, label: str, marks: Mapping[str, Sequence[str]]) -> str:
    """A file of `svg` as an <svg> element; `name` is unique on its page, `label` says what it shows.

    Every mark becomes a shape that takes focus, the first one by Tab and the others by arrow keys (page.js).
    """
    root = ElementTree.fromstring(drawn)
    for parent in root.iter():
        for child in [one for one in parent if one.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)
    _mark(root, marks)
    _own_ids(root, name)
    _flatten(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")  # HTML knows SVG without namespaces
        for paint in ("fill", "stroke"):  # of hatches
            if element.get(paint) in ROLES:
                element.set("style", f"{element.get('style', '')}; {paint}: {element.attrib.pop(paint)}".lstrip("; "))
        if path := element.get("d"):
            element.set("d", LONG.sub(lambda found: f"{float(found[0]):.2f}", path))
        if style := element.get("style"):
            style = COLOUR.sub(lambda found: ROLES.get(found[0], found[0]), style)
            element.set("style", FONT.sub(_font, style))
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "group")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _font(found: re.Match[str]) -> str:
    """The page's own font in matplotlib's size and weight."""
    weight = found[2] or (found[1] if found[1] and found[1].isdigit() else None)
    return f"font-size: {found[3]}px" + (f"; font-weight: {weight}" if weight else "")


def _mark(root: ElementTree.Element, marks: Mapping[str, Sequence[str]]) -> None:
    groups = {element.get("id"): element for element in root.iter(f"{{{SVG}}}g")}
    first = True
    for name, texts in marks.items():
        if name not in groups:
            raise AssertionError(f"the plot drew no {name}")
        for shape, text in zip(_shapes(groups[name]), texts, strict=True):
            shape.set("class", "mark")
            shape.set("tabindex", "0" if first else "-1")
            shape.set("role", "img")
            shape.set("aria-label", text)
            first = False


def _shapes(group: ElementTree.Element) -> list[ElementTree.Element]:
    """What a group draws, but for its definitions."""
    found = []
    for child in group:
        if child.tag in (f"{{{SVG}}}use", f"{{{SVG}}}path"):
            found.append(child)
        elif child.tag == f"{{{SVG}}}g":
            found += _shapes(child)
    return found


def _flatten(parent: ElementTree.Element) -> None:
    """Groups that say nothing about what they hold give way to it."""
    held = []
    for child in list(parent):
        _flatten(child)
        held += list(child) if child.tag == f"{{{SVG}}}g" and not child.attrib else [child]
        child.tail = None
        if (child.get("transform") or "").startswith("rotate(-0 "):
            del child.attrib["transform"]
    parent[:] = held
    parent.text = parent.text if parent.tag == f"{{{SVG}}}text" else None


def _own_ids(root: ElementTree.Element, name: str) -> None:
    """Ids that something refers to begin with the plot's name, others go: no id is on a page twice."""
    text = re.compile(r"url\(#([^)]+)\)")
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used |= set(text.findall(value))
        used.add((element.get(f"{{{XLINK}}}href") or "").removeprefix("#"))
    for element in root.iter():
        own = element.get("id")
        if own is not None:
            if own in used:
                element.set("id", f"{name}-{own}")
            else:
                del element.attrib["id"]
        for key, value in list(element.attrib.items()):
            if key == f"{{{XLINK}}}href":
                element.set("href", f"#{name}-{value.removeprefix('#')}")
                del element.attrib[key]
            elif key != "aria-label":
                element.set(key, text.sub(lambda found: f"url(#{name}-{found[1]})", value))
