"""What the panels work with, made once for a module and closed with it."""

from __future__ import annotations

from typing import Any

import qt

from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.scene.accept import Acceptance
from ProGiDiffSlicerLib.scene.exporting import Exporting
from ProGiDiffSlicerLib.session import ProposalSession
from ProGiDiffSlicerLib.setup.settings import WORKER_SETTINGS, Settings
from ProGiDiffSlicerLib.worker.client import WorkerClient


class Services:
    """The worker's client, the session of proposals, acceptance and settings, without any widget.

    Nothing runs before it is asked for: no process is started here.
    """

    def __init__(self, scene: Any, settings: Settings | None = None, client: WorkerClient | None = None) -> None:
        """``settings`` and ``client`` are made here unless others are given."""
        self.scene = scene
        # Timers and processes are children of this object, so that none outlives it.
        self.owner = qt.QObject()
        self.settings = Settings() if settings is None else settings
        self.idle = IdleQueue(self.owner)
        self.client = WorkerClient(self.settings.command, parent=self.owner) if client is None else client
        self.session = ProposalSession(scene, self.client, self.idle, self._model_folder)
        self.acceptance = Acceptance(scene)
        self.exporting = Exporting(self.idle, self.client, lambda: self.settings.workerKind == "command")
        self.settings.changed.connect(self._on_setting)

    def close(self) -> None:
        """End the worker and leave no process, timer or observer.

        It waits for the process, a few seconds at most: what is closed here (a module that is unloaded or reloaded, the
        application) has no later moment at which a process that lingers could be ended.
        """
        self.settings.changed.disconnect(self._on_setting)
        self.exporting.cleanup()
        self.session.cleanup()
        self.acceptance.cleanup()
        self.idle.clear()
        self.client.stop(wait=True)
        self.owner.deleteLater()

    def _model_folder(self) -> str | None:
        return self.settings.modelFolder or None

    def _on_setting(self, name: str) -> None:
        if name in WORKER_SETTINGS:
            # The next call starts the worker that the settings now speak of.
            self.client.stop()
