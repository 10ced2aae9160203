"""Whether a proposal can be asked for right now, as far as that can be told without starting anything."""

from __future__ import annotations

from dataclasses import dataclass

from slicer.i18n import tr as _

from progidiff.cards import ModelCard
from progidiff.errors import InputError, ModelError
from ProGiDiffSlicerLib.setup.card import read_card
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.setup.status import Status


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


def readiness(settings: Settings, status: Status) -> Readiness:
    """Judge the settings; ``status`` is that of Slicer's own Python."""
    worker_ready, worker = _worker(settings, status)
    if settings.workerKind == "command" and settings.modelFolder:
        return Readiness(worker_ready, worker, "", None)  # a folder of the other machine
    try:
        card = read_card(settings.modelFolder)
    except ModelError as error:
        return Readiness(False, worker, str(error), None)
    return Readiness(worker_ready, worker, "", card)


def _worker(settings: Settings, status: Status) -> tuple[bool, str]:
    if settings.workerKind == "this":
        return status.ready, status.sentence()
    try:
        settings.command()
    except InputError as error:
        return False, str(error)
    if settings.testedWorker == settings.worker_key():
        return True, _("The connection was tested with these settings.")
    return False, _("Press Test connection to see whether this worker answers.")
