"""The whole search on a trained network: scored, searched, scored again, picked; killed and resumed; bad requests."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.errors import DeviceError
from qdeploy.evaluate import Judge, RunCopy, packed_images
from qdeploy.extract import read_spec
from qdeploy.search import predictor
from qdeploy.search import run as module
from qdeploy.search.encoding import Encoding
from qdeploy.search.front import read_front
from qdeploy.search.samples import Samples
from qdeploy.space import SubnetSpec
from qdeploy.target import Target
from qdeploy.train.run import load_run

ROOT = Path(__file__).parents[2]
SMALL = ("--samples", 10, "--population", 24, "--generations", 6, "--measure", 2, "--rounds", 2)
QUESTION = ("--objective", "accuracy", "--objective", "bitops", "--max", "weights_kib=6")


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "STEPS", (40, 40))


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def searched(elastic_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "STEPS", (40, 40))
        code, text, error = call("search", elastic_run, *QUESTION, *SMALL, "-o", out)
    assert code == 0, error
    assert "of them measured" in text and "Kendall tau" in error
    return out


def test_the_picked_subnet_keeps_its_limits_when_it_is_counted(
    elastic_run: Path, searched: Path, tmp_path: Path
) -> None:
    front = read_front(searched)
    assert front.objectives == ("accuracy", "bitops")
    real = [member for member in front.members if member.measured]
    assert real and all(member.measured["weights_kib"] <= 6 for member in real)
    spec = tmp_path / "best.json"
    code, text, _ = call("pick", searched, "--max", "weights_kib=5.5", "-o", spec, "--json")
    found = json.loads(text)
    assert code == 0 and found["source"] == "measured" and found["values"]["weights_kib"] <= 5.5
    chosen, judge = read_spec(spec), Judge(elastic_run, None)
    assert judge.score(chosen) == found["values"]["accuracy"]
    layers = {step.name: step.module for step in judge.net.graph.layers}
    counted = sum(-(-layers[e.layer].weight.numel() * e.weight_bits // 8) for e in chosen.layers)  # type: ignore[union-attr, operator]
    assert counted / 1024 == found["values"]["weights_kib"]
    assert call("pick", searched, "--knee", "-o", spec)[0] == 2
    assert call("pick", searched, "--knee", "-o", spec, "--force")[0] == 0


def test_what_is_written(searched: Path) -> None:
    with (searched / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["round"], row["generation"]) for row in rows] == [
        (str(r), str(g)) for r in range(2) for g in range(1, 7)
    ]
    for name in ("front", "hypervolume", "agreement", "bits"):
        assert (searched / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (searched / "report.html").read_text()
    assert page.count("<svg") == 4 and 'src="' not in page and 'href="http' not in page
    assert "Round 1: 2 of its front measured" in page and "Round 2: " in page
    foretold = [json.loads(line) for line in (searched / "foretold.jsonl").read_text().splitlines()]
    scored = {json.loads(line)["spec_id"] for line in (searched / "scores.jsonl").read_text().splitlines()}
    assert {row["round"] for row in foretold} == {0, 1} and len(scored) >= 12


def test_a_killed_search_ends_in_the_same_front(
    elastic_run: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(searched / "search.json", out)
    rows = (searched / "scores.jsonl").read_bytes().splitlines(keepends=True)[:6]
    (out / "scores.jsonl").write_bytes(b"".join(rows))  # killed a first time while samples were scored
    real, calls = module.Search.score, iter(range(10))

    def killed(self: module.Search, genomes: object) -> None:
        if next(calls) == 1:  # after the first round's generations
            raise KeyboardInterrupt
        real(self, genomes)  # type: ignore[arg-type]

    monkeypatch.setattr("qdeploy.report.front.write_report", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(module.Search, "score", killed)
        assert call("search", elastic_run, *QUESTION, *SMALL, "-o", out)[0] == 130
    assert (out / "round-1.npz").exists() and not (out / "front.json").exists()
    assert call("search", elastic_run, *QUESTION, *SMALL, "-o", out)[0] == 0
    assert (out / "front.json").read_bytes() == (searched / "front.json").read_bytes()
    assert (out / "history.csv").read_bytes() == (searched / "history.csv").read_bytes()


def test_bad_requests_are_one_line(elastic_run: Path, searched: Path, tmp_path: Path) -> None:
    ask = ("search", elastic_run, "-o", tmp_path / "out", "--samples", 10, "--population", 8, "--generations", 2)
    for arguments, text in [
        (("--objective", "acuracy"), "did you mean accuracy"),
        (("--objective", "accuracy", "--max", "weights_mb=4"), "write weights_kib"),
        (("--objective", "latency"), "name one with --target"),
        (("--objective", "bitops", "--strategy", "nsga3"), "did you mean nsga2"),
        (("--objective", "bitops", "--max", "weights_kib=0.1"), "is reachable"),
        ((), "needs an objective"),
    ]:
        code, _, error = call(*ask, *arguments)
        assert code == 2 and text in error and error.strip().count("\n") <= 2, error
    other = ("search", elastic_run, "--objective", "accuracy", *SMALL, "-o", searched)
    code, _, error = call(*other)
    assert code == 2 and "another search (limits, objectives differ)" in error
    (tmp_path / "file").write_text("x")
    code, _, error = call("search", elastic_run, "--objective", "bitops", "-o", tmp_path)
    assert code == 2 and "holds no search" in error
    code, _, error = call(
        "search", elastic_run, "--objective", "bitops", "--strategy", "allocation", "-o", tmp_path / "a"
    )
    assert code == 2 and "method vertical" in error


def test_samples_of_the_run_are_not_scored_again(
    elastic_run: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (searched / "scores.jsonl").read_text().splitlines()]
    encoding = Encoding(load_run(elastic_run)[1].space)
    path, out = tmp_path / "samples.json", tmp_path / "out"
    path.write_bytes(Samples.of(rows, encoding, ["a search"]).to_bytes())
    scored: list[SubnetSpec] = []
    real = Judge.score
    monkeypatch.setattr(Judge, "score", lambda self, spec: scored.append(spec) or real(self, spec))
    monkeypatch.setattr("qdeploy.report.front.write_report", lambda *_: None)
    ask = ("search", elastic_run, *QUESTION, *SMALL[:-4], "--measure", 1, "--scored", path, "-o", out)
    assert call(*ask)[0] == 0
    held = {row["spec_id"] for row in rows}
    assert len(scored) <= 1 and not held & {spec.id for spec in scored}  # one of the front
    found = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert found[: len(rows)] == rows and len(found) == len(rows) + len(scored)
    code, _, error = call(*ask[:-1], tmp_path / "b", "--mirror")
    assert code == 2 and "leave --mirror out" in error and not (tmp_path / "b").exists()
    path.write_bytes(path.read_bytes().replace(b'"run": "', b'"run": "x'))
    code, _, error = call(*ask[:-1], tmp_path / "b")
    assert code == 2 and "another run or space" in error


class Counted:
    """Stands for building a subnet, which takes seconds: latency follows from widths, kernels from layers."""

    def __init__(self, net: object, name: str, images: object, target: Target) -> None:
        self.target = target

    def __call__(self, spec: SubnetSpec) -> Counted:
        self.spec = spec
        return self

    def measure(self, device: object) -> dict[str, object]:
        bits = sum(entry.weight_bits for entry in self.spec.layers)
        kernels = [[entry.layer, "conv", f"kernel of {entry.layer}", 0.1, 0.1, 0.1] for entry in self.spec.layers]
        figures = {"latency_ms": 1 + bits / 500, "download_kib": 10 + bits, "peak_memory_kib": 50 + bits}
        return figures | {"spec_id": self.spec.id, "spec": self.spec.to_json(), "kernels": kernels}


def test_a_search_under_a_latency_limit_measures_its_front(
    elastic_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Builder", Counted)
    ask = ("--target", ROOT / "targets" / "host.toml", "--objective", "bitops", "--objective", "download")
    code, _, error = call("search", elastic_run, *ask, "--max", "latency_ms=1.3", *SMALL, "-o", tmp_path / "out")
    assert code == 0 and "latency_ms" in error and "90% within" in error, error
    real = [member for member in read_front(tmp_path / "out").members if member.measured]
    assert real and all(member.measured["latency_ms@host"] <= 1.3 for member in real)
    rows = [json.loads(line) for line in (tmp_path / "out" / "host.jsonl").read_text().splitlines()]
    assert len({row["spec_id"] for row in rows}) == len(rows) >= 10  # 8 spread, one of each shape, the front
    code, _, error = call("search", elastic_run, *ask, "--device", "pi=local", *SMALL, "-o", tmp_path / "b")
    assert code == 2 and "no --target has the name 'pi'" in error


def test_subnets_measured_on_this_machine(elastic_run: Path, tmp_path: Path) -> None:
    from qdeploy.data import load
    from qdeploy.search.measure import Builder, Building, LocalDevice, Measurements, Packed
    from qdeploy.target import load_target

    recipe, net = load_run(elastic_run)
    images, target = load("fashion-mnist", "sample").images[:256], load_target(ROOT / "targets" / "host.toml")
    build = Builder(net, recipe.name, images, target)
    path, specs, seen = tmp_path / "host.jsonl", [net.uniform(4), net.uniform(2)], []

    class Second(LocalDevice):
        """Vanishes after its first run."""

        def measure(self, artifact: Path, params: object) -> dict[str, object]:
            if seen:
                raise DeviceError("vanished")
            return super().measure(artifact, params)  # type: ignore[arg-type]

    with pytest.raises(DeviceError, match="vanished"):
        Measurements(path, build, Second(noise=1000.0)).measure(specs, seen.append)
    making = pickle.dumps(Building(RunCopy.of(elastic_run), recipe.name, packed_images(images), target))
    spread: list[list[str]] = []

    def elsewhere(chunk: Mapping[str, SubnetSpec]) -> Iterator[tuple[str, Packed]]:
        """What a worker does, pickles included."""
        spread.append(list(chunk))
        made = pickle.loads(making)()
        for key, spec in chunk.items():
            yield key, pickle.loads(pickle.dumps(made(spec)))

    held = Measurements(path, build, LocalDevice(noise=1000.0), elsewhere)
    assert list(held.rows) == [specs[0].id] and held.rows[specs[0].id] == seen[0]
    held.measure([*specs, specs[0]], seen.append)
    assert [row["spec_id"] for row in seen] == [spec.id for spec in specs] and spread == [[specs[1].id]]
    for row in seen:
        assert 0 < row["quartiles_ms"][0] <= row["latency_ms"] <= row["quartiles_ms"][1]
        assert row["peak_memory_kib"] * 1024 > row["packed_bytes"] + row["arena_bytes"]
        assert row["download_kib"] > 0
        assert len(row["kernels"]) > len(specs[0].layers) and all(
            low <= ms <= high for *_, low, ms, high in row["kernels"]
        )
