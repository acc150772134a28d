"""The tutorial, block by block: files are written, commands are run, and what is shown is what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.docs.documents import ROOT, Session, blocks, difference

PAGE = ROOT / "docs" / "tutorial.md"


def steps(console: str) -> list[tuple[str, str]]:
    """(command, shown output) of a console block."""
    found: list[tuple[str, str]] = []
    for line in console.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    with Session(tmp_path, ports=(8000,)) as session:
        for block in blocks(PAGE.read_text()):
            if block.language == "console":
                for command, shown in steps(block.text):
                    ended = session.run(command)
                    assert ended.code == 0, f"{command}\n{ended.said}"
                    wrong = difference(session.here(shown), ended.output)
                    assert not wrong, f"docs/tutorial.md, {command}\n{wrong}\n--- all of it:\n{ended.output}"
            else:
                assert block.title, f"line {block.line}: neither a console nor a file"
                (tmp_path / block.title).write_text(block.text)
    # what the page promises beside its output
    w2, w8 = (np.load(tmp_path / f"{level}.npy") for level in ("w2", "w8"))
    assert w2.shape == w8.shape == (10_000, 10) and (w2 != w8).any()
    assert (tmp_path / "layers" / "sensitivity.html").is_file()


def test_shown_output_is_compared() -> None:
    real = "a: 1,000 bytes\nb 82.3%  of 5\n\nend at 12:30\n"
    assert not difference(real, real) and not difference("", real)
    assert not difference("a: 1,050 bytes\nb 82.0% of 5\n\nend at ...", real)
    assert not difference("a: 1,000 bytes\n...\nend at ...\n", real) and not difference("...", real)
    for wrong in (
        "a: 1,200 bytes\n...",
        "b: 1,000 bytes\n...",
        "a: 1,000 bytes",
        real + "more",
        "...\nb 82.3% of 0\n...",
    ):
        assert difference(wrong, real), wrong
    assert difference("0 bytes", "1 bytes") and difference("w2: 5", "w3: 5")
