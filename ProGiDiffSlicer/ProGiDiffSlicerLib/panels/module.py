"""All panels of the module, one below the other, and what passes between them."""

from __future__ import annotations

from typing import Any

import qt
import slicer
import vtk

from progidiff.wire.conversation import WorkerFailure
from ProGiDiffSlicerLib.panels.panel import Panel, StatusLine
from ProGiDiffSlicerLib.panels.prompt import PromptPanel
from ProGiDiffSlicerLib.panels.proposals import ProposalsPanel
from ProGiDiffSlicerLib.panels.review import ReviewPanel
from ProGiDiffSlicerLib.panels.setup import SetupPanel
from ProGiDiffSlicerLib.panels.tuning import TuningPanel
from ProGiDiffSlicerLib.parameters import Parameters
from ProGiDiffSlicerLib.scene.nodes import is_own, nodes_of
from ProGiDiffSlicerLib.scene.store import Row
from ProGiDiffSlicerLib.services import Services


class ModulePanels(Panel):
    """Setup, Prompt, Proposals, Review and Tuning in a layout.

    Attributes:
        setup, prompt, proposals, review, tuning: the panels.
        status: the line that says how things stand.
    """

    def __init__(self, layout: Any, services: Services) -> None:
        super().__init__("ProGiDiffSlicer")
        layout.addWidget(self.widget)
        self._services = services
        self.status = StatusLine(self.ui.statusLabel, self.ui.restartButton, self.ui.correctButton)
        self.setup = SetupPanel(services.settings, self.ui.setupSection)
        self.prompt = PromptPanel(services, self.status, self.widget)
        self.proposals = ProposalsPanel(services, self.status)
        self.review = ReviewPanel(services, self.status, self.widget, self._selection)
        curating = self.review.curating.curating
        self.tuning = TuningPanel(services, self.status, lambda: curating.contents, lambda: self.prompt.line.text)
        self._of_scene: tuple[Panel, ...] = (self.prompt, self.proposals, self.review, self.tuning)
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
        self.listen(
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
        self.setup.refresh()

    def connectGui(self, parameters: Parameters) -> None:
        """Show the scene's parameters."""
        for panel in self._of_scene:
            panel.connectGui(parameters)

    def disconnectGui(self) -> None:
        """Let go of the scene's parameters."""
        for panel in self._of_scene:
            panel.disconnectGui()

    def enter(self) -> None:
        """The module is shown."""
        self.setup.refresh()
        for panel in self._of_scene:
            panel.enter()

    def exit(self) -> None:
        """Another module is shown; a run goes on meanwhile."""
        for panel in self._of_scene:
            panel.exit()

    def cleanup(self) -> None:
        """Let go of everything outside the panels."""
        for panel in (self.setup, *self._of_scene):
            panel.cleanup()
        self._hider.cleanup()
        self.status.cleanup()
        super().cleanup()

    def _selection(self) -> tuple[str, Row] | None:
        target, row = self.proposals.target, self.proposals.selected
        return None if target is None or row is None else (target, row)

    def _on_worker_failed(self, failure: WorkerFailure) -> None:
        """It may also end while nothing is asked of it."""
        self.status.say_failure(failure.message, failure.details)

    def _on_finished(self) -> None:
        """The list gets the keyboard, unless the user is busy elsewhere or types the next prompt."""
        focus = qt.QApplication.focusWidget()
        store = self._services.session.store
        is_waiting = store is not None and store.prompt == self.prompt.line.text
        if focus is not None and is_waiting and self.prompt.widget.isAncestorOf(focus):
            self.proposals.focus()


class OwnNodesHider:
    """Leaves the module's own nodes out of boxes (qMRMLNodeComboBox), also those that are added later."""

    def __init__(self, *boxes: Any) -> None:
        self._boxes = boxes
        self._scene = slicer.mrmlScene
        self._tag = self._scene.AddObserver(slicer.vtkMRMLScene.NodeAddedEvent, self._on_node_added)
        self.hide()

    def hide(self) -> None:
        """Leave out those that there are now."""
        for box in self._boxes:
            own = [node.GetID() for kind in box.nodeTypes for node in nodes_of(self._scene, kind) if is_own(node)]
            model = box.sortFilterProxyModel()
            if list(model.hiddenNodeIDs) != own:
                # The setter is no slot, so that PythonQt knows the property only.
                model.hiddenNodeIDs = own

    def cleanup(self) -> None:
        """Observe the scene no more."""
        self._scene.RemoveObserver(self._tag)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_added(self, _caller: Any, _event: str, node: Any) -> None:
        if is_own(node):
            self.hide()
