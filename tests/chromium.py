"""Pages in headless Chromium, driven by playwright: fixtures that a folder's conftest.py imports by name.

    from tests.chromium import browser as browser, open_page as open_page

playwright's synchronous interface leaves an event loop marked as running in this thread, so the browser lives for one
module of tests: keep `asyncio.run` and the like out of that module's own thread (servers in threads are fine).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 20_000  # of every wait: machines that test are busy


@dataclass
class Tab:
    """A page and what it did. A test clears `errors` of those that it meant to cause; others fail it at its end."""

    page: Page
    errors: list[str] = field(default_factory=list)  # of the console, and exceptions that nothing caught
    requests: list[str] = field(default_factory=list)  # "METHOD URL", in order


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; tests that ask for it are skipped where it or playwright is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on PATH")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, headless=True, args=arguments)
        try:
            yield found
        finally:
            found.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """`open_page(url, width=1400, height=900, scheme="light", **context)` -> Tab.

    Each has a context (cookies, storage, cache) of its own; `context` goes to playwright's `new_context`.
    """
    tabs: list[Tab] = []
    contexts: list[BrowserContext] = []

    def open_one(
        url: str | None = None, width: int = 1400, height: int = 900, scheme: str = "light", **context: Any
    ) -> Tab:
        size: Any = {"width": width, "height": height}
        kind: Any = scheme
        contexts.append(browser.new_context(viewport=size, color_scheme=kind, **context))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        tab = Tab(contexts[-1].new_page())
        tabs.append(tab)
        tab.page.on("console", lambda m: tab.errors.append(f"{m.text} ({m.location})") if m.type == "error" else None)
        tab.page.on("pageerror", lambda e: tab.errors.append(str(e)))
        tab.page.on("request", lambda r: tab.requests.append(f"{r.method} {r.url}"))
        if url is not None:
            tab.page.goto(url)
        return tab

    try:
        yield open_one
    finally:
        for context in contexts:
            context.close()
    assert [error for tab in tabs for error in tab.errors] == []
