"""``progidiff doctor``: what is installed, which device is used, whether the model loads."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from progidiff.cli.failures import EXIT_PROBLEM
from progidiff.cli.propose import DeviceName

if TYPE_CHECKING:
    from progidiff.doctor import Diagnosis

_MARKS = {"ok": ("ok", "green"), "warning": ("note", "yellow"), "missing": ("MISSING", "bold red")}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model folder, as the worker's machine sees it (default: the bundled one)."),
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Device to load the model on.")] = DeviceName.AUTO,
    worker_command: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Worker to ask, as for propose (default: this Python's)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what is installed, which device is used and whether the model loads; exit code 1 when something
    is missing.
    """
    from progidiff.cli.commandline import split_command
    from progidiff.doctor import examine

    diagnosis = examine(model, device.value, split_command(worker_command), on_check=_announce)
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(EXIT_PROBLEM)


def _announce(name: str) -> None:
    print(f"Looking at {name} ...", file=sys.stderr, flush=True)


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        detail = Text(check.detail)
        if check.advice:
            detail.append(f"\n{check.advice}", style="bold")
        table.add_row(Text(*_MARKS[check.status]), Text(check.name), detail)
    console.print(table)
    missing = [check.name for check in diagnosis.checks if check.status == "missing"]
    summary = f"Missing: {', '.join(missing)}." if missing else "Everything that is needed is there."
    console.print(Text(summary, style="bold"), soft_wrap=True)
