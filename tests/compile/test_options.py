"""Threads, constants, batches and several instruction sets in one artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qdeploy.compile import artifact as loading
from qdeploy.compile import lower
from qdeploy.compile.artifact import Artifact, load_artifact, opened
from qdeploy.compile.codegen import cores
from qdeploy.compile.fuse import fuse
from qdeploy.compile.llvm import resolve
from qdeploy.compile.pipeline import Options, build, compile_model, describe
from qdeploy.compile.read.handlers import read_graph
from qdeploy.errors import CompileError, DeviceError, RecipeError
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet
from qdeploy.integer import dequantize
from qdeploy.qdq import arrays, parse_model
from qdeploy.target import AUTO, CPUINFO_FLAGS, Target, auto_targets, missing_features
from tests.nets_frozen import random_frozen

ROOT = Path(__file__).parents[2]
PORTABLE = auto_targets()[-1]


@pytest.fixture(scope="module")
def net() -> FrozenNet:
    return random_frozen(3, width=17, size=9, blocks=1)


@pytest.fixture(scope="module")
def model(net: FrozenNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options") / "m.onnx"
    path.write_bytes(qdq_bytes(net))
    return path


@pytest.fixture(scope="module")
def automatic(model: Path) -> Path:
    compile_model(model, auto_targets(), model.parent / "auto")
    return model.parent / "auto"


def images_of(net: FrozenNet) -> np.ndarray:
    return dequantize(net.golden[net.input], net.activations[net.input].quantizer)


def params_of(net: FrozenNet) -> dict[str, np.ndarray]:
    return arrays(parse_model(qdq_bytes(net)))


def codes_of(artifact: Artifact, net: FrozenNet, **level: object) -> np.ndarray:
    return np.concatenate([artifact.codes(x[None], **level) for x in images_of(net)])  # type: ignore[arg-type]


def pretend(monkeypatch: pytest.MonkeyPatch, target: Target, less: str = "") -> None:
    """This machine has what `target` needs, but for `less`."""
    flags = frozenset(CPUINFO_FLAGS[name] for name in resolve(target).features if name != less)
    monkeypatch.setattr("qdeploy.target.machine_flags", lambda: flags)


@pytest.mark.parametrize("count", ["1", "3", None])
def test_threads_change_no_code(
    count: str | None, net: FrozenNet, model: Path, monkeypatch: pytest.MonkeyPatch, device_environment: dict[str, str]
) -> None:
    folder = model.parent / "threads"
    if not folder.exists():
        monkeypatch.setattr(lower, "THREAD_WORK", 0)
        info = compile_model(model, PORTABLE, folder, options=Options(threads=2))
        assert info["threads"] == 2
        np.savez(folder / "p.npz", **params_of(net))
        np.save(folder / "x.npy", images_of(net))
    script = """
