"""What teaches a model: ``progidiff next`` (the volume to correct next), ``adapt`` (tuning on own cases) and ``train``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from progidiff.cli.common import (
    EXIT_BAD_INPUT,
    EXIT_CANCELLED,
    AdapterOption,
    CorrectOption,
    DeviceName,
    EvenIfWorseOption,
    ModalityName,
    ModelOption,
    PlaneName,
    PlaneOption,
    ProposalStepsOption,
    StopWord,
    interruptible,
    one_line,
)
from progidiff.errors import CancelledError, DatasetError, OutputError, ProGiDiffError
from progidiff.places import claimed, resource_folders

if TYPE_CHECKING:
    from progidiff.active.record import NextDocument
    from progidiff.cards import AdapterCard, ModelCard
    from progidiff.training.run import RunSettings, TrainingData, Watch
    from progidiff.wire.messages import AdaptPicture, Reply


train = typer.Typer(name="train", help="Train a model, or go on with a training that was interrupted.", no_args_is_help=True)

DataOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="nnU-Net raw folder, or slice folder with manifest.json; may be given several times.",
    ),
]
SyntheticOption = Annotated[
    str | None,
    typer.Option(
        metavar="phantoms|PATH",
        help="Train on synthetic slices (as well): phantoms only, or painted on the label data in PATH/permissive.",
    ),
]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The new model folder.")]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Checkpoints and validation curves; the same command goes on from there (default: OUT-training)."
    ),
]
StepsOption = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
FirstStepsOption = Annotated[
    int | None,
    typer.Option(min=0, help="Steps of the stage before: mask autoencoder (base) or pre-training of the encoder (control)."),
]
ImagesOption = Annotated[int, typer.Option(min=1, help="Images per step.")]
RateOption = Annotated[
    float | None, typer.Option(min=1e-8, max=1.0, help="Peak learning rate (default: by the network's size).")
]
DeviceOption = Annotated[DeviceName, typer.Option(help="Where to train.")]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**31, help="The same seed and data give the same model on one machine.")
]
ShareOption = Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the patients that are held out; 0 for none.")]


class LayersName(StrEnum):
    """Layers that get low-rank partners."""

    ALL = "all"
    ATTENTION = "attention"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("next")(next_volumes)
    app.command("adapt")(adapt)
    app.add_typer(train)


def next_volumes(
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Folder with volumes, also in folders below it.")],
    prompt: Annotated[list[str], typer.Option(help='What to look for, e.g. "liver; pancreas"; may be given several times.')],
    out: Annotated[
        Path, typer.Option(metavar="FILE.json", help="Result; the same command goes on from it and measures what is new.")
    ],
    model: ModelOption = None,
    adapter: AdapterOption = None,
    even_if_worse: EvenIfWorseOption = False,
    proposals: Annotated[int, typer.Option(min=2, max=200, help="Proposals per slice and target.")] = 6,
    steps: ProposalStepsOption = 2,
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
    from progidiff.active.search import search
    from progidiff.wire.messages import ErrorReply, NextRequest, NextSettings

    settings = NextSettings(
        proposals=proposals,
        steps=steps,
        slices=slices,
        closer=closer,
        seed=seed,
        modality=modality and modality.value,  # type: ignore[arg-type]
        plane=plane and plane.value,  # type: ignore[arg-type]
        correct_values=correct_values,
    )
    request = NextRequest(
        folder=str(folder),
        prompt="; ".join(prompt),
        out=str(out),
        model=None if model is None else str(model),
        adapter=None if adapter is None else str(adapter),
        even_if_worse=even_if_worse,
        device=device.value,  # type: ignore[arg-type]
        settings=settings,
    )
    asked = StopWord(sys.stdin if as_json else None)
    try:
        with interruptible("Stopping; what was measured is kept.") as interrupted:
            document = search(request, _line if as_json else _say, lambda: interrupted() or asked.heard)
    except ProGiDiffError as error:
        if not as_json:
            raise
        _line(ErrorReply(error.code, one_line(str(error))))
        print(one_line(str(error)), file=sys.stderr)
        raise typer.Exit(EXIT_CANCELLED if isinstance(error, CancelledError) else EXIT_BAD_INPUT) from None
    if as_json:
        return
    _print_ranking(document, out)
    if not document.complete:
        raise typer.Exit(EXIT_CANCELLED)


def _line(message: Reply) -> None:
    from progidiff.wire.codec import to_line

    print(json.dumps(to_line(message), ensure_ascii=False), flush=True)


def _say(message: Reply) -> None:
    """Progress on standard error, which may end up in a log: numbers only, no names of files."""
    from progidiff.wire.messages import NextStart, NextVolume

    if isinstance(message, NextStart):
        if message.message:
            print(message.message, file=sys.stderr)
        print(f"{message.volumes} volumes, {message.known} of them known.", file=sys.stderr, flush=True)
    elif isinstance(message, NextVolume):
        left = "" if message.eta_s is None else f", about {_duration(message.eta_s)} left"
        print(f"volume {message.done} of {message.volumes}{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _print_ranking(document: NextDocument, out: Path) -> None:
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


def adapt(
    cases: Annotated[
        list[Path],
        typer.Option(metavar="DIR", help="Curated set, nnU-Net raw folder or slice folder; may be given several times."),
    ],
    out: Annotated[Path, typer.Option(metavar="ADAPTER", help="The adapter's folder.")],
    model: ModelOption = None,
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
    learning_rate: RateOption = None,
    replay: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of synthetic phantoms among the images, against forgetting.")
    ] = 0.25,
    images: ImagesOption = 4,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 25,
    patience: Annotated[int, typer.Option(min=1, help="Validations without a new best that end the training.")] = 4,
    validation_share: ShareOption = 0.25,
    name: Annotated[str, typer.Option(help="Name to show (default: the folder's).")] = "",
    plane: PlaneOption = None,
    correct_values: CorrectOption = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of data, split and noise.")] = 0,
    device: DeviceOption = DeviceName.AUTO,
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
    from progidiff.cli.view import STOPPING, TrainingView
    from progidiff.training.adapt import adapt as run
    from progidiff.training.run import Watch
    from progidiff.wire.messages import AdaptRequest, ErrorReply

    request = AdaptRequest(
        cases=tuple(map(str, cases)),
        out=str(out),
        model=None if model is None else str(model),
        work=None if work is None else str(work),
        targets=tuple(target or ()),
        validation_share=validation_share,
        device=device.value,  # type: ignore[arg-type]
        name=name,
        plane=plane and plane.value,  # type: ignore[arg-type]
        correct_values=correct_values,
        steps=steps,
        rank=rank,
        layers=layers.value,  # type: ignore[arg-type]
        learning_rate=learning_rate,
        images=images,
        replay_share=replay,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
    )
    asked = StopWord(sys.stdin if as_json else None)
    try:
        with TrainingView() as view, interruptible(STOPPING, view.log) as interrupted:
            watch = Watch(view.log, view.progress, lambda: interrupted() or asked.heard)
            card = run(request, watch, _Output(as_json, pictures))
    except (ProGiDiffError, CancelledError) as error:
        if not as_json:
            raise
        _line(ErrorReply(error.code, one_line(str(error))))
        print(one_line(str(error)), file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    if not as_json:
        _print_adapter(card, out)


class _Output:
    """Writes events as JSON lines, and pictures where they are asked for."""

    def __init__(self, as_json: bool, pictures: Path | None) -> None:
        self._as_json, self._folder = as_json, pictures
        self._count = 0

    def __call__(self, message: Reply) -> None:
        from progidiff.wire.messages import AdaptPicture, AdaptStart

        if self._as_json:
            _line(message)
        elif isinstance(message, AdaptStart):
            for each in message.left_out:
                print(f"Left out: {each.case}: {one_line(each.reason)}", flush=True)
        if self._folder is not None and isinstance(message, AdaptPicture):
            self._write(self._folder, message)

    def _write(self, folder: Path, picture: AdaptPicture) -> None:
        words = f"{self._count:02d} {picture.target} {picture.before:.2f} to {picture.after:.2f}.png"
        self._count += 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / words).write_bytes(picture.png.tobytes())
        except OSError as error:
            raise OutputError(
                f"The pictures cannot be written to {folder} ({error.strerror}); choose another folder."
            ) from error


def _print_adapter(card: AdapterCard, out: Path) -> None:
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


@train.command("base")
def base(
    out: OutOption,
    data: DataOption = None,
    synthetic: SyntheticOption = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model folder to go on from (default: a small one from scratch).")
    ] = None,
    work: WorkOption = None,
    steps: StepsOption = 4000,
    first_steps: FirstStepsOption = None,
    images: ImagesOption = 4,
    learning_rate: RateOption = None,
    device: DeviceOption = DeviceName.AUTO,
    seed: SeedOption = 0,
    validation_share: ShareOption = 0.2,
    plane: PlaneOption = None,
    correct_values: CorrectOption = False,
) -> None:
    """Train a text-to-mask backbone: what masks of each organ look like. Only the masks of the data count."""
    from progidiff.training.run import train_base

    chosen = _settings(steps, first_steps, images, learning_rate, device, seed)
    what = _data(data, synthetic, validation_share, plane, correct_values)
    with _watch(out, _work(work, out)) as watch:
        card = train_base(what, out, _work(work, out), chosen, watch, model)
    _done(card, out)


@train.command("control")
def control(
    out: OutOption,
    data: DataOption = None,
    synthetic: SyntheticOption = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model folder to start from (default: the bundled model).")
    ] = None,
    work: WorkOption = None,
    steps: StepsOption = 4000,
    first_steps: FirstStepsOption = None,
    images: ImagesOption = 4,
    learning_rate: RateOption = None,
    device: DeviceOption = DeviceName.AUTO,
    seed: SeedOption = 0,
    validation_share: ShareOption = 0.2,
    plane: PlaneOption = None,
    correct_values: CorrectOption = False,
) -> None:
    """Train the control branch and the image encoder against the frozen backbone of a model folder."""
    from progidiff.training.run import train_control

    chosen = _settings(steps, first_steps, images, learning_rate, device, seed)
    what = _data(data, synthetic, validation_share, plane, correct_values)
    with _watch(out, _work(work, out)) as watch:
        card = train_control(model, what, out, _work(work, out), chosen, watch)
    _done(card, out)


@train.command("default")
def default(
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that holds permissive/ (default: ../shared/data beside the repository)."),
    ] = None,
    phantoms_only: Annotated[bool, typer.Option("--phantoms-only", help="Train on procedural phantoms alone.")] = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="A finished small model to go on from (default: from nothing)."),
    ] = None,
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Checkpoints and validation curves; the same command goes on from there.")
    ] = Path("build/default-model"),
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model folder (default: the repository's Resources/Models/default).")
    ] = None,
    device: DeviceOption = DeviceName.AUTO,
) -> None:
    """Train the bundled model again, from phantoms and permissively licensed volumes only."""
    import torch

    from progidiff.model.folder import load_model
    from progidiff.training.default import STAGES, DefaultRecipe, assemble_default, load_volumes
    from progidiff.training.run import training_device

    if data is not None and phantoms_only:
        raise DatasetError("Give either --data or --phantoms-only, not both.")
    target = _default_out() if out is None else out
    chosen = training_device(device.value)
    volumes = load_volumes(None if phantoms_only else _default_data() if data is None else data)
    model = None if start is None else load_model(start, torch.device("cpu"), torch.float32, None)
    with _watch(target, work) as watch:
        recipe = DefaultRecipe(work, volumes, None, str(chosen), watch.log, watch.progress, watch.cancelled, start=model)
        for stage in STAGES:
            recipe.run(stage)
        card = assemble_default(recipe, target)
    _done(card, target)


@contextmanager
def _watch(out: Path, work: Path) -> Iterator[Watch]:
    """A view of the run, which has its folders to itself; one that is stopped ends with one line and exit code 130."""
    from progidiff.cli.view import STOPPING, TrainingView
    from progidiff.training.run import Watch

    try:
        with claimed(out), claimed(work), TrainingView() as view, interruptible(STOPPING, view.log) as cancelled:
            yield Watch(view.log, view.progress, cancelled)
    except CancelledError as error:
        print(f"{error} Run the same command again to go on.", file=sys.stderr, flush=True)
        raise typer.Exit(EXIT_CANCELLED) from None


def _settings(
    steps: int, first_steps: int | None, images: int, learning_rate: float | None, device: DeviceName, seed: int
) -> RunSettings:
    from progidiff.training.run import RunSettings

    return RunSettings(
        steps=steps, first_steps=first_steps, images=images, learning_rate=learning_rate, device=device.value, seed=seed
    )


def _data(
    folders: list[Path] | None, synthetic: str | None, share: float, plane: PlaneName | None, correct_values: bool
) -> TrainingData:
    from progidiff.training.run import TrainingData

    return TrainingData(
        folders=tuple(folders or ()),
        synthetic=synthetic,
        validation_share=share,
        plane=plane and plane.value,
        correct_values=correct_values,
    )


def _work(work: Path | None, out: Path) -> Path:
    """The folder of the checkpoints: beside the result unless another one is named."""
    named = out.absolute()
    return named.with_name(f"{named.name}-training") if work is None else work


def _default_data() -> Path:
    folder = resource_folders()[0].parent.parent / "shared" / "data"
    if not (folder / "permissive").is_dir():
        raise DatasetError(
            "There are no label maps beside the repository; name their folder with --data, or use --phantoms-only."
        )
    return folder


def _default_out() -> Path:
    resources = resource_folders()[0]
    if not resources.is_dir():
        raise OutputError("This is no checkout of the repository; name a folder for the model with --out.")
    return resources / "Models" / "default"


def _done(card: ModelCard, out: Path) -> None:
    print(f"The model {card.model_id} is in {out}; it knows {', '.join(card.vocabulary)}.")
