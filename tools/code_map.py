"""Write the README's code map: one line a file, taken from the first line of each module's docstring."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- code map: tools/code_map.py writes it -->\n", "<!-- end of the code map -->\n"


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0]


def code_map() -> str:
    """Markdown: single files first, then a paragraph a folder."""
    package = ROOT / "qdeploy"
    files = sorted(package.glob("*.py"))
    lines = ["```"]
    lines += [f"qdeploy/{path.name:<14} {first_line(path)}" for path in files if path.name != "__init__.py"]
    for folder in sorted(path.parent for path in package.glob("**/__init__.py") if path.parent != package):
        lines += ["", f"{folder.relative_to(ROOT)}/  {first_line(folder / '__init__.py')}"]
        inside = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]
        lines += [f"  {path.name:<20} {first_line(path)}" for path in inside]
    lines += ["", "tools/  developer scripts and benchmarks, never imported by qdeploy"]
    lines += [f"  {path.name:<20} {first_line(path)}" for path in sorted((ROOT / "tools").glob("*.py"))]
    return "\n".join([*lines, "```"]) + "\n"


def with_map(readme: str) -> str:
    """The README's text with its code map made anew."""
    head, _, rest = readme.partition(START)
    tail = rest.partition(END)[2]
    return f"{head}{START}{code_map()}{END}{tail}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_map(path.read_text()))
