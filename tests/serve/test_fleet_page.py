"""The fleet page in Chromium: real devices that pull and report, changes that devices see, hostile names, keyboard."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from qdeploy.client.pull import pull
from qdeploy.client.report import tell
from qdeploy.client.status import DeviceState
from qdeploy.serve.app import Options, serving_both
from qdeploy.serve.catalogue import read_signed
from qdeploy.serve.database import StateDatabase
from qdeploy.serve.limits import Limits
from tests.chromium import Tab
from tests.client.device import QUICK
from tests.trust.world import World

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
OpenPage = Callable[..., Tab]

TOKEN = "sesame-open-1"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


@dataclass
class Fleet:
    """A published tree that is served, and the database of its devices."""

    world: World
    url: str
    admin: str
    states: Path

    def device_pulls(self, name: str, level: str | None = None) -> str:
        """A real device comes to a level and reports; returns its id."""
        report = pull(self.url, self.world.device(name), level, patience=QUICK)
        assert tell(self.url, self.world.folder / name, report) is None
        with closing(sqlite3.connect(self.states)) as db:
            rows = db.execute("SELECT device FROM devices ORDER BY seen DESC LIMIT 1").fetchall()
        return str(rows[0][0])


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, "1/1", "1/1")
    world.publish(0)
    return world


def served(world: World, **more: object) -> Iterator[Fleet]:
    states = world.folder / "states.sqlite"
    given = {"port": 0, "admin_port": 0, "devices": states, "limits": Limits(stop_s=1)} | more
    with serving_both(world.storage.root, Options(**given)) as (url, admin):  # type: ignore[arg-type]
        assert admin is not None
        yield Fleet(world, url, admin, states)


@pytest.fixture
def fleet(world: World) -> Iterator[Fleet]:
    yield from served(world, control_token=TOKEN, keys=(world.home,))


def unlock(tab: Tab) -> None:
    tab.page.get_by_label("Control token").fill(TOKEN)
    tab.page.get_by_role("button", name="Unlock").click()
    expect(tab.page.locator("#unlocked")).to_be_visible()


def test_devices_appear_while_they_report(fleet: Fleet, open_page: OpenPage) -> None:
    page = open_page(fleet.admin).page
    expect(page.locator("#table tbody")).to_have_text("No device.")
    name = fleet.device_pulls("one", "w2")
    row = page.locator("#table tbody tr")
    expect(row).to_contain_text(name)
    expect(row.locator("td").nth(1)).to_have_text("w2")
    expect(row).to_contain_text("ok")
    expect(page.locator("#summary")).to_contain_text("toy release 1, stable; 1 device, 0 behind")
    fleet.device_pulls("one", "w4")
    expect(row.locator("td").nth(1)).to_have_text("w4")
    fleet.device_pulls("two", "w3")
    expect(row).to_have_count(2)
    expect(page.locator("#now-rate-note")).to_contain_text("KiB since the start")
    expect(page.locator("#runs tbody tr")).to_have_count(2)
    page.get_by_role("button", name=name).click()
    expect(page.locator("#history tbody tr")).to_have_count(2)
    expect(page.locator("#history tbody tr").first).to_contain_text("w4")


def test_what_is_published_is_shown(fleet: Fleet, open_page: OpenPage) -> None:
    fleet.world.publish(1, percent=30, hold=True, minimum="w3")
    page = open_page(fleet.admin).page
    titles = page.locator("#releases h3")
    expect(titles).to_have_text(["toy release 1 · stable", "toy release 2 · canary · on hold"])
    expect(page.locator("#releases")).to_contain_text("to 30% of the devices · minimum w3")
    expect(page.locator("#releases tbody").first.locator("th")).to_have_text(["w2", "w3", "w4"])
    page.locator("details summary").click()
    expect(page.locator("#objects tbody tr")).to_have_count(6)
    expect(page.locator("#now-expires")).to_have_text("in 7 d")


def test_a_wrong_token_is_refused(fleet: Fleet, open_page: OpenPage) -> None:
    tab = open_page(fleet.admin)
    tab.page.get_by_label("Control token").fill("wrong-wrong")
    tab.page.get_by_role("button", name="Unlock").click()
    expect(tab.page.locator("#control-message")).to_have_text("the token is wrong or missing")
    expect(tab.page.locator("#unlocked")).to_be_hidden()
    assert len(tab.errors) == 1 and "401" in tab.errors[0]
    tab.errors.clear()
    unlock(tab)
    assert not any(TOKEN in request or "wrong" in request for request in tab.requests)
    assert tab.page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0


def test_hold_through_the_page_changes_what_devices_hear(fleet: Fleet, open_page: OpenPage) -> None:
    tab = open_page(fleet.admin)
    unlock(tab)
    page = tab.page
    page.get_by_label("Hold: no more devices take it").check()
    page.get_by_label("Minimum level").select_option("w3")
    page.get_by_role("button", name="Review…").click()
    differs = page.locator("#review-table tr.differs")
    expect(differs).to_have_count(2)
    expect(differs.first).to_have_text("Holdnoon hold")
    expect(page.locator("#review-command")).to_contain_text("--model toy --hold --minimum w3")
    page.get_by_role("button", name="Cancel").click()
    assert fleet.world.hear(fleet.world.device()).hold is False
    page.get_by_role("button", name="Review…").click()
    page.get_by_role("button", name="Sign and publish").click()
    expect(page.locator("#control-message")).to_contain_text("Done: toy release 1, stable")
    expect(page.locator("#releases h3")).to_have_text("toy release 1 · stable · on hold")
    said = fleet.world.hear(fleet.world.device())
    assert (said.hold, said.minimum) == (True, "w3")


def test_canary_promotion_and_back(fleet: Fleet, open_page: OpenPage) -> None:
    fleet.world.publish(1, percent=10)
    tab = open_page(fleet.admin)
    unlock(tab)
    page = tab.page

    def confirm(text: str) -> None:
        page.get_by_role("button", name="Sign and publish").click()
        expect(page.locator("#control-message")).to_contain_text(text)
        expect(page.locator("#review")).to_be_hidden()

    page.get_by_label("Canary share").fill("100")
    page.get_by_role("button", name="Review…").first.click()
    confirm("Done: toy release 2, canary")
    device = fleet.world.device()
    assert fleet.world.hear(device).release == 2
    page.get_by_role("button", name="Give release 2 to all devices…").click()
    confirm("Done: toy release 2, stable")
    page.get_by_label("Go back").select_option("1")
    page.get_by_role("button", name="Review…").last.click()
    confirm("Done: toy release 3, stable")
    said = fleet.world.hear(device)
    stable = read_signed(fleet.world.storage.root).rollout["toy"].stable
    assert said.release == 3 and stable is not None and stable.release == 3
    expect(page.locator("#releases h3")).to_have_text("toy release 3 · stable")


def test_a_tree_that_changed_under_the_review(fleet: Fleet, open_page: OpenPage) -> None:
    tab = open_page(fleet.admin)
    unlock(tab)
    tab.page.get_by_label("Hold: no more devices take it").check()
    tab.page.get_by_role("button", name="Review…").click()
    expect(tab.page.locator("#review")).to_be_visible()
    fleet.world.rollout(minimum="w3")
    tab.page.get_by_role("button", name="Sign and publish").click()
    expect(tab.page.locator("#review-message")).to_contain_text("review it again")
    assert len(tab.errors) == 1 and "409" in tab.errors[0]
    tab.errors.clear()
    assert fleet.world.hear(fleet.world.device()).hold is False


def test_without_keys_the_page_shows_the_command(world: World, open_page: OpenPage) -> None:
    for fleet in served(world, control_token=TOKEN):
        tab = open_page(fleet.admin)
        unlock(tab)
        tab.page.get_by_label("Hold: no more devices take it").check()
        tab.page.get_by_role("button", name="Review…").click()
        command = f"qdeploy rollout {world.storage.root} --keys KEYS --model toy --hold"
        expect(tab.page.locator("#review-command")).to_have_text(command)
        expect(tab.page.locator("#apply")).to_be_hidden()
        tab.page.close()


def test_without_a_token_file_there_are_no_controls(world: World, open_page: OpenPage) -> None:
    for fleet in served(world):
        page = open_page(fleet.admin).page
        expect(page.locator("#releases h3")).to_have_count(1)
        expect(page.locator("#controls")).to_be_hidden()
        page.close()


def hostile_rows(fleet: Fleet) -> None:
    """What no report may say, and the one field where a device says what it likes."""
    fleet.device_pulls("one", "w2")
    with closing(StateDatabase(fleet.states)) as database:
        database.write([DeviceState("cam", "toy", "x", 1, "w2", "w2", error=HOSTILE)], time.time())
    with closing(sqlite3.connect(fleet.states)) as db, db:
        row = (time.time(), HOSTILE, HOSTILE, HOSTILE, 1, HOSTILE, HOSTILE, 0, 0, HOSTILE, None)
        names = "seen, device, model, target, release, wanted, reached, stale, fetched, channel, error"
        db.execute(f"INSERT INTO devices ({names}) VALUES ({', '.join('?' * 11)})", row)


def test_hostile_names_are_text(fleet: Fleet, open_page: OpenPage) -> None:
    hostile_rows(fleet)
    tab = open_page(fleet.admin)
    page = tab.page
    expect(page.locator("#table tbody tr")).to_have_count(3)
    expect(page.get_by_role("button", name=HOSTILE)).to_be_visible()
    expect(page.locator("#table tbody")).to_contain_text(f"error: {HOSTILE}")
    page.get_by_role("button", name="cam", exact=True).click()
    expect(page.locator("#history")).to_contain_text(HOSTILE)
    page.keyboard.press("Escape")
    page.get_by_label("Name contains").fill(HOSTILE)
    expect(page.locator("#count")).to_have_text("1 device found")
    assert page.locator("main img, dialog img").count() == 0 and page.title() == "Fleet · qdeploy"


def many(fleet: Fleet, count: int) -> None:
    with closing(StateDatabase(fleet.states)) as database:
        rows = [
            DeviceState(f"cam-{i:03}", "toy", "x", 1, "w4", "w4" if i % 7 else "w2", fetched=i) for i in range(count)
        ]
        database.write(rows, time.time())


def test_keyboard_alone(fleet: Fleet, open_page: OpenPage) -> None:
    """Sort, page, narrow and open a device without a mouse; focus stays where it is while the page renews itself."""
    many(fleet, 60)
    page = open_page(fleet.admin).page
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(25)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#devices")).to_be_focused()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached")

    tab_to("[data-sort=fetched]")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(rows.first).to_contain_text("cam-059")
    expect(page.locator("th[aria-sort]")).to_have_attribute("aria-sort", "descending")
    expect(page.locator("th[aria-sort]")).to_have_text("Fetched")
    tab_to("[data-device=cam-058]")
    with page.expect_response("**/fleet.json*"):
        pass
    many(fleet, 70)  # ten new ones come before it
    expect(rows.first).to_contain_text("cam-069")
    expect(page.locator("[data-device=cam-058]")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#history")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#history")).to_be_hidden()
    tab_to("[data-page=next]")
    page.keyboard.press("Enter")
    expect(page.locator("#range")).to_have_text("26 to 50 of 70")
    page.get_by_label("Name contains").focus()
    page.keyboard.type("cam-00")
    expect(page.locator("#count")).to_have_text("10 devices found")
    page.keyboard.press("Tab")
    page.keyboard.type("behind")
    expect(page.locator("#count")).to_have_text("2 devices found")


def test_pause(fleet: Fleet, open_page: OpenPage) -> None:
    tab = open_page(fleet.admin)
    expect(tab.page.locator("#clock")).not_to_be_empty()
    tab.page.get_by_role("button", name="Pause").click()
    tab.page.wait_for_timeout(200)  # what was under way
    before = len(tab.requests)
    tab.page.wait_for_timeout(2500)
    assert len(tab.requests) == before
    expect(tab.page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    with tab.page.expect_response("**/fleet.json*"):
        tab.page.get_by_role("button", name="Paused: go on").click()


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (css) => { canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c; } return getComputedStyle(document.body).backgroundColor; };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.disabled || e.classList.contains("skip")) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(rgb(ground(e)))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_readable_in_both_schemes_and_widths(fleet: Fleet, open_page: OpenPage, scheme: str, width: int) -> None:
    hostile_rows(fleet)
    with closing(StateDatabase(fleet.states)) as database:
        database.write([DeviceState("sick", "toy", "x", 1, "w4", "w2", stale=True, error="no space")], 1.0)
    fleet.world.publish(1, percent=30, hold=True, minimum="w3", levels={"board": "w4"})
    tab = open_page(fleet.admin, width=width, scheme=scheme)
    unlock(tab)
    page = tab.page
    expect(page.locator("#table tbody tr")).to_have_count(4)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light is (scheme == "light")


def test_what_a_screen_reader_needs(fleet: Fleet, open_page: OpenPage) -> None:
    fleet.device_pulls("one", "w2")
    page = open_page(fleet.admin).page
    expect(page.locator("#table tbody tr")).to_have_count(1)
    assert page.locator("header").count() == page.locator("main").count() == page.locator("h1").count() == 1
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("nav[aria-label], form[role=search][aria-label]").count() == 2
    expect(page.locator("#summary")).to_have_attribute("aria-live", "polite")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button, [role=region], dialog, section')]"
        ".filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
        " || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []


def test_a_server_that_goes_away(world: World, open_page: OpenPage) -> None:
    tab = None
    for fleet in served(world):
        tab = open_page(fleet.admin)
        expect(tab.page.locator("#releases h3")).to_have_count(1)
    assert tab is not None
    expect(tab.page.locator("#alert")).to_contain_text("The server does not answer")
    expect(tab.page.locator("#releases h3")).to_have_count(1)  # what was last known stays
    tab.page.close()
    assert all("ERR_" in error for error in tab.errors)
    tab.errors.clear()
