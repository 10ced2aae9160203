"""``progidiff propose``: ranked proposals for an image, written as a result folder."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from progidiff.outputs.document import ProposalsDocument


class DeviceName(StrEnum):
    """Where the networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class SamplerName(StrEnum):
    """Samplers of the diffusion process."""

    DDIM = "ddim"
    DPMSOLVER = "dpmsolver++"


class RankingName(StrEnum):
    """Scores without ground truth."""

    SOFT_DICE = "soft_dice"
    MEDOID = "medoid"


class ModalityName(StrEnum):
    """Kinds of images."""

    CT = "CT"
    MR = "MR"


class PlaneName(StrEnum):
    """Planes to cut slices in."""

    AXIAL = "axial"
    CORONAL = "coronal"
    SAGITTAL = "sagittal"


PlaneOption = Annotated[
    PlaneName | None,
    typer.Option(help="Plane to cut volumes in (default: one of the model's, unless clearly acquired in another)."),
]
CorrectOption = Annotated[
    bool,
    typer.Option("--correct-values", help="Take values of a CT that cannot be Hounsfield units for what they look like."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("propose")(propose)


def propose(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="NIfTI, NRRD or MHA file, or a folder with DICOM images."),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(help='What to look for, e.g. "liver" or "spleen and both kidneys"; may be given several times.'),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results; made where it does not exist.")],
    proposals: Annotated[int, typer.Option(min=1, max=1024, help="Proposals per target.")] = 16,
    top_k: Annotated[int, typer.Option(min=1, max=1024, help="Best proposals to put forward as segments.")] = 3,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Denoising steps.")] = 4,
    scheduler: Annotated[SamplerName, typer.Option(help="Sampler.")] = SamplerName.DDIM,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same masks.")] = 0,
    slices: Annotated[
        str, typer.Option(metavar="all|A:B|N", help="Slices from A up to, not including, B; or one slice.")
    ] = "all",
    device: Annotated[DeviceName, typer.Option(help="Where the networks run.")] = DeviceName.AUTO,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model folder, as the worker's machine sees it (default: the bundled one)."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help='Adapter made by "progidiff adapt", as the worker\'s machine sees it.')
    ] = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", help="Use an adapter that was not better than its base.")
    ] = False,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Stop before --proposals once the consensus has settled.")
    ] = False,
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="Also draw a target on slices where it seems to be absent.")
    ] = False,
    ranking: Annotated[RankingName, typer.Option(help="Score without ground truth.")] = RankingName.SOFT_DICE,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, max=65536, help="Most samples in one network call (default: as memory allows)."),
    ] = None,
    modality: Annotated[ModalityName | None, typer.Option(help="For files that do not say it themselves.")] = None,
    series: Annotated[
        str | None,
        typer.Option(metavar="N|UID", help="Which series of a DICOM folder: its number, or the end of its UID."),
    ] = None,
    plane: PlaneOption = None,
    correct_values: CorrectOption = False,
    worker_command: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Worker to use, e.g. 'ssh host python -m progidiff worker' (default: this Python's).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds other files.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, the content of proposals.json, on standard output."),
    ] = False,
) -> None:
    """Find organs in a CT or MR volume: N proposals for each, ranked, with agreement maps, volumes and a
    report.
    """
    from progidiff.cli.progress import progress_view
    from progidiff.cli.proposing import ProposeOptions, run_propose

    options = ProposeOptions(
        source=source,
        prompts=tuple(prompt),
        out=out,
        proposals=proposals,
        top_k=top_k,
        steps=steps,
        scheduler=scheduler.value,
        seed=seed,
        slices=slices,
        device=device.value,
        model=model,
        adapter=adapter,
        even_if_worse=even_if_worse,
        adaptive=adaptive,
        everywhere=everywhere,
        ranking=ranking.value,
        batch_size=batch_size,
        modality=modality.value if modality else None,
        series=series,
        plane=plane.value if plane else None,
        correct_values=correct_values,
        worker_command=worker_command,
        overwrite=overwrite,
    )
    with progress_view() as view:
        document = run_propose(options, view)
    if as_json:
        sys.stdout.write(document.to_json())
    else:
        _print_summary(document, out)


def _print_summary(document: ProposalsDocument, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from progidiff.outputs.report import REPORT_NAME, millilitres, percent, score

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Target")
    for heading in ("Best score", "Best mL", "Ensemble mL", "5-95 % mL", "Proposals", "Empty"):
        table.add_column(heading, justify="right")
    for target in document.targets:
        best = target.ranked()[0]
        table.add_row(
            Text(target.name),
            score(best.score) if target.found else "not found",
            millilitres(best.millilitres),
            millilitres(target.ensembles_ml.mean_probability),
            f"{millilitres(target.volume_ml.low)}-{millilitres(target.volume_ml.high)}",
            str(len(target.proposals)),
            percent(target.empty_share),
        )
    console.print(table)
    console.print(Text(f"Results in {out}; open {REPORT_NAME} there first."), soft_wrap=True)
