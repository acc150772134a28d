"""Loading: fresh processes agree, damaged or foreign artifacts and wrong parameters are refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tvm

from qdeploy.bundle.planes import container, join, split_cheapest
from qdeploy.bundle.tables import TensorLevel
from qdeploy.compile import artifact as module
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.kernels.join import LAYOUTS
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import CompileError, DeviceError
from qdeploy.export.write import qdq_bytes
from qdeploy.files import canonical_json, sha256
from qdeploy.frozen import FrozenNet
from qdeploy.integer import dequantize
from qdeploy.qdq import arrays, parse_model
from qdeploy.target import Target, load_target
from tests.nets_frozen import ladder_of

ROOT = Path(__file__).parents[2]
PORTABLE = load_target(ROOT / "targets" / "x86-64.toml")
PLAIN = Target("plain", "x86_64", "llvm", "x86-64")


@pytest.fixture(scope="module")
def nets() -> list[FrozenNet]:
    return ladder_of(2, (2, 4), width=4, size=6, blocks=1)


@pytest.fixture(scope="module")
def compiled(nets: list[FrozenNet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "m.onnx").write_bytes(qdq_bytes(nets[0]))
    compile_model(folder / "m.onnx", load_target(ROOT / "targets" / "x86-64.toml"), folder / "a")
    return folder / "a"


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    for path in compiled.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def params_of(net: FrozenNet) -> dict[str, np.ndarray]:
    return arrays(parse_model(qdq_bytes(net)))


def images_of(net: FrozenNet) -> np.ndarray:
    return dequantize(net.golden[net.input], net.activations[net.input].quantizer)


def edit(folder: Path, **changes: object) -> None:
    head = json.loads((folder / "artifact.json").read_bytes())
    (folder / "artifact.json").write_bytes(canonical_json(head | changes))


def test_a_moved_artifact_in_a_fresh_process_agrees(
    copy: Path, nets: list[FrozenNet], tmp_path: Path, device_environment: dict[str, str]
) -> None:
    """With numpy and TVM alone."""
    np.savez(tmp_path / "p.npz", **params_of(nets[0]))
    np.save(tmp_path / "x.npy", images_of(nets[0])[:1])
    script = """
import sys
for absent in ("onnx", "onnxruntime", "onnxsim", "safetensors", "aiohttp", "matplotlib", "click", "PIL"):
    sys.modules[absent] = None
from pathlib import Path
import numpy as np
from qdeploy.compile.artifact import load_artifact
assert "tvm" not in sys.modules
folder, work = Path(sys.argv[1]), Path(sys.argv[2])
artifact = load_artifact(folder)
packed = artifact.prepare(dict(np.load(work / "p.npz")))
np.save(work / "y.npy", artifact.codes(np.load(work / "x.npy"), packed))
"""
    command = [sys.executable, "-c", script, str(copy), str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env=device_environment)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), nets[0].golden[nets[0].output][:1])


def test_levels_run_side_by_side_from_threads(compiled: Path, nets: list[FrozenNet]) -> None:
    loaded = load_artifact(compiled)
    packed = [loaded.prepare(params_of(net)) for net in nets]
    wrong: list[int] = []

    def work(i: int) -> None:
        net = nets[i]
        for _ in range(20):
            for image, want in zip(images_of(net), net.golden[net.output], strict=True):
                if not np.array_equal(loaded.codes(image[None], packed[i])[0], want):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert packed[0].nbytes == packed[1].nbytes > 0


def test_a_new_artifact_at_an_old_path_is_the_new_one(compiled: Path, copy: Path, nets: list[FrozenNet]) -> None:
    """dlopen remembers paths: a second model compiled into the same folder must not run the first one's code."""
    load_artifact(copy)
    net = ladder_of(9, (2,), width=3, size=5, blocks=1, channels=1)[0]
    (copy / "m.onnx").write_bytes(qdq_bytes(net))
    compile_model(copy / "m.onnx", load_target(ROOT / "targets" / "x86-64.toml"), copy, force=True)
    loaded = load_artifact(copy)
    codes = loaded.codes(images_of(net)[:1], loaded.prepare(params_of(net)))
    np.testing.assert_array_equal(codes, net.golden[net.output][:1])


def test_wrong_parameters_are_refused_by_name(compiled: Path, nets: list[FrozenNet]) -> None:
    loaded, params = load_artifact(compiled), params_of(nets[0])
    without = {k: v for k, v in params.items() if k != "stem.weight"}
    with pytest.raises(DeviceError, match="parameter stem.weight is missing: this artifact needs int8"):
        loaded.prepare(without)
    with pytest.raises(DeviceError, match="parameter fc.bias is int64"):
        loaded.prepare(params | {"fc.bias": params["fc.bias"].astype(np.int64)})
    with pytest.raises(DeviceError, match=r"parameter fc.weight is int8 \[10, 3\]"):
        loaded.prepare(params | {"fc.weight": params["fc.weight"][:, :3]})
    packed = loaded.prepare(params)
    with pytest.raises(DeviceError, match=r"give float32 \[1, 3, 6, 6\]"):
        loaded.run(images_of(nets[0]), packed)
    with pytest.raises(DeviceError, match="float64"):
        loaded.run(images_of(nets[0])[:1].astype(np.float64), packed)
    with pytest.raises(DeviceError, match="another artifact"):
        load_artifact(compiled).run(images_of(nets[0])[:1], packed)


