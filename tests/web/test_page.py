"""The page in Chromium, on a real server: a trained ladder is pulled, climbed and dropped while it classifies."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.store import load_tree, object_name
from qdeploy.bundle.write import write_bundle
from qdeploy.data import CLASSES, Dataset, load
from qdeploy.export.parity import stock_session
from qdeploy.export.write import qdq_bytes
from qdeploy.extract import calibration_set
from qdeploy.ladder import read_ladder
from qdeploy.serve.app import BROWSER_PREFIX, Options, serving
from qdeploy.serve.byte_log import read_byte_log
from qdeploy.subnet import extract
from qdeploy.train.run import load_run
from tests.chromium import PATIENCE_MS, Tab
from tests.web.agent import Publisher
from tests.web.site import VENDOR, copy_page, serving_page

IMAGES = 500
WIDTHS = (2, 3, 4)
MODEL = Path(__file__).parents[2] / "models" / "fashion-resnet8"

pytestmark = pytest.mark.skipif(not VENDOR.is_dir(), reason="the page's ONNX Runtime is not there: run `make web`")


@dataclass(frozen=True)
class Site:
    """A publisher with a signed tree, the page with root and sample, and the ladder's files."""

    publisher: Publisher
    page: Path
    log: Path
    url: str
    files: dict[str, bytes]
    data: Dataset

    def scores(self, level: str) -> np.ndarray:
        """Python's ONNX Runtime: float32 [IMAGES, classes]."""
        session = stock_session(self.files[level])
        inputs = self.data.images.astype(np.float32) / np.float32(255)
        return np.concatenate([session({"input": image[None]})[0] for image in inputs])

    def accuracy(self, level: str) -> str:
        right = (self.scores(level).argmax(1) == self.data.labels).mean()
        return f"{100 * right:.1f}%"

    def sent(self) -> list[tuple[str, int]]:
        """(path, bytes) of each answer to a request for the tree, by the server's log."""
        return [(row.path, row.sent) for row in read_byte_log(self.log) if not row.path.startswith(BROWSER_PREFIX)]


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A bundle of the shipped network's uniform levels, and their files."""
    folder = tmp_path_factory.mktemp("ladder")
    recipe, net = load_run(MODEL)
    calibration = calibration_set(recipe, None).images[:256]
    files = {}
    for width in WIDTHS:
        frozen = extract(net, net.uniform(width), recipe.name, calibration, None)
        files[f"w{width}"] = qdq_bytes(frozen)
        (folder / f"w{width}.onnx").write_bytes(files[f"w{width}"])
    write_bundle(read_ladder([folder / f"{name}.onnx" for name in files]), [], folder / "tree")
    return folder / "tree", files


@pytest.fixture
def site(tmp_path: Path, ladder: tuple[Path, dict[str, bytes]]) -> Iterator[Site]:
    whole = load("fashion-mnist", "test")
    data = replace(whole, images=whole.images[:IMAGES], labels=whole.labels[:IMAGES])
    publisher = Publisher(tmp_path)
    publisher.publish(ladder[0])
    page = copy_page(tmp_path / "page", publisher.root, data)
    with serving_page(publisher.tree, page, tmp_path / "log") as url:
        yield Site(publisher, page, tmp_path / "log", url, ladder[1], data)


def expect_text(tab: Tab, name: str, wanted: str) -> None:
    """Wait until the element of this id says so."""
    from playwright.sync_api import expect

    expect(tab.page.locator(f"#{name}")).to_have_text(re.compile(wanted), timeout=PATIENCE_MS)


def in_force(tab: Tab, level: str) -> None:
    expect_text(tab, "status", f"^Level {level} is in force")
    assert tab.page.inner_text("#now-level") == level


def whole_sample(tab: Tab, level: str) -> str:
    """Wait until the level has seen all images; its accuracy, as the page shows it."""
    expect_text(tab, "now-seen", f"^of {IMAGES} images$")
    assert tab.page.inner_text("#now-level") == level
    return tab.page.inner_text("#now-accuracy")


def press(tab: Tab, label: str) -> None:
    tab.page.get_by_role("button", name=label, exact=True).click()


