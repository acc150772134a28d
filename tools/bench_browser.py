"""A browser as a device: bytes, accuracy, latency and start of the page in Chromium, beside Python's ONNX Runtime.

    python tools/bench_browser.py [--images N] [--screenshot PNG] [-o JSON]

The demo's four levels are exported, bundled, signed and served on the loopback interface; Chromium opens the page, is
given the root and the first N images of Fashion-MNIST's test set, and climbs. Printed are when the page could be used,
when the base was in force (nothing kept, and all kept), and for each level the object bytes that were fetched for it,
accuracy, the median of milliseconds an image (means of ten), ONNX Runtime's in this process on one thread, and how many
scores differ. Needs `make web`, playwright and Chromium.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qdeploy.bundle.write import write_bundle
from qdeploy.data import CLASSES, load
from qdeploy.demo import shipped_run, write_levels
from qdeploy.errors import DeviceError, QDeployError
from qdeploy.export.parity import stock_session
from qdeploy.files import write_atomic
from qdeploy.ladder import read_ladder
from qdeploy.profile.latency import machine
from qdeploy.serve.app import BROWSER_PREFIX, Options, serving
from qdeploy.trust.keys import KeyFolder, Quorum, init_keys
from qdeploy.trust.publish import Wish, publish
from qdeploy.trust.storage import Folder

WAIT_MS = 120_000
RUN = """async ([onnx, images]) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const worker = new Worker("./runner.worker.mjs", { type: "module" });
  const ask = (request) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data.result));
    worker.postMessage(request);
  });
  await ask({ op: "load", onnx: bytes(onnx) });
  const { scores } = await ask({ op: "classify", images: Float32Array.from(bytes(images), (pixel) => pixel / 255) });
  worker.terminate();
  return scores.map((row) => Array.from(row));
}"""


def make_site(folder: Path) -> dict[str, Path]:
    """Keys and a signed tree of the demo's levels in `folder`; the levels' files."""
    write_levels(shipped_run(), folder, lambda _: None)
    paths = {name: folder / "onnx" / f"{name}.onnx" for name in ("w2", "w3", "mixed", "w4")}
    write_bundle(read_ladder(list(paths.values())), [], folder / "tree")
    init_keys(folder / "keys", Quorum.parse("1/1"), Quorum.parse("1/1"), None)
    publish(folder / "tree", Folder(folder / "site"), KeyFolder([folder / "keys"]), Wish())
    return paths


def python_run(path: Path, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores [n, classes] by ONNX Runtime in this process, and its median milliseconds an image (means of ten)."""
    session = stock_session(path.read_bytes())
    inputs = images.astype(np.float32) / np.float32(255)
    scores, times = [], []
    for at in range(0, len(inputs), 10):
        start = time.perf_counter()
        scores += [session({"input": image[None]})[0][0] for image in inputs[at : at + 10]]
        times.append(100 * (time.perf_counter() - start))
    return np.stack(scores), float(np.median(times))


def number(text: str) -> float:
    """The first number in a text of the page."""
    return float("".join(c for c in text.split(maxsplit=1)[0] if c in "0123456789."))


def in_force(page: Any, level: str) -> None:
    """Wait until the page says so."""
    page.locator("#status", has_text=f"Level {level} is in force").wait_for(timeout=WAIT_MS)


def climb(page: Any, level: str, images: int) -> dict[str, float]:
    """Put a level in force, let it see all images twice; what the page shows."""
    if page.inner_text("#now-level") != level:
        page.get_by_role("button", name=f"Climb to {level}", exact=True).click()
        in_force(page, level)
    fetched = number(page.inner_text("#status").partition(": ")[2])
    page.locator("#now-seen", has_text=f"of {images} images").wait_for(timeout=WAIT_MS)
    page.wait_for_timeout(3000)  # more batches for the median
    accuracy, latency = (number(page.inner_text(f"#now-{name}")) for name in ("accuracy", "latency"))
    return {"bytes": fetched, "accuracy": accuracy, "ms": latency}


