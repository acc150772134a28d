"""A report in a real browser: nothing is loaded, figures show by pointer and by keyboard, it fits narrow screens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qdeploy.report.folders import report
from tests.chromium import Tab
from tests.report.material import profile, search_folder, sensitivity, write_json

Open = Callable[..., Tab]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a report on a search, a sensitivity and a profile."""
    root = tmp_path_factory.mktemp("page")
    search_folder(root / "search")
    write_json(root / "sens" / "sensitivity.json", sensitivity())
    write_json(root / "times" / "profile.json", profile())
    report([root / name for name in ("search", "sens", "times")], root / "report.html", None)
    return f"file://{root / 'report.html'}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_loads_nothing_and_fits(page: str, open_page: Open, width: int, scheme: str) -> None:
    tab = open_page(page, width=width, scheme=scheme)
    assert tab.requests == [f"GET {page}"] and tab.errors == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    assert dark == (scheme == "dark")


def test_a_point_says_its_figures_under_the_pointer(page: str, open_page: Open) -> None:
    tab = open_page(page)
    tip, mark = tab.page.locator(".tip"), tab.page.locator("#front .mark").last
    assert not tip.is_visible()
    mark.hover(force=True)
    tip.wait_for(state="visible")
    assert tip.inner_text() == mark.get_attribute("aria-label")
    assert "top-1 accuracy (%)" in tip.inner_text() and "latency on host (ms)" in tip.inner_text()
    tab.page.mouse.move(2, 2)
    tip.wait_for(state="hidden")


def test_a_plot_is_one_stop_of_tab_and_arrows_go_on(page: str, open_page: Open) -> None:
    tab = open_page(page)
    tip, focused = tab.page.locator(".tip"), "document.activeElement.getAttribute('aria-label')"
    tab.page.locator("#sensitivity summary").first.focus()
    tab.page.keyboard.press("Shift+Tab")
    first = tab.page.evaluate(focused)
    assert first.startswith("stem\n") and "weight width (bits): 2" in first
    tip.wait_for(state="visible")
    assert tip.inner_text() == first
    tab.page.evaluate("scrollBy(0, 40)")  # as focus does for a mark that is out of view
    tab.page.wait_for_timeout(200)
    assert tip.is_visible() and tip.inner_text() == first
    for key, layer, bits in (
        ("ArrowRight", "stem", 8),
        ("ArrowDown", "head", 8),
        ("ArrowLeft", "head", 2),
        ("Home", "stem", 2),
    ):
        tab.page.keyboard.press(key)
        text = tab.page.evaluate(focused)
        assert text.startswith(layer) and f"weight width (bits): {bits}\n" in text
        assert tip.inner_text() == text
    tab.page.keyboard.press("ArrowUp")
    assert tab.page.evaluate(focused) == first  # nothing is above
    tab.page.keyboard.press("Escape")
    assert not tip.is_visible()
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_data_are_tables_that_the_keyboard_opens(page: str, open_page: Open) -> None:
    tab = open_page(page)
    plots, tables = tab.page.locator("figure .plot"), tab.page.locator("figure details table")
    assert plots.count() == tables.count() == 6
    tab.page.locator("#front summary").focus()
    tab.page.keyboard.press("Enter")
    assert tables.first.is_visible() and "accuracy" in tables.first.inner_text()


def test_paper_is_light_and_has_no_controls(page: str, open_page: Open) -> None:
    tab = open_page(page, scheme="dark")
    tab.page.emulate_media(media="print", color_scheme="dark")
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.page.locator("nav").is_visible() and not tab.page.locator("summary").first.is_visible()
    assert tab.page.pdf()[:5] == b"%PDF-"
