"""What the README says is so."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from qdeploy.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_map_is_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import code_map

    assert code_map.with_map(README) == README, "run python tools/code_map.py"
    sys.modules.pop("code_map")


def commands() -> list[str]:
    texts = [README, (ROOT / "CONTRIBUTING.md").read_text(), *(p.read_text() for p in (ROOT / "docs").rglob("*.md"))]
    blocks = [block for text in texts for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.S)]
    lines = [line.split("#")[0].strip(" &") for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("qdeploy ")})


@pytest.mark.parametrize("line", commands())
def test_every_documented_command_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = main.commands[name]
    with click.Context(command) as context:
        command.parse_args(context, arguments)


@pytest.mark.parametrize("text", [README, (ROOT / "CONTRIBUTING.md").read_text()], ids=["README", "CONTRIBUTING"])
def test_links_lead_somewhere(text: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (ROOT / link).exists(), link
