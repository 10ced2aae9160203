"""``progidiff train``: the backbone, the control branch, or the bundled model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from progidiff.cli.failures import EXIT_CANCELLED
from progidiff.cli.propose import CorrectOption, DeviceName, PlaneName, PlaneOption
from progidiff.errors import CancelledError, DatasetError, OutputError
from progidiff.places import resource_folders

if TYPE_CHECKING:
    from progidiff.cards import ModelCard
    from progidiff.training.run import RunSettings, TrainingData, Watch

app = typer.Typer(name="train", help="Train a model, or go on with a training that was interrupted.", no_args_is_help=True)

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


def register(program: typer.Typer) -> None:
    """Add the commands."""
    program.add_typer(app)


@app.command("base")
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


@app.command("control")
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


@app.command("default")
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
    from progidiff.cli.stopping import interruptible
    from progidiff.cli.training import STOPPING, TrainingView
    from progidiff.places import claimed
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
