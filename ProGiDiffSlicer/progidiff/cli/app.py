"""The ``progidiff`` program.

Each command has a file of its own; nothing heavy is imported until one of them runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from progidiff import __version__
from progidiff.cli import accuracy, adapt, bench, curate, doctor, evaluate, info, next, propose, table, train, worker
from progidiff.cli.failures import FriendlyGroup

# The order of the help. A command's module has register(app: typer.Typer) and imports only what its options
# need.
COMMANDS = (propose, next, curate, train, adapt, accuracy, evaluate, table, bench, info, doctor, worker)

app = typer.Typer(
    name="progidiff",
    cls=FriendlyGroup,
    help="Type an organ, get ranked mask proposals from a CT or MR volume. Research use only, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    # tracebacks with local variables would print parts of the image and file names
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"progidiff {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    # a terminal of another encoding shows replacements instead of failing on "µ" or "–"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


for command in COMMANDS:
    command.register(app)


def main() -> None:
    """Run the program and end the process with its exit code."""
    app()
