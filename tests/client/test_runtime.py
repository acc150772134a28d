from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qdeploy.bundle.store import assemble, level_tensors
from qdeploy.bundle.write import write_bundle
from qdeploy.client.fetch import Patience
from qdeploy.client.pull import climb
from qdeploy.client.runtime import LevelRunner, in_batches, run
from qdeploy.client.state import DeviceFolder
from qdeploy.compile.artifact import Artifact, load_artifact
from qdeploy.errors import BundleError, DataError, DeviceError, FetchError
from qdeploy.ladder import read_ladder
from qdeploy.serve.app import serving
from tests.client.conftest import LEVELS, RealRelease
from tests.client.device import damage, pull
from tests.client.tree import make_tree
from tests.qdq_models import Net


@pytest.fixture
def url(real: RealRelease) -> Iterator[str]:
    with serving(real.root) as url:
        yield url


def test_the_levels_differ(real: RealRelease) -> None:
    """Else the tests below would prove nothing."""
    first = [real.outputs[level][0] for level in LEVELS]
    assert not any(np.array_equal(a, b) for a, b in zip(first, first[1:], strict=False))


@pytest.mark.parametrize("runtime", ["tvm", "ort"])
def test_every_level_answers_as_the_integer_reference(real: RealRelease, url: str, dev: Path, runtime: str) -> None:
    pull(url, dev, "w2")
    runner = LevelRunner(dev, runtime)
    for level in LEVELS:
        runner.climb(level)
        output, made_by = runner.run_with_level(real.images)
        assert made_by == runner.level == level
        assert output.dtype == np.float32
        np.testing.assert_array_equal(output, real.outputs[level])
        device = DeviceFolder(dev)
        manifest = device.manifest(device.chosen().manifest)
        assert assemble(manifest, level, device.reader(manifest)) == real.onnx[level]
    assert runner.levels_held == list(LEVELS)
    runner.drop("w2")
    np.testing.assert_array_equal(runner.run(real.images), real.outputs["w2"])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_model_with_a_batch_takes_any_number_of_images(size: int) -> None:
    images = np.arange(4 * 2, dtype=np.float32).reshape(4, 2)
    seen: list[int] = []

    def run_batch(x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return x.sum(1, keepdims=True)

    np.testing.assert_array_equal(in_batches(run_batch, images, size), images.sum(1, keepdims=True))
    assert set(seen) == {size} and len(seen) == -(-4 // size)


@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_onnx_runtime_takes_models_with_an_open_batch(batch: str | int, dev: Path, tmp_path: Path) -> None:
    net = Net((batch, 4, 6, 6))  # type: ignore[arg-type]
    (tmp_path / "m.onnx").write_bytes(net.model(net.q(net.node("Relu", net.q("x")))).SerializeToString())
    write_bundle(read_ladder([tmp_path / "m.onnx"]), [], tmp_path / "root")
    with serving(tmp_path / "root") as url:
        pull(url, dev)
    images = np.random.default_rng(0).normal(0, 1, (5, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(dev, images, "ort"), np.maximum(images, 0), atol=0.051)


def test_planes_are_joined_by_the_compiled_code(
    real: RealRelease, url: str, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same codes as numpy's, level after level."""
    pull(url, dev, "w2")
    device = DeviceFolder(dev)
    manifest = device.manifest(device.chosen().manifest)
    compiled = load_artifact(next((dev / "artifacts").iterdir())).join
    joined: list[int] = []
    monkeypatch.setattr(Artifact, "join", lambda self, *args: joined.append(args[1]) or compiled(*args))
    runner = LevelRunner(dev)
    for level in LEVELS:
        runner.climb(level)
        want = level_tensors(manifest, level, device.reader(manifest))
        got = level_tensors(manifest, level, device.reader(manifest), compiled)
        assert want.keys() == got.keys() and any(entry.bits for entry in manifest.level(level).tensors)
        for name, array in want.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name], array)
        tensors = zip(manifest.level(level).tensors, manifest.of_kind("planes"), strict=True)
        counts = [area.count for entry, area in tensors if entry.bits]
        assert sorted(joined[-len(counts) :]) == sorted(counts)  # each once
        joined.clear()


def test_forms_of_input(real: RealRelease, url: str, dev: Path) -> None:
    pull(url, dev, "w3")
    runner = LevelRunner(dev)
    assert runner.sample == (3, 8, 8)
    pixels = real.images.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(runner.run(pixels), real.outputs["w3"])
    np.testing.assert_array_equal(runner.run(real.images[0]), real.outputs["w3"][:1])
    with pytest.raises(DataError, match=r"images have shape \[6, 1, 8, 8\]: the model reads \[n, 3, 8, 8\]"):
        runner.run(real.images[:, :1])
    with pytest.raises(DataError, match="int64"):
        runner.run(real.images.astype(np.int64))


def test_climbs_and_drops_under_running_inference(real: RealRelease, url: str, dev: Path) -> None:
    """Every batch equals one level's answers, and each level was seen at work."""
    pull(url, dev, "w2")
    runner = LevelRunner(dev)
    stop = threading.Event()
    counts = dict.fromkeys(LEVELS, 0)
    wrong: list[str] = []
    turned = threading.Condition()

    def infer() -> None:
        while not stop.is_set():
            output, level = runner.run_with_level(real.images)
            if not np.array_equal(output, real.outputs[level]):
                wrong.append(level)
            with turned:
                counts[level] += 1
                turned.notify_all()

    def seen_at_work(level: str) -> bool:
        with turned:
            least = counts[level] + 3
            return turned.wait_for(lambda: counts[level] >= least, timeout=60)

    threads = [threading.Thread(target=infer) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for step, to in ((runner.climb, "w3"), (runner.climb, "w4"), (runner.drop, "w2"), (runner.climb, "w4")):
            assert seen_at_work(runner.level)
            step(to)
            assert runner.level == to
            assert seen_at_work(to)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert min(counts.values()) >= 3
    assert DeviceFolder(dev).chosen().level == "w4"


def test_a_climb_that_fails_leaves_the_level_at_work(real: RealRelease, dev: Path) -> None:
    with serving(real.root) as url:
        pull(url, dev, "w2")
    runner = LevelRunner(dev, patience=Patience(timeout_s=1, attempts=1))
    with pytest.raises(FetchError):
        runner.climb("w3")
    with pytest.raises(BundleError, match="levels are w2, w3, w4"):
        runner.climb("w5")
    assert runner.level == "w2"
    np.testing.assert_array_equal(runner.run(real.images), real.outputs["w2"])


def test_two_processes_on_one_folder(real: RealRelease, url: str, dev: Path) -> None:
    """A level that another process chose is not what a runner built upon."""
    pull(url, dev, "w2")
    runner = LevelRunner(dev)
    climb(dev, "w4")
    assert runner.level == "w2"
    np.testing.assert_array_equal(runner.run(real.images), real.outputs["w2"])
    runner.climb("w4")
    np.testing.assert_array_equal(runner.run(real.images), real.outputs["w4"])


def test_damage_is_named_before_anything_runs(real: RealRelease, url: str, dev: Path) -> None:
    pull(url, dev, "w2")
    for path in (dev / "objects").iterdir():
        damage(path, 5)
    for runtime in ("tvm", "ort"):
        with pytest.raises(BundleError, match="is damaged in .*run `qdeploy pull` again"):
            LevelRunner(dev, runtime)
    pull(url, dev)
    assert LevelRunner(dev).level == "w2"


def test_an_edited_library_is_replaced_by_the_verified_one(real: RealRelease, url: str, dev: Path) -> None:
    pull(url, dev, "w2")
    (library,) = (dev / "artifacts").glob("*/lib.so")
    good = library.read_bytes()
    library.write_bytes(b"\x7fELF" + b"\0" * 100)
    np.testing.assert_array_equal(LevelRunner(dev).run(real.images), real.outputs["w2"])
    assert library.read_bytes() == good


def test_runtimes_that_cannot_run(url: str, dev: Path, tmp_path: Path) -> None:
    pull(url, dev, "w2")
    with pytest.raises(DeviceError, match="runtime 'tflite' is unknown: choose tvm or ort"):
        LevelRunner(dev, "tflite")
    tree = make_tree(tmp_path / "root", artifact_bytes=100, target={"name": "board", "arch": "vax", "features": []})
    with serving(tree.root) as other:
        pull(other, tmp_path / "plain", "w2")
        with pytest.raises(DeviceError, match="no compiled artifact for this machine: use --runtime ort"):
            LevelRunner(tmp_path / "plain")
        pull(other, tmp_path / "plain", "w2", target="board")
        with pytest.raises(DeviceError, match="board does not run here .*vax.*use --runtime ort"):
            LevelRunner(tmp_path / "plain")
        with pytest.raises(DeviceError, match="ONNX Runtime cannot load level w2"):
            LevelRunner(tmp_path / "plain", "ort")


def test_run_reads_files(real: RealRelease, url: str, dev: Path, tmp_path: Path) -> None:
    pull(url, dev, "w4")
    np.save(tmp_path / "x.npy", real.images)
    np.testing.assert_array_equal(run(dev, tmp_path / "x.npy"), real.outputs["w4"])


def test_a_compiled_level_needs_neither_onnx_nor_torch(real: RealRelease, url: str, dev: Path, tmp_path: Path) -> None:
    pull(url, dev, "w2")
    code = f"""
import sys
for absent in ("torch", "onnx", "onnxruntime", "onnxsim", "safetensors", "aiohttp", "urllib3", "click"):
    sys.modules[absent] = None  # importing it now fails, as on a device that lacks it
from pathlib import Path
import numpy as np
from qdeploy.client.runtime import LevelRunner
assert "tvm" not in sys.modules
LevelRunner(Path({str(dev)!r})).run(np.zeros((1, 3, 8, 8), np.uint8))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
