"""``python -m experiments table``: the tables of the evaluation, measured and written again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from progidiff.cli.common import DeviceName
from progidiff.errors import InputError

if TYPE_CHECKING:
    from experiments.tables.setup import TableResult

DEFAULT_WORK = Path("evaluation-work")
_LINE_S = 60.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("table")(table)


def table(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="cross-validation, n-curve, encoder, mr, raters, ranking or ablations.", show_default=False
        ),
    ],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the labelled real images.")] = None,
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="What is kept between runs, and the results: an interrupted run goes on.")
    ] = DEFAULT_WORK,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; the bundled one by default.")] = None,
    proposals: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Proposals per slice and target (N); the table's own by default.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Denoising steps.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="An option of this table; name any to see which there are."),
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="Where to compute.")] = DeviceName.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure one table of the evaluation and write it to the work folder as JSON and Markdown."""
    from rich.console import Console

    from experiments.shared_slices import SHARED
    from experiments.tables import load_table
    from experiments.tables.setup import TableSetup, check_work

    chosen = load_table(name)
    options = read_options(option or [], chosen.OPTIONS)
    folder = data if data is not None else SHARED.folder
    if not folder.is_dir():
        raise InputError("The tables need the labelled real images; give their folder with --data.")
    check_work(work)
    screen = Console(stderr=True)
    last = time.monotonic()

    def report(line: str) -> None:
        nonlocal last
        status.update(f"{name}: {line}")
        if not screen.is_terminal and time.monotonic() - last > _LINE_S:  # a log gets a line now and then
            last = time.monotonic()
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    with screen.status(chosen.TITLE) as status:
        setup = TableSetup(
            data=folder,
            work=work,
            model=model,
            seed=seed,
            proposals=proposals,
            steps=steps,
            device=device.value,
            options=options,
            progress=report,
        )
        result = chosen.run(setup)
    files = result.write(work)
    if as_json:
        print(json.dumps(result.content() | {"files": [str(f) for f in files]}, indent=1, ensure_ascii=False))
        return
    show(result)
    screen.print(f"Written to {' and '.join(str(f) for f in files)}")


def read_options(given: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Options from ``NAME=VALUE`` texts.

    Raises:
        InputError: one has no value, or the table does not know it.
    """
    options: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if name not in known:
            listed = "; ".join(f"{key}: {what}" for key, what in known.items()) or "it has none"
            raise InputError(f'This table has no option "{name}" (options: {listed}).')
        if not equals or not value:
            raise InputError(f'The option {name} needs a value: "--option {name}=...".')
        options[name] = value
    return options


def show(result: TableResult) -> None:
    """Print a table and its notes."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=result.title)
    for head in result.header:
        shown.add_column(head)
    for row in result.rows:
        if row:
            shown.add_row(*row)
        else:
            shown.add_section()
    screen = Console(width=max(120, 14 * len(result.header)))
    screen.print(shown)
    for note in result.notes:
        screen.print(f"- {note}", highlight=False, markup=False)
    for part in result.also:
        show(part)
