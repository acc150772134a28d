"""Every command says what it does with examples that parse, and takes the options that all share."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from qdeploy.cli import SECTIONS, main

ROOT = Path(__file__).parents[1]
PRINTS_NO_RESULT = {"serve"}  # it serves until it is stopped
DRY = {"publish", "rollout", "refresh", "keys init", "keys rotate", "pull", "climb", "evict"}


def commands(group: click.Group = main, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


ALL = dict(commands())


def examples(command: click.Command) -> list[str]:
    head, _, lines = (command.epilog or "").partition("Examples:\n")
    return [line.strip() for line in lines.splitlines() if line.strip()] if head == "\b\n" else []


@pytest.mark.parametrize("name", ALL)
def test_help_ends_with_examples_of_this_command(name: str) -> None:
    result = CliRunner().invoke(main, [*name.split(), "--help"])
    assert result.exit_code == 0 and result.stderr == ""
    lines = examples(ALL[name])
    assert lines and all(line in result.stdout for line in lines), "the last part of --help"
    assert any(f"qdeploy {name}" in line for line in lines)


@pytest.mark.parametrize(("name", "line"), [(n, line) for n in ALL for line in examples(ALL[n])])
def test_every_example_parses(name: str, line: str) -> None:
    words = shlex.split(line.partition(" > ")[0])
    words = words[words.index("qdeploy") + 1 :]  # behind torchrun and its options, for one
    command: click.Command = main
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    with click.Context(command) as context:
        command.parse_args(context, words)


@pytest.mark.parametrize("name", ALL)
def test_shared_options_have_one_form(name: str) -> None:
    forms = {form: option for option in ALL[name].params for form in option.opts}
    assert forms["-q"] is forms["--quiet"]
    assert name in PRINTS_NO_RESULT or "--json" in forms
    assert ("--dry-run" in forms) == (name in DRY)
    if "--out" in forms:
        assert forms["--out"] is forms["-o"]
    for option in ALL[name].params:
        if isinstance(option, click.Option):
            assert option.help, f"{option.opts[0]} says nothing"


def test_no_option_appears_twice() -> None:
    for name, command in ALL.items():
        forms = [form for option in command.params for form in (*option.opts, *option.secondary_opts)]
        assert len(forms) == len(set(forms)), name


def test_help_lists_every_command_once() -> None:
    listed = [command.name for commands in SECTIONS.values() for command in commands]
    assert sorted(map(str, listed)) == sorted(main.commands)
    text = CliRunner().invoke(main, ["--help"]).stdout
    for title in SECTIONS:
        assert f"\n{title}:\n" in text
    assert "Exit codes:" in text


def complete(*words: str) -> list[str]:
    """What the shell offers for the last word."""
    found = ShellComplete(main, {}, "qdeploy", "_QDEPLOY_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found if item.type == "plain"]  # others tell the shell to offer files


def test_completion_of_commands_targets_and_levels(tmp_path: Path) -> None:
    from qdeploy.client.pull import pull
    from qdeploy.serve.app import serving
    from tests.client.tree import make_tree

    assert complete("keys", "") == ["init", "rotate"] and "latency-table" in complete("lat")
    assert {"host", "raspberry-pi-5"} <= set(complete("compile", "m.onnx", "--target", ""))
    assert complete("package", "a", "--target", "rasp") == ["raspberry-pi-4", "raspberry-pi-5"]
    make_tree(tmp_path / "tree", weights=(300,))
    with serving(tmp_path / "tree") as url:
        pull(url, tmp_path / "device", unsigned=True)
    device = str(tmp_path / "device")
    levels = complete("climb", device, "--to", "")
    assert len(levels) > 1 and levels == complete("drop", device, "--to", "w") == complete("run", device, "--climb", "")
    for broken in ("[]", "{", '{"manifest": 3}'):
        (tmp_path / "device" / "current.json").write_text(broken)
        assert complete("climb", device, "--to", "") == []
    assert complete("climb", str(tmp_path / "nowhere"), "--to", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    variables = os.environ | {"_QDEPLOY_COMPLETE": f"{shell}_source", "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-c", "from qdeploy.cli import main; main(prog_name='qdeploy')"]
    done = subprocess.run(code, env=variables, capture_output=True, text=True, check=False)
    if shell == "bash" and "Shell completion is not supported" in done.stderr:
        pytest.skip("this bash is older than 4.4")
    assert "_QDEPLOY_COMPLETE" in done.stdout, done.stderr


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    code = (
        "import sys; from qdeploy.cli import main, click\n"
        "@main.command()\ndef talk():\n    while True: click.echo('x' * 10000)\n"
        "main(['talk'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10) == b"x" * 10
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_a_broken_pipe_of_the_work_is_an_error() -> None:
    from qdeploy.cli_options import Group

    @click.group(cls=Group)
    def group() -> None: ...

    @group.command()
    def broken() -> None:
        raise BrokenPipeError(32, "Broken pipe", "worker.sock")

    result = CliRunner().invoke(group, ["broken"])
    assert result.exit_code == 2 and result.stderr == "qdeploy: worker.sock: Broken pipe\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/disk/x"), "/disk/x: No space left on device: free space there"),
        (PermissionError(13, "Permission denied", "/root/x"), "change its permissions, or name another path"),
        (FileNotFoundError(2, "No such file", "x"), "x: No such file: check the path"),
        (ModuleNotFoundError("No module named 'pymoo'", name="pymoo.core"), "needs pymoo, which is not installed: pip"),
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), "needs pillow, which is not installed: pip install"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: Exception, line: str) -> None:
    from qdeploy.cli_options import Group

    @click.group(cls=Group)
    def group() -> None: ...

    @group.command()
    def work() -> None:
        raise error

    result = CliRunner().invoke(group, ["work"])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert line in result.stderr


def test_a_bug_shows_itself() -> None:
    from qdeploy.cli_options import Group

    @click.group(cls=Group)
    def group() -> None: ...

    @group.command()
    def work() -> None:
        raise ModuleNotFoundError("No module named 'qdeploy.nothing'", name="qdeploy.nothing")

    assert isinstance(CliRunner().invoke(group, ["work"]).exception, ModuleNotFoundError)
