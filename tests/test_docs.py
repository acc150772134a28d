"""What the documentation says is so: the code map, links, and every command, run in the order of its page."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from qdeploy.cli import main
from tests.docs.documents import PAGES, ROOT, blocks, commands, key

README = (ROOT / "README.md").read_text()


def test_the_code_map_is_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import code_map

    assert code_map.with_map(README) == README, "run python tools/code_map.py"
    sys.modules.pop("code_map")


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page.read_text())}))
def test_every_documented_command_parses(line: str) -> None:
    _, *words = shlex.split(re.split("[|<>&]", line)[0])
    command: click.Command = main
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    with click.Context(command) as context:
        command.parse_args(context, words)


@pytest.mark.parametrize("page", PAGES, ids=key)
def test_links_and_other_commands_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    if page.parent == ROOT:  # mkdocs checks the links of docs/
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" in link or (ROOT / link).exists(), link
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)) <= made
    for tool in re.findall(r"python (tools/\w+\.py)", text):
        assert (ROOT / tool).is_file(), tool


def test_blocks_of_other_languages_are_well_formed() -> None:
    for page in PAGES:
        for block in blocks(page.read_text()):
            if block.language == "json":
                json.loads(block.text)
            elif block.language == "toml":
                tomllib.loads(block.text)
            elif block.language == "python":
                for node in ast.walk(ast.parse(block.text)):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qdeploy"):
                        module = importlib.import_module(str(node.module))
                        assert all(hasattr(module, name.name) for name in node.names), f"{page}: {ast.unparse(node)}"


def test_the_site_builds_and_needs_no_other_host(tmp_path: Path) -> None:
    """As `make docs`, with warnings as errors."""
    pytest.importorskip("mkdocs", reason="the site's generator is of qdeploy[docs]: make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=\"([^\"]+)", page.read_text())
        assert not [url for url in loaded if "//" in url], page
    text = (tmp_path / "site" / "reference" / "commands.html").read_text()
    assert all(f'id="qdeploy-{name}"' in text for name in main.commands)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name in text or name.startswith("adr/"), name
