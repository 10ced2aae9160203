"""The ``progidiff`` program.

Nothing heavy is imported until a command runs.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from progidiff import __version__
from progidiff.cli import curate, evaluate, learn, look, propose
from progidiff.cli.common import EXIT_BAD_INPUT, EXIT_CANCELLED, EXIT_PROBLEM, one_line
from progidiff.errors import CancelledError, InputError, ProGiDiffError

if TYPE_CHECKING:
    from progidiff.datasets.slices import NamedSets

# The order of the help. Each module has register(app: typer.Typer) and imports only what the options of its commands need.
COMMANDS = (propose, curate, learn, evaluate, look)

#: How the help calls a value that is a path.
_PATHS = frozenset({"ADAPTER", "DIR", "FILE.json", "INPUT", "OTHER...", "OUT", "PATH", "SET", "phantoms|PATH"})


class FriendlyGroup(TyperGroup):
    """Turns the errors that users are meant to read into one line; with ``--json`` also into a JSON object.

    Anything else is a defect and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        as_json = "--json" in (*ctx._protected_args, *ctx.args)
        try:
            _check_paths(self, (*ctx._protected_args, *ctx.args))
            return super().invoke(ctx)
        except (KeyboardInterrupt, CancelledError):
            raise _ended("cancelled", "Cancelled; nothing was written.", EXIT_CANCELLED, as_json) from None
        except ProGiDiffError as error:
            hint = " The option for that is --even-if-worse." if error.code == "adapter_worse" else ""
            raise _ended(error.code, one_line(str(error)) + hint, EXIT_BAD_INPUT, as_json) from None
        except BrokenPipeError:
            # The reader of our output (head, less) has gone: nobody is left to tell.
            sys.stderr.close()
            raise typer.Exit(EXIT_PROBLEM) from None


def _check_paths(group: TyperGroup, arguments: Sequence[str]) -> None:
    """Refuse an empty path, as an unset variable of a script gives: it would stand for the current folder."""
    options = {name: p for command in _commands(group) for p in command.params for name in p.opts if name.startswith("-")}
    for before, argument in itertools.pairwise(("", *arguments)):
        option, _, value = argument.partition("=")
        if argument.strip() == "":
            option, value = before, ""
        elif option == argument:
            continue
        known = options.get(option)
        takes_path = known is not None and getattr(known, "metavar", None) in _PATHS
        stands_alone = not argument.strip() and (known is None or getattr(known, "is_flag", False))
        if takes_path and not value.strip():
            raise InputError(f"The path after {option} is empty; give one.")
        if stands_alone:
            raise InputError("The path of the input is empty; give one.")


def _commands(group: Any) -> Iterator[Any]:
    for command in group.commands.values():
        yield command
        if hasattr(command, "commands"):
            yield from _commands(command)


def _ended(code: str, sentence: str, exit_code: int, as_json: bool) -> typer.Exit:
    print(sentence, file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"error": {"code": code, "message": sentence}}, ensure_ascii=False), flush=True)
    return typer.Exit(exit_code)


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
