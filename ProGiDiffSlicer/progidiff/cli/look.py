"""What is there: ``progidiff info`` (a model's parts and card), ``doctor`` (installation, device, model) and ``worker``."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from progidiff.cli.common import EXIT_PROBLEM, DeviceName, JsonOption, split_command
from progidiff.errors import InputError
from progidiff.places import default_model_folder

if TYPE_CHECKING:
    from progidiff.doctor import Diagnosis


_MARKS = {"ok": ("ok", "green"), "warning": ("note", "yellow"), "missing": ("MISSING", "bold red")}


class BackboneName(StrEnum):
    """Published backbones whose parameter table can be made without their weights."""

    SD15 = "sd15"
    SD21 = "sd21"


def register(app: typer.Typer) -> None:
    """Add the commands. The worker's options are its own: it starts without this program where speed counts."""
    app.command("info")(info)
    app.command("doctor")(doctor)
    app.command(
        "worker",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        short_help="Answer requests on standard input and output (started by other programs).",
    )(worker)


def info(
    config: Annotated[
        BackboneName | None,
        typer.Option(help="Parameter table of the method on a Stable Diffusion version, without weights."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Model folder; without it and --config, the bundled model."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Parameter table of a configuration, or parameters and card of a model folder."""
    if config is not None and model is not None:
        raise InputError("Give either --config or --model, not both.")
    from progidiff.model.parameters import print_info

    chosen = config.value if config is not None else model or default_model_folder()
    result = print_info(chosen, as_json=as_json)
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else result)


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
    as_json: JsonOption = False,
) -> None:
    """Tell what is installed, which device is used and whether the model loads; exit code 1 when something
    is missing.
    """
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


def worker(ctx: typer.Context) -> None:
    """Answer requests on standard input and output until they end; the log goes to standard error."""
    from progidiff.worker.server import main

    main(ctx.args)