@pytest.mark.parametrize("name", ["lib.so", "artifact.json"])
@pytest.mark.parametrize("damage", ["truncated", "edited", "gone"])
def test_damage_is_refused(copy: Path, name: str, damage: str) -> None:
    data = bytearray((copy / name).read_bytes())
    if damage == "gone":
        (copy / name).unlink()
    else:
        data[len(data) // 2] ^= 64
        (copy / name).write_bytes(data[:-7] if damage == "truncated" else data)
    if name == "artifact.json" and damage == "edited":
        edit_head_somewhere_else(copy, bytes(data))
    with pytest.raises((CompileError, DeviceError)):
        load_artifact(copy)


def edit_head_somewhere_else(folder: Path, data: bytes) -> None:
    """A flipped bit inside a name would be harmless text; flip the library's digest instead."""
    text = data.replace(b'"lib.so":"', b'"lib.so":"0')
    (folder / "artifact.json").write_bytes(text)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "qdeploy-artifact/1"}, CompileError, "format 'qdeploy-artifact/1'"),
        ({"files": {"../lib.so": "0" * 64}}, CompileError, "its files are not just lib.so"),
        ({"extra": 1}, CompileError, "its keys are not"),
        ({"params": [{"name": 1, "dtype": "int8", "shape": []}]}, CompileError, "params has a wrong type"),
        ({"inputs": []}, CompileError, "inputs is not a list of the right length"),
        ({"variants": []}, CompileError, "it has no variants"),
        ({"variants": [{}]}, CompileError, "a variant is not"),
        ({"constant": 1}, CompileError, "constant has a wrong type"),
        ({"threads": -1}, CompileError, "threads has a wrong type"),
        ({"versions": {"apache-tvm": "9.1"}}, DeviceError, "compiled by apache-tvm 9.1"),
    ],
)
def test_wrong_descriptions_are_refused(copy: Path, changes: dict, error: type, message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(error, match=message):
        load_artifact(copy)


def test_a_machine_without_the_instructions_gets_one_line(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeploy.target.machine_flags", lambda: frozenset({"sse", "sse2"}))
    with pytest.raises(DeviceError, match="this machine's cpu lacks avx, avx2"):
        load_artifact(compiled)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": {"name": "t"}}, CompileError, "a target has no list of features"),
        ({"target": {"name": "t", "features": ["amx-fp16"]}}, DeviceError, "cpu lacks amx-fp16, which target t needs"),
        ({"target": {"name": "t", "features": []}}, CompileError, "lib.so was not made with this artifact.json"),
        ({"arena_bytes": 64}, CompileError, "lib.so was not made with this artifact.json"),
        ({"packed_bytes": "64"}, CompileError, "packed_bytes has a wrong type"),
        ({"kernels": [1]}, CompileError, "kernels has a wrong type"),
        ({"packed": "packed.bin"}, CompileError, "library or packed has a wrong type"),
    ],
)
def test_wrong_variants_are_refused(copy: Path, changes: dict, error: type, message: str) -> None:
    """A lie about instruction sets or sizes would end in a signal: the library carries what it was made for."""
    (variant,) = json.loads((copy / "artifact.json").read_bytes())["variants"]
    edit(copy, variants=[variant | changes])
    with pytest.raises(error, match=message):
        load_artifact(copy)


def test_description_and_library_that_do_not_belong_together(copy: Path) -> None:
    head = json.loads((copy / "artifact.json").read_bytes())
    edit(copy, params=head["params"][1:])
    with pytest.raises(CompileError, match="lib.so was not made with this artifact.json"):
        load_artifact(copy)


