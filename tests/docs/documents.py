"""Pages of the documentation as programs: their blocks, and a session that runs commands the way a reader would."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from qdeploy.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)")
PATIENCE_S = 300  # until a server listens; a busy machine takes its time to import what it needs
TOLERANCE = 0.1  # of numbers in shown output: another processor trains to other weights


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its `title="..."`, and what stands in it."""

    language: str
    title: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """Fenced blocks of a page, in order."""
    found = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M):
        info, body = match.groups()
        title = re.search(r'title="([^"]*)"', info)
        language = info.split()[0] if info.split() else ""
        found.append(Block(language, title[1] if title else "", body, text[: match.start()].count("\n") + 1))
    return found


def commands(text: str) -> list[str]:
    """Lines of a page's blocks that call qdeploy, without prompts and comments; each once, in order."""
    lines = [line.removeprefix("$ ") for block in blocks(text) for line in block.text.splitlines()]
    return list(dict.fromkeys(re.split(r"\s#", line)[0].strip() for line in lines if line.startswith("qdeploy ")))


@dataclass(frozen=True)
class Ended:
    """A command that ended: exit code, its results (standard output), what it said beside them (standard error)."""

    code: int
    output: str
    said: str = ""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Session:
    """Runs commands in a folder: `qdeploy ...` in this process, which loads packages once, anything else in a shell.

    Fixed port numbers become free ones, the same throughout a session. A command that ends with & is a process that
    lives until the session is closed.
    """

    def __init__(self, folder: Path, ports: tuple[int, ...] = ()) -> None:
        self.folder = folder
        self._ports = {str(port): str(free_port()) for port in ports}
        self._running: list[subprocess.Popen[bytes]] = []
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {"PATH": path, "PYTHONWARNINGS": "ignore"}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait(30)

    def here(self, line: str) -> str:
        """A line with this session's ports."""
        return re.sub(r"\b\d{4}\b", lambda match: self._ports.get(match[0], match[0]), line)

    def run(self, line: str) -> Ended:
        """Run one line; only a background one may still run afterwards."""
        line = self.here(line)
        if line.endswith("&"):
            return self._start(line.rstrip("& "))
        if not line.startswith("qdeploy ") or re.search(r"[|<>;]|&&", line):
            done = subprocess.run(
                line, shell=True, cwd=self.folder, env=self._environment, check=False, text=True, capture_output=True
            )
            return Ended(done.returncode, done.stdout, done.stderr)
        before, modules, path = Path.cwd(), set(sys.modules), sys.path[:]
        os.chdir(self.folder)
        try:
            result = CliRunner().invoke(main, shlex.split(line)[1:])
        finally:
            os.chdir(before)
            sys.path[:] = path
            for name in set(sys.modules) - modules:  # a reader's own modules are not those of the next page
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(self.folder)):
                    del sys.modules[name]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ended(result.exit_code, result.stdout, result.stderr)

    def _start(self, line: str) -> Ended:
        """Start a server and wait until it listens on the ports that its command names."""
        path = self.folder / f".background-{len(self._running)}"
        with path.open("w") as log:
            process = subprocess.Popen(
                shlex.split(line), cwd=self.folder, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._running.append(process)
        end = time.monotonic() + PATIENCE_S
        for port in (int(port) for port in re.findall(r"port (\d+)", line)):
            while process.poll() is None and not listens(port):
                assert time.monotonic() < end, f"{line} does not listen on {port} after {PATIENCE_S} s"
                time.sleep(0.02)
        return Ended(process.poll() or 0, path.read_text())


def listens(port: int) -> bool:
    """Does anybody on this machine take connections on that port?"""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def near(shown: str, real: str) -> bool:
    """Is a shown number the real one, up to what another processor may change? Zero is zero."""
    a, b = (float(text.replace(",", "")) for text in (shown, real))
    return abs(a - b) <= TOLERANCE * abs(a)


def same_line(shown: str, real: str) -> bool:
    """Equal words, near numbers; spaces count as one, and `...` stands for anything in a line."""
    shown, real = " ".join(shown.split()), " ".join(real.split())
    parts = re.split(rf"(\.\.\.|{NUMBER.pattern})", shown)
    forms = {True: f"({NUMBER.pattern})", False: ""}
    pattern = "".join(".*" if p == "..." else forms[bool(NUMBER.fullmatch(p))] or re.escape(p) for p in parts)
    match = re.fullmatch(pattern, real)
    numbers = [part for part in parts if NUMBER.fullmatch(part)]
    return match is not None and all(map(near, numbers, match.groups()))


def difference(shown: str, real: str) -> str:
    """What is wrong with shown output, or "": a line `...` stands for any lines."""
    wanted, found = shown.strip().splitlines(), real.strip().splitlines()
    if not shown.strip():
        return ""
    position = 0
    for number, line in enumerate(wanted):
        if line.strip() == "...":
            following = wanted[number + 1] if number + 1 < len(wanted) else None
            while position < len(found) and (following is None or not same_line(following, found[position])):
                position += 1
        elif position < len(found) and same_line(line, found[position]):
            position += 1
        else:
            return f"shown: {line}\n real: {found[position] if position < len(found) else '(nothing more)'}"
    return "" if position == len(found) else f"shown: (nothing more)\n real: {found[position]}"


def key(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
