"""Progress: bars in a terminal, lines in a pipe, nothing when quiet; Ctrl-C leaves the terminal as it was."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdeploy import progress
from qdeploy.progress import BYTES, Counter, Display, duration, number, size

ROOT = Path(__file__).parents[1]
WORK = """
import signal, sys, time
import click

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
from qdeploy.cli_options import Group, say, show
from qdeploy.progress import Counter

@click.group(cls=Group)
def main(): pass

@main.command()
@click.option("--steps", type=int, default=40)
@click.option("--seconds", type=float, default=0.01)
def work(steps, seconds):
    counter = Counter(say, "train", steps, "step", of=8, things="images")
    say("it [bold]begins[/bold]")
    for step in range(1, steps + 1):
        time.sleep(seconds)
        counter.at(step, f"loss {1 / step:.3f}")
        if step == steps // 2:
            say("half of it")
    show({}, "the result")

main()
"""
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", WORK, "work", *arguments]


class Terminal:
    """A process whose standard error is a terminal of 100 columns, and what it writes there."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "PYTHONPATH": str(ROOT)}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=theirs, env=environment)
        os.close(theirs)
        self.text = ""

    def read(self, until: str | None = None) -> str:
        """All that comes up to the text `until`, or to the end of the process."""
        end = time.monotonic() + 60
        while time.monotonic() < end and (until is None or until not in self.text):
            if not select.select([self.ours], [], [], 1)[0]:
                continue
            try:
                data = os.read(self.ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not data:
                break
            self.text += data.decode()
        return self.text

    def end(self) -> tuple[int, str]:
        """(exit code, standard output); a process that has not ended by now is killed."""
        assert self.process.stdout is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        with self.process.stdout:
            out = self.process.stdout.read().decode()
        os.close(self.ours)
        return self.process.wait(60), out


def shown(text: str) -> list[str]:
    """Lines of a terminal's text without what only moves or colours."""
    return [line for part in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines() if (line := part.strip("\r "))]


def test_a_terminal_gets_a_bar_and_is_left_as_it_was() -> None:
    terminal = Terminal()
    text = terminal.read()
    assert terminal.end() == (0, "the result\n"), text
    bars = [line for line in shown(text) if "━" in line]
    assert len(bars) > 3 and "train" in bars[0] and re.search(r"step \d+/40 .* images/s, .* left +loss 0", bars[-1])
    assert text.index(HIDE) < text.index(SHOW) < text.rindex("━") < text.rindex(SHOW)  # also if it is killed
    assert text.count(HIDE) == 1
    assert "it [bold]begins[/bold]" in shown(text)  # no markup is read in what is said
    assert "half of it" in shown(text)
    last = [line for line in shown(text) if line.startswith("train: step 40/40, loss 0.025")]
    assert len(last) == 1 and "━" not in shown(text)[-1]


def test_ctrl_c_in_a_terminal() -> None:
    terminal = Terminal("--steps", "100000")
    terminal.read("━")
    terminal.process.send_signal(signal.SIGINT)
    text = terminal.read()
    assert terminal.end() == (130, "")
    assert text.rindex(HIDE) < text.rindex("━") < text.rindex(SHOW)
    assert shown(text)[-1].startswith("qdeploy: interrupted") and "Traceback" not in text


@pytest.mark.parametrize(("more", "lines"), [([], 3), (["-q"], 0), (["--quiet"], 0)])
def test_a_pipe_gets_lines_and_no_rich(more: list[str], lines: int) -> None:
    watched = WORK.replace("\nmain()\n", "\ntry:\n    main()\nfinally:\n    assert 'rich' not in sys.modules\n")
    assert watched != WORK
    code, environment = [sys.executable, "-c", watched, "work", *more], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(code, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "the result\n" and "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == lines
    if lines:
        assert done.stderr.splitlines()[-1].startswith("train: step 40/40, loss 0.025, ")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not Display().draws
    monkeypatch.setenv("TERM", "xterm")
    assert Display().draws


def test_a_counter_says_rate_and_time_left_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    counter = Counter(said.append, "float", 100, "step", done=20, of=64, things="images")
    for step in range(21, 41):
        now[0] += 0.5
        counter.at(step, "epoch 1/2")
    assert said == ["float: step 40/100, epoch 1/2, 128 images/s, 30 s left"]
    now[0] += 0.1
    counter.at(100)
    assert said[1:] == ["float: step 100/100, 507 images/s, 0 s left"]


def test_an_end_that_something_else_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    counter = Counter(said.append, "code", 3, "object", last=False)
    for step in (1, 2, 3):
        now[0] += 20.0
        counter.at(step)
    assert said == ["code: object 1/3, 0.05 objects/s, 40 s left", "code: object 2/3, 0.05 objects/s, 20 s left"]


def test_bytes_are_written_as_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    counter = Counter(said.append, "pull", 3_400_000, BYTES)
    now[0] = 20.0
    counter.at(1_000_000)
    assert said == ["pull: 1 MB of 3.4 MB, 50 kB/s, 48 s left"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (98_765_432, "98.8 MB")]
)
def test_sizes(value: int, text: str) -> None:
    assert size(value) == text


def test_durations_and_numbers() -> None:
    assert [duration(s) for s in (-1, 59.4, 60, 3599, 7500)] == ["0 s", "59 s", "1 min 0 s", "59 min 59 s", "2 h 5 min"]
    assert [number(v) for v in (0.01234, 4.567, 789.4, 12345.6)] == ["0.0123", "4.57", "789", "12346"]


def test_a_new_command_is_not_quiet_for_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.quiet = True
    display("hidden")
    display.warn("shown always")
    display.begin()
    display("shown")
    assert capsys.readouterr().err == "shown always\nshown\n"
