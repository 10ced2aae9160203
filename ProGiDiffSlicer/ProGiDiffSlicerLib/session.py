"""From a prompt to proposals in the scene: what the panels talk to.

A run loads a model, sends a volume and asks for proposals, and that for one frame after another. One run at a time.
Proposals that have arrived stay whatever becomes of their run; results for a volume that has changed or gone are dropped,
with a sentence that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from progidiff.cards import CardError, ModelCard
from progidiff.errors import ProGiDiffError
from progidiff.targets import Target, catalog, parse_prompt
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import USUAL_PLANES, SlicePlan, plan_slices
from progidiff.wire.messages import (
    AdapterLoaded,
    Event,
    ImageReply,
    Loaded,
    ProgressEvent,
    ProposeRequest,
    RankingEvent,
    SliceEvent,
    TidiedEvent,
    WarningEvent,
)
from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.learning.adapters import card_here
from ProGiDiffSlicerLib.scene.shown import AgreementOverlay, ProposalSegmentation, Shelf
from ProGiDiffSlicerLib.scene.store import ProposalStore
from ProGiDiffSlicerLib.scene.volumes import (
    Extent,
    Frames,
    VolumeImage,
    frames,
    slices_of_extent,
    still_same,
    volume_image,
)
from ProGiDiffSlicerLib.signals import Signal

#: Shares of a frame's progress bar that loading and sending take.
_LOADED, _SENT = 0.05, 0.10


@dataclass(frozen=True)
class RunRequest:
    """What the user asks for: of the engine, and what only this side knows.

    Attributes:
        volume_node_id: MRML id of the volume.
        prompt: targets in words.
        request: for the engine; its targets become those of ``prompt``, its slices those of ``extent``.
        extent: the volume, a range (the slices of ``request``) or the slice that the slice views show.
        plane: in which the volume is cut; ``None`` or "" for the one that suits it and the model.
        correct_values: take values of a CT that cannot be Hounsfield units for what they look like.
        frames: of a sequence, the one that is shown or all of them.
        model_folder: folder of the model as the worker sees it; ``None`` or "" for the bundled one.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        adapter_folder: folder of the adapter as the worker sees it; ``None`` or "" for the base model.
        adapter_even_if_worse: use it although it was not better than its base on its held-out cases.
    """

    volume_node_id: str
    prompt: str
    request: ProposeRequest
    extent: Extent = Extent.VOLUME
    plane: str | None = None
    correct_values: bool = False
    frames: Frames = Frames.THIS
    model_folder: str | None = None
    device: str = "auto"
    adapter_folder: str | None = None
    adapter_even_if_worse: bool = False


@dataclass(frozen=True, eq=False)
class FrameJob:
    """What is proposed on one volume, or on one frame of it.

    Attributes:
        image: its voxels and place.
        plan: how it is cut.
        request: for the engine.
    """

    image: VolumeImage
    plan: SlicePlan
    request: ProposeRequest


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
        asked: what is wanted.
        frames: frames to work on, one after another; ``[None]`` for the volume as it is.
        prepare: voxels and slices of a frame; may raise ``ProGiDiffError``.

    Attributes:
        asked: as given; once the model is loaded, with its targets.
        job: the frame at work, once it has been prepared.
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
        asked: RunRequest,
        frames: list[int | None],
        prepare: Callable[[RunRequest, int | None], FrameJob],
    ) -> None:
        self.asked = asked
        self.job: FrameJob | None = None
        self.over = False
        self.frameStarted, self.event, self.progressed = Signal(), Signal(), Signal()
        self.finished, self.failed, self.cancelled = Signal(), Signal(), Signal()
        self._client = client
        self._frames = frames
        self._position = 0
        self._prepare = prepare
        self._call: Any = None
        self._began = 0.0

    def start(self) -> None:
        """Ask for the model, or go on with the one that is loaded."""
        folder = self.asked.model_folder or None
        self._progress(0.0, _("starting the worker"), None)
        if self._client.loaded is not None and self._client.loaded_from == (folder, self.asked.device):
            self._on_loaded(self._client.loaded)
            return
        self._follow(self._client.load(folder, self.asked.device), self._on_loading, self._on_loaded)

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
        targets = tuple(target.key for target in parse_prompt(self.asked.prompt, loaded.vocabulary))
        self.asked = replace(self.asked, request=replace(self.asked.request, targets=targets))
        folder = self.asked.adapter_folder or None
        # Asked for each time: one that was tuned again lies in the same folder. The worker knows what it holds.
        if folder is not None:
            self._progress(_LOADED, _("loading the adapter"), None)
            call = self._client.load_adapter(folder, self.asked.adapter_even_if_worse)
            self._follow(call, self._on_loading, self._on_adapter)
        elif self._client.adapter is not None:
            self._follow(self._client.unload_adapter(), self._on_loading, self._on_adapter)
        else:
            self._next_frame()

    def _on_adapter(self, _reply: Any) -> None:
        self._attempt(self._next_frame)

    def _next_frame(self) -> None:
        self.job = self._prepare(self.asked, self._frames[self._position])
        image = self.job.image
        self._progress(_LOADED, _("sending the volume"), None)
        plane, correct = self.job.plan.plane, self.asked.correct_values
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
            self._follow(self._client.propose(job.request), self._on_event, self._on_proposed)

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


class SessionState(Enum):
    """Where the session stands."""

    IDLE = "idle"
    RUNNING = "running"
    CANCELLING = "cancelling"


class ProposalSession:
    """Runs requests on the worker and keeps what arrives.

    Args:
        scene: vtkMRMLScene.
        client: :class:`ProGiDiffSlicerLib.worker.client.WorkerClient`.
        idle: where work is queued that could stall the window.
        model_folder: says which model the next run will ask for; ``None`` for the bundled one.

    Attributes:
        state: a :class:`SessionState`.
        proposals: the segmentation that shows proposals.
        overlay: the map of agreement.
        failure: the last run's ``WorkerFailure``, or ``None``.
        stateChanged: Signal(SessionState).
        progressChanged: Signal(fraction, text, eta_s | None).
        preview: Signal(target): some slices have arrived in ``store`` and are shown, before there is a ranking.
        ranked: Signal(target): its proposals in ``store`` are complete; of the first target the best ones are shown.
        finished: Signal(): the run is complete.
        failed: Signal(str): it failed; what had arrived is kept.
        cancelled: Signal(): it was cancelled; what had arrived is kept.
        dropped: Signal(str): results were given up, and why.
        warned: Signal(WarningEvent): something the user should know.
        storeChanged: Signal(): ``store`` is another one, as at the first slice of a run, or when another frame is looked at.
    """

    def __init__(
        self, scene: Any, client: Client, idle: IdleQueue, model_folder: Callable[[], str | None] | None = None
    ) -> None:
        self.state = SessionState.IDLE
        self.failure: Any = None
        self.stateChanged, self.progressChanged, self.preview, self.ranked = Signal(), Signal(), Signal(), Signal()
        self.finished, self.failed, self.cancelled = Signal(), Signal(), Signal()
        self.dropped, self.warned, self.storeChanged = Signal(), Signal(), Signal()
        self.proposals = ProposalSegmentation(scene, idle)
        self.overlay = AgreementOverlay(scene, idle)
        self._shelf = Shelf(scene, self.proposals, self.overlay)
        self._shelf.changed.connect(self.storeChanged.emit)
        self._scene = scene
        self._client = client
        self._model_folder = model_folder
        self._run: Run | None = None
        self._arriving: ProposalStore | None = None
        self._closing = False
        kinds = slicer.vtkMRMLScene
        self._tags = [
            scene.AddObserver(kinds.NodeAboutToBeRemovedEvent, self._on_node_leaving),
            scene.AddObserver(kinds.StartCloseEvent, self._on_close_begins),
            scene.AddObserver(kinds.EndCloseEvent, self._on_close_ends),
        ]

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self.state is not SessionState.IDLE

    @property
    def store(self) -> ProposalStore | None:
        """The proposals for what is looked at: of the volume, or of the frame that is shown."""
        return self._shelf.current

    @property
    def stores(self) -> dict[int | None, ProposalStore]:
        """What has arrived, by frame; ``None`` for a volume that is no frame of a sequence."""
        return dict(self._shelf.stores)

    def vocabulary(self) -> tuple[str, ...]:
        """Targets of the model that the next run will ask for; empty where only its worker can say."""
        card = self._card(self._folder())
        return () if card is None else tuple(card.vocabulary)

    def planes(self) -> tuple[str, ...]:
        """Planes of the slices that this model was trained on; the usual ones where only its worker can say."""
        card = self._card(self._folder())
        return USUAL_PLANES if card is None else tuple(card.planes)

    def plan(self, geometry: Geometry, plane: str | None = None) -> SlicePlan:
        """How the next run would cut a volume: in ``plane``, by default in the one that suits it and the model."""
        return plan_slices(geometry, plane or None, self.planes())

    def parse(self, prompt: str) -> list[Target]:
        """What a prompt asks for.

        Raises:
            PromptError: something that the model does not know; the sentence says what it could have meant.
        """
        return parse_prompt(prompt, self.vocabulary() or tuple(catalog()))

    def stale(self) -> str | None:
        """Why the proposals do not belong to their volume any more, as a sentence; ``None`` while they do."""
        return None if self.store is None else still_same(self._scene, self.store.fingerprint)

    def start(self, asked: RunRequest) -> None:
        """Ask for proposals. A run that is under way is cancelled first; earlier proposals stay until new ones arrive.

        Raises:
            ProGiDiffError: the volume, the slices or the prompt cannot be used; nothing has changed then.
        """
        card = self._card(asked.model_folder)
        if card is not None:
            parse_prompt(asked.prompt, card.vocabulary)
        first = self._prepare(asked, None)
        playing = frames(self._scene.GetNodeByID(asked.volume_node_id))
        wanted: list[int | None] = [first.image.frame]
        if playing is not None and asked.frames == Frames.ALL:
            wanted = list(range(playing.count))
        if first.request.slices is not None:
            # "This slice" is the one that is looked at now, whatever is looked at when the model is loaded; and a range is
            # one of the plane that was seen when it was chosen.
            asked = replace(asked, extent=Extent.RANGE, request=first.request, plane=first.plan.plane)
        self._supersede()
        self.failure = None
        self._run = run = Run(self._client, asked, wanted, self._prepare)
        run.frameStarted.connect(self._on_frame)
        run.event.connect(self._on_event)
        run.progressed.connect(self.progressChanged.emit)
        run.finished.connect(self._on_finished)
        run.failed.connect(self._on_failed)
        run.cancelled.connect(self._on_cancelled)
        self._set_state(SessionState.RUNNING)
        run.start()

    def cancel(self) -> None:
        """Cancel the run; ``cancelled`` follows when the worker has stopped."""
        if self._run is not None and self.state is SessionState.RUNNING:
            self._set_state(SessionState.CANCELLING)
            self._run.cancel()

    def forget(self) -> None:
        """Cancel, and give up all proposals and what shows them."""
        self._supersede()
        self._clear()

    def cleanup(self) -> None:
        """Let go of the scene and the worker; nothing that the session put into the scene is left."""
        self.forget()
        for tag in self._tags:
            self._scene.RemoveObserver(tag)
        self._tags = []

    # The run --------------------------------------------------------------------------------------------------------------

    def _folder(self) -> str | None:
        return self._model_folder() if self._model_folder is not None else None

    def _card(self, folder: str | None) -> ModelCard | None:
        """What a model knows; ``None`` where only the worker can say."""
        loaded, source = self._client.loaded, self._client.loaded_from
        if loaded is not None and source is not None and source[0] == (folder or None):
            with suppress(CardError):
                return ModelCard.read(loaded.card)
        return card_here(folder)

    def _prepare(self, asked: RunRequest, frame: int | None) -> FrameJob:
        image = volume_image(self._scene.GetNodeByID(asked.volume_node_id or ""), frame)
        card = self._card(asked.model_folder)
        plan = plan_slices(image.geometry, asked.plane or None, USUAL_PLANES if card is None else card.planes)
        slices = slices_of_extent(asked.extent, asked.request.slices, image.geometry, plan, self._scene)
        return FrameJob(image, plan, replace(asked.request, slices=slices))

    def _supersede(self) -> None:
        """End the run that is under way, if there is one, so that a new one can begin at once."""
        if self._abandon():
            self._set_state(SessionState.IDLE)
            self.cancelled.emit()

    def _abandon(self) -> bool:
        run, self._run = self._run, None
        self._arriving = None
        if run is not None:
            run.abandon()
        return run is not None

    def _on_frame(self, job: FrameJob) -> None:
        run = self._run
        if run is not None and self._same(job.image.fingerprint):
            store = ProposalStore(job.image, job.request, run.asked.prompt, job.plan.plane)
            store.corrected = run.asked.correct_values
            store.model_id = "" if self._client.loaded is None else self._client.loaded.model_id
            store.adapter_id = "" if self._client.adapter is None else self._client.adapter.adapter_id
            self._arriving = store

    def _on_event(self, event: Event) -> None:
        store = self._arriving
        if isinstance(event, WarningEvent):
            self.warned.emit(event)
        elif (
            store is not None
            and isinstance(event, SliceEvent | TidiedEvent | RankingEvent)
            and self._same(store.fingerprint)
        ):
            try:
                self._take(store, event)
            except ProGiDiffError as error:
                self._abandon()
                self._on_failed(str(error), None)

    def _take(self, store: ProposalStore, event: SliceEvent | TidiedEvent | RankingEvent) -> None:
        store.add(event)
        if isinstance(event, TidiedEvent):
            return  # the ranking follows, and with it all that has changed is shown
        if isinstance(event, SliceEvent):
            self._shelf.keep(store)
            if event.target == store.targets[0] and self._shelf.look(store):
                self.preview.emit(event.target)
            return
        if store is self.store:
            if event.target == store.targets[0]:
                self._shelf.show(store)
            self.ranked.emit(event.target)

    def _same(self, fingerprint: Any) -> bool:
        """Whether results for a volume can be used; otherwise they are dropped."""
        reason = still_same(self._scene, fingerprint)
        if reason is not None:
            self._drop(reason)
        return reason is None

    def _drop(self, reason: str) -> None:
        self._abandon()
        self._clear()
        self._set_state(SessionState.IDLE)
        self.dropped.emit(reason)

    def _on_finished(self) -> None:
        self._end()
        self.finished.emit()

    def _on_failed(self, message: str, failure: Any) -> None:
        self.failure = failure
        self._end()
        self.failed.emit(message)

    def _on_cancelled(self) -> None:
        self._end()
        self.cancelled.emit()

    def _end(self) -> None:
        self._run = self._arriving = None
        store = self.store
        if store is not None and not store[store.targets[0]].ranked:
            self._shelf.show(store)  # the last slices may have arrived after the last look
        self._set_state(SessionState.IDLE)

    # The scene ------------------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self.proposals.clear()
        self.overlay.clear()
        self._shelf.clear()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_leaving(self, _scene: Any, _event: str, node: Any) -> None:
        if self._closing or node is None:
            return
        run = self._run
        concerned = self._shelf.volume_ids | ({run.asked.volume_node_id} if run is not None else set())
        if node.GetID() in concerned:
            self._drop(_("The volume was removed; its proposals were dropped."))

    def _on_close_begins(self, _scene: Any, _event: str) -> None:
        self._closing = True
        self.proposals.forget()
        self.overlay.forget()
        self._supersede()
        self._shelf.clear()

    def _on_close_ends(self, _scene: Any, _event: str) -> None:
        self._closing = False

    def _set_state(self, state: SessionState) -> None:
        if state is not self.state:
            self.state = state
            self.stateChanged.emit(state)
