"""``progidiff propose``: ranked proposals for an image through a worker process, written as a result folder."""

from __future__ import annotations

import inspect
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from progidiff.cli.common import (
    CorrectOption,
    DeviceName,
    EvenIfWorseOption,
    ModalityName,
    OverwriteOption,
    PlaneOption,
    split_command,
)
from progidiff.errors import PromptError, WorkerError
from progidiff.wire.request import ProposeRequest, Range

if TYPE_CHECKING:
    from progidiff.cli.view import ProgressView
    from progidiff.cli.writing import Wanted
    from progidiff.outputs.document import ProposalsDocument
    from progidiff.volumes.slicing import SlicePlan
    from progidiff.wire.client import EventStream

#: Said after a warning about the values.
_CORRECT = " The option for that is --correct-values."
_SAY_CT = " Say --modality CT where it is one."


@dataclass(frozen=True, kw_only=True)
class ProposeOptions:
    """The options of ``progidiff propose``; those of its request are made of the request's own fields."""

    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="NIfTI, NRRD or MHA file, or a folder with DICOM images."),
    ]
    prompt: Annotated[
        list[str],
        typer.Option(help='What to look for, e.g. "liver" or "spleen and both kidneys"; may be given several times.'),
    ]
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results; made where it does not exist.")]
    request: ProposeRequest
    slices: Annotated[
        str, typer.Option(metavar="all|A:B|N", help="Slices from A up to, not including, B; or one slice.")
    ] = "all"
    device: Annotated[DeviceName, typer.Option(help="Where the networks run.")] = DeviceName.AUTO
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model folder, as the worker's machine sees it (default: the bundled one)."),
    ] = None
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help='Adapter made by "progidiff adapt", as the worker\'s machine sees it.')
    ] = None
    even_if_worse: EvenIfWorseOption = False
    modality: Annotated[ModalityName | None, typer.Option(help="For files that do not say it themselves.")] = None
    series: Annotated[
        str | None,
        typer.Option(metavar="N|UID", help="Which series of a DICOM folder: its number, or the end of its UID."),
    ] = None
    plane: PlaneOption = None
    correct_values: CorrectOption = False
    worker_command: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Worker to use, e.g. 'ssh host python -m progidiff worker' (default: this Python's).",
        ),
    ] = None
    overwrite: OverwriteOption = False
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, the content of proposals.json, on standard output."),
    ] = False


#: Help for the fields of a request, but for its targets and slices, which follow from prompt and volume.
_HELP = {
    "proposals": "Proposals per target.",
    "top_k": "Best proposals to put forward as segments.",
    "steps": "Denoising steps.",
    "scheduler": "Sampler.",
    "seed": "The same seed gives the same masks.",
    "adaptive": "Stop before --proposals once the consensus has settled.",
    "batch_size": "Most samples in one network call (default: as memory allows).",
    "ranking": "Score without ground truth.",
    "everywhere": "Also draw a target on slices where it seems to be absent.",
    "keep_pieces": "Leave proposals as they were sampled, with islands and holes.",
}


def register(app: typer.Typer) -> None:
    """Add the command."""

    def command(**values: Any) -> None:
        request = ProposeRequest((), **{field.name: values.pop(field.name) for field in _chosen()})
        propose(ProposeOptions(request=request, **values))

    command.__signature__ = inspect.Signature(list(_parameters()))  # type: ignore[attr-defined]
    app.command("propose", help=propose.__doc__)(command)


def _chosen() -> list[Field[Any]]:
    return [field for field in fields(ProposeRequest) if field.name not in ("targets", "slices")]


def _parameters() -> Iterator[inspect.Parameter]:
    """The options as typer reads them, one by one."""
    hints = get_type_hints(ProposeOptions, include_extras=True)
    for option in fields(ProposeOptions):
        if option.name == "request":
            yield from map(_request_parameter, _chosen())
        else:
            yield _parameter(option, hints[option.name])


def _request_parameter(field: Field[Any]) -> inspect.Parameter:
    hint = get_type_hints(ProposeRequest, include_extras=True)[field.name]
    plain = get_type_hints(ProposeRequest)[field.name]
    bounds = next((part for each in (hint, *get_args(hint)) for part in get_args(each) if isinstance(part, Range)), None)
    limits: dict[str, Any] = {} if bounds is None else {"min": bounds.low, "max": bounds.high}
    # a flag has no opposite: leaving it out is that
    names = [f"--{field.name.replace('_', '-')}"] if plain is bool else []
    return _parameter(field, Annotated[plain, typer.Option(*names, help=_HELP[field.name], **limits)])


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def propose(options: ProposeOptions) -> None:
    """Find organs in a CT or MR volume: N proposals for each, ranked, with agreement maps, volumes and a
    report.
    """
    from progidiff.cli.view import progress_view

    with progress_view() as view:
        document = run_propose(options, view)
    if options.as_json:
        sys.stdout.write(document.to_json())
    else:
        _print_summary(document, options.out)


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


