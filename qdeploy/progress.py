"""What a command says while it works, on standard error: bars in a terminal, plain lines elsewhere, nothing if quiet.

Work is given an `Echo`, a function that takes a line, and counts its loops with a `Counter`. Whoever passes a plain
function gets a line every few seconds. The command line passes `DISPLAY`, which draws a bar where standard error is a
terminal. No thread is started: a bar moves when its counter does, so a process may fork beside it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Echo = Callable[[str], None]
LINE_SECONDS = 10.0  # between two lines of a counter
DRAW_SECONDS = 0.1  # between two states of a bar
BYTES = "byte"  # the unit whose counts and rates are written as sizes


def duration(seconds: float) -> str:
    """ "45 s", "3 min 20 s", "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes to three digits: "512 B", "1.25 kB", "98.7 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{number(count)} GB"


def number(value: float) -> str:
    """A rate to three digits: "0.0123", "4.56", "789", "12345"."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def silent(text: str) -> None:
    """An `Echo` that nobody hears."""


class Counter:
    """How far a loop is: `at` is called when a part of `total` is done, and tells `echo` now and then.

    `unit` names what is counted, BYTES where it is that. The rate is of those a second, or of `of` times as many
    `things`: the images of a step. `done` were finished before, by a process that this one resumes, and do not count
    for the rate. The end gets a line of its own unless `last` is False: where something else says it.
    """

    def __init__(
        self, echo: Echo, task: str, total: int, unit: str, done: int = 0, *, of: int = 1, things: str = "",
        last: bool = True,
    ) -> None:  # fmt: skip
        self.echo, self.task, self.total, self.unit, self.done = echo, task, total, unit, done
        self.of, self.things, self.says_end = of, things or f"{unit}s", last
        self.detail = ""
        self.first, self.start = done, time.monotonic()
        self.last = self.start - DRAW_SECONDS

    @property
    def rate(self) -> float:
        """Things a second since the counter was made."""
        return (self.done - self.first) * self.of / max(1e-9, time.monotonic() - self.start)

    @property
    def where(self) -> str:
        """The count: "step 3/100", or "1.2 of 3.4 MB"."""
        if self.unit == BYTES:
            return f"{size(self.done)} of {size(self.total)}"
        return f"{self.unit} {self.done}/{self.total}"

    @property
    def pace(self) -> str:
        """Rate and time left; empty before the first part is done."""
        if self.done == self.first:
            return ""
        left = (self.total - self.done) * self.of / self.rate
        rate = size(self.rate) if self.unit == BYTES else f"{number(self.rate)} {self.things}"
        return f"{rate}/s, {duration(left)} left"

    @property
    def line(self) -> str:
        """For a log."""
        return f"{self.task}: " + ", ".join(part for part in (self.where, self.detail, self.pace) if part)

    def at(self, done: int, detail: str = "") -> None:
        """`done` of `total` are finished; `detail` says more about the last one."""
        self.done, self.detail = done, detail
        draws = isinstance(self.echo, Display) and self.echo.draws
        now = time.monotonic()
        if now - self.last < (DRAW_SECONDS if draws else LINE_SECONDS) and done < self.total:
            return
        self.last = now
        if draws and isinstance(self.echo, Display):
            self.echo.draw(self)
        elif done < self.total or self.says_end:
            self.echo(self.line)

    def stop(self) -> None:
        """No more will come, though the total is not reached: the bar goes."""
        if isinstance(self.echo, Display):
            self.echo.remove(self)


class Display:
    """The `Echo` of the command line. Not for several threads at once."""

    def __init__(self) -> None:
        self.quiet = False
        self._progress: Progress | None = None
        self._tasks: dict[Counter, TaskID] = {}

    def begin(self) -> None:
        """A new command: not quiet, no bars."""
        self.close()
        self.quiet = False

    @property
    def draws(self) -> bool:
        """Whether counters are drawn as bars: in a terminal that can move its cursor."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def __call__(self, text: str) -> None:
        """A line about the work; none when quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """A line that is said also when quiet; above the bars where there are some."""
        if self._progress is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def draw(self, counter: Counter) -> None:
        """Show a counter's bar; one that is complete becomes a line, and its bar goes."""
        if self._progress is None:
            self._progress = _bars()
            self._progress.start()
            self._progress.console.show_cursor(True)  # so that a process that is killed does not leave it hidden
        if counter not in self._tasks:
            self._tasks[counter] = self._progress.add_task(
                counter.task, total=counter.total, where="", pace="", detail=""
            )
        task = self._tasks[counter]
        self._progress.update(
            task, completed=counter.done, where=counter.where, detail=counter.detail, pace=counter.pace
        )
        if counter.done < counter.total:
            self._progress.refresh()
            return
        self.remove(counter)
        if counter.says_end:
            self(counter.line)

    def remove(self, counter: Counter) -> None:
        """Take a counter's bar away, if it has one."""
        task = self._tasks.pop(counter, None)
        if self._progress is not None and task is not None:
            self._progress.remove_task(task)
            if not self._tasks:
                self.close()

    def close(self) -> None:
        """Take all bars away and leave the terminal as it was. Results are printed after this."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._tasks = None, {}


def _bars() -> Progress:
    """The look of the bars: task, bar, count, rate and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(field: str, ratio: int | None = None) -> TextColumn:
        return TextColumn(f"{{task.{field}}}", markup=False, table_column=Column(no_wrap=True, ratio=ratio))

    return Progress(
        text("description"),
        BarColumn(bar_width=24),
        text("fields[where]"),
        text("fields[pace]"),
        text("fields[detail]", 1),
        console=Console(file=sys.stderr, stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        expand=True,
    )


DISPLAY = Display()
