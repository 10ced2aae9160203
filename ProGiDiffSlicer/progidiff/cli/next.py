"""``progidiff next``: which volume of a folder to correct next."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli.failures import EXIT_BAD_INPUT, EXIT_CANCELLED, one_line
from progidiff.cli.propose import CorrectOption, DeviceName, ModalityName, PlaneOption
from progidiff.errors import CancelledError, ProGiDiffError

if TYPE_CHECKING:
    from progidiff.active.record import NextDocument
    from progidiff.sampling.engine import Engine


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("next")(next_volumes)


def next_volumes(
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Folder with volumes, also in folders below it.")],
    prompt: Annotated[list[str], typer.Option(help='What to look for, e.g. "liver; pancreas"; may be given several times.')],
    out: Annotated[
        Path, typer.Option(metavar="FILE.json", help="Result; the same command goes on from it and measures what is new.")
    ],
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; the bundled one by default.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter to use on the model.")] = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", help="Use an adapter that was not better than its base.")
    ] = False,
    proposals: Annotated[int, typer.Option(min=2, max=200, help="Proposals per slice and target.")] = 6,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Denoising steps.")] = 2,
    slices: Annotated[int, typer.Option(min=1, max=1000, help="Slices spread over each volume.")] = 8,
    closer: Annotated[
        int, typer.Option(min=0, max=100, help="Further slices per target, beside those on which it was found.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same numbers.")] = 0,
    modality: Annotated[ModalityName | None, typer.Option(help="For files that do not say it themselves.")] = None,
    plane: PlaneOption = None,
    correct_values: CorrectOption = False,
    device: Annotated[DeviceName, typer.Option(help="Where to compute.")] = DeviceName.AUTO,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help='One JSON object per line on standard output; a line "stop" on standard input ends early.'
        ),
    ] = False,
) -> None:
    """Rank the volumes of a folder by how much the proposals disagree: correct the first ones, they teach most.

    Ctrl+C keeps what was measured; the same command goes on. Unreadable volumes are listed and do not end the search.
    """
    from progidiff.active.disagreement import NextSettings

    settings = NextSettings(
        proposals, steps, slices, closer, seed, modality and modality.value, plane and plane.value, correct_values
    )
    try:
        document = _search(folder, prompt, out, model, adapter, even_if_worse, settings, device.value, as_json)
    except ProGiDiffError as error:
        if not as_json:
            raise
        _line({"event": "error", "code": error.code, "message": one_line(str(error))})
        print(one_line(str(error)), file=sys.stderr)
        raise typer.Exit(EXIT_CANCELLED if isinstance(error, CancelledError) else EXIT_BAD_INPUT) from None
    if as_json:
        return
    _print(document, out)
    if not document.complete:
        raise typer.Exit(EXIT_CANCELLED)


def _search(
    folder: Path,
    prompt: list[str],
    out: Path,
    model: Path | None,
    adapter: Path | None,
    even_if_worse: bool,
    settings: Any,
    device: str,
    as_json: bool,
) -> NextDocument:
    from progidiff.active.search import rank_folder
    from progidiff.cards import load_card
    from progidiff.cli.stopping import StopWord, interruptible
    from progidiff.places import claimed
    from progidiff.sampling.engine import Engine
    from progidiff.targets import parse_prompt

    asked = StopWord(sys.stdin if as_json else None)
    targets = [target.key for target in parse_prompt("; ".join(prompt), load_card(model).vocabulary)]
    with claimed(out), interruptible("Stopping; what was measured is kept.") as interrupted:
        engine: Engine = Engine.load(model, device)
        if adapter is not None:
            engine.load_adapter(adapter, even_if_worse)

        def tell(event: dict[str, Any]) -> None:
            if as_json:
                _line(event)
            else:
                _say(event)

        return rank_folder(engine, folder, targets, out, settings, tell, lambda: interrupted() or asked.heard)


def _line(event: dict[str, Any]) -> None:
    print(json.dumps(event, ensure_ascii=False), flush=True)


def _say(event: dict[str, Any]) -> None:
    """Progress on standard error, which may end up in a log: numbers only, no names of files."""
    if event["event"] == "start":
        if event["message"]:
            print(event["message"], file=sys.stderr)
        print(f"{event['volumes']} volumes, {event['known']} of them known.", file=sys.stderr, flush=True)
    elif event["event"] == "volume":
        left = "" if event["eta_s"] is None else f", about {_duration(event['eta_s'])} left"
        print(f"volume {event['done']} of {event['volumes']}{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _print(document: NextDocument, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("Volume", "Target"):
        table.add_column(head, overflow="fold")
    for head in ("Slice", "Disagreement", "Pairwise", "Entropy", "Presence"):
        table.add_column(head, justify="right")
    for item in document.ranked():
        worst = item.per_target[item.target]
        figures = (worst.disagreement, worst.pairwise, worst.entropy, worst.presence)
        table.add_row(Text(item.path), item.target, str(item.slice), *(f"{figure:.3f}" for figure in figures))
    console = Console(highlight=False)
    console.print(table)
    for item in document.ranked():
        for note in item.notes:
            console.print(Text(f"{item.path}: {note}"), soft_wrap=True)
    for failure in document.failures:
        console.print(Text(f"Not measured: {failure.path}: {one_line(failure.reason)}"), soft_wrap=True)
    if not document.complete:
        console.print("Stopped early; the same command goes on.")
    console.print(Text(f"Results in {out}."), soft_wrap=True)