@pytest.fixture(scope="module")
def automatic(nets: list[FrozenNet], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants and their packed levels."""
    folder = tmp_path_factory.mktemp("automatic")
    (folder / "m.onnx").write_bytes(qdq_bytes(nets[0]))
    compile_model(folder / "m.onnx", [PORTABLE, PLAIN], folder / "a", options=Options(constant=True))
    return folder / "a"


def test_any_flipped_byte_of_the_description(compiled: Path, nets: list[FrozenNet], copy: Path) -> None:
    """Refused by name, or of no consequence: a digit of a version's patch level."""
    data = (compiled / "artifact.json").read_bytes()
    params, image, want = params_of(nets[0]), images_of(nets[0])[:1], nets[0].golden[nets[0].output][:1]
    refused = 0
    for i in range(0, len(data), 23):
        damaged = bytearray(data)
        damaged[i] ^= 1 << i % 7
        (copy / "artifact.json").write_bytes(damaged)
        try:
            loaded = load_artifact(copy)
        except (CompileError, DeviceError) as e:
            assert "\n" not in str(e)
            refused += 1
        else:
            np.testing.assert_array_equal(loaded.codes(image, loaded.prepare(params)), want)
    assert refused > len(data) // 23 * 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("swap lib", "does not match artifact.json"), ("swap packed", "does not match artifact.json"),
        ("swap lib and digests", "was not made with this artifact.json"),
        ("swap variants", "was not made with this artifact.json"), ("cut lib", "does not match"),
        ("empty packed", "does not match"), ("other packed", "has another length"), ("no packed", "cannot read"),
        ("dangling", "cannot read"), ("folder", "is no file"), ("fifo", "is no file"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together(automatic: Path, tmp_path: Path, change: str, message: str) -> None:
    for path in automatic.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    head = json.loads((tmp_path / "artifact.json").read_bytes())
    names = [[variant[key] for variant in head["variants"]] for key in ("library", "packed")]
    (lib, other), (packed, other_packed) = names
    if change.startswith("swap"):
        a, b = (packed, other_packed) if "packed" in change else (lib, other)
        first, second = (tmp_path / a).read_bytes(), (tmp_path / b).read_bytes()
        if "variants" not in change:
            (tmp_path / a).write_bytes(second)
            (tmp_path / b).write_bytes(first)
        if "digests" in change:
            head["files"][a], head["files"][b] = head["files"][b], head["files"][a]
            edit(tmp_path, files=head["files"])
        if "variants" in change:
            one, two = head["variants"]
            edit(tmp_path, variants=[one | {"library": other}, two | {"library": lib}])
    elif change == "cut lib":
        (tmp_path / lib).write_bytes((tmp_path / lib).read_bytes()[:-100])
    elif change == "empty packed":
        (tmp_path / packed).write_bytes(b"")
    elif change == "other packed":
        data = (tmp_path / packed).read_bytes()[:-64]
        (tmp_path / packed).write_bytes(data)
        edit(tmp_path, files=head["files"] | {packed: sha256(data)})
    else:
        (tmp_path / packed).unlink()
        if change == "dangling":
            (tmp_path / packed).symlink_to(tmp_path / "nowhere")
        elif change == "folder":
            (tmp_path / packed).mkdir()
        elif change == "fifo":
            os.mkfifo(tmp_path / packed)
    with pytest.raises(CompileError, match=message) as caught:
        load_artifact(tmp_path)
    assert "\n" not in str(caught.value)


def test_links_to_the_files_are_as_good(compiled: Path, tmp_path: Path) -> None:
    for path in compiled.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert load_artifact(tmp_path / "link").graph == load_artifact(compiled).graph


def test_nothing_is_loaded_before_the_instructions_are_checked(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdeploy.target.machine_flags", frozenset)
    monkeypatch.setattr(module, "opened", None)
    with pytest.raises(DeviceError, match="this machine's cpu lacks avx, .*: compile for another target"):
        load_artifact(compiled)


def test_the_library_refuses_buffers_of_other_sizes(compiled: Path, nets: list[FrozenNet]) -> None:
    loaded = load_artifact(compiled)
    packed = loaded.prepare(params_of(nets[0]))
    small = type(packed)(loaded, tvm.runtime.empty((64,), "uint8"), 64)
    with pytest.raises(DeviceError, match="the artifact cannot run"):
        loaded.run(images_of(nets[0])[:1], small)


@pytest.mark.parametrize(("bits", "base", "dtype"), [(4, 2, "int8"), (8, 3, "uint8"), (6, 1, "int8"), (1, 1, "int8")])
def test_planes_are_joined(compiled: Path, bits: int, base: int, dtype: str) -> None:
    loaded, rng = load_artifact(compiled), np.random.default_rng(bits)
    u = np.clip(rng.normal(1 << bits >> 1, 2 ** (bits - 2.5), (24, 3, 41)), 0, (1 << bits) - 1).astype(np.uint8)
    parts = [(part.bits, part.layout, b"".join(part.segments)) for part in split_cheapest(u, bits, base)]
    for first in range(1, len(parts) + 1):
        held = sum(part[0] for part in parts[:first])
        level = TensorLevel(held, 8 - held, (0 if dtype == "int8" else 128) + (1 << (8 - held) >> 1) - 1 + (held == 8))
        bias = level.offset - ((1 << held >> 1) << level.shift)
        got = loaded.join(parts[:first], u.size, level.shift, bias, held)
        want = container(join(parts[:first], u.shape), level, dtype)
        np.testing.assert_array_equal(got.view(dtype).reshape(u.shape), want)
    with pytest.raises(DeviceError, match="another length than its layout says"):
        loaded.join([(*parts[0][:2], parts[0][2] + b"0")], u.size, 0, 0, parts[0][0])
    assert module.JOIN_LAYOUTS == LAYOUTS


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="is not an artifact folder"):
        load_artifact(tmp_path / "none")
    assert module.FORMAT == "qdeploy-artifact/2"