def test_pull_climb_drop_and_reload(site: Site, open_page: Callable[..., Tab]) -> None:
    tab = open_page(site.url)
    in_force(tab, "w2")
    assert whole_sample(tab, "w2") == site.accuracy("w2")
    press(tab, "Climb to w4")
    in_force(tab, "w4")
    assert whole_sample(tab, "w4") == site.accuracy("w4")
    manifest = load_tree(site.publisher.tree)
    objects = {object_name(entry.sha256): entry.size for entry in manifest.objects}
    pulled = [(path.lstrip("/"), sent) for path, sent in site.sent()]
    assert dict(pulled[2:]) == objects and len(pulled) == 2 + len(objects)
    assert tab.page.inner_text("#now-fetched") == f"{sum(objects.values()):,}"
    for level in ("w2", "w3"):
        press(tab, f"{'Drop' if level == 'w2' else 'Climb'} to {level}")
        in_force(tab, level)
        assert "0 bytes were fetched" in tab.page.inner_text("#status")
        assert whole_sample(tab, level) == site.accuracy(level)
    assert len(site.sent()) == len(pulled)
    tab.page.reload()
    in_force(tab, "w3")
    assert tab.page.inner_text("#now-fetched") == "0"
    assert [path for path, _ in site.sent()[len(pulled) :]] == ["/release.json"]


def test_it_classifies_while_it_climbs(site: Site, open_page: Callable[..., Tab]) -> None:
    tab = open_page(site.url)
    in_force(tab, "w2")
    whole_sample(tab, "w2")
    tab.page.select_option("#rate", "31250")
    press(tab, "Climb to w4")
    strip = tab.page.locator("#strip")
    seen = set()
    while tab.page.inner_text("#now-level") == "w2":
        seen.add(strip.inner_text())
    in_force(tab, "w4")
    assert len(seen) > 3
    press(tab, "Pause")
    before = strip.inner_text()
    tab.page.wait_for_timeout(300)
    assert tab.page.inner_text("#pause") == "Go on" and strip.inner_text() == before
    press(tab, "Drop to w3")  # also while nothing is classified
    in_force(tab, "w3")


RUN = """async ([onnx, images, size]) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const worker = new Worker("./runner.worker.mjs", { type: "module" });
  const ask = (request) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data.result));
    worker.postMessage({ id: 1, ...request });
  });
  const { shape } = await ask({ op: "load", onnx: bytes(onnx) });
  const input = Float32Array.from(bytes(images), (pixel) => pixel / 255);
  const { scores } = await ask({ op: "classify", images: input });
  worker.terminate();
  return { shape, scores: scores.map((row) => Array.from(row)) };
}"""


def test_scores_equal_those_of_python(site: Site, open_page: Callable[..., Tab]) -> None:
    tab = open_page(site.url)
    in_force(tab, "w2")
    pixels = base64.b64encode(site.data.images.tobytes()).decode()
    for level, data in site.files.items():
        found = tab.page.evaluate(RUN, [base64.b64encode(data).decode(), pixels, 28 * 28])
        assert found["shape"] == [1, 28, 28]
        ours, theirs = np.array(found["scores"], np.float32), site.scores(level)
        assert (ours == theirs).all(), f"{level}: {(ours != theirs).sum()} of {ours.size} scores differ"


def test_a_flipped_byte_on_the_server_is_never_run(site: Site, open_page: Callable[..., Tab]) -> None:
    manifest = load_tree(site.publisher.tree)
    path = site.publisher.tree / object_name(manifest.objects[-1].sha256)
    data = path.read_bytes()
    path.write_bytes(data[:9] + bytes([data[9] ^ 4]) + data[10:])
    tab = open_page(site.url)
    in_force(tab, "w2")
    press(tab, "Climb to w4")
    expect_text(tab, "alert", "are not those that were signed. Level w2 stays in force.$")
    assert tab.page.inner_text("#now-level") == "w2"
    path.write_bytes(data)
    press(tab, "Climb to w4")
    in_force(tab, "w4")
    assert tab.page.locator("#alert").is_hidden()


def test_a_foreign_signature_and_an_older_release(site: Site, tmp_path: Path, open_page: Callable[..., Tab]) -> None:
    release = site.publisher.tree / "release.json"
    tab = open_page(site.url)
    in_force(tab, "w2")
    old = release.read_bytes()
    site.publisher.publish(tmp_path / "site")
    tab.page.reload()
    in_force(tab, "w2")
    release.write_bytes(old)
    tab.page.reload()
    expect_text(tab, "alert", "^rollback: the server offers release 1, this device took 2$")
    assert tab.page.locator("#device").is_hidden()
    (site.page / "root.json").write_bytes(Publisher(tmp_path / "other").root)
    tab.page.reload()
    expect_text(tab, "alert", "^wrong signature or too few: 0 of 1 signatures")
    assert tab.page.locator("#device").is_hidden()


