"""`qdeploy demo`: the whole pipe on the shipped model, every figure measured while it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import numpy as np

from qdeploy.allocate import allocate, level_bytes
from qdeploy.bundle.store import level_tensors, tree_reader
from qdeploy.bundle.tables import Manifest
from qdeploy.bundle.write import write_bundle
from qdeploy.client.pull import pull
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.pipeline import compile_model
from qdeploy.data import CLASSES, Dataset, load
from qdeploy.demo_search import DemoSearch, Run, search_text
from qdeploy.errors import DeviceError
from qdeploy.export import export_onnx
from qdeploy.export.parity import stock_session
from qdeploy.extract import calibration_set, read_spec
from qdeploy.files import canonical_json, check_free, write_atomic
from qdeploy.frozen import save_frozen
from qdeploy.inspect import describe
from qdeploy.ladder import read_ladder
from qdeploy.profile.latency import machine
from qdeploy.profile.report import profile
from qdeploy.serve.app import serving
from qdeploy.serve.byte_log import Sent, read_byte_log
from qdeploy.space import SubnetSpec
from qdeploy.subnet import extract
from qdeploy.target import load_target
from qdeploy.train.run import load_run
from qdeploy.trust.keys import KeyFolder, Quorum, init_keys
from qdeploy.trust.publish import Wish, publish
from qdeploy.trust.storage import Folder

REPOSITORY = Path(__file__).parents[1]
MODEL = REPOSITORY / "models" / "fashion-mobilenetv3"
TARGET = REPOSITORY / "targets" / "host.toml"
PARITY_IMAGES = 1000
PAGE_IMAGES = 500
PROFILE_REPEATS = 20
DEVICE_SECONDS = 120.0
Echo = Callable[[str], None]


def specs(net: Any, base: SubnetSpec) -> dict[str, SubnetSpec]:
    """The demo's levels by name, each nested in the next: uniform ones and a mixed one below the highest.

    All have the architecture of `base`, which is the lowest of them.
    """
    assert base.architecture is not None
    activations = max(entry.activation_bits for entry in base.layers)
    widths = net.choice.weight_bits
    levels = {f"w{width}": net.uniform_blocks(base.architecture.stages, width, activations) for width in widths}
    low, high = (levels[f"w{width}"] for width in widths[-2:])
    budget = (level_bytes(net, low) + level_bytes(net, high)) // 2
    mixed = {"mixed": allocate(net, budget, low)}
    names = list(levels)
    return {name: (levels | mixed)[name] for name in (*names[:-1], "mixed", names[-1])}


def shipped_run() -> Run:
    """The run that ships with the repository."""
    recipe, net = load_run(MODEL)
    return Run(MODEL, recipe.name, net, calibration_set(recipe, None).images, load_target(TARGET))


def write_levels(run: Run, out: Path, echo: Echo) -> dict[str, dict[str, Any]]:
    """Freeze and export every level; returns the sidecars by level."""
    sidecars = {}
    for name, spec in specs(run.net, read_spec(run.folder / "base.json")).items():
        echo(f"level {name}: freezing spec {spec.id}, exporting, comparing codes with ONNX Runtime")
        frozen = extract(run.net, spec, run.name, run.calibration, None)
        save_frozen(frozen, out / "subnets" / name)
        sidecars[name] = export_onnx(frozen, out / "onnx" / f"{name}.onnx") | {"simulation": frozen.report["parity"]}
    return sidecars


def compiled_parity(root: Path, manifest: Manifest, artifact: Path, onnx: Path, images: np.ndarray) -> dict[str, Any]:
    """How many of the compiled program's outputs differ from stock ONNX Runtime's, level by level."""
    program, read = load_artifact(artifact), tree_reader(root, manifest)
    inputs = images.astype(np.float32) / np.float32(255)
    found = {}
    for level in manifest.levels:
        packed = program.prepare(level_tensors(manifest, level.name, read))
        session = stock_session((onnx / f"{level.name}.onnx").read_bytes())
        differing = total = 0
        for image in inputs:
            ours, theirs = program.run(image[None], packed), session({"input": image[None]})[0]
            differing += int((ours != theirs).sum())
            total += ours.size
        found[level.name] = {"outputs": total, "differing": differing}
    return found


class Device:
    """A device process (`python -m qdeploy.client`): inference without end, commands in, JSON lines out."""

    def __init__(self, folder: Path, images: Path, labels: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "qdeploy.client",
            str(folder),
            "--images",
            str(images),
            "--labels",
            str(labels),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.rows: Queue[dict[str, Any]] = Queue()
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.rows.put(json.loads(line))

    def tell(self, command: str) -> None:
        """Send one command."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def wait(self, wanted: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        """The next report that is `wanted`; raises DeviceError when the device says an error, dies or hangs."""
        deadline = time.monotonic() + DEVICE_SECONDS
        while time.monotonic() < deadline:
            try:
                row = self.rows.get(timeout=0.2)
            except Empty:
                if self.process.poll() is not None and self.rows.empty():
                    assert self.process.stderr is not None
                    raise DeviceError(f"the device process ended: {self.process.stderr.read().strip()}") from None
                continue
            if row["event"] == "error":
                raise DeviceError(f"the device could not {row['command']}: {row['error']}")
            if wanted(row):
                return row
        raise DeviceError(f"the device process said nothing that was waited for in {DEVICE_SECONDS:.0f} s")

    def accuracy(self, level: str, images: int) -> dict[str, Any]:
        """The next whole pass over the images by one level."""
        return self.wait(lambda row: row["event"] == "run" and row["level"] == level and row["n"] == images)


@contextmanager
def device_process(folder: Path, images: Path, labels: Path) -> Iterator[Device]:
    """A Device that is stopped whatever happens."""
    device = Device(folder, images, labels)
    try:
        yield device
    finally:
        device.process.kill()
        device.process.communicate()


def climb_under_inference(
    url: str, root: Path, folder: Path, manifest: Manifest, files: tuple[Path, Path], count: int, echo: Echo
) -> list[dict[str, Any]]:
    """Pull the lowest level, signed, start the device, climb it level by level while it infers, drop it at the end."""
    levels = [level.name for level in manifest.levels]
    first = pull(url, folder, levels[0], root=root)
    steps = [{"level": levels[0], "step": "pull", "fetched": dict(first.fetched), "bytes": first.total_fetched}]
    with device_process(folder, *files) as device:
        device.wait(lambda row: row["event"] == "ready")
        for name in levels:
            if name != levels[0]:
                device.tell(f"climb {name}")
                row = device.wait(lambda row: row["event"] == "climb")
                steps.append({"level": name, "step": "climb", "fetched": row["fetched"], "bytes": row["bytes"]})
            run = device.accuracy(name, count)
            steps[-1]["accuracy"] = 100.0 * run["correct"] / run["n"]
            echo(
                f"device at {name}: {steps[-1]['bytes']} bytes fetched, {steps[-1]['accuracy']:.2f}% of {count} images"
            )
        device.tell(f"drop {levels[0]}")
        row = device.wait(lambda row: row["event"] == "drop")
        steps.append({"level": levels[0], "step": "drop", "fetched": row["fetched"], "bytes": row["bytes"]})
        device.tell("stop")
        device.wait(lambda row: row["event"] == "stopped")
    return steps


def fetched_twice(rows: list[Sent]) -> int:
    """Object bytes that the server sent more than once: by its own log, range by range."""
    seen: dict[str, np.ndarray] = {}
    again = 0
    for row in rows:
        if row.method != "GET" or not row.path.startswith("/objects/"):
            continue
        counts = seen.setdefault(row.path, np.zeros(0, np.uint8))
        end = row.start + row.sent
        if len(counts) < end:
            counts = seen[row.path] = np.concatenate([counts, np.zeros(end - len(counts), np.uint8)])
        again += int(counts[row.start : end].sum())
        counts[row.start : end] = 1
    return again


def demo(out: Path, echo: Echo) -> dict[str, Any]:
    """Run everything into `out` (replaced) and return the result; report.html and demo.json are written there."""
    from qdeploy.report.demo import demo_page

    began = time.monotonic()
    out = check_free(out, force=True)
    shutil.rmtree(out, ignore_errors=True)
    write_atomic(out / "demo.json", b"{}\n")  # marks the folder as ours from the start, so that a rerun may replace it
    (out / "onnx").mkdir()
    test = load("fashion-mnist", "test")
    run = shipped_run()
    sidecars = write_levels(run, out, echo)
    names = list(sidecars)
    echo("compiling one artifact for all levels")
    artifact = out / "artifact"
    compile_model(out / "onnx" / f"{names[0]}.onnx", run.target, artifact)
    echo("writing the bundle")
    tree, site = out / "tree", out / "site"
    manifest = write_bundle(read_ladder([out / "onnx" / f"{name}.onnx" for name in names]), [artifact], tree)
    echo("signing it as a release, with fresh keys")
    root = init_keys(out / "keys", Quorum(1, 1), Quorum(1, 1), None)
    publish(tree, Folder(site), KeyFolder([out / "keys"]), Wish())
    profiles = {}
    for name in names:
        echo(f"profiling level {name} in TVM and ONNX Runtime")
        profiles[name] = profile(artifact, out / "onnx" / f"{name}.onnx", PROFILE_REPEATS)
    parity = compiled_parity(tree, manifest, artifact, out / "onnx", test.images[:PARITY_IMAGES])
    images, labels = save_images(out, test)
    save_page_files(out / "page", root, test)
    with serving(site, log=out / "bytes.jsonl") as url:
        echo(f"serving at {url}; the device pulls {names[0]} and climbs while it classifies")
        steps = climb_under_inference(url, root, out / "device", manifest, (images, labels), len(test), echo)
    bundle = describe(tree)
    echo(f"searching {run.net.space.size:.1e} subnets for the best one under two limits of this machine")
    ladder = [
        (SubnetSpec.from_json(sidecars[name]["spec"]), out / "onnx" / f"{name}.onnx", artifact)
        for name in (names[0], names[-1])
    ]
    result = {
        "model": manifest.model,
        "machine": machine(),
        "levels": level_rows(bundle["levels"], steps, profiles, parity, sidecars),
        "drop": steps[-1],
        "fetched_twice": fetched_twice(read_byte_log(out / "bytes.jsonl")),
        "planes": bundle["planes against their entropy"],
        "search": DemoSearch(run, ladder, out / "search", echo)(test),
        "report": str(out / "report.html"),
    }
    result["seconds"] = round(time.monotonic() - began, 1)
    write_atomic(out / "report.html", demo_page(result).encode())
    write_atomic(out / "demo.json", canonical_json(result))
    return result


def save_images(out: Path, test: Dataset) -> tuple[Path, Path]:
    """The test images and labels as the files that a device reads."""
    images, labels = out / "images.npy", out / "labels.npy"
    np.save(images, test.images)
    np.save(labels, test.labels)
    return images, labels


def save_page_files(folder: Path, root: Path, test: Dataset) -> None:
    """What `qdeploy serve --browser-files` takes: the keys, some images and labels, the names of the classes."""
    (folder / "sample").mkdir(parents=True)
    shutil.copyfile(root, folder / "root.json")
    arrays = {
        "images": test.images[:PAGE_IMAGES],
        "labels": test.labels[:PAGE_IMAGES],
        "classes": np.array(CLASSES["fashion-mnist"]),
    }
    for name, array in arrays.items():
        np.save(folder / "sample" / f"{name}.npy", array)


def level_rows(
    levels: list[dict[str, Any]],
    steps: list[dict[str, Any]],
    profiles: Mapping[str, Any],
    parity: Mapping[str, Any],
    sidecars: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One row a level: what the table and the report show."""
    rows, total = [], 0
    by_level = {step["level"]: step for step in steps if step["step"] != "drop"}
    for level in levels:
        name = level["level"]
        step = by_level[name]
        total += step["bytes"]
        spec = SubnetSpec.from_json(sidecars[name]["spec"])
        rows.append(
            {
                "level": name,
                "spec_id": spec.id,
                "layers": [asdict(entry) for entry in spec.layers],
                "bits_per_weight": level["bits a weight"],
                "fetched": step["fetched"],
                "bytes": step["bytes"],
                "total_bytes": total,
                "accuracy": step["accuracy"],
                "profile": profiles[name],
                "parity": parity[name],
                "codes": sidecars[name]["parity"],
                "simulation": sidecars[name]["simulation"],
            }
        )
    return rows


def render(result: Mapping[str, Any]) -> str:
    """The result as a table for a terminal."""
    from qdeploy.report.demo import HEAD, level_cells

    rows = [list(HEAD), *(level_cells(row) for row in result["levels"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    drop, machine_ = result["drop"], result["machine"]
    lines += [
        "",
        f"dropping back to {drop['level']} fetched {drop['bytes']} bytes; "
        f"{result['fetched_twice']} object bytes were sent twice, by the server's log",
        f"{result['model']} on {machine_['cpu']}, {machine_['cores']} cores, one thread; {result['seconds']} s in all",
        search_text(result["search"]),
        f"report: {result['report']}",
    ]
    return "\n".join(lines)
