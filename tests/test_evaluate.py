"""Scoring many specs: nothing lost, nothing twice, the same file whatever made it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.data import Dataset
from qdeploy.errors import DeviceError, ModelError, RecipeError
from qdeploy.evaluate import Judge, evaluate, read_specs, spec_lines
from qdeploy.quant.calibrate import calibrated
from qdeploy.space import SubnetSpec
from qdeploy.train.run import accuracy, load_run

REPOSITORY = Path(__file__).parents[1]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def specs(elastic_run: Path) -> list[SubnetSpec]:
    space, random = load_run(elastic_run)[1].space, Random(0)
    return [space.sample(random) for _ in range(5)]


@pytest.fixture(scope="module")
def listed(specs: list[SubnetSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("specs") / "specs.jsonl"
    path.write_bytes(spec_lines([*specs, specs[0]]) + b"\n")
    return path


@pytest.fixture(scope="module")
def whole(elastic_run: Path, listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "out.jsonl"
    evaluate(elastic_run, listed, out, None, quiet)
    return out


def test_each_spec_is_scored_once_on_the_held_out_images(
    elastic_run: Path, specs: list[SubnetSpec], whole: Path
) -> None:
    rows = [json.loads(line) for line in whole.read_bytes().splitlines()]
    assert [row["spec_id"] for row in rows] == [spec.id for spec in specs]
    assert all(SubnetSpec.from_json(row["spec"]).id == row["spec_id"] for row in rows)
    assert {row["images"] for row in rows} == {500}
    assert rows[1]["accuracy"] == Judge(elastic_run, None).score(specs[1])
    assert max(row["accuracy"] for row in rows) > 30  # chance is 10


def test_mirror_images_count_as_much_as_the_images(
    elastic_run: Path, specs: list[SubnetSpec], listed: Path, whole: Path, tmp_path: Path
) -> None:
    judge, plain = Judge(elastic_run, None, mirror=True), Judge(elastic_run, None).held_out
    both = judge.held_out
    halves = [Dataset(both.name, both.split, both.images[at], both.labels[at]) for at in np.split(np.arange(1000), 2)]
    assert len(both) == 1000 and np.array_equal(halves[0].images, plain.images)
    assert np.array_equal(halves[1].images, np.flip(plain.images, axis=3))
    assert all(np.array_equal(half.labels, plain.labels) for half in halves)
    net = calibrated(judge.net, specs[0], judge.calibration)
    of_halves = [accuracy(net, specs[0], half) for half in halves]
    assert judge.score(specs[0]) == pytest.approx(np.mean(of_halves), abs=0.1)
    assert of_halves[0] == pytest.approx(json.loads(whole.read_bytes().splitlines()[0])["accuracy"], abs=0.2)
    out = tmp_path / "out.jsonl"
    shutil.copy(whole, out)
    with pytest.raises(ModelError, match=r"other images \(--mirror\?\)"):
        evaluate(elastic_run, listed, out, None, quiet, mirror=True)
    assert out.read_bytes() == whole.read_bytes()


def test_several_processes_and_a_kill_give_the_same_file(
    elastic_run: Path, listed: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "qdeploy.cli",
        "evaluate",
        str(elastic_run),
        "--specs",
        str(listed),
        "-o",
        str(out),
    ]
    child = subprocess.Popen([*command, "--workers", "2"], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (not out.exists() or not out.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    held = out.read_bytes()
    with out.open("ab") as file:
        file.write(whole.read_bytes()[:40])  # a line that the kill cut short
    scored: list[SubnetSpec] = []
    real = Judge.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "score", lambda self, spec: scored.append(spec) or real(self, spec))
        rows = evaluate(elastic_run, listed, out, None, quiet)
    assert held.count(b"\n") + len(scored) == len(rows) == 5
    assert out.read_bytes() == whole.read_bytes()


def test_results_of_others_are_kept_apart(elastic_run: Path, listed: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for change, text in [
        ({"run": "0" * 12}, "another run"),
        ({"images": 7}, "other images"),
        ({"x": 1}, "not a result"),
    ]:
        row = json.loads(whole.read_bytes().splitlines()[0]) | change
        out.write_text(json.dumps(row) + "\n")
        with pytest.raises(ModelError, match=text):
            evaluate(elastic_run, listed, out, None, quiet)
    out.write_bytes(b"{}\n{\n")
    with pytest.raises(ModelError, match="line 1"):
        evaluate(elastic_run, listed, out, None, quiet)


def test_two_at_once_are_refused(elastic_run: Path, listed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DeviceError, match="another `qdeploy evaluate`"):
            evaluate(elastic_run, listed, out, None, quiet)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no subnet spec"),
        (b'{"version":1}\n', "line 1: a subnet spec needs"),
        (b"\n{\n", "line 2: .*not valid"),
    ],
)
def test_a_wrong_specs_file_names_the_line(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "specs.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=text):
        read_specs(path)


def test_commands(elastic_run: Path, specs: list[SubnetSpec], whole: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        return result.exit_code, result.stdout, result.stderr

    path = tmp_path / "specs.jsonl"
    code, out, _ = call("space", elastic_run, "--sample", 5, "--seed", 0, "-o", path)
    space = load_run(elastic_run)[1].space
    assert code == 0 and f"{space.size} subnets" in out and read_specs(path) == specs
    code, _, error = call("space", elastic_run, "--sample", 5, "-o", path)
    assert code == 2 and "--force" in error
    assert call("space", elastic_run, "--sample", 5)[0] == 2
    scores = tmp_path / "scores.jsonl"
    shutil.copy(whole, scores)
    code, out, error = call("evaluate", elastic_run, "--specs", path, "-o", scores)
    assert code == 0 and "5 specs on 500 images, the best" in out and "5 of 5 specs are scored already" in error
    code, out, error = call("evaluate", elastic_run, "--specs", path, "-o", scores, "--json", "--quiet")
    found = json.loads(out)
    assert code == 0 and error == "" and (found["specs"], found["images"]) == (5, 500)
    assert set(found["best"]) == {"spec_id", "accuracy"} and found["out"] == str(scores)
    path.write_bytes(spec_lines(specs[:1]) + spec_lines([SubnetSpec("tiny", specs[0].layers)]))
    code, _, error = call("evaluate", elastic_run, "--specs", path, "-o", scores)
    assert code == 2 and "spec 2" in error and "network 'tiny'" in error
    shipped = REPOSITORY / "models" / "fashion-resnet8"
    assert call("space", shipped)[0] == 0
    code, _, error = call("evaluate", shipped, "--specs", path, "-o", scores)
    assert code == 2 and "held_out" in error
