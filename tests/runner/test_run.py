"""qdeploy-run on this machine: the same outputs as the Python client, little memory, one line for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdeploy.compile.artifact import load_artifact
from qdeploy.files import canonical_json
from qdeploy.target import FEATURES, missing_features
from tests.runner.conftest import Demo
from tests.runner.programs import run

BAD, MACHINE = 2, 3
MEGABYTE = 1_000_000


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_an_artifact_with_its_level_gives_the_outputs_of_python(demo: Demo, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    assert run(demo.constant, "--input", saved(tmp_path / "x.npy", demo.images), "--output", out, "--json").code == 0
    assert np.array_equal(np.load(out), demo.outputs["w4"])


def test_codes_are_those_of_python_from_any_form_of_the_images(demo: Demo, tmp_path: Path) -> None:
    loaded = load_artifact(demo.constant)
    real = demo.images.astype(np.float32) / np.float32(255)
    codes = np.concatenate([loaded.codes(image[None]) for image in real])
    real[:50].tofile(tmp_path / "a.f32")
    rest = [saved(tmp_path / "b.npy", demo.images[50:120]), saved(tmp_path / "c.npy", real[120:199, 0])]
    one, out = saved(tmp_path / "d.npy", demo.images[199, 0]), tmp_path / "codes.npy"
    found = run(demo.constant, "--input", tmp_path / "a.f32", *rest, one, "--codes", "--output", out, "--json")
    assert found.report["images"] == 200
    assert np.load(out).dtype == codes.dtype and np.array_equal(np.load(out), codes)
    raw = tmp_path / "codes.bin"
    assert run(demo.constant, "--input", rest[0], "--codes", "--output", raw, "--json").code == 0
    assert raw.read_bytes() == codes[50:120].tobytes()


@pytest.mark.parametrize("mode", ["swap", "in-place"])
def test_climbs_and_drops_give_each_levels_outputs(demo: Demo, tmp_path: Path, mode: str) -> None:
    x, out = saved(tmp_path / "x.npy", demo.images), tmp_path / "out.npy"
    before = {path: path.stat().st_mtime_ns for path in demo.device.rglob("*")}
    args = ("--level", "w2", "--climb", "w4,w2,w4", "--mode", mode, "--output", out, "--json")
    report = run(demo.device, "--input", x, *args).report
    levels = ["w2", "w4", "w2", "w4"]
    assert [row["level"] for row in report["passes"]] == levels
    assert all(row["fetched_bytes"] == 0 and row["calls"] == 200 for row in report["passes"])
    found = np.load(out)
    assert found.shape == (4, 200, 10)
    for rows, level in zip(found, levels, strict=True):
        assert np.array_equal(rows, demo.outputs[level])
    assert before == {path: path.stat().st_mtime_ns for path in demo.device.rglob("*")}, "the folder was changed"


def test_the_level_in_force_is_the_default_and_an_unpacked_artifact_will_do(demo: Demo, tmp_path: Path) -> None:
    device, x = demo.copy("device", tmp_path), saved(tmp_path / "x.npy", demo.images[:3])
    shutil.rmtree(device / "artifacts")  # as a gateway leaves it
    assert run(device, "--input", x, "--json").report["passes"][0]["level"] == "w4"
    unpacked = next((device / "artifacts").glob("*/*.so"))
    assert unpacked.read_bytes() == (demo.artifact / "lib.so").read_bytes()
    unpacked.write_bytes(b"damaged")  # mended from its piece
    assert run(device, "--input", x, "--json").code == 0
    expected = saved(tmp_path / "y.npy", demo.outputs["w2"][:3])
    assert (
        run(device, "--artifact", demo.artifact, "--level", "w2", "--input", x, "--expect", expected, "--json").code
        == 0
    )


def test_a_difference_from_what_was_expected_is_counted(demo: Demo, tmp_path: Path) -> None:
    x, outputs = saved(tmp_path / "x.npy", demo.images[:20]), demo.outputs["w4"][:20].copy()
    outputs[3, 4] = np.nextafter(outputs[3, 4], np.float32(np.inf))
    found = run(demo.constant, "--input", x, "--expect", saved(tmp_path / "y.npy", outputs), "--json")
    assert found.code == 1 and json.loads(found.out)["expect"] == {"compared": 200, "differing": 1}


def test_memory_is_the_networks_and_little_more(demo: Demo, tmp_path: Path) -> None:
    x = saved(tmp_path / "x.npy", demo.images)
    alone = run(demo.constant, "--input", x, "--json").report["memory"]
    own = alone["packed_bytes"] + alone["arena_bytes"]
    assert alone["peak_bytes"] <= 12 * MEGABYTE + own
    ladder = run(demo.device, "--input", x, "--level", "w2", "--climb", "w4,w2", "--json").report["memory"]
    assert 1 * MEGABYTE < ladder["resident_bytes"] <= 12 * MEGABYTE + own
    assert ladder["peak_bytes"] <= 12 * MEGABYTE + own + 2 * ladder["packed_bytes"]


def test_profile_names_every_kernel_call(demo: Demo, tmp_path: Path) -> None:
    x = saved(tmp_path / "x.npy", demo.images[:4])
    row = run(demo.constant, "--input", x, "--profile", "--repeat", 5, "--json").report["passes"][0]
    kernels = json.loads((demo.constant / "artifact.json").read_bytes())["variants"][0]["kernels"]
    assert [k["function"] for k in row["kernels"]] == [name for k in kernels for name in k["functions"]]
    assert row["calls"] == 20 and all(k["ms"] >= 0 for k in row["kernels"])
    assert 0 < sum(k["ms"] for k in row["kernels"]) <= row["ms"]["max"] * 1.001


def test_the_processors_features_are_those_of_python() -> None:
    report = run("--cpu", "--json").report
    assert set(report["known"]) == FEATURES["x86_64"] and report["arch"] == "x86_64"
    assert report["features"] == sorted(FEATURES["x86_64"] - set(missing_features(FEATURES["x86_64"])))


# --- what is wrong ---------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no folder": ((), "name an artifact folder"),
    "no such folder": (("/nowhere",), "neither an artifact folder nor a pulled device folder"),
    "unknown option": (("CONSTANT", "--fast"), "unknown option --fast"),
    "no value": (("CONSTANT", "--input"), "--input needs a file"),
    "repeat": (("CONSTANT", "--input", "X", "--repeat", "0"), "--repeat is a number of 1 to"),
    "mode": (("DEVICE", "--input", "X", "--mode", "fast"), "--mode is swap or in-place"),
    "output without images": (("CONSTANT", "--output", "Y"), "--output needs images"),
    "no such image": (("CONSTANT", "--input", "/nowhere.npy"), "cannot read the images /nowhere.npy"),
    "a folder as image": (("CONSTANT", "--input", "/tmp"), "/tmp is no file"),
    "level of an artifact": (("CONSTANT", "--level", "w2"), "--level and --climb need a pulled folder"),
    "no level": (("ARTIFACT",), "holds no level: run a pulled folder, or compile with --constant"),
    "unknown level": (("DEVICE", "--level", "w9"), "no level w9 in fashion-mobilenetv3: levels are w2, w4"),
    "unknown climb": (("DEVICE", "--input", "X", "--climb", "w4,w9"), "no level w9"),
    "a level of two lines": (("DEVICE", "--level", "a\nb\x1b"), "no level a?b? in"),
    "unwritable": (("CONSTANT", "--input", "X", "--output", "/nowhere/y"), "cannot write /nowhere/y"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_are_one_line(demo: Demo, tmp_path: Path, case: str) -> None:
    words, text = ARGUMENTS[case]
    known = {"CONSTANT": demo.constant, "ARTIFACT": demo.artifact, "DEVICE": demo.device, "Y": tmp_path / "y"}
    known["X"] = saved(tmp_path / "x.npy", demo.images[:2])
    found = run(*(str(known.get(word, word)) for word in words or ("--json",)))
    assert found.code == BAD and text in found.error and found.error.count("\n") == 1
    assert not (tmp_path / "y").exists()


def test_an_output_never_takes_the_place_of_what_is_no_file(demo: Demo, tmp_path: Path) -> None:
    pipe, x = tmp_path / "pipe", saved(tmp_path / "x.npy", demo.images[:2])
    os.mkfifo(pipe)
    found = run(demo.constant, "--input", x, "--output", pipe)
    assert found.code == BAD and "pipe is no file: name one for the output" in found.error and pipe.is_fifo()


IMAGES: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "shape": (lambda x: x[:, :, :27], "has shape [2, 1, 27, 28]: the model reads [n, 1, 28, 28]"),
    "dtype": (lambda x: x.astype(np.float64), "not a usable .npy file"),
    "fortran": (lambda x: np.asfortranarray(x.repeat(2, 0)), "not a usable .npy file"),
    "none": (lambda x: x[:0], "has shape [0, 1, 28, 28]"),
    "not finite": (lambda x: np.full(x.shape, np.nan, np.float32), "values that are not finite"),
    "int8": (lambda x: x.astype(np.int8), "holds int8"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_wrong_images_are_one_line(demo: Demo, tmp_path: Path, case: str) -> None:
    change, text = IMAGES[case]
    x, out = saved(tmp_path / "x.npy", change(demo.images[:2])), tmp_path / "y"
    found = run(demo.constant, "--input", x, "--output", out)
    assert found.code == BAD and text in found.error and found.error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [x], "something was left behind"


@pytest.mark.parametrize("length", [0, 5, 60, 127, 128, 1000])
def test_cut_and_changed_image_files_are_refused(demo: Demo, tmp_path: Path, length: int) -> None:
    x = saved(tmp_path / "x.npy", demo.images[:2])
    x.write_bytes(x.read_bytes()[:length])
    found = run(demo.constant, "--input", x)
    assert found.code == BAD and found.error.startswith("error: ") and found.error.count("\n") == 1


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    head = json.loads((folder / "artifact.json").read_bytes())
    change(head)
    (folder / "artifact.json").write_bytes(canonical_json(head))


ARTIFACTS: dict[str, tuple[Callable[[dict[str, Any]], object], int, str]] = {
    "format": (lambda h: h.update(format="qdeploy-artifact/1"), BAD, "does not have the format qdeploy-artifact/2"),
    "extra key": (lambda h: h.update(more=1), BAD, "unknown key"),
    "shape": (lambda h: h["inputs"][0].update(shape=[1, 1, 28, 29]), BAD, "was not made with this artifact.json"),
    "arena": (lambda h: h["variants"][0].update(arena_bytes=64), BAD, "was not made with this artifact.json"),
    "huge": (lambda h: h["variants"][0].update(arena_bytes=1 << 40), BAD, "arena_bytes is too large"),
    "feature": (lambda h: h["variants"][0]["target"]["features"].append("xop"), MACHINE, "cpu lacks xop"),
    "unknown feature": (lambda h: h["variants"][0]["target"]["features"].append("warp"), MACHINE, "cpu lacks warp"),
    "architecture": (lambda h: h["variants"][0]["target"].update(arch="aarch64"), MACHINE, "is for aarch64"),
    "cuda": (lambda h: h["variants"][0]["target"].update(kind="cuda"), MACHINE, "of kind cuda"),
    "version": (lambda h: h["versions"].update({"apache-tvm": "0.9.0"}), MACHINE, "compiled by apache-tvm 0.9.0"),
    "path": (lambda h: h["variants"][0].update(library="../lib.so"), BAD, "not a file of the folder"),
}


@pytest.mark.parametrize("case", ARTIFACTS)
def test_an_edited_description_is_refused_before_code_runs(demo: Demo, tmp_path: Path, case: str) -> None:
    change, code, text = ARTIFACTS[case]
    folder = demo.copy("constant", tmp_path)
    edited(folder, change)
    found = run(folder, "--input", saved(tmp_path / "x.npy", demo.images[:2]))
    assert (found.code, found.error.count("\n")) == (code, 1) and text in found.error


@pytest.mark.parametrize("name", ["lib.so", "packed.bin", "artifact.json"])
def test_a_flipped_bit_or_a_missing_file_is_refused(demo: Demo, tmp_path: Path, name: str) -> None:
    folder = demo.copy("constant", tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    found = run(folder)
    assert found.code == BAD and ("does not match" in found.error or "artifact.json" in found.error)
    (folder / name).write_bytes(data[:-100])
    assert run(folder).code == BAD
    (folder / name).unlink()
    assert run(folder).code == BAD


def test_random_damage_to_a_device_folder_never_changes_an_output(demo: Demo, tmp_path: Path) -> None:
    device, x = demo.copy("device", tmp_path), saved(tmp_path / "x.npy", demo.images[:2])
    expected = saved(tmp_path / "y.npy", demo.outputs["w4"][:2])
    rng = np.random.default_rng(5)
    files = [*(device / "objects").iterdir(), *(device / "manifests").iterdir(), device / "current.json"]
    for path in files:
        data = path.read_bytes()
        for at in rng.integers(0, len(data), 3):
            changed = bytearray(data)
            changed[at] ^= 1 << rng.integers(8)
            path.write_bytes(changed)
            found = run(device, "--input", x, "--expect", expected)
            # a byte that no level reads (an URL, planes above) may change unseen
            assert found.code in (0, BAD) and (found.code == 0 or found.error.count("\n") == 1), found.error
        path.write_bytes(data)
    assert run(device, "--input", x, "--expect", expected, "--json").code == 0


def test_a_level_that_is_not_held_says_how_to_fetch_it(demo: Demo, tmp_path: Path) -> None:
    from qdeploy.client.pull import pull
    from qdeploy.serve.app import serving

    with serving(demo.tree) as url:
        pull(url, tmp_path / "low", level="w2", unsigned=True)
    found = run(tmp_path / "low", "--input", saved(tmp_path / "x.npy", demo.images[:2]), "--climb", "w4")
    assert found.code == BAD and "level w4: object" in found.error and "qdeploy climb" in found.error
