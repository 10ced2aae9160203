"""One run: a model is loaded, a volume is sent, proposals are asked for, and that for one frame after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.volumes.slicing import SlicePlan
from progidiff.wire.messages import AdapterLoaded, Event, ImageReply, Loaded, ProgressEvent, ProposeRequest, SchedulerName
from ProGiDiffSlicerLib.scene.volumes import Extent, Frames, Point, VolumeImage
from ProGiDiffSlicerLib.signals import Signal

#: Shares of a frame's progress bar that loading and sending take.
_LOADED, _SENT = 0.05, 0.10


@dataclass(frozen=True)
class RunRequest:
    """What the user asks for.

    Attributes:
        volume_node_id: MRML id of the volume.
        prompt: targets in words.
        plane: in which the volume is cut; ``None`` or "" for the one that suits it and the model.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
        extent: the volume, a range (of ``start`` to ``stop``) or a slice (at ``point_ras``).
        start, stop: half-open range of slices along the slice axis.
        point_ras: place of the slice in mm; ``None`` for the one that the slice views show.
        proposals, top_k, steps, scheduler, seed, adaptive, everywhere: as in ``ProposeRequest``.
        model_folder: folder of the model as the worker sees it; ``None`` or "" for the bundled one.
        adapter_folder: folder of the adapter as the worker sees it; ``None`` or "" for the base model.
        adapter_even_if_worse: use it although it was not better than its base on its held-out cases.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        frames: of a sequence, the one that is shown or all of them.
    """

    volume_node_id: str
    prompt: str
    plane: str | None = None
    correct_values: bool = False
    extent: Extent = Extent.VOLUME
    start: int = 0
    stop: int = 0
    point_ras: Point | None = None
    proposals: int = 16
    top_k: int = 3
    steps: int = 4
    scheduler: SchedulerName = "ddim"
    seed: int = 0
    adaptive: bool = False
    everywhere: bool = False
    model_folder: str | None = None
    device: str = "auto"
    frames: Frames = Frames.THIS
    adapter_folder: str | None = None
    adapter_even_if_worse: bool = False

    def for_worker(self, targets: tuple[str, ...], slices: tuple[int, int] | None) -> ProposeRequest:
        """The same for the engine."""
        return ProposeRequest(
            targets=targets,
            proposals=self.proposals,
            top_k=self.top_k,
            steps=self.steps,
            scheduler=self.scheduler,
            seed=self.seed,
            slices=slices,
            adaptive=self.adaptive,
            everywhere=self.everywhere,
        )


@dataclass(frozen=True, eq=False)
class FrameJob:
    """What is proposed on one volume, or on one frame of it.

    Attributes:
        image: its voxels and place.
        plan: how it is cut.
        slices: half-open range, or ``None`` for all.
    """

    image: VolumeImage
    plan: SlicePlan
    slices: tuple[int, int] | None


class Client(Protocol):
    """The part of :class:`ProGiDiffSlicerLib.worker.client.WorkerClient` that a run uses."""

    loaded: Loaded | None
    loaded_from: tuple[str | None, str] | None
    adapter: AdapterLoaded | None
    adapter_from: str | None

    def load_adapter(self, folder: str, even_if_worse: bool = ...) -> Any: ...

    def unload_adapter(self) -> Any: ...

    def load(self, folder: str | None, device: Any = ...) -> Any: ...

    def set_image(
        self,
        array_kji: np.ndarray,
        affine: np.ndarray,
        modality: str | None = ...,
        plane: str | None = ...,
        correct_values: bool = ...,
    ) -> Any: ...

    def propose(self, request: ProposeRequest) -> Any: ...


class Run:
    """Drives the worker through a request.

    Args:
        client: the worker.
        request: what is wanted.
        frames: frames to work on, one after another; ``[None]`` for the volume as it is.
        prepare: voxels and slices of a frame; may raise ``ProGiDiffError``.
        targets_of: what the prompt means to a model, given its vocabulary; may raise ``ProGiDiffError``.

    Attributes:
        job: the frame at work, once it has been prepared.
        targets: canonical names, once the model is loaded.
        frameStarted: Signal(FrameJob).
        event: Signal(Event), of the proposing call; progress comes by ``progressed``.
        progressed: Signal(fraction, text, eta_s | None).
        finished: Signal().
        failed: Signal(str, WorkerFailure | None).
        cancelled: Signal().
        over: whether it has ended.

    It ends by exactly one of the last three signals, unless it was abandoned.
    """

    def __init__(
        self,
        client: Client,
        request: RunRequest,
        frames: list[int | None],
        prepare: Callable[[int | None], FrameJob],
        targets_of: Callable[[tuple[str, ...]], tuple[str, ...]],
    ) -> None:
        self.request = request
        self.job: FrameJob | None = None
        self.targets: tuple[str, ...] = ()
        self.over = False
        self.frameStarted, self.event, self.progressed = Signal(), Signal(), Signal()
        self.finished, self.failed, self.cancelled = Signal(), Signal(), Signal()
        self._client = client
        self._frames = frames
        self._position = 0
        self._prepare = prepare
        self._targets_of = targets_of
        self._call: Any = None
        self._began = 0.0

    def start(self) -> None:
        """Ask for the model, or go on with the one that is loaded."""
        folder = self.request.model_folder or None
        self._progress(0.0, _("starting the worker"), None)
        if self._client.loaded is not None and self._client.loaded_from == (folder, self.request.device):
            self._on_loaded(self._client.loaded)
            return
        self._follow(self._client.load(folder, self.request.device), self._on_loading, self._on_loaded)

    def cancel(self) -> None:
        """Stop; ends by ``cancelled`` when the worker has stopped."""
        if self._call is not None and not self._call.done:
            self._call.cancel()
        elif not self.over:
            self._end(self.cancelled)

    def abandon(self) -> None:
        """Stop and tell nobody."""
        self.over = True
        for signal in (self.frameStarted, self.event, self.progressed, self.finished, self.failed, self.cancelled):
            signal.clear()
        if self._call is not None:
            self._call.cancel()

    def _follow(self, call: Any, on_event: Callable[[Event], None], on_success: Callable[[Any], None]) -> None:
        self._call = call
        call.event.connect(on_event)
        call.succeeded.connect(on_success)
        call.failed.connect(self._on_failed)
        call.cancelled.connect(self._on_cancelled)

    def _on_loading(self, event: Event) -> None:
        if isinstance(event, ProgressEvent) and not self.over:
            self._progress(_LOADED * event.fraction, _("loading the model"), None)

    def _on_loaded(self, loaded: Loaded) -> None:
        self._attempt(self._begin, loaded)

    def _begin(self, loaded: Loaded) -> None:
        self.targets = self._targets_of(tuple(loaded.vocabulary))
        folder = self.request.adapter_folder or None
        # Asked for each time: one that was tuned again lies in the same folder. The worker knows what it holds.
        if folder is not None:
            self._progress(_LOADED, _("loading the adapter"), None)
            call = self._client.load_adapter(folder, self.request.adapter_even_if_worse)
            self._follow(call, self._on_loading, self._on_adapter)
        elif self._client.adapter is not None:
            self._follow(self._client.unload_adapter(), self._on_loading, self._on_adapter)
        else:
            self._next_frame()

    def _on_adapter(self, _reply: Any) -> None:
        self._attempt(self._next_frame)

    def _next_frame(self) -> None:
        self.job = self._prepare(self._frames[self._position])
        image = self.job.image
        self._progress(_LOADED, _("sending the volume"), None)
        plane, correct = self.job.plan.plane, self.request.correct_values
        stated = image.modality or image.stated_modality or None
        call = self._client.set_image(image.array_kji, image.affine, stated, plane, correct)
        self._follow(call, self._on_sending, self._on_image)

    def _on_sending(self, event: Event) -> None:
        if isinstance(event, ProgressEvent) and not self.over:
            self._progress(_LOADED + (_SENT - _LOADED) * event.fraction, _("sending the volume"), None)

    def _on_image(self, reply: ImageReply) -> None:
        self._attempt(self._propose, reply)

    def _propose(self, reply: ImageReply) -> None:
        job = self.job
        assert job is not None
        if (reply.info.slice_count, reply.info.plane, reply.info.slice_shape) != (
            job.plan.count,
            job.plan.plane,
            job.plan.shape_rc,
        ):
            raise ProGiDiffError(_("The worker cuts this volume differently; install the same version on both sides."))
        self._began = time.monotonic()
        self.frameStarted.emit(job)
        if not self.over:
            call = self._client.propose(self.request.for_worker(self.targets, job.slices))
            self._follow(call, self._on_event, self._on_proposed)

    def _on_event(self, event: Event) -> None:
        if self.over:
            return
        if isinstance(event, ProgressEvent):
            self._progress(_SENT + (1 - _SENT) * event.fraction, progress_text(event), event.eta_s)
        else:
            self.event.emit(event)

    def _on_proposed(self, _done: Any) -> None:
        if self.over:
            return
        self._position += 1
        if self._position < len(self._frames):
            self._attempt(self._next_frame)
        else:
            self._progress(1.0, "", 0.0)
            self._end(self.finished)

    def _on_failed(self, failure: Any) -> None:
        if not self.over:
            self._end(self.failed, failure.message, failure)

    def _on_cancelled(self) -> None:
        if not self.over:
            self._end(self.cancelled)

    def _attempt(self, step: Callable[..., None], *values: Any) -> None:
        """Do something that can turn out to be impossible."""
        if self.over:
            return
        try:
            step(*values)
        except ProGiDiffError as error:
            self._end(self.failed, str(error), None)

    def _end(self, signal: Signal, *values: Any) -> None:
        self.over = True
        self._call = None
        signal.emit(*values)

    def _progress(self, fraction: float, text: str, eta_s: float | None) -> None:
        """Progress over all frames; the later ones are taken to need as long as this one."""
        count = len(self._frames)
        if count > 1:
            text = _("frame {number}/{count}, {what}").format(number=self._position + 1, count=count, what=text)
            if eta_s is not None:
                whole = time.monotonic() - self._began + eta_s
                eta_s += whole * (count - self._position - 1)
        self.progressed.emit(min(1.0, (self._position + fraction) / count), text, eta_s)


def progress_text(event: ProgressEvent) -> str:
    """What the engine is doing, e.g. "slice 12/80"."""
    if event.slices_total > 0:
        number = min(event.slices_done + 1, event.slices_total)
        return _("slice {number}/{count}").format(number=number, count=event.slices_total)
    return _("proposing")