import sys
from pathlib import Path
import numpy as np
from qdeploy.compile.artifact import load_artifact
folder = Path(sys.argv[1])
artifact = load_artifact(folder)
packed = artifact.prepare(dict(np.load(folder / "p.npz")))
np.save(folder / "y.npy", np.concatenate([artifact.codes(x[None], packed) for x in np.load(folder / "x.npy")]))
import tvm
print(tvm.get_global_func("runtime.NumThreads")())
"""
    kept = {name: value for name, value in device_environment.items() if name not in loading.THREAD_VARIABLES}
    environment = kept | ({} if count is None else {"TVM_NUM_THREADS": count})
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == min(int(count or 2), cores())
    np.testing.assert_array_equal(np.load(folder / "y.npy"), net.golden[net.output])


def test_small_layers_are_not_spread(model: Path) -> None:
    graph = fuse(read_graph(parse_model(model.read_bytes())), lookup=True)
    dot = resolve(PORTABLE).dot
    few = lower.lower(graph, dot, threads=4)
    assert few.kernels.keys() == lower.lower(graph, dot).kernels.keys()
    assert not any("parallel" in str(kernel) for kernel in few.kernels.values())


def test_constants_are_in_the_artifact(net: FrozenNet, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compile_model(model, PORTABLE, tmp_path / name, options=Options(constant=True))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["artifact.json", "lib.so", "packed.bin"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    artifact = load_artifact(tmp_path / "a")
    np.testing.assert_array_equal(codes_of(artifact, net), net.golden[net.output])
    other = random_frozen(4, width=17, size=9, blocks=1)
    np.testing.assert_array_equal(  # and another level's parameters still go
        codes_of(artifact, other, packed=artifact.prepare(params_of(other))), other.golden[other.output]
    )
    data = bytearray((tmp_path / "a" / "packed.bin").read_bytes())
    data[100] ^= 1
    (tmp_path / "a" / "packed.bin").write_bytes(data)
    with pytest.raises(CompileError, match=r"packed.bin does not match artifact.json"):
        load_artifact(tmp_path / "a")


def test_an_artifact_without_constants_asks_for_parameters(net: FrozenNet, automatic: Path) -> None:
    with pytest.raises(DeviceError, match="holds no level: give what `prepare` returned"):
        load_artifact(automatic).run(images_of(net)[:1])


def test_constants_need_a_machine_that_packs_them(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, PORTABLE, less="avx2")
    with pytest.raises(DeviceError, match="target x86-64, but this machine's cpu lacks avx2: .* without --constant"):
        compile_model(model, PORTABLE, tmp_path / "a", options=Options(constant=True))
    assert list(tmp_path.iterdir()) == []


def test_all_instruction_sets_in_one_artifact(net: FrozenNet, automatic: Path) -> None:
    head = json.loads((automatic / "artifact.json").read_bytes())
    assert [variant["target"]["name"] for variant in head["variants"]] == list(AUTO)
    assert head["target"]["name"] == "auto" and head["target"]["features"] == list(resolve(PORTABLE).features)
    assert set(head["files"]) == {f"lib-{name}.so" for name in AUTO}
    loaded = load_artifact(automatic)
    np.testing.assert_array_equal(codes_of(loaded, net, packed=loaded.prepare(params_of(net))), net.golden[net.output])


@pytest.mark.parametrize("which", range(len(AUTO)))
def test_the_best_that_the_machine_has_is_loaded(
    which: int, net: FrozenNet, automatic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = auto_targets()[which]
    if lacking := missing_features(resolve(target).features):
        pytest.skip(f"this machine has no {', '.join(lacking)}")
    pretend(monkeypatch, target)
    loaded = load_artifact(automatic)
    assert loaded.description["target"]["name"] == target.name
    np.testing.assert_array_equal(codes_of(loaded, net, packed=loaded.prepare(params_of(net))), net.golden[net.output])


def test_a_machine_that_can_run_none_gets_one_line(automatic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, PORTABLE, less="avx2")
    with pytest.raises(DeviceError) as caught:
        load_artifact(automatic)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("compile for another target")
    assert all(f"which target {name} needs" in text for name in AUTO)


def test_a_variant_that_claims_less_than_it_uses(automatic: Path, tmp_path: Path) -> None:
    for path in automatic.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    head = json.loads((tmp_path / "artifact.json").read_bytes())
    head["variants"][0]["target"]["features"] = []
    (tmp_path / "artifact.json").write_text(json.dumps(head))
    with pytest.raises(CompileError, match="lib-x86-64-amx.so was not made with this artifact.json"):
        load_artifact(tmp_path)


def test_shipped_targets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="x86-64-amx.toml"):
        auto_targets(tmp_path)


def test_a_batch_is_its_images_one_after_another(net: FrozenNet, model: Path) -> None:
    graph, count = read_graph(parse_model(model.read_bytes())), 3
    batch = replace(graph, input_shape=(count, *graph.input_shape[1:]), output_shape=(count, *graph.output_shape[1:]))
    resolved = resolve(PORTABLE)
    loaded = []
    for one in (graph, batch):
        head = describe(one, [resolved], "0" * 64, Options())
        code, variant = build(one, resolved, head, "lib.so")
        loaded.append(opened(head, variant, code))
    single, many = loaded
    assert many.arena_bytes == single.arena_bytes
    packed, params = many.prepare(params_of(net)), images_of(net)
    images = np.concatenate([params] * count)[:count]
    wanted = np.concatenate([net.golden[net.output]] * count)[:count]
    np.testing.assert_array_equal(many.codes(images, packed), wanted)
    rows = single.prepare(params_of(net))
    np.testing.assert_array_equal(many.run(images, packed), np.concatenate([single.run(x[None], rows) for x in images]))
    assert many.ticks(images, packed)().shape == single.ticks(images[:1], rows)().shape
