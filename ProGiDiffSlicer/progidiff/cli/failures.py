"""How commands end: one sentence on standard error, and an exit code that scripts can rely on.

0: done; 1: ``doctor`` found something missing; 2: the input, the request or the place for results cannot be
    used; 130: cancelled.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from progidiff.errors import CancelledError, InputError, ProGiDiffError

EXIT_PROBLEM = 1
EXIT_BAD_INPUT = 2
EXIT_CANCELLED = 130

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


def one_line(text: str) -> str:
    """The sentence on one line, without control characters (a file name may hold them).

    Of lines that follow the sentence, such as the end of a worker's log, the last one is kept: it names the
    cause.
    """
    lines = [cleaned for line in text.splitlines() if (cleaned := _printable(line))]
    return f"{lines[0]} [{lines[-1]}]" if len(lines) > 1 else "".join(lines)


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _ended(code: str, sentence: str, exit_code: int, as_json: bool) -> typer.Exit:
    print(sentence, file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"error": {"code": code, "message": sentence}}, ensure_ascii=False), flush=True)
    return typer.Exit(exit_code)