def run_propose(options: ProposeOptions, view: ProgressView) -> ProposalsDocument:
    """Read, propose, write. The results appear all together at the end, or not at all.

    Raises:
        ProGiDiffError: the image, a prompt, the model, the worker or the place for the results cannot be
            used.
        KeyboardInterrupt: cancelled by Ctrl+C or by the system's wish to end; nothing was written.
    """
    from progidiff.cards import load_card
    from progidiff.cli.writing import RunFacts, model_record, names, write_results
    from progidiff.places import atomic_folder, claimed
    from progidiff.proposals.proposals import Gathered
    from progidiff.volumes.reading import read_volume
    from progidiff.volumes.slicing import USUAL_PLANES, parse_slice_range, plan_slices
    from progidiff.wire.client import WorkerClient
    from progidiff.wire.messages import ProgressEvent, WarningEvent

    began = time.monotonic()
    # what the user typed is judged by the card, which is there at once; of another computer's model only its worker knows it
    card = None
    if options.worker_command is None:
        card = load_card(Path(options.model) if options.model else None)
        understand(options.prompt, card.vocabulary)

    def cut(planes: Sequence[str]) -> tuple[SlicePlan, range]:
        plan = plan_slices(volume.geometry, options.plane and options.plane.value, planes)
        return plan, parse_slice_range(options.slices, plan.count)

    with (
        _ends_like_ctrl_c(),
        claimed(options.out),
        # made before the long part, so that a place that cannot be written to is known at once
        atomic_folder(options.out, overwrite=options.overwrite) as folder,
        ExitStack() as stack,
    ):
        volume = read_volume(options.source, series=options.series)
        modality = options.modality.value if options.modality else volume.modality
        if card is not None:
            cut(card.planes)
        else:
            parse_slice_range(options.slices, max(volume.geometry.shape_ijk))  # no plane has more
        client = stack.enter_context(WorkerClient(split_command(options.worker_command)))
        loaded = client.load(options.model, options.device.value, view.show)
        wanted = understand(options.prompt, loaded.vocabulary)
        plan, slices = cut(loaded.card.get("planes") or USUAL_PLANES)
        # what the engine says of the image comes before what its file and the adapter may be
        later = [WarningEvent("volume", sentence) for sentence in volume.warnings]
        if options.adapter is not None:
            adapter = client.load_adapter(options.adapter, options.even_if_worse).card
            if not adapter.get("better"):
                why = f"The adapter is used although nothing shows that it helps: {adapter.get('reason', '')}"
                later.append(WarningEvent("adapter", why))
        image = client.set_image(volume.array, volume.geometry.affine, modality, plan.plane, options.correct_values)
        request = replace(options.request, targets=names(wanted), slices=(slices.start, slices.stop))
        gathered = Gathered(request.targets, plan, request.slices)
        with _cancelled_with_us(client.propose(request)) as stream:
            for event in stream:
                while later and not isinstance(event, WarningEvent):
                    gathered.add(later[0])
                    view.warn(later.pop(0).message)
                gathered.add(event)
                if isinstance(event, ProgressEvent):
                    view.show(event)
                elif isinstance(event, WarningEvent) and event.code != "empty":
                    kept = event.code == "values_kept" and modality is None
                    view.warn(event.message + (_CORRECT if event.code == "values" else _SAY_CT if kept else ""))
        # the worker's memory is not needed while the results are written
        client.close()
        view.show(ProgressEvent("writing the results", 0.0))
        job = RunFacts(
            options=replace(options, request=request),
            volume=volume,
            modality=modality,
            plan=plan,
            image=image,
            wanted=wanted,
            model=model_record(loaded.model_id, loaded.card, loaded.device),
            began=began,
        )
        document = write_results(folder, job, gathered)
    # of a target that was not found only the record is sure
    told = {warning.message for warning in gathered.warnings if warning.code != "empty"}
    for warning in document.warnings:
        if warning.message not in told:
            view.warn(warning.message)
    return document


def understand(prompts: Sequence[str], vocabulary: Sequence[str]) -> tuple[Wanted, ...]:
    """Targets of all prompts in their order, each with the first prompt that named it.

    Raises:
        PromptError: a prompt names something that the model does not know, or there is none.
    """
    from progidiff.cli.writing import Wanted
    from progidiff.targets.prompts import parse_prompt

    wanted: dict[str, Wanted] = {}
    for prompt in prompts:
        for target in parse_prompt(prompt, vocabulary):
            wanted.setdefault(target.key, Wanted(target, prompt.strip()))
    if not wanted:
        raise PromptError("No prompt was given; name at least one target, such as --prompt liver.")
    return tuple(wanted.values())


@contextmanager
def _cancelled_with_us(stream: EventStream) -> Iterator[EventStream]:
    """The stream; when the user ends us in it, the worker is told so.

    One that is gone already needs no telling.
    """
    try:
        yield stream
    except BaseException:
        with suppress(WorkerError):
            stream.close()
        raise


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """Let the polite wish to end (SIGTERM, as from a job scheduler) clean up as Ctrl+C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
