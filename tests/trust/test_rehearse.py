"""Dry runs of publishing check, sign and say what the real run says, and write nothing."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from qdeploy.cli import main
from qdeploy.trust.rehearse import Rehearsal
from qdeploy.trust.storage import Folder
from tests.client.tree import make_tree


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def document(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict = json.loads(result.stdout)
    return found


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_from_keys_to_a_refresh(tmp_path: Path) -> None:
    keys, site, dry = tmp_path / "keys", tmp_path / "site", "--dry-run"

    def twice(*arguments: object) -> tuple[dict, dict]:
        """What the dry run says, which writes nothing, and what the real one says."""
        before = content(tmp_path)
        said = document(*arguments, dry)
        assert content(tmp_path) == before
        return said, document(*arguments)

    said, done = twice("keys", "init", keys, "--targets", "1/2")
    assert (said.pop("dry_run"), done.pop("dry_run")) == (True, False) and said == done
    make_tree(tmp_path / "one", weights=(300,))
    make_tree(tmp_path / "two", weights=(300,), seed=1)
    for arguments in (
        ("publish", tmp_path / "one", "--to", site, "--keys", keys, "--minimum", "w3"),
        ("publish", tmp_path / "two", "--to", site, "--keys", keys, "--canary", "10%", "--hold"),
        ("rollout", site, "--keys", keys, "--canary", "50%", "--no-hold"),
        ("rollout", site, "--keys", keys, "--promote"),
    ):
        said, done = twice(*arguments)
        assert said["sent"] == done["sent"] and (said["sent"] > 0) == (arguments[0] == "publish")
        for unlike in ("dry_run", "expires"):
            assert unlike in said and unlike in done
            del said[unlike], done[unlike]
        assert said == done
    said, done = twice("keys", "rotate", "--keys", keys, "--role", "targets")
    assert said["root"] == done["root"] == str(keys / "2.root.json")
    said, done = twice("refresh", site, "--keys", keys, "--days", "2")
    assert set(said) == set(done) == {"timestamp", "targets", "root", "dry_run"}
    text = run("publish", tmp_path / "one", "--to", site, "--keys", keys, dry).stdout
    assert "release 3, stable" in text and "dry run: " in text and "would be sent" in text


def test_what_the_real_run_refuses(tmp_path: Path) -> None:
    keys, site = tmp_path / "keys", tmp_path / "site"
    assert run("keys", "init", keys).exit_code == 0
    make_tree(tmp_path / "one", weights=(300,))
    for arguments, problem in (
        (("publish", tmp_path / "one", "--to", site, "--keys", keys, "--level", "x=w9"), "w9"),
        (("publish", tmp_path / "none", "--to", site, "--keys", keys), "none"),
        (("rollout", site, "--keys", keys, "--promote"), "publishes none"),
        (("refresh", site, "--keys", keys), "publishes nothing yet"),
        (("keys", "init", keys), "not empty"),
        (("keys", "rotate", "--keys", tmp_path / "none", "--role", "root"), "holds no 1.root.json"),
    ):
        done = run(*arguments, "--dry-run")
        assert done.exit_code == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1
    assert not site.exists()


def test_a_rehearsal_reads_what_it_wrote(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    storage = Rehearsal(Folder(tmp_path))
    storage.write("new", b"new")
    storage.create("other", b"other")
    digest = "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
    assert storage.read("new") == b"new" and storage.read("old") == b"old" and storage.read("none") is None
    assert storage.holds("new", digest, 3) and not storage.holds("new", "0" * 64, 3)
    assert not storage.holds("old", digest, 3) and storage.written == {"new": b"new", "other": b"other"}
    with storage.locked():
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