def test_the_installed_page(
    tmp_path: Path, ladder: tuple[Path, dict[str, bytes]], open_page: Callable[..., Tab]
) -> None:
    """Neither keys nor images lie beside it: it asks for them."""
    publisher = Publisher(tmp_path)
    publisher.publish(ladder[0])
    data = load("fashion-mnist", "test")
    np.save(tmp_path / "images.npy", data.images[:35])
    np.save(tmp_path / "labels.npy", data.labels[:35])
    (tmp_path / "no-root.json").write_text("{}")
    with serving(publisher.tree, options=Options(port=0, browser=True)) as url:
        tab = open_page(f"{url}{BROWSER_PREFIX}")
        expect_text(tab, "status", "No keys are known yet")
        tab.page.set_input_files("#root-file", tmp_path / "no-root.json")
        expect_text(tab, "alert", "is no TUF root metadata")
        tab.page.set_input_files("#root-file", publisher.home / "1.root.json")
        in_force(tab, "w2")
        tab.page.reload()
        in_force(tab, "w2")  # the root was kept
        tab.page.set_input_files("#sample-files", [tmp_path / "images.npy"])
        expect_text(tab, "alert", "choose images.npy and labels.npy together")
        tab.page.set_input_files("#sample-files", [tmp_path / "images.npy", tmp_path / "labels.npy"])
        expect_text(tab, "now-seen", "^of 35 images$")
    tab.errors = [error for error in tab.errors if "404" not in error]  # a browser logs what is not there


def test_an_image_of_ones_own(site: Site, tmp_path: Path, open_page: Callable[..., Tab]) -> None:
    from PIL import Image

    tab = open_page(site.url)
    in_force(tab, "w2")
    session = stock_session(site.files["w2"])
    pixels = 255 - site.data.images[0, 0]
    Image.fromarray(pixels).save(tmp_path / "shoe.png")
    tab.page.set_input_files("#own-file", tmp_path / "shoe.png")
    expect_text(tab, "own-scores", r"%")
    upside = tab.page.inner_text("#own-scores")
    tab.page.check("#own-invert")
    wanted = CLASSES["fashion-mnist"][session({"input": site.data.images[:1] / np.float32(255)})[0].argmax()]
    expect_text(tab, "own-scores", f"^{wanted}: ")
    assert tab.page.inner_text("#own-scores") != upside
    (tmp_path / "no.png").write_bytes(b"no image")
    tab.page.set_input_files("#own-file", tmp_path / "no.png")
    expect_text(tab, "alert", "^this image cannot be classified")


def test_forgetting(site: Site, open_page: Callable[..., Tab]) -> None:
    tab = open_page(site.url)
    in_force(tab, "w2")
    tab.page.on("dialog", lambda dialog: dialog.accept())
    count = len(site.sent())
    with tab.page.expect_event("load"):
        press(tab, "Forget everything")
    in_force(tab, "w2")
    assert len(site.sent()) == 2 * count


def test_by_keyboard_and_without_overflow(site: Site, open_page: Callable[..., Tab]) -> None:
    tab = open_page(site.url)
    in_force(tab, "w2")
    for width in (400, 1400):
        tab.page.set_viewport_size({"width": width, "height": 900})
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    focused = "document.activeElement.getAttribute('aria-label')"
    for label in ("w2 is in force", "Climb to w3"):
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate(focused) == label
    tab.page.keyboard.press("Enter")
    in_force(tab, "w3")
    assert tab.page.evaluate(focused) == "w3 is in force"


def test_without_the_runtime_it_says_so(site: Site, open_page: Callable[..., Tab]) -> None:
    shutil.rmtree(site.page / "vendor")
    tab = open_page(site.url)
    expect_text(tab, "alert", "cannot be run: is a file of the page missing on the server")
    assert tab.page.inner_text("#now-level") == "–"
    tab.errors = [error for error in tab.errors if "404" not in error]
