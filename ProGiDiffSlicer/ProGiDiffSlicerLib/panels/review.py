"""The review panel: accept a proposal into a segmentation, edit it, undo; where a segment comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slicer
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from ProGiDiffSlicerLib.logic.accept import Accepted
from ProGiDiffSlicerLib.logic.curating_example import remember_volume
from ProGiDiffSlicerLib.logic.editing import Editing, begin_edit
from ProGiDiffSlicerLib.logic.labelmaps import segments_of
from ProGiDiffSlicerLib.logic.store import Row
from ProGiDiffSlicerLib.panels.binding import Binding
from ProGiDiffSlicerLib.panels.curating import Chosen, CuratingPanel
from ProGiDiffSlicerLib.panels.loading import load_panel
from ProGiDiffSlicerLib.panels.node_choices import is_own
from ProGiDiffSlicerLib.panels.origin import describe_segment
from ProGiDiffSlicerLib.panels.shortcuts import Shortcuts
from ProGiDiffSlicerLib.panels.status_line import StatusLine
from ProGiDiffSlicerLib.parameters import AcceptMode, Parameters
from ProGiDiffSlicerLib.services import Services


class ReviewPanel:
    """What becomes of a proposal.

    The segment in the combo box is the one that is edited, described, replaced or added to; after an accept it is the
    accepted one.

    Attributes:
        widget: the panel, to be placed in a layout.
        curating: the panel in it that saves training examples.
    """

    def __init__(
        self, services: Services, status: StatusLine, scope: Any, selection: Callable[[], tuple[str, Row] | None]
    ) -> None:
        """``scope``: the widget within which the undo keys work. ``selection``: target and row of what is selected."""
        self.widget, self.ui = load_panel("ReviewPanel")
        self._acceptance = services.acceptance
        self._session = services.session
        self._workflow = services.workflow
        self._exporting = services.exporting
        self._status = status
        self._selection = selection
        self._binding = Binding(self.widget, self._on_parameters)
        self._segmentation: Any = None
        self._segmentation_tags: list[tuple[Any, int]] = []
        self._segment_ids: list[str] = []
        self._editing: Editing | None = None
        self._shortcuts = Shortcuts()
        self._shortcuts.add(scope, "Ctrl+Z", self.undo)
        self._shortcuts.add(scope, "Ctrl+Y", self.redo)
        self.ui.segmentEditor.setSegmentationNodeSelectorVisible(False)
        self.ui.segmentEditor.setSourceVolumeNodeSelectorVisible(False)
        self.curating = CuratingPanel(services, status, self._chosen, self._complete)
        self.ui.examplesSection.layout().addWidget(self.curating.widget)
        self._connections = (
            (self.ui.acceptButton, "clicked()", self.accept),
            (self.ui.editButton, "clicked()", self.edit),
            (self.ui.undoButton, "clicked()", self.undo),
            (self.ui.redoButton, "clicked()", self.redo),
            (self.ui.exportButton, "clicked()", self.export),
            (self.ui.segmentComboBox, "currentIndexChanged(int)", self._on_segment),
            (self.ui.editorSection, "contentsCollapsed(bool)", self._on_editor_collapsed),
        )
        for widget, signature, slot in self._connections:
            widget.connect(signature, slot)
        self._acceptance.undo.changed.connect(self.refresh)
        self._exporting.changed.connect(self.refresh)
        self._exporting.told.connect(status.say)
        self._acceptance.save_editor_state = self._save_editor_state
        self.refresh()

    # The module's life ----------------------------------------------------------------------------------------------------

    def connectGui(self, parameters: Parameters) -> None:
        """Show parameters and keep them as the user changes them."""
        self._binding.bind(parameters)

    def disconnectGui(self) -> None:
        """Let go of the parameters; editing ends."""
        self.end_edit()
        self.ui.segmentEditor.setMRMLSegmentEditorNode(None)
        self._observe(None)
        self._binding.release()

    def enter(self) -> None:
        """The module is shown: its keys work."""
        self._shortcuts.install()
        self.curating.activate(True)
        self.refresh()

    def exit(self) -> None:
        """Another module is shown: no effect of the editor stays active behind it."""
        self._shortcuts.remove()
        self.curating.activate(False)
        self.end_edit()

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        self.exit()
        self.disconnectGui()
        for widget, signature, slot in self._connections:
            widget.disconnect(signature, slot)
        self._acceptance.undo.changed.disconnect(self.refresh)
        self._exporting.changed.disconnect(self.refresh)
        self._exporting.told.disconnect(self._status.say)
        self._acceptance.save_editor_state = None
        self.curating.cleanup()
        self.widget.setMRMLScene(None)

    # What the user does ---------------------------------------------------------------------------------------------------

    def accept(self) -> Accepted | None:
        """Make the selected proposal a segment; what stands in the way is told in the status line."""
        parameters, chosen = self._binding.parameters, self._selection()
        if parameters is None:
            return None
        if chosen is None:
            self._status.say(_("Select the proposal to accept."))
            return None
        target, row = chosen
        self.end_edit()
        try:
            accepted = self._workflow.accept(
                target,
                row,
                parameters.targetSegmentation,
                parameters.acceptMode.value,
                parameters.targetSegment or None,
                parameters.overwrite.value,
            )
        except ProGiDiffError as error:
            self._status.say(str(error))
            return None
        store = self._session.store
        if store is not None:
            remember_volume(accepted.segmentation_node, accepted.segment_id, store.volume_id)
        parameters.targetSegmentation = accepted.segmentation_node
        parameters.targetSegment = accepted.segment_id
        # The next proposal is a new segment again, unless the user says otherwise.
        parameters.acceptMode = AcceptMode.NEW
        self._status.say(_accepted_sentence(accepted))
        self.refresh()
        return accepted

    def edit(self) -> None:
        """Open the chosen segment in the editor."""
        parameters = self._binding.parameters
        segment = self._segment()
        if parameters is None or segment is None:
            self._status.say(_("Accept a proposal, or choose a segmentation with a segment to edit."))
            return
        self.end_edit()
        self._editing = begin_edit(
            self._segmentation,
            parameters.targetSegment,
            parameters.inputVolume,
            self.ui.segmentEditor,
            parameters.overwrite.value,
            self._on_edited,
        )
        self.ui.editorSection.collapsed = False

    def end_edit(self) -> None:
        """Leave and close the editor; the provenance is brought up to date."""
        editing, self._editing = self._editing, None
        if editing is not None:
            editing.end()
            self.ui.editorSection.collapsed = True

    def undo(self) -> None:
        """Take back the last step."""
        label = self._go(self._acceptance.undo.undo)
        self._status.say(_("Undone: {step}").format(step=label) if label else _("There is nothing to undo."))

    def redo(self) -> None:
        """Make the step again that was taken back."""
        label = self._go(self._acceptance.undo.redo)
        self._status.say(_("Done again: {step}").format(step=label) if label else _("There is nothing to redo."))

    def export(self) -> None:
        """Write the segments of the segmentation as DICOM SEG."""
        self._complete()
        chosen = self._chosen()
        try:
            self._exporting.export(chosen.segmentation, chosen.segment_id, chosen.volume)
            self._status.say(_("Writing the segments as DICOM SEG …"))
        except ProGiDiffError as error:
            self._status.say(str(error))

    def _go(self, step: Callable[[], str]) -> str:
        """Undo or redo; a segment that comes back by it is chosen, as it was when it was accepted."""
        self.end_edit()
        before = _segments()
        label = step()
        come = [pair for pair in _segments() if pair not in before]
        if come and self._binding.parameters is not None:
            self._binding.parameters.targetSegmentation, self._binding.parameters.targetSegment = come[-1]
        self.refresh()
        return label

    # What is shown --------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Show what can be done now, and where the chosen segment comes from."""
        self._fill_segments()
        is_new = self._binding.parameters is None or self._binding.parameters.acceptMode is AcceptMode.NEW
        undo = self._acceptance.undo
        self.ui.acceptButton.setEnabled(self._selection() is not None)
        self.ui.acceptButton.setText(_("Accept") if is_new else _("Accept into segment"))
        self.ui.editButton.setEnabled(self._segment() is not None)
        self.ui.segmentComboBox.setEnabled(bool(self._segment_ids))
        self.ui.undoButton.setEnabled(undo.can_undo)
        self.ui.redoButton.setEnabled(undo.can_redo)
        undo_tip = _("Undo: {step}. An edit by hand is one step; the editor's own Undo takes back a stroke of it.")
        self.ui.undoButton.setToolTip(_tip(undo_tip, undo.undo_label, _("There is nothing to undo.")))
        self.ui.redoButton.setToolTip(_tip(_("Redo: {step}"), undo.redo_label, _("There is nothing to redo.")))
        chosen = self._chosen()
        obstacle = self._exporting.obstacle(chosen.segmentation, chosen.segment_id, chosen.volume)
        self.ui.exportButton.setEnabled(not obstacle)
        self.ui.exportButton.setToolTip(
            obstacle or _("Writes the segments of this segmentation as DICOM SEG into Slicer's DICOM database.")
        )
        segment = self._segment()
        text = "" if segment is None else describe_segment(segment)
        self.ui.provenanceLabel.setText(text)
        self.ui.provenanceLabel.setVisible(bool(text))
        self.curating.refresh()

    def _fill_segments(self) -> None:
        node = self._segmentation
        segments = [] if node is None else list(segments_of(node))
        self._segment_ids = [identifier for identifier, _segment in segments]
        names = [segment.GetName() for _identifier, segment in segments]
        box = self.ui.segmentComboBox
        chosen = "" if self._binding.parameters is None else self._binding.parameters.targetSegment
        blocked = box.blockSignals(True)
        box.clear()
        box.addItems(names)
        if self._segment_ids:
            box.setCurrentIndex(self._segment_ids.index(chosen) if chosen in self._segment_ids else len(names) - 1)
        box.blockSignals(blocked)
        if self._binding.parameters is not None:
            self._on_segment(box.currentIndex)

    def _segment(self) -> Any:
        """The chosen vtkSegment, or ``None``."""
        if self._segmentation is None or self._binding.parameters is None:
            return None
        return self._segmentation.GetSegmentation().GetSegment(self._binding.parameters.targetSegment)

    def _observe(self, node: Any) -> None:
        for observed, tag in self._segmentation_tags:
            observed.RemoveObserver(tag)
        self._segmentation_tags = []
        self._segmentation = node
        if node is not None:
            kinds = slicer.vtkSegmentation
            for event in (kinds.SegmentAdded, kinds.SegmentRemoved, kinds.SegmentModified):
                self._segmentation_tags.append((node, node.AddObserver(event, self._on_segmentation)))

    # What happens ---------------------------------------------------------------------------------------------------------

    def _on_parameters(self) -> None:
        if self._binding.parameters is not None:
            node = self._binding.parameters.targetSegmentation
            if node is not self._segmentation:
                self._observe(node)
            self.refresh()

    def _on_segmentation(self, caller: Any, event: str) -> None:
        self.refresh()

    def _on_segment(self, index: int) -> None:
        identifier = self._segment_ids[index] if 0 <= index < len(self._segment_ids) else ""
        if self._binding.parameters is not None and identifier != self._binding.parameters.targetSegment:
            self._binding.parameters.targetSegment = identifier

    def _on_editor_collapsed(self, collapsed: bool) -> None:
        if collapsed:
            self.end_edit()
        elif self._editing is None and self._segment() is not None:
            self.edit()

    def _chosen(self) -> Chosen:
        """What would be saved as a training example."""
        parameters = self._binding.parameters
        if parameters is None:
            return Chosen(None, "", None)
        return Chosen(self._segmentation, parameters.targetSegment, parameters.inputVolume, parameters.plane.value)

    def _complete(self) -> None:
        """What is saved now is what was edited, with its Dice to the proposal."""
        self.end_edit()
        self._acceptance.tracker.update_all()

    def _save_editor_state(self) -> None:
        """Make an accept a state of the editor too, so that the editor's own undo does not step over it."""
        editor = self.ui.segmentEditor
        if editor.segmentationNode() is not None and editor.segmentationNode() is self._segmentation:
            editor.saveStateForUndo()

    def _on_edited(self) -> None:
        self._acceptance.tracker.update_all()
        self.refresh()


def _accepted_sentence(accepted: Accepted) -> str:
    segment = accepted.segmentation_node.GetSegmentation().GetSegment(accepted.segment_id)
    sentence = _("Accepted as {segment} in {segmentation}.").format(
        segment=segment.GetName(), segmentation=accepted.segmentation_node.GetName()
    )
    lost = sum(accepted.overwritten.values())
    if lost:
        sentence += " " + _("Other segments lost {count} voxels.").format(count=lost)
    return f"{sentence} {accepted.note}".strip()


def _segments() -> list[tuple[Any, str]]:
    """The segments of the scene with their segmentations, proposals left out."""
    nodes = [node for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode") if not is_own(node)]
    return [(node, identifier) for node in nodes for identifier, _segment in segments_of(node)]


def _tip(text: str, step: str, otherwise: str) -> str:
    return text.format(step=step) if step else otherwise
