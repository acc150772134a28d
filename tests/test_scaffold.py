"""`qdeploy init`: the recipe that it writes for images of one's own trains as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from qdeploy.cli import main
from qdeploy.recipe import load_recipe
from tests.test_image_folder import pictures

MODULE = """
from torch import nn

def make(channels, classes):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))

def wrong(channels, classes):
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))

def nothing(channels, classes):
    return 3

def fails(channels):
    return None
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def shortened(recipe: Path) -> None:
    """Few epochs a phase."""
    text = recipe.read_text()
    lines = ["epochs = 8" if line.startswith("epochs = ") else line for line in text.splitlines()]
    assert lines.count("epochs = 8") == 2
    recipe.write_text("\n".join(lines) + "\n")


def test_from_pictures_to_a_frozen_level(tmp_path: Path) -> None:
    pictures(tmp_path / "data", 400, (9, 8), seed=1)
    done = call("init", tmp_path / "mine", "--data", tmp_path / "data", "--network", "tiny", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["images"], found["classes"], found["channels"], found["size"]) == (400, ["cats", "dogs"], 3, [9, 8])
    recipe = Path(found["recipe"])
    assert recipe == tmp_path / "mine" / "recipe.toml"
    shortened(recipe)
    done = call("train", recipe, "-o", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["float"] > 80 and set(report["levels"]) == {"2", "3", "4"}  # dark and light pictures
    done = call("subnet", tmp_path / "run", "--bits", 4, "-o", tmp_path / "s4", "--json", "-q")
    assert done.exit_code == 0 and done.stderr == "", done.output
    row = json.loads(done.stdout)
    assert row["parity"]["simulation"]["differing"] == 0 and 40 < row["test_images"] < 130
    moved = tmp_path / "elsewhere"
    (tmp_path / "data").rename(moved)
    assert "check the path" not in call("subnet", tmp_path / "run", "--bits", 2, "-o", tmp_path / "s2").output
    done = call("subnet", tmp_path / "run", "--bits", 2, "-o", tmp_path / "s2", "--data-dir", moved)
    assert done.exit_code == 0, done.output


def test_a_network_and_arrays_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("scaffold_nets.py").write_text(MODULE)
    random, labels = np.random.default_rng(0), np.arange(600) % 3
    images = np.clip(random.normal(60 + 70 * labels[:, None, None], 20, (600, 8, 8)), 0, 255).astype(np.uint8)
    np.savez("images.npz", images=images, labels=labels)
    done = call("init", ".", "--data", "images.npz", "--network", "scaffold_nets:make", "--classes", "0,2")
    assert done.exit_code == 0 and "400 grey images of 2 classes, 8 x 8" in done.stdout, done.output
    recipe = Path("recipe.toml")
    shortened(recipe)
    done = call("train", recipe, "-o", "run", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["float"] > 80, done.output
    assert call("subnet", "run", "--bits", 4, "-o", "s4").exit_code == 0
    for name, problem in [
        ("wrong", "not into logits [2, 2]"),
        ("nothing", "returned a int"),
        ("fails", "a function that takes (channels, classes)"),
        ("absent", "cannot be imported"),
    ]:
        recipe.write_text(recipe.read_text().replace("scaffold_nets:make", f"scaffold_nets:{name}"))
        done = call("train", recipe, "-o", "other")
        assert done.exit_code == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1
        recipe.write_text(recipe.read_text().replace(f"scaffold_nets:{name}", "scaffold_nets:make"))
    assert not Path("other").exists()


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    pictures(tmp_path / "data", 400, (4, 4))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text("mine")
    done = call("init", tmp_path / "mine", "--data", tmp_path / "data")
    assert done.exit_code == 2 and "exists and may have been edited" in done.stderr
    assert (tmp_path / "mine" / "recipe.toml").read_text() == "mine"


def test_pictures_of_several_sizes_need_one(tmp_path: Path) -> None:
    pictures(tmp_path / "data", 300, (4, 4))
    pictures(tmp_path / "data", 100, (6, 5), name="larger")
    done = call("init", tmp_path / "mine", "--data", tmp_path / "data")
    assert done.exit_code == 2 and "have 2 sizes, 300 of 400 are 4 x 4: give --size 4,4" in done.stderr
    assert not (tmp_path / "mine").exists()
    assert call("init", tmp_path / "mine", "--data", tmp_path / "data", "--size", "5,5").exit_code == 0
    recipe = load_recipe(tmp_path / "mine" / "recipe.toml")
    assert recipe.data.size == (5, 5) and recipe.data.resize == "crop"


def test_too_few_images(tmp_path: Path) -> None:
    pictures(tmp_path / "data", 100, (4, 4))
    done = call("init", tmp_path / "mine", "--data", tmp_path / "data")
    assert done.exit_code == 2 and "100 images of 2 classes: training takes 340 or more" in done.stderr


def test_odd_names_of_classes_and_folders(tmp_path: Path) -> None:
    names = ('say "miau"', "back\\slash", "tab\there", "größe")
    pictures(tmp_path / 'da"ta # 1', 400, (4, 4), classes=names)
    done = call("init", tmp_path / "mine", "--data", tmp_path / 'da"ta # 1')
    assert done.exit_code == 0, done.output
    data = load_recipe(tmp_path / "mine" / "recipe.toml").data
    assert data.classes == tuple(sorted(names)) and data.folder == str(tmp_path / 'da"ta # 1')


@pytest.mark.parametrize("network", ["resnet8", "mobilenetv2-imagenet", "package.module:make"])
def test_every_recipe_has_a_comment_for_each_choice(tmp_path: Path, network: str) -> None:
    pictures(tmp_path / "data", 400, (4, 4))
    assert call("init", tmp_path / "mine", "--data", tmp_path / "data", "--network", network).exit_code == 0
    recipe = load_recipe(tmp_path / "mine" / "recipe.toml")
    assert recipe.network.name == network
    text = (tmp_path / "mine" / "recipe.toml").read_text()
    plain = [line for line in text.splitlines() if line and "#" not in line and not line.startswith("[")]
    known = ("name = ", "folder", "classes", "epochs", "learning_rate", "weight_decay", "nesterov", "batch")
    assert all(line.startswith(known) for line in plain), plain
