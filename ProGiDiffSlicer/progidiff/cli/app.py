"""The ``progidiff`` program.

Each command has a file of its own; nothing heavy is imported until one of them runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from progidiff import __version__
from progidiff.cli import accuracy, adapt, curate, doctor, evaluate, info, next, propose, train, worker
from progidiff.cli.failures import FriendlyGroup

if TYPE_CHECKING:
    from progidiff.datasets.slices import NamedSets

# The order of the help. A command's module has register(app: typer.Typer) and imports only what its options
# need.
COMMANDS = (propose, next, curate, train, adapt, accuracy, evaluate, info, doctor, worker)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"progidiff {__version__}")
        raise typer.Exit


def program(name: str, about: str, commands: Iterable[ModuleType], sets: NamedSets | None = None) -> typer.Typer:
    """A program of these commands; ``sets`` are the labelled sets that they know by name."""
    made = typer.Typer(
        name=name,
        cls=FriendlyGroup,
        help=about,
        no_args_is_help=True,
        add_completion=False,
        # tracebacks with local variables would print parts of the image and file names
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"], "obj": sets},
    )
    made.callback()(_begin)
    for command in commands:
        command.register(made)
    return made


def _begin(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    # a terminal of another encoding shows replacements instead of failing on "µ" or "–"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


app = program(
    "progidiff",
    "Type an organ, get ranked mask proposals from a CT or MR volume. Research use only, not a medical device.",
    COMMANDS,
)


def main() -> None:
    """Run the program and end the process with its exit code."""
    app()
