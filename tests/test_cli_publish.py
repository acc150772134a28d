"""The publishing commands, as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qdeploy.cli import main
from qdeploy.client.fetch import GoneError
from qdeploy.client.trust import install_root, refresh
from tests.client.tree import make_tree


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_from_keys_to_a_rotation(tmp_path: Path) -> None:
    keys, root, words = tmp_path / "keys", tmp_path / "root", tmp_path / "words"
    words.write_text("a long passphrase\nnot this line\n")
    make_tree(tmp_path / "one", weights=(300,))
    make_tree(tmp_path / "two", weights=(300,), seed=1)
    done = run("keys", "init", keys, "--root", "2/3", "--targets", "1/2", "--passphrase-file", words)
    assert done.exit_code == 0 and "1.root.json: root metadata for devices, root 2/3, targets 1/2" in done.output
    signing = ("--keys", keys, "--passphrase-file", words)
    done = run("publish", tmp_path / "one", "--to", root, *signing, "--minimum", "w3", "--level", "board=w4")
    assert done.exit_code == 0, done.output
    assert f"{root}: toy release 1, stable\nminimum w3; board runs w4\n" in done.output
    done = run("publish", tmp_path / "two", "--to", root, *signing, "--canary", "10%", "--hold")
    assert "toy release 2, canary to 10% of the devices, on hold" in done.output
    done = run("rollout", root, *signing, "--canary", "50", "--no-hold", "--json")
    row = json.loads(done.output)
    assert (row["release"], row["percent"], row["hold"], row["minimum"]) == (2, 50, False, "w3")
    assert json.loads(run("rollout", root, *signing, "--promote", "--json").output)["channel"] == "stable"
    done = run("refresh", root, "--keys", keys, "--days", "2")  # the online key is not encrypted
    assert done.exit_code == 0 and "expires: timestamp" in done.output, done.output
    assert run("keys", "rotate", *signing, "--role", "targets", "--quorum", "2/2").exit_code == 0
    assert set(json.loads(run("refresh", root, *signing, "--json").output)) == {
        *("timestamp", "targets", "root", "dry_run")
    }

    def fetch(path: str, limit: int) -> bytes:
        if not (root / path).exists():
            raise GoneError(path)
        return (root / path).read_bytes()

    install_root(tmp_path / "dev", (keys / "1.root.json").read_bytes())
    said = refresh(tmp_path / "dev", fetch, hardware="board")
    assert (said.release, said.level) == (2, "w4")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("keys", "init", "k", "--root", "3/2"), "is no quorum"),
        (("publish", "b", "--to", "r", "--keys", "nowhere"), "holds no 1.root.json"),
        (("publish", "b", "--to", "r", "--keys", "k", "--canary", "0%"), "whole number of per cent"),
        (("publish", "b", "--to", "r", "--keys", "k", "--level", "w4"), "write CLASS=LEVEL"),
        (("publish", "b", "--to", "nosuch://x", "--keys", "k"), "cannot publish to nosuch"),
        (("refresh", "r", "--keys", "k"), "publishes nothing yet"),
        (("rollout", "r", "--keys", "k", "--promote"), "publishes none"),
        (("publish", "b", "--to", "r", "--keys", "k", "--passphrase-file", "empty"), "is empty"),
        (("publish", "b", "--to", "r"), "Missing option '--keys'"),
    ],
)
def test_one_line_for_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("\n")
    make_tree(Path("b"), weights=(300,))
    assert run("keys", "init", "k").exit_code == 0
    done = run(*arguments)
    assert done.exit_code == 2
    assert problem in done.output and len(done.output.strip().splitlines()) == 1
