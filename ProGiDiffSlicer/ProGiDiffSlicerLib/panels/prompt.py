"""The prompt panel: what to outline, where, how many proposals; Propose and Cancel."""

from __future__ import annotations

import random
from typing import Any

import slicer
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.volumes.slicing import SlicePlan
from ProGiDiffSlicerLib.logic.run import RunRequest
from ProGiDiffSlicerLib.logic.sequences import frames
from ProGiDiffSlicerLib.logic.session import SessionState
from ProGiDiffSlicerLib.panels.binding import Binding
from ProGiDiffSlicerLib.panels.completion import PromptLine
from ProGiDiffSlicerLib.panels.loading import load_panel
from ProGiDiffSlicerLib.panels.progress import remaining
from ProGiDiffSlicerLib.panels.shortcuts import Shortcuts
from ProGiDiffSlicerLib.panels.status_line import StatusLine
from ProGiDiffSlicerLib.panels.volume_slices import slices_of
from ProGiDiffSlicerLib.parameters import LARGEST_SEED, Extent, Parameters, Plane
from ProGiDiffSlicerLib.services import Services

_PROGRESS_STEPS = 1000


class PromptPanel:
    """What to outline and where.

    It starts and cancels the session's runs and shows how far they are. The prompt stays in its line and in the
    parameters whatever happens to a run.

    Attributes:
        widget: the panel, to be placed in a layout.
        line: the line in which the prompt is typed.
    """

    def __init__(self, services: Services, status: StatusLine, scope: Any) -> None:
        """``scope`` is the widget within which Ctrl+Enter starts a run: the whole module."""
        self.widget, self.ui = load_panel("PromptPanel")
        self.line = PromptLine(self.ui.promptEdit, self.ui.historyButton, services.session.vocabulary)
        self._session = session = services.session
        self._workflow = services.workflow
        self._settings = services.settings
        self._status = status
        self._binding = Binding(self.widget, self._on_parameters)
        # The range of slices as it is shown; the parameters may still hold another volume's.
        self._range: tuple[int, int] | None = None
        self._shortcuts = Shortcuts()
        for keys in ("Ctrl+Return", "Ctrl+Enter"):
            self._shortcuts.add(scope, keys, self.propose)
        self.ui.progressBar.setMaximum(_PROGRESS_STEPS)
        self.ui.proposeButton.connect("clicked()", self._on_button)
        self.ui.rangeWidget.connect("valuesChanged(double,double)", self._on_range)
        session.stateChanged.connect(self._on_state)
        session.progressChanged.connect(self._on_progress)
        session.failed.connect(self._on_failed)
        session.cancelled.connect(self._on_cancelled)
        session.dropped.connect(self._on_dropped)
        session.warned.connect(status.warn)
        self._settings.changed.connect(self._on_setting)
        self._on_state()

    def connectGui(self, parameters: Parameters) -> None:
        """Show parameters and keep them as the user changes them."""
        self.line.set_history(parameters.promptHistory)
        self._binding.bind(parameters)

    def disconnectGui(self) -> None:
        """Let go of the parameters."""
        self._binding.release()

    def enter(self) -> None:
        """The module is shown: its keys work."""
        self._shortcuts.install()
        self.line.install_shortcuts()
        self._on_parameters()

    def exit(self) -> None:
        """Another module is shown."""
        self._shortcuts.remove()
        self.line.remove_shortcuts()

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        self.exit()
        self.disconnectGui()
        self.line.cleanup()
        self.ui.proposeButton.disconnect("clicked()", self._on_button)
        self.ui.rangeWidget.disconnect("valuesChanged(double,double)", self._on_range)
        self._session.stateChanged.disconnect(self._on_state)
        self._session.progressChanged.disconnect(self._on_progress)
        self._session.failed.disconnect(self._on_failed)
        self._session.cancelled.disconnect(self._on_cancelled)
        self._session.dropped.disconnect(self._on_dropped)
        self._session.warned.disconnect(self._status.warn)
        self._settings.changed.disconnect(self._on_setting)
        self.widget.setMRMLScene(None)

    def propose(self) -> None:
        """Start a run with what the panel says; what stands in the way is told in the status line."""
        if not self._session.running:
            self._start()

    def correct_values(self, wanted: bool) -> None:
        """Start again, with values of the volume that cannot be Hounsfield units taken for what they look like or not."""
        if self._binding.parameters is not None:
            self._binding.parameters.correctedVolume = self._binding.parameters.inputVolume if wanted else None
            self._start()

    def _start(self) -> None:
        parameters = self._binding.parameters
        if parameters is None:
            return
        prompt = self.line.text
        self._status.clear()
        seed = parameters.seed if parameters.seedLocked else random.randint(0, LARGEST_SEED)
        try:
            self._workflow.start(self._request(prompt, seed))
        except ProGiDiffError as error:
            self._status.say(str(error))
            return
        parameters.seed = seed
        self.line.remember(prompt)
        parameters.promptHistory = self.line.history

    def _request(self, prompt: str, seed: int) -> RunRequest:
        parameters = self._binding.parameters
        volume = parameters.inputVolume
        start, stop = self._range or (0, 0)
        return RunRequest(
            volume_node_id="" if volume is None else volume.GetID(),
            prompt=prompt,
            plane=parameters.plane.value or None,
            correct_values=volume is not None and _same(parameters.correctedVolume, volume),
            extent=parameters.extent.value,
            start=start,
            stop=stop,
            proposals=parameters.proposals,
            top_k=min(parameters.topK, parameters.proposals),
            steps=parameters.steps,
            seed=seed,
            adaptive=parameters.adaptive,
            everywhere=parameters.everywhere,
            model_folder=self._settings.modelFolder or None,
            device=self._settings.device,
            frames=parameters.frames.value,
            adapter_folder=parameters.adapterFolder or None,
            adapter_even_if_worse=parameters.adapterEvenIfWorse,
        )

    def _on_button(self) -> None:
        if self._session.running:
            self._session.cancel()
        else:
            self.propose()

    def _on_parameters(self) -> None:
        """Follow the volume and the extent: which rows there are, how far the range goes."""
        if self._binding.parameters is None:
            return
        node = self._binding.parameters.inputVolume
        is_sequence = frames(node) is not None
        for widget in (self.ui.framesLabel, self.ui.framesComboBox):
            widget.setVisible(is_sequence)
        plane = self._binding.parameters.plane.value
        slices = slices_of(node, lambda geometry: self._session.plan(geometry, plane))
        self._show_plane(None if slices is None else slices.plan)
        self._range = None
        has_range = self._binding.parameters.extent is Extent.RANGE and slices is not None
        for widget in (self.ui.rangeLabel, self.ui.rangeWidget):
            widget.setVisible(has_range)
        if slices is not None:
            self._show_range(slices.plan.count)

    def _on_setting(self, name: str) -> None:
        if name == "modelFolder":
            self._on_parameters()  # another model may know other planes

    def _show_plane(self, plan: SlicePlan | None) -> None:
        """Say how the volume is cut, and whether the model has seen such slices."""
        text = ""
        if plan is not None:
            text = _("{plane}, {count} slices").format(plane=Plane(plan.plane).label(), count=plan.count)
            if plan.plane not in self._session.planes():
                text += _("; the model was not trained on such slices")
        self.ui.planeNote.setText(text)

    def _show_range(self, count: int) -> None:
        """People count slices from 1 and include the last; the parameters count from 0 and leave it out."""
        start, stop = self._binding.parameters.rangeStart, self._binding.parameters.rangeStop
        if not 0 <= start < stop <= count:
            start, stop = 0, count
        self._range = (start, stop)
        box = self.ui.rangeWidget
        blocked = box.blockSignals(True)
        box.setRange(1, count)
        box.setValues(start + 1, stop)
        box.blockSignals(blocked)

    def _on_range(self, first: float, last: float) -> None:
        parameters = self._binding.parameters
        if parameters is not None:
            with slicer.util.NodeModify(parameters):  # one change: a range of which half is old is shown to nobody
                parameters.rangeStart = round(first) - 1
                parameters.rangeStop = round(last)

    def _on_state(self, *_state: Any) -> None:
        running = self._session.running
        cancelling = self._session.state is SessionState.CANCELLING
        self.ui.proposeButton.setText(_("Cancelling") if cancelling else _("Cancel") if running else _("Propose"))
        self.ui.proposeButton.setEnabled(not cancelling)
        self.ui.progressBar.setVisible(running)
        if not running:
            self.ui.progressBar.setValue(0)

    def _on_progress(self, fraction: float, text: str, eta_s: float | None) -> None:
        left = remaining(eta_s)
        self.ui.progressBar.setValue(int(fraction * _PROGRESS_STEPS))
        self.ui.progressBar.setFormat(f"{text}, {left}" if text and left else text or left)

    def _on_failed(self, sentence: str) -> None:
        failure = self._session.failure
        if failure is None or failure.kind == "remote":
            # The worker answered and is well; starting it again would not help.
            self._status.say(sentence)
        else:
            self._status.say_failure(sentence, failure.details)

    def _on_dropped(self, sentence: str) -> None:
        self._status.clear()
        self._status.say(sentence)

    def _on_cancelled(self) -> None:
        self._status.say(_("Cancelled. What had arrived is kept below."))


def _same(node: Any, other: Any) -> bool:
    return node is not None and node.GetID() == other.GetID()
