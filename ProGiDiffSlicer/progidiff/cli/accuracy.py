"""``progidiff accuracy``: Dice of proposals on held-out phantoms and on labelled real slices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli.propose import DeviceName
from progidiff.errors import InputError

if TYPE_CHECKING:
    from progidiff.cards import ModelCard
    from progidiff.datasets.slices import LabelledSlice, NamedSets
    from progidiff.sampling.engine import Engine

PHANTOMS = "phantoms"


class State(StrEnum):
    """What the networks see as their noisy state."""

    NONE = "none"
    SHUFFLED = "shuffled"
    NOISE = "noise"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("accuracy")(accuracy)


def accuracy(
    ctx: typer.Context,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME", help="nnU-Net raw folder or slice folder in that of --data; or phantoms."),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that the sets are in.")] = None,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; the bundled one by default.")] = None,
    proposals: Annotated[int, typer.Option(min=1, max=200, help="Proposals per slice and target (N).")] = 16,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Denoising steps.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    phantoms: Annotated[int, typer.Option(min=1, help="Number of held-out phantoms.")] = 40,
    every: Annotated[int, typer.Option(min=1, help="Measure every n-th slice only.")] = 1,
    device: Annotated[DeviceName, typer.Option(help="Where to compute.")] = DeviceName.AUTO,
    write_card: Annotated[bool, typer.Option(help="Write the figures into the model's card.")] = False,
    ablation: Annotated[
        State,
        typer.Option(help="Hide the noisy state from the networks: shuffled between samples, or fresh noise."),
    ] = State.NONE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure rank-1, mean, best-of-N and RandTop-3 Dice, with numbers of slices and patients."""
    from rich.console import Console

    from progidiff.evaluation import accuracy as measure
    from progidiff.evaluation.accuracy import PlainSegmenter, disturbed_state, image_only_twin
    from progidiff.evaluation.cases import held_out_phantoms
    from progidiff.sampling.engine import Engine

    screen = Console(stderr=True)
    known: NamedSets | None = ctx.obj
    folder = data if data is not None else Path() if known is None else known.folder
    names = sets or [PHANTOMS]
    if not sets and known is None and data is not None:
        raise InputError(f"Say with --set which of the sets in '{data}' to measure.")
    if not sets and known is not None and (data is not None or folder.is_dir()):
        names += known.usual
    elif not sets:
        screen.print("No labelled real images (--set NAME, --data DIR): measuring on the held-out phantoms alone.")
    labels = [name if known is not None or name == PHANTOMS else (folder / name).resolve().name for name in names]
    if len(set(labels)) < len(labels):
        raise InputError("Two of the sets have the same name; give each set once, under a name of its own.")
    engine = Engine.load(model, device.value)
    twin = image_only_twin(engine.model)
    compare = None if twin is None else PlainSegmenter(twin, engine.card)
    scores: list[measure.SliceScore] = []
    absences: list[measure.AbsentScore] = []
    for label, name in zip(labels, names, strict=True):
        items = held_out_phantoms(phantoms) if name == PHANTOMS else _items(name, folder, known, engine.card, screen.print)
        chosen = items[::every] if isinstance(items, list) else islice(items, 0, None, every)
        total = f" of {len(chosen)}" if isinstance(chosen, list) else ""
        with screen.status(f"{label}: slice 1{total}") as status:

            def report(done: int, label: str = label, total: str = total) -> None:
                status.update(f"{label}: slice {done}{total}")

            with disturbed_state(engine.model, ablation.value):
                found = measure.score_slices(engine, label, chosen, proposals, steps, seed, compare, progress=report)
        scores += found[0]
        absences += found[1]
    rows = measure.summarise(scores)
    if write_card:
        _write_card(engine, measure.card_entries(rows, proposals))
    result = {
        "model": engine.card.model_id,
        "proposals": proposals,
        "steps": steps,
        "seed": seed,
        "ablation": ablation.value,
        "targets": rows,
        "means": {label: measure.mean_over_targets(rows, label) for label in labels},
        "absent": measure.summarise_absent(absences),
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, compare is not None)


def _items(
    name: str, folder: Path, known: NamedSets | None, card: ModelCard, tell: Callable[[str], None]
) -> Iterable[LabelledSlice]:
    """The slices of a set; of a folder one after the other, as they are read."""
    from progidiff.training.stacks import open_dataset

    if not folder.is_dir():
        raise InputError(f'The set "{name}" needs the labelled real images; give their folder with --data.')
    if known is not None:
        return known.read(folder, name)
    return open_dataset(folder / name, known=card.planes, tell=tell)


def _write_card(engine: Engine, entries: list[Any]) -> None:
    from progidiff.cards import save_card

    folder = engine.model.folder
    if folder is None:
        raise InputError("The model has no folder to write its card to.")
    save_card(replace(engine.card, accuracy=entries), folder)


def _print(result: dict[str, Any], with_twin: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    n = result["proposals"]
    heads = {"rank1": "rank 1", "mean": "mean", "best": f"best of {n}", "rand_top_3": "RandTop-3", "ensemble": "ensemble"}
    heads |= {"twin": "image-only twin"} if with_twin else {}
    heads |= {"diversity": "pairwise", "spearman": "Spearman"}
    table = Table(title=f"Dice per slice, {result['model']}, N = {n}, {result['steps']} steps, seed {result['seed']}")
    for head in ("set", "target", "slices", "patients", "rank 1, 95 % interval"):
        table.add_column(head, justify="left" if head in ("set", "target") else "right")
    for head in heads.values():
        table.add_column(head, justify="right")
    for name in dict.fromkeys(row["set"] for row in result["targets"]):
        for row in (r for r in result["targets"] if r["set"] == name):
            interval = f"{row['rank1_low']:.2f}-{row['rank1_high']:.2f}" if row["patients"] > 1 else "one patient"
            figures = [f"{row[key]:.3f}" for key in heads]
            table.add_row(name, row["target"], str(row["slices"]), str(row["patients"]), interval, *figures)
        means = result["means"][name]
        table.add_row(
            name, "mean of targets", "", "", "", *[f"{means[k]:.3f}" if k in means else "" for k in heads], end_section=True
        )
    screen = Console(width=170)
    screen.print(table)
    if result["absent"]:
        absent = Table(title="Prompts for organs that are labelled as absent")
        for head in ("set", "target", "slices", "share of empty proposals", "rank 1 empty"):
            absent.add_column(head)
        for row in result["absent"]:
            cells = (f"{row['empty_share']:.2f}", f"{row['rank1_empty']:.2f}")
            absent.add_row(row["set"], row["target"], str(row["slices"]), *cells)
        screen.print(absent)
