"""Runs one request from image to result folder, always through a worker process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from progidiff.cards import load_card
from progidiff.cli.commandline import split_command
from progidiff.cli.progress import ProgressView
from progidiff.cli.writing import Job, Wanted, model_record, names, write_results
from progidiff.errors import PromptError, WorkerError
from progidiff.outputs.document import ProposalsDocument
from progidiff.places import atomic_folder, claimed
from progidiff.proposals.proposals import Gathered
from progidiff.targets.prompts import parse_prompt
from progidiff.volumes.reading import read_volume
from progidiff.volumes.slicing import USUAL_PLANES, SlicePlan, parse_slice_range, plan_slices
from progidiff.wire.client import EventStream, WorkerClient
from progidiff.wire.messages import Device, ProgressEvent, ProposeRequest, RankingMethod, SchedulerName, WarningEvent

#: Said after a warning about the values.
_CORRECT = " The option for that is --correct-values."
_SAY_CT = " Say --modality CT where it is one."


@dataclass(frozen=True)
class ProposeOptions:
    """What the command line was given; see ``progidiff propose --help``."""

    source: Path
    prompts: tuple[str, ...]
    out: Path
    proposals: int = 16
    top_k: int = 3
    steps: int = 4
    scheduler: SchedulerName = "ddim"
    seed: int = 0
    slices: str = "all"
    device: Device = "auto"
    model: str | None = None
    adapter: str | None = None
    even_if_worse: bool = False
    adaptive: bool = False
    ranking: RankingMethod = "soft_dice"
    batch_size: int | None = None
    everywhere: bool = False
    modality: str | None = None
    series: str | None = None
    plane: str | None = None
    correct_values: bool = False
    worker_command: str | None = None
    overwrite: bool = False


def run_propose(options: ProposeOptions, view: ProgressView) -> ProposalsDocument:
    """Read, propose, write. The results appear all together at the end, or not at all.

    Raises:
        ProGiDiffError: the image, a prompt, the model, the worker or the place for the results cannot be
            used.
        KeyboardInterrupt: cancelled by Ctrl+C or by the system's wish to end; nothing was written.
    """
    began = time.monotonic()
    # what the user typed is judged by the card, which is there at once; of another computer's model only its worker knows it
    card = None
    if options.worker_command is None:
        card = load_card(Path(options.model) if options.model else None)
        understand(options.prompts, card.vocabulary)

    def cut(planes: Sequence[str]) -> tuple[SlicePlan, range]:
        plan = plan_slices(volume.geometry, options.plane, planes)
        return plan, parse_slice_range(options.slices, plan.count)

    with (
        _ends_like_ctrl_c(),
        claimed(options.out),
        # made before the long part, so that a place that cannot be written to is known at once
        atomic_folder(options.out, overwrite=options.overwrite) as folder,
        ExitStack() as stack,
    ):
        volume = read_volume(options.source, series=options.series)
        modality = options.modality or volume.modality
        if card is not None:
            cut(card.planes)
        else:
            parse_slice_range(options.slices, max(volume.geometry.shape_ijk))  # no plane has more
        client = stack.enter_context(WorkerClient(split_command(options.worker_command)))
        loaded = client.load(options.model, options.device, view.show)
        wanted = understand(options.prompts, loaded.vocabulary)
        plan, slices = cut(loaded.card.get("planes") or USUAL_PLANES)
        # what the engine says of the image comes before what its file and the adapter may be
        later = [WarningEvent("volume", sentence) for sentence in volume.warnings]
        if options.adapter is not None:
            adapter = client.load_adapter(options.adapter, options.even_if_worse).card
            if not adapter.get("better"):
                why = f"The adapter is used although nothing shows that it helps: {adapter.get('reason', '')}"
                later.append(WarningEvent("adapter", why))
        image = client.set_image(volume.array, volume.geometry.affine, modality, plan.plane, options.correct_values)
        request = ProposeRequest(
            targets=names(wanted),
            proposals=options.proposals,
            top_k=options.top_k,
            steps=options.steps,
            scheduler=options.scheduler,
            seed=options.seed,
            slices=(slices.start, slices.stop),
            adaptive=options.adaptive,
            batch_size=options.batch_size,
            ranking=options.ranking,
            everywhere=options.everywhere,
        )
        gathered = Gathered(request.targets, plan, request.slices)
        with _cancelled_with_us(client.propose(request)) as stream:
            for event in stream:
                while later and not isinstance(event, WarningEvent):
                    gathered.add(later[0])
                    view.warn(later.pop(0).message)
                gathered.add(event)
                if isinstance(event, ProgressEvent):
                    view.show(event)
                elif isinstance(event, WarningEvent):
                    kept = event.code == "values_kept" and modality is None
                    view.warn(event.message + (_CORRECT if event.code == "values" else _SAY_CT if kept else ""))
        # the worker's memory is not needed while the results are written
        client.close()
        view.show(ProgressEvent("writing the results", 0.0))
        job = Job(
            source_name=options.source.name or options.source.resolve().name,
            volume=volume,
            modality=modality,
            plan=plan,
            slices=slices,
            image=image,
            prompts=options.prompts,
            wanted=wanted,
            request=request,
            model=model_record(loaded.model_id, loaded.card, loaded.device),
            correct_values=options.correct_values,
            began=began,
        )
        document = write_results(folder, job, gathered)
    told = {warning.message for warning in gathered.warnings}
    for warning in document.warnings:
        if warning.message not in told:
            view.warn(warning.message)
    return document


def understand(prompts: Sequence[str], vocabulary: Sequence[str]) -> tuple[Wanted, ...]:
    """Targets of all prompts in their order, each with the first prompt that named it.

    Raises:
        PromptError: a prompt names something that the model does not know, or there is none.
    """
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
