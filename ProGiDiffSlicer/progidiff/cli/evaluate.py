"""What measures a model: ``progidiff accuracy`` (Dice per slice, also on held-out phantoms) and ``evaluate`` (every case,
figures over them, and a report).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli.common import (
    EXIT_CANCELLED,
    AdapterOption,
    CorrectOption,
    DeviceName,
    EvenIfWorseOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    PlaneOption,
    ProposalStepsOption,
    interruptible,
    one_line,
)
from progidiff.errors import CancelledError, DatasetError, InputError, OutputError
from progidiff.places import MARKER, atomic_folder, claimed, holds_files

if TYPE_CHECKING:
    from rich.table import Table

    from progidiff.cards import ModelCard
    from progidiff.datasets.slices import LabelledSlice, NamedSets
    from progidiff.evaluation.cases import EvaluationCase
    from progidiff.evaluation.evaluate import EvaluationDocument, Progress
    from progidiff.evaluation.summary import TargetSummary
    from progidiff.sampling.engine import Engine

PHANTOMS = "phantoms"


class State(StrEnum):
    """What the networks see as their noisy state."""

    NONE = "none"
    SHUFFLED = "shuffled"
    NOISE = "noise"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("accuracy")(accuracy)
    app.command("evaluate")(evaluate)


def accuracy(
    ctx: typer.Context,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME", help="nnU-Net raw folder or slice folder in that of --data; or phantoms."),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that the sets are in.")] = None,
    model: ModelOption = None,
    proposals: Annotated[int, typer.Option(min=1, max=200, help="Proposals per slice and target (N).")] = 16,
    steps: ProposalStepsOption = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    phantoms: Annotated[int, typer.Option(min=1, help="Number of held-out phantoms.")] = 40,
    every: Annotated[int, typer.Option(min=1, help="Measure every n-th slice only.")] = 1,
    device: Annotated[DeviceName, typer.Option(help="Where to compute.")] = DeviceName.AUTO,
    write_card: Annotated[bool, typer.Option(help="Write the figures into the model's card.")] = False,
    ablation: Annotated[
        State,
        typer.Option(help="Hide the noisy state from the networks: shuffled between samples, or fresh noise."),
    ] = State.NONE,
    as_json: JsonOption = False,
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
        _print_accuracy(result, compare is not None)


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


def _print_accuracy(result: dict[str, Any], with_twin: bool) -> None:
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


def evaluate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results; made where it does not exist.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Curated set, nnU-Net raw folder (volumes, in 3-D) or slice folder (in 2-D); several times."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME", help="Set in the folder given by --shared.")
    ] = None,
    shared: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the sets.")] = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    even_if_worse: EvenIfWorseOption = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Measure these targets only (default: all that model and labels have).")
    ] = None,
    proposals: Annotated[int, typer.Option(min=1, max=1000, help="Proposals per target (N).")] = 16,
    steps: ProposalStepsOption = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")] = 0,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="k of RandTop-k.")] = 3,
    tolerance: Annotated[float, typer.Option(min=0.01, max=100, help="Tolerance of the surface Dice (NSD) in mm.")] = 2.0,
    no_distances: Annotated[bool, typer.Option("--no-distances", help="Leave HD95 and NSD out.")] = False,
    present_only: Annotated[
        bool, typer.Option("--present-only", help="Do not ask for organs that are labelled as absent.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="Every n-th case of each set.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many cases of each set.")] = None,
    plane: PlaneOption = None,
    correct_values: CorrectOption = False,
    device: Annotated[DeviceName, typer.Option(help="Where to compute.")] = DeviceName.AUTO,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Results of finished cases; the same command goes on there (default: OUT-cases)."),
    ] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Put no pictures of patients into the report.")] = False,
    overwrite: OverwriteOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json on standard output.")] = False,
) -> None:
    """Measure Dice, HD95 and surface Dice on labelled volumes and slices.

    For the first-ranked proposal, medoid, ensemble, mean, best-of-N and RandTop-k, by organ, with patient-bootstrap
    intervals. Ctrl+C keeps finished cases; the same command goes on.
    """
    from progidiff.cards import load_card
    from progidiff.evaluation.evaluate import evaluate_cases, to_csv
    from progidiff.evaluation.examples import draw_examples
    from progidiff.evaluation.measuring import EvaluationSettings
    from progidiff.evaluation.report import CSV_NAME, JSON_NAME, REPORT_NAME, render_evaluation
    from progidiff.sampling.engine import Engine
    from progidiff.targets import parse_prompt

    _check_out(out, overwrite)
    card = load_card(model)
    targets = tuple(t.key for t in parse_prompt("; ".join(prompt), card.vocabulary)) if prompt else ()
    with claimed(out), interruptible("Stopping; finished cases are kept.") as cancelled:
        engine = Engine.load(model, device.value)
        if adapter is not None:
            engine.load_adapter(adapter, even_if_worse)
        settings = EvaluationSettings(
            proposals=proposals,
            steps=steps,
            seed=seed,
            k=top_k,
            tolerance_mm=None if no_distances else tolerance,
            absent=not present_only,
            targets=targets,
            plane=plane and plane.value,
            correct_values=correct_values,
        )
        cases = _cases(data or [], sets or [], shared, engine.card, every, limit, settings.plane, ctx.obj)
        try:
            with _bar() as show:
                document = evaluate_cases(engine, cases, settings, cache or _beside(out), cancelled, show)
            examples = [] if no_pictures else draw_examples(engine, cases, document, cancelled)
        except CancelledError:
            sentence = "Stopped; finished cases are kept, and the same command goes on from there."
            print(sentence, file=sys.stderr, flush=True)
            if as_json:
                print(json.dumps({"error": {"code": CancelledError.code, "message": sentence}}))
            raise typer.Exit(EXIT_CANCELLED) from None
        with atomic_folder(out, overwrite=overwrite) as folder:
            (folder / JSON_NAME).write_text(document.to_json(), encoding="utf-8")
            (folder / CSV_NAME).write_text(to_csv(document), encoding="utf-8")
            (folder / REPORT_NAME).write_text(render_evaluation(document, examples), encoding="utf-8", newline="\n")
    if as_json:
        sys.stdout.write(document.to_json())
    else:
        print_evaluation(document, out)


def _check_out(out: Path, overwrite: bool) -> None:
    """Learn before the work, not after it, that the results cannot be written."""
    if out.is_file() or (out.is_dir() and not overwrite and not (out / MARKER).is_file() and holds_files(out)):
        raise OutputError(f"{out} is not an empty folder; give another one for the results, or allow overwriting.")


def _beside(out: Path) -> Path:
    named = out.absolute()
    return named.with_name(f"{named.name}-cases")


def _cases(
    data: list[Path],
    sets: list[str],
    shared: Path | None,
    card: ModelCard,
    every: int,
    limit: int | None,
    plane: str | None,
    known: NamedSets | None,
) -> list[EvaluationCase]:
    from progidiff.evaluation.cases import cases_of_folder, cases_of_slices

    if not data and not sets:
        raise DatasetError("There is nothing to measure; name a labelled set with --data, or by --set and --shared.")
    if sets and shared is None:
        raise DatasetError("The sets lie in a folder of yours; name it with --shared.")
    groups = [cases_of_folder(folder, card, plane) for folder in data]
    if shared is not None:
        groups += [
            cases_of_folder(shared / name, card, plane)
            if known is None
            else cases_of_slices(known.read(shared, name), name, card)
            for name in sets
        ]
    return _told_apart([case for group in groups for case in group[::every][:limit]])


def _told_apart(cases: list[EvaluationCase]) -> list[EvaluationCase]:
    """Two sets of one name would be mixed up."""
    if len({(case.set, case.name) for case in cases}) < len(cases):
        raise DatasetError("Two of the sets have the same name and cases; give each set once, under a name of its own.")
    return cases


class _bar:
    """Cases done and time left, on standard error; without names, since that may end up in a log."""

    def __enter__(self) -> Callable[[Progress], None]:
        from progidiff.cli.view import progress_view

        self._view: Any = progress_view()
        self._view.__enter__()
        self._began = time.monotonic()
        return self._show

    def __exit__(self, *error: Any) -> None:
        self._view.__exit__(*error)

    def _show(self, state: Progress) -> None:
        from progidiff.wire.messages import ProgressEvent

        measured = state.done - state.kept + state.share
        share = (state.done + state.share) / max(state.total, 1)
        left = state.total - state.done - state.share
        eta = (time.monotonic() - self._began) / measured * left if measured > 0 else None
        self._view.show(ProgressEvent("measuring", share, eta_s=eta))


def print_evaluation(document: EvaluationDocument, out: Path) -> None:
    """Print Dice, distances and presence errors."""
    from rich.console import Console
    from rich.text import Text

    from progidiff.evaluation.report import REPORT_NAME

    settings = document.settings
    console = Console(width=210, highlight=False)
    model = settings.model_id + (f" with adapter {settings.adapter_id}" if settings.adapter_id else "")
    made = f"{model}, N = {settings.proposals}, {settings.steps} steps, seed {settings.seed}"
    console.print(_table(f"Dice (95 % interval over patients), {made}", document, "dice"))
    if settings.tolerance_mm is not None:
        by = settings.distances_by
        console.print(_table(f"HD95 in mm over finite ones, and failures ({by})", document, "hd95_mm"))
        console.print(_table(f"NSD at {settings.tolerance_mm:g} mm ({by})", document, "nsd"))
    console.print(_presence(document))
    for note in document.notes:
        console.print(Text(note), soft_wrap=True)
    for failure in document.failures:
        console.print(Text(f"Not measured: {failure.name} of {failure.set}: {one_line(failure.reason)}"), soft_wrap=True)
    console.print(Text(f"Results in {out}; open {REPORT_NAME} there first."), soft_wrap=True)


def _table(title: str, document: EvaluationDocument, field: str) -> Table:
    from rich.table import Table

    from progidiff.evaluation.report import answer_name, failures, figure_text
    from progidiff.evaluation.scoring import ANSWERS
    from progidiff.evaluation.summary import MEAN

    table = Table(title=title)
    for head in ("set", "target", "n"):
        table.add_column(head)
    for answer in ANSWERS:
        table.add_column(answer_name(answer, document.settings), justify="right")
    for row in document.summary:
        if not row.cases:
            continue
        cells = []
        for answer in ANSWERS:
            summary = row.answers[answer]
            text = figure_text(getattr(summary, field), 1 if field == "hd95_mm" else 3)
            cells.append(f"{text}; {failures(summary)} failed" if field == "hd95_mm" and summary.hd95_failures else text)
        table.add_row(row.set, row.target, _size(row), *cells, end_section=row.target == MEAN)
    return table


def _presence(document: EvaluationDocument) -> Table:
    from rich.table import Table

    from progidiff.evaluation.report import number
    from progidiff.evaluation.summary import MEAN

    table = Table(title="Found or not: cases missed and invented by rank 1 and by the consensus")
    heads = ("set", "target", "present", "missed", "missed by consensus", "absent", "invented", "invented by consensus")
    for head in (*heads, "empty proposals where absent", "calibration error"):
        table.add_column(head, justify="left" if head in ("set", "target") else "right")
    for row in document.summary:
        if row.target == MEAN:
            continue
        first, consensus = row.answers["rank1"].presence, row.answers["consensus"].presence
        counts = (row.cases, first["FN"], consensus["FN"], row.absent, first["FP"], consensus["FP"])
        shares = (number(row.absent_empty_share, 2), number(row.calibration_error))
        table.add_row(row.set, row.target, *(str(n) for n in counts), *shares)
    return table


def _size(row: TargetSummary) -> str:
    patients = f"{row.patients} patient{'s' if row.patients != 1 else ''}"
    if row.dimensions == 2:
        return f"{row.cases} slice{'s' if row.cases != 1 else ''}, {patients}"
    return f"{row.cases} volume{'s' if row.cases != 1 else ''} ({row.slices} slices), {patients}"
