"""From a prompt to proposals in the scene: what the panels talk to.

One run at a time. Proposals that have arrived stay whatever becomes of their run; results for a volume that has changed or
gone are dropped, with a sentence that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import Any

import slicer
import vtk
from slicer.i18n import tr as _

from progidiff.cards import CardError, ModelCard
from progidiff.errors import ProGiDiffError
from progidiff.targets import Target, catalog, parse_prompt
from progidiff.volumes.geometry import Geometry
from progidiff.volumes.slicing import USUAL_PLANES, SlicePlan, plan_slices
from progidiff.wire.messages import Event, RankingEvent, SliceEvent, WarningEvent
from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.learning.adapters import card_here
from ProGiDiffSlicerLib.logic.run import Client, FrameJob, Run, RunRequest
from ProGiDiffSlicerLib.logic.store import ProposalStore
from ProGiDiffSlicerLib.scene.shown import AgreementOverlay, ProposalSegmentation, Shelf
from ProGiDiffSlicerLib.scene.volumes import Extent, Frames, frames, slices_of_extent, still_same, volume_image
from ProGiDiffSlicerLib.signals import Signal


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

    def start(self, request: RunRequest) -> None:
        """Ask for proposals. A run that is under way is cancelled first; earlier proposals stay until new ones arrive.

        Raises:
            ProGiDiffError: the volume, the slices or the prompt cannot be used; nothing has changed then.
        """
        card = self._card(request.model_folder)
        if card is not None:
            parse_prompt(request.prompt, card.vocabulary)
        first = self._prepare(request, None)
        playing = frames(self._scene.GetNodeByID(request.volume_node_id))
        wanted: list[int | None] = [first.image.frame]
        if playing is not None and request.frames == Frames.ALL:
            wanted = list(range(playing.count))
        if first.slices is not None:
            # "This slice" is the one that is looked at now, whatever is looked at when the model is loaded.
            plane = first.plan.plane  # and a range is one of the plane that was seen when it was chosen
            request = replace(request, extent=Extent.RANGE, start=first.slices[0], stop=first.slices[1], plane=plane)
        self._supersede()
        self.failure = None
        run = Run(
            self._client,
            request,
            wanted,
            lambda frame: self._prepare(request, frame),
            lambda vocabulary: tuple(target.key for target in parse_prompt(request.prompt, vocabulary)),
        )
        self._run = run
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

    def _prepare(self, request: RunRequest, frame: int | None) -> FrameJob:
        image = volume_image(self._scene.GetNodeByID(request.volume_node_id or ""), frame)
        geometry = image.geometry
        card = self._card(request.model_folder)
        plan = plan_slices(geometry, request.plane or None, USUAL_PLANES if card is None else card.planes)
        slices = slices_of_extent(
            request.extent, geometry, plan, request.start, request.stop, request.point_ras, self._scene
        )
        return FrameJob(image, plan, slices)

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
            store = ProposalStore(job.image, run.targets, run.request.prompt, job.slices, job.plan.plane)
            store.request = run.request
            store.model_id = "" if self._client.loaded is None else self._client.loaded.model_id
            store.adapter_id = "" if self._client.adapter is None else self._client.adapter.adapter_id
            self._arriving = store

    def _on_event(self, event: Event) -> None:
        store = self._arriving
        if isinstance(event, WarningEvent):
            self.warned.emit(event)
        elif store is not None and isinstance(event, SliceEvent | RankingEvent) and self._same(store.fingerprint):
            try:
                self._take(store, event)
            except ProGiDiffError as error:
                self._abandon()
                self._on_failed(str(error), None)

    def _take(self, store: ProposalStore, event: SliceEvent | RankingEvent) -> None:
        store.add(event)
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
        concerned = self._shelf.volume_ids | ({run.request.volume_node_id} if run is not None else set())
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