def open_page(browser: Any, url: str, folder: Path, images: int) -> tuple[Any, dict[str, float]]:
    """The page with the base in force, and seconds: usable, base from nothing, base again after a reload."""
    page = browser.new_context(viewport={"width": 1400, "height": 1080}, color_scheme="light").new_page()
    page.goto(url)
    usable = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") / 1000
    page.locator("#root-file").wait_for()
    start = time.perf_counter()
    page.set_input_files("#root-file", folder / "keys" / "1.root.json")
    in_force(page, "w2")
    cold = time.perf_counter() - start
    start = time.perf_counter()
    page.reload()
    in_force(page, "w2")
    warm = time.perf_counter() - start
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Forget everything", exact=True).click()
    page.locator("#root-file").wait_for()
    page.set_input_files("#root-file", folder / "keys" / "1.root.json")
    in_force(page, "w2")
    data = load("fashion-mnist", "test")
    arrays = {"images": data.images[:images], "labels": data.labels[:images], "classes": np.array(CLASSES[data.name])}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    page.set_input_files("#sample-files", [folder / f"{name}.npy" for name in arrays])
    return page, {"usable": usable, "base": cold, "base again": warm}


def screenshot(page: Any, level: str, out: Path) -> None:
    """A picture of the page, in 256 colours, while it climbs to a level over a slow line and goes on classifying."""
    from PIL import Image

    page.select_option("#rate", "8000")
    page.get_by_role("button", name=f"Climb to {level}", exact=True).click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.quantize(256).save(out, "PNG", optimize=True)
    page.select_option("#rate", "0")
    in_force(page, level)


def bench(folder: Path, images: int, picture: Path | None) -> dict[str, Any]:
    """All figures."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as e:
        raise DeviceError("playwright is not installed: pip install playwright, which is part of qdeploy[dev]") from e
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise DeviceError("Chromium is not on PATH: install it")
    paths = make_site(folder)
    pixels = load("fashion-mnist", "test").images[:images]
    coded = base64.b64encode(pixels.tobytes()).decode()
    rows: dict[str, dict[str, float]] = {}
    with serving(folder / "site", options=Options(port=0, browser=True)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page, seconds = open_page(browser, url + BROWSER_PREFIX, folder, images)
        for level in paths:
            if level == "w4" and picture is not None:
                screenshot(page, level, picture)
            rows[level] = climb(page, level, images)
        page.get_by_role("button", name="Pause", exact=True).click()
        for level, path in paths.items():
            theirs, ms = python_run(path, pixels)
            ours = np.array(page.evaluate(RUN, [base64.b64encode(path.read_bytes()).decode(), coded]), np.float32)
            answers = int((ours.argmax(1) != theirs.argmax(1)).sum())
            rows[level] |= {"python ms": ms, "differing": int((ours != theirs).sum()), "scores": ours.size}
            rows[level] |= {"largest difference": float(abs(ours - theirs).max()), "other answers": answers}
        version = browser.version
        browser.close()
    return {"machine": machine(), "browser": f"Chromium {version}", "seconds": seconds, "levels": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = bench(Path(folder), args.images, args.screenshot)
    except QDeployError as e:
        sys.exit(f"error: {e}")
    where = found["machine"]
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load']}, Python {platform.python_version()}, ", end="")
    print(f"{found['browser']}, {args.images} images")
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in found["seconds"].items()))
    print("level    bytes  accuracy %  browser ms  python ms  scores that differ")
    for name, row in found["levels"].items():
        share = f"{row['differing']} of {row['scores']} by at most {row['largest difference']:.3f}"
        times = f"{row['ms']:11.2f} {row['python ms']:10.3f}"
        print(f"{name:5} {row['bytes']:8.0f} {row['accuracy']:11.1f} {times}  {share}, {row['other answers']} answers")
    if args.out:
        write_atomic(args.out, json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
