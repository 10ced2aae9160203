"""All panels of the module, one below the other, and what passes between them."""

from __future__ import annotations

from typing import Any

import qt
import slicer

from progidiff.wire.conversation import WorkerFailure
from ProGiDiffSlicerLib.logic.rows import Row
from ProGiDiffSlicerLib.panels.loading import load_panel
from ProGiDiffSlicerLib.panels.node_choices import OwnNodesHider
from ProGiDiffSlicerLib.panels.prompt import PromptPanel
from ProGiDiffSlicerLib.panels.proposals import ProposalsPanel
from ProGiDiffSlicerLib.panels.review import ReviewPanel
from ProGiDiffSlicerLib.panels.setup import SetupPanel
from ProGiDiffSlicerLib.panels.slice_watch import SliceWatch
from ProGiDiffSlicerLib.panels.status_line import StatusLine
from ProGiDiffSlicerLib.panels.tuning import TuningPanel
from ProGiDiffSlicerLib.parameters import Parameters
from ProGiDiffSlicerLib.services import Services


class ModulePanels:
    """Setup, Prompt, Proposals, Review and Tuning in a layout.

    Attributes:
        widget: the widget that holds them.
        setup, prompt, proposals, review, tuning: the panels.
        status: the line that says how things stand.
    """

    def __init__(self, layout: Any, services: Services) -> None:
        self.widget, self.ui = load_panel("ProGiDiffSlicer")
        layout.addWidget(self.widget)
        self._services = services
        self._watch = SliceWatch(self.widget)
        self.status = StatusLine(self.ui.statusLabel, self.ui.restartButton, self.ui.correctButton)
        self.setup = SetupPanel(services.settings, self.ui.setupSection)
        self.prompt = PromptPanel(services, self.status, self.widget)
        self.proposals = ProposalsPanel(services, self.status, self._watch)
        self.review = ReviewPanel(services, self.status, self.widget, self._selection)
        curating = self.review.curating.curating
        self.tuning = TuningPanel(services, self.status, lambda: curating.contents, lambda: self.prompt.line.text)
        for section, panel in (
            (self.ui.setupSection, self.setup),
            (self.ui.promptSection, self.prompt),
            (self.ui.proposalsSection, self.proposals),
            (self.ui.reviewSection, self.review),
            (self.ui.tuningSection, self.tuning),
        ):
            section.layout().addWidget(panel.widget)
            panel.widget.setMRMLScene(slicer.mrmlScene)
        self.widget.setMRMLScene(slicer.mrmlScene)
        self._hider = OwnNodesHider(self.prompt.ui.volumeSelector, self.review.ui.segmentationSelector)
        self._listeners = (
            (self.status.restartRequested, services.client.restart),
            (self.status.correctRequested, self.prompt.correct_values),
            (self.setup.workerMustStop, services.client.stop),
            (self.proposals.selectionChanged, self.review.refresh),
            (self.proposals.acceptRequested, self.review.accept),
            (services.session.finished, self._on_finished),
            (services.client.failed, self._on_worker_failed),
            (curating.changed, self.tuning.show_cases),
            (self.tuning.next.loaded, self.prompt.ui.volumeSelector.setCurrentNode),
        )
        for signal, listener in self._listeners:
            signal.connect(listener)
        self.setup.connectGui()

    def connectGui(self, parameters: Parameters) -> None:
        """Show the scene's parameters."""
        for panel in (self.prompt, self.proposals, self.review, self.tuning):
            panel.connectGui(parameters)

    def disconnectGui(self) -> None:
        """Let go of the scene's parameters."""
        for panel in (self.prompt, self.proposals, self.review, self.tuning):
            panel.disconnectGui()

    def enter(self) -> None:
        """The module is shown."""
        self._watch.start()
        self.setup.refresh()
        for panel in (self.prompt, self.proposals, self.review, self.tuning):
            panel.enter()

    def exit(self) -> None:
        """Another module is shown; a run goes on meanwhile."""
        self._watch.stop()
        for panel in (self.prompt, self.proposals, self.review):
            panel.exit()

    def cleanup(self) -> None:
        """Let go of everything outside the panels."""
        for signal, listener in self._listeners:
            signal.disconnect(listener)
        for panel in (self.setup, self.prompt, self.proposals, self.review, self.tuning):
            panel.cleanup()
        self._hider.cleanup()
        self._watch.cleanup()
        self.status.cleanup()
        self.widget.setMRMLScene(None)

    def _selection(self) -> tuple[str, Row] | None:
        target, row = self.proposals.target, self.proposals.selected
        return None if target is None or row is None else (target, row)

    def _on_worker_failed(self, failure: WorkerFailure) -> None:
        """It may also end while nothing is asked of it."""
        self.status.say_failure(failure.message, failure.details)

    def _on_finished(self) -> None:
        """The list gets the keyboard, unless the user is busy elsewhere or types the next prompt."""
        focus = qt.QApplication.focusWidget()
        origin = self._services.workflow.origin
        is_waiting = origin is not None and origin.request.prompt == self.prompt.line.text
        if focus is not None and is_waiting and self.prompt.widget.isAncestorOf(focus):
            self.proposals.focus()
