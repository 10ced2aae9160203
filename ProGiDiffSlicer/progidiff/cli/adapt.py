"""``progidiff adapt``: tune a model on a team's own cases."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli.failures import EXIT_BAD_INPUT, one_line
from progidiff.cli.propose import CorrectOption, DeviceName, PlaneOption
from progidiff.errors import CancelledError, ProGiDiffError

if TYPE_CHECKING:
    from progidiff.cards import AdapterCard


class LayersName(StrEnum):
    """Layers that get low-rank partners."""

    ALL = "all"
    ATTENTION = "attention"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("adapt")(adapt)


def adapt(
    cases: Annotated[
        list[Path],
        typer.Option(metavar="DIR", help="Curated set, nnU-Net raw folder or slice folder; may be given several times."),
    ],
    out: Annotated[Path, typer.Option(metavar="ADAPTER", help="The adapter's folder.")],
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; the bundled one by default.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoints; the same command goes on from there (default: OUT-training)."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Tune this target only; may be given several times (default: all labelled).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Most optimiser steps.")] = 150,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Rank of the low-rank layers.")] = 8,
    layers: Annotated[LayersName, typer.Option(help="Layers that get them.")] = LayersName.ALL,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-8, max=1.0, help="Peak learning rate (default: by the network's size).")
    ] = None,
    replay: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of synthetic phantoms among the images, against forgetting.")
    ] = 0.25,
    images: Annotated[int, typer.Option(min=1, help="Images per step.")] = 4,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 25,
    patience: Annotated[int, typer.Option(min=1, help="Validations without a new best that end the training.")] = 4,
    validation_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the patients that are held out; 0 for none.")
    ] = 0.25,
    name: Annotated[str, typer.Option(help="Name to show (default: the folder's).")] = "",
    plane: PlaneOption = None,
    correct_values: CorrectOption = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of data, split and noise.")] = 0,
    device: Annotated[DeviceName, typer.Option(help="Where to train.")] = DeviceName.AUTO,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write before/after pictures of held-out cases there; they show patients."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help='One JSON object per line on standard output; a line "stop" on standard input ends it.'),
    ] = False,
) -> None:
    """Tune control branch and image encoder with LoRA; Ctrl+C keeps the best so far.

    A quarter of the patients is held out; the adapter's card says what it gives on them, before and after.
    """
    from progidiff.cli.stopping import StopWord, interruptible
    from progidiff.cli.training import STOPPING, TrainingView
    from progidiff.places import claimed
    from progidiff.training.adapt import AdaptSettings
    from progidiff.training.adapt import adapt as run
    from progidiff.training.run import Watch
    from progidiff.training.tuning import TuneSettings

    settings = AdaptSettings(
        tuning=TuneSettings(
            steps=steps,
            rank=rank,
            layers=layers.value,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            replay_share=replay,
            images=images,
            validate_every=validate_every,
            patience=patience,
            seed=seed,
        ),
        targets=tuple(target or ()),
        validation_share=validation_share,
        device=device.value,
        name=name,
        plane=plane and plane.value,
        correct_values=correct_values,
    )
    output = _Output(as_json, pictures)
    asked = StopWord(sys.stdin) if as_json else None
    try:
        with (
            claimed(out),
            claimed(work or out.with_name(f"{out.name}-training")),
            TrainingView() as view,
            interruptible(STOPPING, view.log) as interrupted,
        ):

            def cancelled() -> bool:
                return interrupted() or (asked is not None and asked.heard)

            watch = Watch(log=view.log, progress=view.progress, cancelled=cancelled)
            card = run(cases, model, out, work, settings, watch, output)
    except (ProGiDiffError, CancelledError) as error:
        if not as_json:
            raise
        output({"event": "error", "code": error.code, "message": one_line(str(error))})
        print(one_line(str(error)), file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    if not as_json:
        _print(card, out)


class _Output:
    """Writes events as JSON lines, and pictures where they are asked for."""

    def __init__(self, as_json: bool, pictures: Path | None) -> None:
        self._as_json, self._pictures = as_json, pictures

    def __call__(self, event: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(event, ensure_ascii=False), flush=True)
        for case in event.get("left_out", []) if not self._as_json else []:
            print(f"Left out: {case['case']}: {one_line(case['reason'])}", flush=True)
        if self._pictures is not None and event["event"] == "pictures":
            self._write(self._pictures, event["items"])

    @staticmethod
    def _write(folder: Path, items: list[dict[str, Any]]) -> None:
        import base64

        from progidiff.errors import OutputError

        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number, item in enumerate(items):
                words = f"{number:02d} {item['target']} {item['before']:.2f} to {item['after']:.2f}.png"
                (folder / words).write_bytes(base64.b64decode(item["png"]))
        except OSError as error:
            raise OutputError(
                f"The pictures cannot be written to {folder} ({error.strerror}); choose another folder."
            ) from error


def _print(card: AdapterCard, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    screen = Console()
    table = Table(title=f"Dice of the first-ranked proposal on held-out cases, {card.name}")
    for head in ("target", "training cases", "slices", "patients", "before", "after"):
        table.add_column(head, justify="left" if head == "target" else "right")
    for target, counts in card.targets.items():
        before, after = card.before.get(target), card.after.get(target)
        figures = ["", "", "", ""]
        if before is not None and after is not None:
            figures = [str(after.n_slices), str(after.n_patients), f"{before.dice:.3f}", f"{after.dice:.3f}"]
        table.add_row(target, str(counts.training), *figures)
    screen.print(table)
    if card.retention is not None:
        kept = card.retention
        screen.print(f"Retention on {kept.n} {kept.set}: {kept.before:.3f} before, {kept.after:.3f} after.")
    screen.print(f"{card.steps} steps in {card.seconds:.0f} s, best at step {card.best_step}. {card.reason} {card.notes}")
    screen.print(f"Adapter: {out}", soft_wrap=True)
