"""What all commands share: options of one name and meaning, examples in --help, one way to print, errors as a line."""

from __future__ import annotations

import errno
import json
import os
import select
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from qdeploy.errors import QDeployError
from qdeploy.progress import DISPLAY as say  # what commands pass down as `echo`

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_NO_READER = 141  # 128 + SIGPIPE

PATH = click.Path(path_type=Path)


class TargetPath(click.Path):
    """A target file, or the name of one that ships, which completion offers."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names of shipped targets, then files."""
        from qdeploy.target import SHIPPED

        names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*found, *super().shell_complete(ctx, param, incomplete)]


class LevelName(click.ParamType):
    """A level of the release that the device folder, the command's first argument, holds."""

    name = "level"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names in the folder's manifest; none when it cannot be read."""
        words = [ctx.params.get("folder"), *ctx.args]  # click leaves it in `args` where the level is still empty
        folder = next((word for word in words if word is not None), ".")
        try:
            current = json.loads((Path(folder) / "current.json").read_bytes())
            manifest = json.loads((Path(folder) / "manifests" / f"{current['manifest']}.json").read_bytes())
            names = [str(level["name"]) for level in manifest["levels"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


TARGET = TargetPath()

# ---- options ---------------------------------------------------------------------------------------------------------


def _be_quiet(_ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    say.quiet = say.quiet or value


def quiet_option() -> click.Option:
    """-q, which `Group` gives to every command."""
    text = "No progress: results and errors alone."
    return click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_be_quiet, help=text)


def option_out(text: str) -> Callable[[Any], Any]:
    """-o, where a command writes."""
    return click.option("-o", "--out", type=PATH, required=True, help=text)


force = click.option("--force", is_flag=True, help="Replace the output if it exists.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
data_dir = click.option("--data-dir", type=PATH, help="Folder with the dataset's files.")
dry_run = click.option("--dry-run", is_flag=True, help="Check everything and say what would happen; change nothing.")


def examples(*lines: str) -> str:
    """The end of a command's --help: lines as one types them."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def show(value: Any, text: str, as_json: bool = False) -> None:
    """Print a result: `value` as one JSON document, or `text`. The bars go first."""
    say.close()
    click.echo(json.dumps(value) if as_json else text)


# ---- errors ----------------------------------------------------------------------------------------------------------


def fail(ctx: click.Context, text: str) -> None:
    """One line on standard error, exit code 2."""
    say.close()
    click.echo(f"qdeploy: {' '.join(text.split())}", err=True)
    ctx.exit(EXIT_BAD_INPUT)


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install where a package is absent."""
    from qdeploy.installed import distribution_of, extras_of

    module = (error.name or str(error)).partition(".")[0]
    package = distribution_of(module)
    extras = extras_of(package)
    how = f"pip install 'qdeploy[{extras[0]}]'" if extras else f"pip install {package}"
    return f"this command needs {package}, which is not installed: {how}"


WAYS_OUT = {
    errno.ENOSPC: "free space there, or name a folder on another disk",
    errno.EDQUOT: "free space there, or name a folder on another disk",
    errno.EACCES: "change its permissions, or name another path",
    errno.EPERM: "change its permissions, or name another path",
    errno.EROFS: "name a path on a disk that can be written",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory, or do less at once",
}


def os_problem(error: OSError) -> str:
    """A file that cannot be used, and the way out."""
    text = f"{error.filename or 'a file'}: {error.strerror or error}"
    return f"{text}: {WAYS_OUT[error.errno]}" if error.errno in WAYS_OUT else text


def reader_is_gone() -> bool:
    """Whether standard output or error is a pipe that nobody reads any more. Both then lead nowhere, silently."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    gone = [number for number, events in poll.poll(0) if events & select.POLLERR]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


class Group(click.Group):
    """Gives every command -q. Our errors are one line and exit code 2, Ctrl-C is 130, a reader that went away 141;
    anything else is a bug and shows itself."""

    sections: Mapping[str, Sequence[str]] = {}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands in `sections`, title -> names, where there are some."""
        if not self.sections:
            super().format_commands(ctx, formatter)
        width = max(map(len, self.commands))
        for title, names in self.sections.items():
            with formatter.section(title):
                limit = formatter.width - 6 - width
                rows = [(name.ljust(width), self.commands[name].get_short_help_str(limit)) for name in names]
                formatter.write_dl(rows)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        if not isinstance(cmd, click.Group):
            cmd.params.append(quiet_option())
        super().add_command(cmd, name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.parent is not None:
            return super().parse_args(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except (click.UsageError, BrokenPipeError) as e:
            return self._end(ctx, e)

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        say.begin()
        try:
            return super().invoke(ctx)
        except (QDeployError, click.UsageError, OSError, ModuleNotFoundError, KeyboardInterrupt) as e:
            return self._end(ctx, e)
        finally:
            say.close()

    def _end(self, ctx: click.Context, error: BaseException) -> Any:
        """Say what went wrong and exit."""
        if isinstance(error, KeyboardInterrupt):
            say.close()
            again = "train, evaluate, search and pull resume, any other command begins again"
            click.echo(f"qdeploy: interrupted; {again}", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            ctx.exit(EXIT_NO_READER)
        if isinstance(error, click.UsageError):
            name = error.ctx.command_path if error.ctx is not None else "qdeploy"
            fail(ctx, f"{error.format_message()} (see `{name} --help`)")
        if isinstance(error, ModuleNotFoundError):
            if (error.name or "").partition(".")[0] == "qdeploy":
                raise error
            fail(ctx, missing_package(error))
        fail(ctx, os_problem(error) if isinstance(error, OSError) else str(error))
