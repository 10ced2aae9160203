"""Whether a proposal can be asked for right now, and trying the worker that the settings speak of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slicer.i18n import tr as _

from progidiff import __version__
from progidiff.cards import ModelCard
from progidiff.errors import InputError, ModelError
from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import Loaded
from ProGiDiffSlicerLib.setup.card import card_of, read_card
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import PythonStatus
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.client import WorkerClient
from ProGiDiffSlicerLib.worker.command import WorkerCommand

ClientFactory = Callable[[Callable[[], WorkerCommand]], WorkerClient]


@dataclass(frozen=True)
class Readiness:
    """How the setup stands.

    Attributes:
        ready: whether everything is in place.
        worker: sentence about the worker.
        model: why the model cannot be used, or "".
        card: of the model, where it lies on this computer.
    """

    ready: bool
    worker: str
    model: str
    card: ModelCard | None


def readiness(settings: Settings, status: PythonStatus) -> Readiness:
    """Judge the settings; ``status`` is that of Slicer's own Python."""
    worker_ready, worker = _worker(settings, status)
    if settings.workerKind == "command" and settings.modelFolder:
        return Readiness(worker_ready, worker, "", None)  # a folder of the other machine
    try:
        card = read_card(settings.modelFolder)
    except ModelError as error:
        return Readiness(False, worker, str(error), None)
    return Readiness(worker_ready, worker, "", card)


def _worker(settings: Settings, status: PythonStatus) -> tuple[bool, str]:
    if settings.workerKind == "this":
        return status.ready, status.sentence()
    try:
        settings.command()
    except InputError as error:
        return False, str(error)
    if settings.testedWorker == settings.worker_key():
        return True, _("The connection was tested with these settings.")
    return False, _("Press Test connection to see whether this worker answers.")


@dataclass(frozen=True)
class Trial:
    """How a test of the connection ended.

    Attributes:
        worked: whether proposals can be made with this worker.
        message: one sentence.
        details: the worker's log, for a support person.
        card: of the model that the worker loaded.
    """

    worked: bool
    message: str
    details: str = ""
    card: ModelCard | None = None


class ConnectionTest:
    """Starts a worker of its own, so that one that is making proposals is left alone.

    Attributes:
        ended: emitted with the :class:`Trial`; not after :meth:`cancel`.
    """

    def __init__(self, settings: Settings, client_factory: ClientFactory = WorkerClient) -> None:
        self._settings = settings
        self._make_client = client_factory
        self._client: WorkerClient | None = None
        self._leaving: WorkerClient | None = None
        self._call: Call | None = None
        self._key = ""
        self.ended = Signal()

    @property
    def running(self) -> bool:
        """Whether a test is under way."""
        return self._client is not None

    def start(self) -> None:
        """Start the worker and let it load the model; does nothing while a test is under way."""
        if self._client is not None:
            return
        self._key = self._settings.worker_key()
        self._client = self._make_client(self._settings.command)
        self._call = self._client.load(self._settings.modelFolder or None, self._settings.device)
        self._call.succeeded.connect(self._loaded)
        self._call.failed.connect(self._failed)

    def cancel(self) -> None:
        """End the test and its worker; nothing is told."""
        client, self._client = self._client, None
        if self._call is not None:
            self._call.succeeded.disconnect(self._loaded)
            self._call.failed.disconnect(self._failed)
            self._call = None
        if client is not None:
            client.stop()
            self._leaving = client

    def cleanup(self) -> None:
        """End the test and wait until its worker has gone, and the one of the test before."""
        self.cancel()
        if self._leaving is not None:
            self._leaving.stop(wait=True)
            self._leaving = None
        self.ended.clear()

    def _loaded(self, reply: Loaded) -> None:
        hello: Any = self._client.hello if self._client is not None else None
        try:
            card = card_of(reply.card)
        except ModelError as error:
            self._end(Trial(False, str(error)))
            return
        text = _("The worker answers: Python {python}, {model} loaded on {device}.")
        message = text.format(python=hello.python if hello else "?", model=card.name, device=reply.device or "?")
        if hello is not None and hello.version != __version__:
            text = _("{message} It is version {theirs} and this is {ours}; install the same version on both sides.")
            message = text.format(message=message, theirs=hello.version, ours=__version__)
        self._settings.testedWorker = self._key
        self._end(Trial(True, message, card=card))

    def _failed(self, failure: WorkerFailure) -> None:
        if self._settings.testedWorker == self._key:
            self._settings.testedWorker = ""
        self._end(Trial(False, failure.message, failure.details))

    def _end(self, trial: Trial) -> None:
        self.cancel()
        self.ended.emit(trial)
