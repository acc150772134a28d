"""The device's commands as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.client.settings import read_settings
from qdeploy.serve.app import Options, serving, serving_both
from qdeploy.serve.fleet import read_fleet
from qdeploy.serve.limits import Limits
from tests.client.tree import Tree
from tests.trust.world import World


def run(*args: object, code: int = 0) -> str:
    found = CliRunner().invoke(main, [str(arg) for arg in args])
    assert found.exit_code == code, found.output
    return found.output


def test_a_device_from_first_contact_to_eviction(dev: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.publish()
    with serving(world.storage.root) as url:
        assert "no root of trust yet" in run("pull", url, dev, code=2)
        run("pull", url, dev, "--root", world.home / "1.root.json", "--level", "w3")
        row = json.loads(run("pull", url, url + "/", dev, "--json", "--quota", 10**7))
        assert (row["level"], row["wanted"], row["stale"], row["signed"]) == ("w3", "w3", None, True)
        assert "level w4" in run("climb", dev, "--to", "w4", "--rate", 10**7)
        assert json.loads(run("drop", dev, "--to", "w2", "--json"))["level"] == "w2"
    assert json.loads(run("evict", dev, "--json"))["files"] == 2
    assert "0 files removed" in run("evict", dev)


def test_a_device_reports_when_it_is_told_to(dev: Path, tree: Tree, tmp_path: Path) -> None:
    options = Options(port=0, devices=tmp_path / "states.sqlite", limits=Limits(stop_s=1))
    with serving_both(tree.root, options) as (url, _):
        run("pull", url, dev, "--unsigned")
        assert "not taken" not in run("climb", dev, "--to", "w4", "--report", url)
    (state,) = [state for _, state in read_fleet(str(tmp_path / "states.sqlite"))]
    settings = read_settings(dev)
    assert settings is not None and (state.device, state.fetched) == (settings.id, settings.received)
    assert (state.model, state.release, state.wanted, state.reached) == ("toy", 1, "w4", "w4")
    assert "the report was not taken" in run("drop", dev, "--to", "w2", "--report", url)


def test_the_folder_by_option_and_unsigned(tree: Tree, dev: Path) -> None:
    with serving(tree.root) as url:
        output = run("pull", url, "-o", dev, "--unsigned")
        assert "nothing is signed" in output and "(UNSIGNED)" in output
        assert "give at least one URL" in run("pull", url, code=2)


@pytest.mark.parametrize("command", [["climb", "--to", "w3"], ["drop", "--to", "w2"], ["evict"]])
def test_a_folder_that_is_none_is_one_line(tmp_path: Path, command: list[str]) -> None:
    output = run(command[0], tmp_path / "none", *command[1:], code=2)
    assert output.count("\n") == 1
