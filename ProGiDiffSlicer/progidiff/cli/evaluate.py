"""``progidiff evaluate``: a model on labelled cases, with every case, figures over them, and a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli.failures import EXIT_CANCELLED
from progidiff.cli.propose import CorrectOption, DeviceName, PlaneOption
from progidiff.errors import CancelledError, DatasetError

if TYPE_CHECKING:
    from progidiff.cards import ModelCard
    from progidiff.datasets.slices import NamedSets
    from progidiff.evaluation.cases import EvaluationCase
    from progidiff.evaluation.evaluate import Progress


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


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
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; the bundled one by default.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter to use on the model.")] = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", help="Use an adapter that was not better than its base.")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Measure these targets only (default: all that model and labels have).")
    ] = None,
    proposals: Annotated[int, typer.Option(min=1, max=1000, help="Proposals per target (N).")] = 16,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Denoising steps.")] = 4,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds other files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json on standard output.")] = False,
) -> None:
    """Measure Dice, HD95 and surface Dice on labelled volumes and slices.

    For the first-ranked proposal, medoid, ensemble, mean, best-of-N and RandTop-k, by organ, with patient-bootstrap
    intervals. Ctrl+C keeps finished cases; the same command goes on.
    """
    from progidiff.cards import load_card
    from progidiff.cli.evaluate_table import print_evaluation
    from progidiff.cli.stopping import interruptible
    from progidiff.evaluation.evaluate import evaluate_cases, to_csv
    from progidiff.evaluation.examples import draw_examples
    from progidiff.evaluation.measuring import EvaluationSettings
    from progidiff.evaluation.report import CSV_NAME, JSON_NAME, REPORT_NAME, render_evaluation
    from progidiff.places import atomic_folder, claimed
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
    from progidiff.places import MARKER, holds_files

    if out.is_file() or (out.is_dir() and not overwrite and not (out / MARKER).is_file() and holds_files(out)):
        from progidiff.errors import OutputError

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
        import time

        from progidiff.cli.progress import progress_view

        self._view: Any = progress_view()
        self._view.__enter__()
        self._began = time.monotonic()
        return self._show

    def __exit__(self, *error: Any) -> None:
        self._view.__exit__(*error)

    def _show(self, state: Progress) -> None:
        import time

        from progidiff.wire.messages import ProgressEvent

        measured = state.done - state.kept + state.share
        share = (state.done + state.share) / max(state.total, 1)
        left = state.total - state.done - state.share
        eta = (time.monotonic() - self._began) / measured * left if measured > 0 else None
        self._view.show(ProgressEvent("measuring", share, eta_s=eta))
