"""Pages of the site that are made at build: commands, modules, the bundle format, the decisions (mkdocs hook)."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from qdeploy.cli import main

ROOT = Path(__file__).parents[1]
WIDTH = 100  # columns of a command's help

# what a Python program calls, in the order of the data flow; everything else may change without notice
MODULES = {
    "Vocabulary": "space recipe target cost data frozen errors",
    "Training": "train.run subnet extract evaluate freeze",
    "Quantizing": "ptq.quantize ptq.settings ptq.images",
    "Exporting": "export.write export.contract integer qdq ladder",
    "Compiling": "compile.pipeline compile.artifact profile.latency profile.memory package",
    "Searching": "search.run search.front search.objectives",
    "Publishing": "bundle.write bundle.manifest bundle.store trust.keys trust.publish trust.storage",
    "The device": "client.pull client.runtime client.evict client.status client.state",
    "Serving": "serve.app serve.fleet",
    "Looking": "inspect",
}


def commands(command: click.Command, path: str, parent: click.Context | None = None) -> list[tuple[str, str]]:
    """(path, help) of a command and all below it, as `--help` prints them."""
    with click.Context(command, info_name=path.rpartition(" ")[2], parent=parent, max_content_width=WIDTH) as context:
        context.terminal_width = WIDTH
        found = [(path, command.get_help(context))]
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                below = command.get_command(context, name)
                if below is not None and not below.hidden:
                    found += commands(below, f"{path} {name}", context)
        return found


def command_page() -> str:
    """The reference of the command line."""
    lines = ["# Commands", "", "What `--help` prints, of every command.", ""]
    for path, text in commands(main, "qdeploy"):
        lines += [
            f"{'##' if ' ' not in path or path.count(' ') == 1 else '###'} {path}",
            "",
            "```text",
            text,
            "```",
            "",
        ]
    return "\n".join(lines)


def module_page(title: str, names: str) -> str:
    """The reference of some modules, from their docstrings."""
    lines = [f"# {title}", ""]
    for name in names.split():
        importlib.import_module(f"qdeploy.{name}")  # a module that went away is an error here, not an empty section
        lines += [f"::: qdeploy.{name}", ""]
    return "\n".join(lines)


def title(page: Path) -> str:
    """A page's first heading."""
    return page.read_text().splitlines()[0].removeprefix("# ")


def pages() -> dict[str, dict[str, str]]:
    """Section of the navigation -> {path below docs: content} of what is made here."""
    reference = {"reference/commands.md": command_page()}
    reference |= {
        f"reference/{heading.lower().replace(' ', '-')}.md": module_page(heading, names)
        for heading, names in MODULES.items()
    }
    reference["reference/format.md"] = (ROOT / "qdeploy" / "bundle" / "FORMAT.md").read_text()
    reference["reference/changes.md"] = (ROOT / "CHANGELOG.md").read_text()
    return {"Reference": reference, "Decisions": {}}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the made pages, and the decisions in their order, into the navigation."""
    nav: list[dict[str, Any]] = list(config.nav or [])
    decisions = sorted((ROOT / "docs" / "adr").glob("*.md"))
    sections = {
        "Reference": [{re.sub("^# ", "", text.splitlines()[0]): path} for path, text in pages()["Reference"].items()],
        "Decisions": [{title(page): f"adr/{page.name}"} for page in decisions],
    }
    config.nav = [
        {name: [*entry, *sections[name]] if name in sections else entry} for item in nav for name, entry in item.items()
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages."""
    for path, text in pages()["Reference"].items():
        files.append(File.generated(config, path, content=text))
    return files
