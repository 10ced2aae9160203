"""Tuning on the curated set, and the search for the next case to correct, each by a worker of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.wire.messages import (
    AdaptDone,
    AdaptPicture,
    AdaptRequest,
    AdaptStart,
    AdaptStep,
    AdaptValidation,
    Device,
    Event,
    NextDone,
    NextItem,
    NextRequest,
    NextStart,
    NextVolume,
)
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.client import WorkerClient


class Choices(Protocol):
    """The settings that such a request depends on; see :class:`ProGiDiffSlicerLib.setup.settings.Settings`."""

    @property
    def modelFolder(self) -> str: ...

    @property
    def device(self) -> Device: ...

    @property
    def curatedFolder(self) -> str: ...

    @property
    def adaptersFolder(self) -> str: ...


class Tuning:
    """Tunes on the curated set, by a worker of its own.

    Attributes:
        losses: (step, loss) so far.
        dices: (step, mean Dice on held-out cases) so far; step 0 is the base model.
        pictures: of held-out slices, at the end.
        steps: steps that were planned; 0 as long as that is not known.
        eta_s: seconds left, or ``None``.
        message: how things stand, a sentence.
        folder: of the adapter that the latest tuning has left; "" for none.
        better: whether that adapter is better than the base on held-out cases.
        changed: Signal(): something of this is different.
        finished: Signal(folder, better): an adapter was made.
        failed: Signal(sentence).
    """

    def __init__(self, settings: Choices, client: WorkerClient) -> None:
        self.losses: list[tuple[int, float]] = []
        self.dices: list[tuple[int, float]] = []
        self.pictures: list[AdaptPicture] = []
        self.steps = 0
        self.eta_s: float | None = None
        self.message = ""
        self.folder = ""
        self.better = self._stopping = False
        self.changed, self.finished, self.failed = Signal(), Signal(), Signal()
        self._settings = settings
        self._client = client
        self._call: Call | None = None
        self._unfinished = ""

    @property
    def running(self) -> bool:
        """Whether a tuning is under way."""
        return self._call is not None

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self.running and self._stopping

    @property
    def fraction(self) -> float:
        """Share of the planned steps that are made."""
        return min(1.0, self.losses[-1][0] / self.steps) if self.steps and self.losses else 0.0

    @property
    def log_text(self) -> str:
        """The last lines of its log."""
        return self._client.log_tail()

    def start(self, name: str = "", target: str = "", steps: int = 0, rank: int = 0) -> None:
        """Start; does nothing while one runs.

        Args:
            name: of the adapter; "" for one by the date.
            target: the only target to tune; "" for all.
            steps, rank: of the training; 0 for the default.

        Raises:
            InputError: a folder is not chosen, or there is such an adapter.
        """
        if self.running:
            return
        cases, adapters = self._settings.curatedFolder, self._settings.adaptersFolder
        if not cases or not os.path.isdir(cases):
            raise InputError(_("There are no training examples yet: save some under Review first."))
        if not adapters:
            raise InputError(_("Choose a folder for the adapters first."))
        # One that was ended before it had finished goes on from its checkpoint.
        name = name.strip() or self._unfinished or time.strftime("adapter-%Y%m%d-%H%M%S")
        slug = "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-") or "adapter"
        out = os.path.join(adapters, slug)
        if os.path.exists(out):
            raise InputError(_('There is an adapter "{name}" already; choose another name.').format(name=name))
        request = AdaptRequest(
            cases=(cases,),
            out=out,
            model=self._settings.modelFolder or None,
            targets=(target,) if target else (),
            device=self._settings.device,
            name=name,
            steps=steps or AdaptRequest.steps,
            rank=rank or AdaptRequest.rank,
        )
        self.losses, self.dices, self.pictures = [], [], []
        self.steps, self.eta_s, self.folder, self.better, self._stopping = 0, None, "", False, False
        self.message, self._unfinished = _("Starting …"), name
        self._call = follow(self._client.ask(request, AdaptDone), self._on_event, self._on_done, self._on_failed)
        self.changed.emit()

    def stop(self) -> None:
        """Stop and keep the best so far; asked again, end it at once."""
        if self._call is not None:
            self.message = _("Stopping: the best so far is measured and kept …")
            at_once, self._stopping = self._stopping, True
            stop(self._client, self._call, at_once)
            self.changed.emit()

    def close(self) -> None:
        """End it for good; its checkpoint stays."""
        for signal in (self.changed, self.finished, self.failed):
            signal.clear()
        self._client.stop(wait=True)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, AdaptStart):
            self.steps = event.steps
            text = _("Tuning on {training} cases; {validation} are held out. Measuring the base model …")
            self.message = text.format(**event.cases)
        elif isinstance(event, AdaptStep):
            self.losses.append((event.step, event.loss))
            self.steps, self.eta_s = event.steps, event.eta_s
            if not self._stopping:
                self.message = _("Step {step} of {steps}").format(step=event.step, steps=event.steps)
        elif isinstance(event, AdaptValidation):
            self.dices.append((event.step, event.dice))
        elif isinstance(event, AdaptPicture):
            self.pictures = [*self.pictures, event]
        self.changed.emit()

    def _on_done(self, reply: AdaptDone) -> None:
        self._call, self.eta_s, self._unfinished = None, None, ""
        self.folder, self.better, self.message = reply.folder, reply.better, reply.reason
        self.changed.emit()
        self.finished.emit(self.folder, self.better)

    def _on_failed(self, message: str) -> None:
        if not self.losses:
            self._unfinished = ""  # nothing of it is worth going on with, or it was refused
        self._call, self.eta_s, self.message = None, None, message
        self.changed.emit()
        self.failed.emit(message)


RESULT_NAME = "progidiff-next.json"


class NextCase:
    """Asks a worker of its own which volume of a folder to correct next.

    Attributes:
        items: what was looked at so far, the most uncertain first.
        done, volumes: how many are done, and how many there are; 0 as long as that is not known.
        eta_s: seconds left, or ``None``.
        message: how things stand.
        changed: Signal(): something of this is different.
    """

    def __init__(self, settings: Choices, client: WorkerClient) -> None:
        self.items: list[NextItem] = []
        self.done = self.volumes = 0
        self.eta_s: float | None = None
        self.message = ""
        self.changed = Signal()
        self._settings = settings
        self._client = client
        self._call: Call | None = None
        self._folder = ""
        self._stopping = False

    @property
    def running(self) -> bool:
        """Whether a search is under way."""
        return self._call is not None

    def start(self, folder: str, prompt: str, adapter_folder: str = "", even_if_worse: bool = False) -> None:
        """Search a folder; what an earlier search of the same prompt has measured is taken over.

        Raises:
            InputError: no folder, or no prompt.
        """
        if self.running:
            return
        if not folder or not os.path.isdir(folder):
            raise InputError(_("Choose a folder with volumes first."))
        if not prompt.strip():
            raise InputError(_("Type under Prompt what to look for first."))
        request = NextRequest(
            folder=folder,
            prompt=prompt,
            out=os.path.join(folder, RESULT_NAME),
            model=self._settings.modelFolder or None,
            adapter=adapter_folder or None,
            even_if_worse=even_if_worse,
            device=self._settings.device,
        )
        self._folder = folder
        self.items, self.done, self.volumes, self.eta_s, self._stopping = [], 0, 0, None, False
        self.message = _("Starting …")
        self._call = follow(self._client.ask(request, NextDone), self._on_event, self._on_done, self._on_ended)
        self.changed.emit()

    def stop(self) -> None:
        """Stop, what was measured is kept; asked again, end it at once."""
        if self._call is not None:
            self.message = _("Stopping …")
            at_once, self._stopping = self._stopping, True
            stop(self._client, self._call, at_once)
            self.changed.emit()

    def close(self) -> None:
        """End it for good; what was measured is on disk."""
        self.changed.clear()
        self._client.stop(wait=True)

    def place(self, item: NextItem) -> str:
        """Path of the file of a volume, or of its folder of DICOM slices."""
        return os.path.join(self._folder, *item.path.split("/"))

    def _on_event(self, event: Event) -> None:
        if isinstance(event, NextStart):
            self.volumes = event.volumes
            self.message = _("{count} volumes, {known} of them known").format(count=event.volumes, known=event.known)
        elif isinstance(event, NextVolume):
            self.done, self.volumes, self.eta_s = event.done, event.volumes, event.eta_s
            self.message = _("Volume {done} of {count}").format(done=event.done, count=event.volumes)
            if event.item.disagreement is not None:  # one that could not be read has none
                others = [item for item in self.items if item.path != event.item.path]
                self.items = sorted([*others, event.item], key=lambda item: -(item.disagreement or 0.0))
        self.changed.emit()

    def _on_done(self, reply: NextDone) -> None:
        self.items = list(reply.ranking)
        self._on_ended(_("{count} volumes, the most uncertain first").format(count=len(self.items)))

    def _on_ended(self, message: str) -> None:
        self._call, self.eta_s, self.message = None, None, message
        self.changed.emit()


def follow(call: Call, told: Callable[[Event], None], done: Callable[[Any], None], ended: Callable[[str], None]) -> Call:
    """Listen to a call; ``ended`` gets a sentence where it has no result."""
    call.event.connect(told)
    call.succeeded.connect(done)
    call.failed.connect(lambda failure: ended(failure.message))
    call.cancelled.connect(lambda: ended(_("Ended before it had finished; what was done is kept, start again to go on.")))
    return call


def stop(client: WorkerClient, call: Call, at_once: bool) -> None:
    """Let a call finish what it is at, or end its worker ``at_once``."""
    if at_once:
        client.stop(at_once=True)
    else:
        call.cancel()
