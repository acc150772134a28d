"""Ways to compute a convolution: all exact; measured, remembered, taken from the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.compile import tune
from qdeploy.compile.artifact import load_artifact
from qdeploy.compile.graph import Window
from qdeploy.compile.kernels.conv import way, ways
from qdeploy.compile.kernels.spec import Choice, ConvSpec
from qdeploy.compile.llvm import Dot, Resolved, resolve
from qdeploy.compile.pipeline import Options, compile_model
from qdeploy.errors import CompileError, DeviceError
from qdeploy.export.write import qdq_bytes
from qdeploy.frozen import FrozenNet
from qdeploy.integer import dequantize
from qdeploy.qdq import arrays, parse_model
from qdeploy.target import CPUINFO_FLAGS, auto_targets
from tests.compile.kernels import target_of
from tests.compile.test_conv import check, kernels_of, spec_of
from tests.nets_frozen import random_frozen

PORTABLE = auto_targets()[-1]
SAME = (1, 1, 1, 1)
DENSE = (20, 70, 1, 7, 13, Window((3, 3), (1, 1), SAME), (0, 0, 0, 0))
NARROW = (64, 64, 1, 8, 8, Window((1, 1)), (0, 0, 0, 0))
STRIDED = (3, 8, 1, 9, 9, Window((3, 3), (2, 2), SAME), (0, 0, 0, 0))
DEPTHWISE = (70, 70, 70, 9, 8, Window((5, 5), (1, 1), (2, 2, 2, 2)), (0, 0, 0, 0))


@pytest.fixture(scope="module")
def net() -> FrozenNet:
    return random_frozen(5, width=17, size=9, blocks=1)


@pytest.fixture(scope="module")
def model(net: FrozenNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "m.onnx"
    path.write_bytes(qdq_bytes(net))
    return path


@pytest.fixture
def here() -> Resolved:
    return resolve(PORTABLE)


@pytest.mark.parametrize("name", ["pmaddwd", "vpdpbusd", "amx"])
def test_every_way_is_exact(name: str) -> None:
    target, rng = target_of(name), np.random.default_rng(0)
    specs = []
    for shape in (DENSE, DEPTHWISE):
        spec = spec_of(shape, target.dot)
        found = ways(spec)
        assert found[0] == way(spec) and len(set(found)) == len(found)
        others = found if len(found) < 4 else found[:3] + found[:: len(found) // 4]
        specs += [replace(spec, choice=choice) for choice in others]
    library = kernels_of(dict(enumerate(specs)), target.tvm)
    for i, spec in enumerate(specs):
        for extreme in ("random", "zero_points"):
            check(library, i, spec, extreme, rng)
    families = {spec.family for spec in specs}
    assert (
        families
        == {
            "pmaddwd": {"dense", "depthwise"},
            "vpdpbusd": {"dense", "depthwise", "depthwise_rows"},
            "amx": {"dense", "tiles", "depthwise", "depthwise_rows"},
        }[name]
    )


def test_what_has_no_other_way() -> None:
    spec = spec_of(DEPTHWISE, Dot("pmaddwd", 8, 16))
    assert ways(spec) == [Choice("depthwise")]
    packed = replace(spec_of(DENSE, Dot("vpdpbusd", 16, 32, True)), packed4=True)
    assert {choice.family for choice in ways(packed)} == {"dense"}


def test_the_faster_way_wins(monkeypatch: pytest.MonkeyPatch, here: Resolved) -> None:
    spec = spec_of(NARROW, here.dot)
    candidates = ways(spec)[: tune.WAYS]

    def clocks(seconds: Sequence[float]) -> None:
        def fake(specs: Sequence[ConvSpec], resolved: Resolved) -> list[tune.Run]:
            assert [spec.choice for spec in specs] == candidates
            return [lambda turns, one=one: turns * one for one in seconds]

        monkeypatch.setattr(tune, "loaded", fake)

    equal = [1e-4] * len(candidates)
    clocks(equal[:3] + [0.5e-4] + equal[4:])
    assert tune.measure(spec, here) == tune.Measured(candidates[3], 0.5e-4, 1e-4)
    clocks([1e-4] + [0.98e-4] * (len(candidates) - 1))  # not by more than the noise
    assert tune.measure(spec, here) == tune.Measured(candidates[0], 1e-4, 1e-4)
    clocks(equal[:1] + [9e-4] * (len(candidates) - 1))
    assert tune.measure(spec, here).choice == candidates[0]


def test_runs_are_timed(here: Resolved) -> None:
    spec = spec_of(NARROW, here.dot)
    (run,) = tune.loaded([spec], here)
    few, many = min(run(100) for _ in range(5)), min(run(2000) for _ in range(5))
    assert 5 * few < many < 80 * few


def codes_of(folder: Path, net: FrozenNet) -> np.ndarray:
    artifact = load_artifact(folder)
    packed = artifact.prepare(arrays(parse_model(qdq_bytes(net))))
    images = dequantize(net.golden[net.input], net.activations[net.input].quantizer)
    return np.concatenate([artifact.codes(x[None], packed) for x in images])


def test_what_was_measured_is_used_again(
    net: FrozenNet, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Resolved
) -> None:
    cache, lines, seen = tmp_path / "cache" / "tune.json", list[str](), list[ConvSpec]()

    def last(spec: ConvSpec, resolved: Resolved) -> tune.Measured:
        seen.append(spec)
        return tune.Measured(ways(spec)[-1], 1.0, 2.0)

    monkeypatch.setattr(tune, "measure", last)
    first = compile_model(
        model, PORTABLE, tmp_path / "a", echo=lines.append, options=Options(tune=60.0, cache=cache)
    )  # fmt: skip
    assert any(f"{len(seen)} of {len(seen)} convolutions are faster another way" in line for line in lines)
    work = [tune.multiply_adds(spec) for spec in seen]
    assert len(seen) == len(set(seen)) > 3 and work[0] == max(work)
    rows = [row["way"] for row in first["variants"][0]["kernels"] if row["operator"] == "conv"]
    assert {Choice(**row) for row in rows} == {ways(spec)[-1] for spec in seen}
    np.testing.assert_array_equal(codes_of(tmp_path / "a", net), net.golden[net.output])

    count = len(seen)
    for name, options in (("b", Options(cache=cache)), ("c", Options(tune=60.0, cache=cache))):
        again = compile_model(model, PORTABLE, tmp_path / name, options=options)
        assert again["files"] == first["files"]
    assert len(seen) == count  # nothing was measured twice
    assert compile_model(model, PORTABLE, tmp_path / "d")["files"] != first["files"]
    assert json.loads(cache.read_bytes())["targets"].keys() == {
        tune.sha256(tune.canonical_json(tune.target_of(here)))
    }  # fmt: skip


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Resolved) -> None:
    small, large = spec_of(NARROW, here.dot), spec_of(DENSE, here.dot)

    def stop(spec: ConvSpec, resolved: Resolved) -> tune.Measured:
        if spec == small:
            raise KeyboardInterrupt
        return tune.Measured(ways(spec)[1], 1.0, 2.0)

    monkeypatch.setattr(tune, "measure", stop)
    cache = tmp_path / "tune.json"
    with pytest.raises(KeyboardInterrupt):
        tune.choices([small, large, small], here, cache, 60.0, print)
    assert tune.choices([small, large], here, cache, 0.0, print) == {large: ways(large)[1]}


def test_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Resolved) -> None:
    specs, lines = [spec_of(shape, here.dot) for shape in (NARROW, DENSE, STRIDED, DEPTHWISE)], list[str]()
    now = iter(range(100))
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(tune, "measure", lambda spec, resolved: tune.Measured(ways(spec)[0], 1.0, 1.0))
    found = tune.choices(specs, here, tmp_path / "tune.json", 1.5, lines.append)
    assert found == {specs[1]: ways(specs[1])[0]}
    assert lines[0].startswith("tuning: 0 of 1 convolutions") and lines[0].endswith(
        "no time was left for 2 smaller ones"
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "qdeploy-tune/0", "targets": {}}'])
def test_a_damaged_cache(content: str, tmp_path: Path, here: Resolved) -> None:
    (tmp_path / "tune.json").write_text(content)
    with pytest.raises(CompileError, match=r"tune\.json"):
        tune.choices([spec_of(DENSE, here.dot)], here, tmp_path / "tune.json", 0.0, print)


@pytest.mark.parametrize("choice", [{"family": "dense", "pixels": 99, "blocks": 1}, {"family": "dense"}, {}, None])
def test_a_cache_with_a_way_that_does_not_exist(choice: object, tmp_path: Path, here: Resolved) -> None:
    spec, cache = spec_of(DENSE, here.dot), tmp_path / "tune.json"
    measured = {spec: tune.Measured(ways(spec)[0], 1.0, 1.0)}
    value = tune.added({"format": tune.FORMAT, "targets": {}}, measured, here)
    next(iter(value["targets"].values()))["convolutions"][tune.spec_id(spec)]["choice"] = choice
    cache.write_bytes(tune.canonical_json(value))
    with pytest.raises(CompileError, match="delete it"):
        tune.choices([spec], here, cache, 0.0, print)


def test_there_is_no_cache(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no tuning cache .*: make one with --tune SECONDS"):
        compile_model(model, PORTABLE, tmp_path / "a", options=Options(cache=tmp_path / "tune.json"))
    assert list(tmp_path.iterdir()) == []


def test_tuning_needs_a_machine_that_runs_the_code(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = frozenset(CPUINFO_FLAGS[name] for name in resolve(PORTABLE).features if name != "avx2")
    monkeypatch.setattr("qdeploy.target.machine_flags", lambda: flags)
    with pytest.raises(DeviceError, match="tuning runs the code of target x86-64, but .* lacks avx2: .*without --tune"):
        compile_model(model, PORTABLE, tmp_path / "a", options=Options(tune=1.0))


def test_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = Path(__file__).parents[2] / "targets" / "x86-64.toml"
    common = ["compile", str(model), "--target", str(target)]
    done = CliRunner().invoke(main, [*common, "-o", str(tmp_path / "a"), "--tune", "0.001"])
    assert done.exit_code == 0 and "tuning: " in done.stderr and "no time was left" in done.stderr
    assert tune.default_cache() == tmp_path / "cache" / "qdeploy" / "tune.json"
    assert len(next(iter(json.loads(tune.default_cache().read_bytes())["targets"].values()))["convolutions"]) == 1
