from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdeploy.errors import ModelError
from qdeploy.frozen import save_frozen
from qdeploy.report.folders import read, recognized, report
from qdeploy.report.front import write_report
from qdeploy.report.page import SECTIONS
from qdeploy.report.write import MOST_BYTES
from tests.bundle.small import small_tree
from tests.nets_frozen import random_frozen
from tests.report.material import demo_result, profile, run_folder, search_folder, sensitivity, write_json


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind. Shared: copy before you change one."""
    root = tmp_path_factory.mktemp("report")
    small_tree(root)
    search_folder(root / "search")
    write_json(root / "sens" / "sensitivity.json", sensitivity())
    write_json(root / "artifact" / "profile.json", profile())
    write_json(root / "times" / "profile.json", profile())
    write_json(root / "demo" / "demo.json", demo_result())
    run_folder(root / "run")
    save_frozen(random_frozen(0), root / "frozen")
    weights = {"a": {"bits": 2, "top": 4, "container": 8}, "b": {"bits": 8, "top": 8, "container": 8}}
    sidecar = {"weights": weights, "average_bits": 2.5, "weight_bytes": 99, "accuracy": None}
    sidecar |= {"float_output": {"error": 0.1, "agreement": 95.0, "images": 4}}
    write_json(root / "levels" / "w2.onnx.json", sidecar)
    write_json(root / "levels" / "w8.onnx.json", sidecar | {"weight_bytes": 200})
    return root


KINDS = {
    "search": ("search", {"front", "bits", "agreement", "hypervolume"}),
    "tree": ("bundle", {"ladder", "bits"}),
    "artifact": ("compiled artifact", {"time"}),
    "times": ("profile", {"time"}),
    "sens": ("sensitivity", {"sensitivity"}),
    "run": ("training run", {"training"}),
    "frozen": ("frozen network", {"bits"}),
    "levels": ("QDQ ONNX files", {"bits", "ladder"}),
    "demo": ("demo", {"front", "bits", "time", "ladder"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_folder_is_recognized_and_drawn(everything: Path, name: str) -> None:
    kind, sections = KINDS[name]
    assert list(recognized(everything / name)) == [kind]
    assert {block.section for block in read(everything / name).blocks} == sections


def test_a_report_of_all_folders_has_all_sections(everything: Path, tmp_path: Path) -> None:
    out, plots = tmp_path / "r.html", tmp_path / "plots"
    found = report([everything / name for name in KINDS], out, plots)
    page = out.read_text()
    assert all(f"<h2>{section.title}</h2>" in page for section in SECTIONS.values())
    assert len(page) < MOST_BYTES and page.count("<svg") == len(found["figures"])
    files = sorted(path.name for path in plots.iterdir())
    assert files == sorted(f"{name}.{end}" for name in found["figures"] for end in ("png", "svg"))
    assert [row["kinds"] for row in found["folders"]] == [[kind] for kind, _ in KINDS.values()]
    assert list(found["missing"]) == ["Accuracy of each rung (tree)"]


def test_a_climb_sends_nothing_twice(everything: Path) -> None:
    block = next(block for block in read(everything / "tree").blocks if block.section == "ladder")
    rows = block.plots[0].data.rows
    fetched = [row[-3] for row in rows]
    assert [row[-2] for row in rows] == [sum(fetched[: i + 1]) for i in range(3)]
    assert rows[0][1] and not rows[1][1]  # the graph comes once
    assert f"fetches {sum(fetched):,} bytes" in block.text[0] and "is fetched once" in block.text[1]


def test_fusion_lint_names_each_float_operator(everything: Path, tmp_path: Path) -> None:
    shutil.copytree(everything / "artifact", tmp_path / "a")
    head = json.loads((tmp_path / "a" / "artifact.json").read_text())
    head["variants"][0]["kernels"] = [
        {"name": "layer2", "operator": "mul", "arithmetic": "float", "reason": "<no> kernel", "functions": ["f"]},
        {"name": "layer0", "operator": "conv", "arithmetic": "integer", "functions": ["g"]},
    ]
    write_json(tmp_path / "a" / "artifact.json", head)
    block = read(tmp_path / "a").blocks[0]
    assert block.tables[0].rows == [["layer2", "mul", 50.0, "<no> kernel"]]
    assert "2 kernels, 1 of them in integers" in block.text[0]
    (tmp_path / "a" / "profile.json").unlink()
    found = read(tmp_path / "a")
    assert found.blocks[0].tables[0].rows[0][2] is None
    assert "--layers" in found.missing["Time of each operator (a)"]


def test_what_lacks_is_named_with_its_command(everything: Path, tmp_path: Path) -> None:
    shutil.copytree(everything / "search", tmp_path / "s")
    for name in ("foretold.jsonl", "history.csv", "search.json"):
        (tmp_path / "s" / name).unlink()
    found = report([tmp_path / "s"], tmp_path / "r.html", None)
    assert found["folders"][0]["sections"] == ["front", "bits"]
    assert "cannot read" in found["missing"]["Predicted against measured (s)"]
    assert "qdeploy bundle" in found["missing"]["What a climb costs"]
    assert "Predicted against measured" not in found["missing"]  # it was said already, with the reason
    (tmp_path / "s" / "front.json").unlink()
    write_json(tmp_path / "s" / "search.json", {})
    with pytest.raises(ModelError, match="it resumes"):
        report([tmp_path / "s"], tmp_path / "other.html", None)
    assert not (tmp_path / "other.html").exists()


def test_a_half_written_line_of_a_run_that_goes_on_is_left_out(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "quant')
    (block,) = read(tmp_path / "run").blocks
    assert len(block.plots[0].data.rows) == 6


HOSTILE: dict[str, tuple[str, str, Any]] = {
    "nan": ("run", "metrics.jsonl", '{"phase": "a", "epoch": 1, "loss": {"x": NaN}, "images_per_second": 1}\n'),
    "infinite": ("run", "metrics.jsonl", '{"phase": "a", "epoch": 1, "loss": {"x": 1e999}, "images_per_second": 1}\n'),
    "huge number": (
        "run",
        "metrics.jsonl",
        '{"phase": "a", "epoch": 1, "loss": {"x": 1e99}, "images_per_second": 1}\n',
    ),
    "no loss": ("run", "metrics.jsonl", '{"phase": "a", "epoch": 1}\n'),
    "no epoch": ("run", "metrics.jsonl", ""),
    "a list": ("sens", "sensitivity.json", "[1, 2]"),
    "another width": ("sens", "sensitivity.json", json.dumps(sensitivity() | {"widths": [5]})),
    "half": ("sens", "sensitivity.json", json.dumps(sensitivity())[:99]),
    "deep": ("sens", "sensitivity.json", "[" * 100_000),
    "text": ("times", "profile.json", json.dumps(profile() | {"layers": [{"layer": "a", "ms": "fast"}]})),
    "negative": ("times", "profile.json", json.dumps(profile() | {"layers": 3})),
    "unfinished": ("demo", "demo.json", "{}"),
    "a level lacks": ("demo", "demo.json", json.dumps(demo_result() | {"levels": [{"level": "w2"}]})),
    "no level": ("demo", "demo.json", json.dumps(demo_result() | {"levels": []})),
    "another format": ("search", "front.json", '{"format": "x"}'),
    "empty front": ("search", "front.json", None),
    "not UTF-8": ("levels", "w2.onnx.json", b"\xff\xfe"),
    "no weights": ("levels", "w2.onnx.json", "{}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_error_and_leave_nothing(everything: Path, tmp_path: Path, name: str) -> None:
    folder, file, content = HOSTILE[name]
    shutil.copytree(everything / folder, tmp_path / folder)
    path = tmp_path / folder / file
    if name == "empty front":
        content = json.dumps(json.loads(path.read_text()) | {"members": []})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError) as error:
        report([tmp_path / folder], tmp_path / "r.html", tmp_path / "plots")
    assert file in str(error.value) or folder in str(error.value)
    assert not (tmp_path / "r.html").exists() and not (tmp_path / "plots").exists()


def test_random_damage_is_an_error_or_a_page(everything: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for folder, file in (("search", "front.json"), ("sens", "sensitivity.json"), ("times", "profile.json")):
        whole = (everything / folder / file).read_bytes()
        shutil.copytree(everything / folder, tmp_path / folder)
        for _ in range(12):
            bad = bytearray(whole)
            at = int(random.integers(len(bad)))
            bad[at : at + int(random.integers(1, 20))] = bytes(
                random.integers(32, 127, int(random.integers(0, 4))).tolist()
            )
            (tmp_path / folder / file).write_bytes(bytes(bad))
            try:
                read(tmp_path / folder)
            except ModelError as e:
                assert "\n" not in str(e)


def test_hostile_names_are_text(everything: Path, tmp_path: Path) -> None:
    name = "<script>alert(1)<" + "a" * 90
    shutil.copytree(everything / "search", tmp_path / name)
    write_json(tmp_path / "s" / "sensitivity.json", sensitivity(("</script><b>", "$x", "a\ud800\x00\nb", "n" * 5000)))
    report([tmp_path / name, tmp_path / "s"], tmp_path / "r.html", None)
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page and "<b>" not in page and page.count("</script>") == 1
    assert "&lt;script&gt;alert(1)" in page


def test_a_front_of_hundreds_fits(tmp_path: Path) -> None:
    front = search_folder(tmp_path / "s")
    value = json.loads(front.to_bytes())
    value["members"] = (value["members"] * 900)[:900]
    write_json(tmp_path / "s" / "front.json", value)
    report([tmp_path / "s"], tmp_path / "r.html", None)
    page = (tmp_path / "r.html").read_text()
    assert len(page) < MOST_BYTES and "800 of them are drawn" in page and "The first 400 of 900 rows" in page


def test_no_folder_and_no_kind_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        read(tmp_path / "absent")
    with pytest.raises(ModelError, match="knows"):
        read(tmp_path)


def test_a_search_writes_its_own_report(tmp_path: Path) -> None:
    search_folder(tmp_path)
    write_report(tmp_path, "Search of <x>", "nsga2, no limits.")
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Search of &lt;x&gt;</h1>" in page and "nsga2, no limits." in page and page.count("<svg") == 4
    assert {path.stem for path in tmp_path.glob("*.png")} == {"front", "bits", "agreement", "hypervolume"}
