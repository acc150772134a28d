"""The command line: one command a stage, in the files beside this one. Each parses, makes one call and prints."""

from __future__ import annotations

import sys

import click

from qdeploy import __version__
from qdeploy.cli_device import climb, drop, evict, pull, run
from qdeploy.cli_devices import devices, latency_table
from qdeploy.cli_model import bundle, compile_, export, inspect, package, profile, targets
from qdeploy.cli_options import Group
from qdeploy.cli_publish import keys, publish, refresh, rollout
from qdeploy.cli_quantize import quantize, sensitivity
from qdeploy.cli_report import report
from qdeploy.cli_search import pick, search
from qdeploy.cli_serve import fleet, serve
from qdeploy.cli_setup import demo, doctor, fetch, init
from qdeploy.cli_train import evaluate, space, subnet, train


@click.group(
    cls=Group,
    context_settings={"max_content_width": 120},
    epilog="""\b
Exit codes:
  0    done
  1    `qdeploy doctor`: something that every install needs is missing
  2    bad input; one line says what to do
  130  interrupted (Ctrl-C)
  141  the reader of a pipe went away (| head)
""",
)
@click.version_option(__version__, prog_name="qdeploy")
def main() -> None:
    """Take a trained, elastic, mixed-precision network to edge devices.

    \b
    init -> train -> subnet -> export -> bundle -> publish -> serve    on the host
                        compile -> profile -> package                  per target
    pull -> run -> climb / drop                                        on the device

    Every command takes --help, which ends with examples, and -q; those that print a result take --json. Conventions,
    shell completion and environment variables: docs/cli.md.
    """


SECTIONS: dict[str, list[click.Command]] = {
    "Begin": [init, doctor, demo, fetch],
    "Train": [train, subnet, evaluate, space],
    "Quantize without training": [quantize, sensitivity],
    "Search": [search, pick, latency_table, devices],
    "Build": [export, bundle, inspect, targets, compile_, profile, package],
    "Look": [report],
    "Publish": [keys, publish, rollout, refresh, serve, fleet],
    "On the device": [pull, run, climb, drop, evict],
}
for commands in SECTIONS.values():
    for command in commands:
        main.add_command(command)
main.sections = {title: [str(command.name) for command in commands] for title, commands in SECTIONS.items()}


if __name__ == "__main__":
    sys.exit(main())
