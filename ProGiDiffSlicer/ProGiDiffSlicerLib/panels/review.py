"""The review panel: accept a proposal into a segmentation, edit it, undo; where a segment comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slicer
from slicer.i18n import tr as _

from progidiff.errors import ProGiDiffError
from progidiff.outputs.segmentation import tag_text
from ProGiDiffSlicerLib.panels.curating import Chosen, CuratingPanel
from ProGiDiffSlicerLib.panels.panel import Panel, StatusLine, blocked
from ProGiDiffSlicerLib.parameters import Plane
from ProGiDiffSlicerLib.scene.accept import Accepted, AcceptMode
from ProGiDiffSlicerLib.scene.editing import Editing, begin_edit
from ProGiDiffSlicerLib.scene.examples import remember_volume
from ProGiDiffSlicerLib.scene.labelmaps import segments_of
from ProGiDiffSlicerLib.scene.nodes import is_own
from ProGiDiffSlicerLib.scene.provenance import Provenance, earlier_provenance, read_provenance
from ProGiDiffSlicerLib.scene.store import Row, row_name
from ProGiDiffSlicerLib.services import Services


class ReviewPanel(Panel):
    """What becomes of a proposal.

    The segment in the combo box is the one that is edited, described, replaced or added to; after an accept it is the
    accepted one.

    Attributes:
        curating: the panel in it that saves training examples.
    """

    def __init__(
        self, services: Services, status: StatusLine, scope: Any, selection: Callable[[], tuple[str, Row] | None]
    ) -> None:
        """``scope``: the widget within which the undo keys work. ``selection``: target and row of what is selected."""
        super().__init__("ReviewPanel")
        self._acceptance = services.acceptance
        self._session = services.session
        self._exporting = services.exporting
        self._status = status
        self._selection = selection
        self._segmentation: Any = None
        self._segmentation_tags: list[tuple[Any, int]] = []
        self._segment_ids: list[str] = []
        self._editing: Editing | None = None
        self.keys.add(scope, "Ctrl+Z", self.undo)
        self.keys.add(scope, "Ctrl+Y", self.redo)
        self.ui.segmentEditor.setSegmentationNodeSelectorVisible(False)
        self.ui.segmentEditor.setSourceVolumeNodeSelectorVisible(False)
        self.curating = CuratingPanel(services, status, self._chosen, self._complete)
        self.ui.examplesSection.layout().addWidget(self.curating.widget)
        self.listen(
            (self.ui.acceptButton, "clicked()", self.accept),
            (self.ui.editButton, "clicked()", self.edit),
            (self.ui.undoButton, "clicked()", self.undo),
            (self.ui.redoButton, "clicked()", self.redo),
            (self.ui.exportButton, "clicked()", self.export),
            (self.ui.segmentComboBox, "currentIndexChanged(int)", self._on_segment),
            (self.ui.editorSection, "contentsCollapsed(bool)", self._on_editor_collapsed),
            (self._acceptance.undo.changed, self.refresh),
            (self._exporting.changed, self.refresh),
            (self._exporting.told, status.say),
        )
        self._acceptance.save_editor_state = self._save_editor_state
        self.refresh()

    # The module's life ----------------------------------------------------------------------------------------------------

    def disconnectGui(self) -> None:
        """Let go of the parameters; editing ends."""
        self.end_edit()
        self.ui.segmentEditor.setMRMLSegmentEditorNode(None)
        self._observe(None)
        super().disconnectGui()

    def enter(self) -> None:
        """The module is shown: its keys work."""
        super().enter()
        self.curating.activate(True)
        self.refresh()

    def exit(self) -> None:
        """Another module is shown: no effect of the editor stays active behind it."""
        super().exit()
        self.curating.activate(False)
        self.end_edit()

    def cleanup(self) -> None:
        """Let go of everything outside the panel."""
        super().cleanup()
        self._acceptance.save_editor_state = None
        self.curating.cleanup()

    # What the user does ---------------------------------------------------------------------------------------------------

    def accept(self) -> Accepted | None:
        """Make the selected proposal a segment; what stands in the way is told in the status line."""
        parameters, chosen = self.parameters, self._selection()
        if parameters is None:
            return None
        if chosen is None:
            self._status.say(_("Select the proposal to accept."))
            return None
        target, row = chosen
        self.end_edit()
        try:
            accepted = self._acceptance.accept_proposal(
                self._session.store,
                target,
                row,
                parameters.targetSegmentation,
                parameters.acceptMode,
                parameters.targetSegment or None,
                parameters.overwrite,
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
        parameters = self.parameters
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
            parameters.overwrite,
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
        if come and self.parameters is not None:
            self.parameters.targetSegmentation, self.parameters.targetSegment = come[-1]
        self.refresh()
        return label

    # What is shown --------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Show what can be done now, and where the chosen segment comes from."""
        self._fill_segments()
        is_new = self.parameters is None or self.parameters.acceptMode is AcceptMode.NEW
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
        chosen = "" if self.parameters is None else self.parameters.targetSegment
        with blocked(box):
            box.clear()
            box.addItems(names)
            if self._segment_ids:
                box.setCurrentIndex(self._segment_ids.index(chosen) if chosen in self._segment_ids else len(names) - 1)
        if self.parameters is not None:
            self._on_segment(box.currentIndex)

    def _segment(self) -> Any:
        """The chosen vtkSegment, or ``None``."""
        if self._segmentation is None or self.parameters is None:
            return None
        return self._segmentation.GetSegmentation().GetSegment(self.parameters.targetSegment)

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

    def on_parameters(self) -> None:
        if self.parameters is not None:
            node = self.parameters.targetSegmentation
            if node is not self._segmentation:
                self._observe(node)
            self.refresh()

    def _on_segmentation(self, caller: Any, event: str) -> None:
        self.refresh()

    def _on_segment(self, index: int) -> None:
        identifier = self._segment_ids[index] if 0 <= index < len(self._segment_ids) else ""
        if self.parameters is not None and identifier != self.parameters.targetSegment:
            self.parameters.targetSegment = identifier

    def _on_editor_collapsed(self, collapsed: bool) -> None:
        if collapsed:
            self.end_edit()
        elif self._editing is None and self._segment() is not None:
            self.edit()

    def _chosen(self) -> Chosen:
        """What would be saved as a training example."""
        parameters = self.parameters
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


def describe_segment(segment: Any) -> str:
    """Lines about a vtkSegment's origin; "" for a segment that was not accepted from a proposal."""
    facts = read_provenance(segment)
    if facts is None:
        return ""
    lines = [_first_line(facts), _run_line(facts), _state_line(facts)]
    earlier = len(earlier_provenance(segment))
    if earlier:
        lines.append(_("Added to {count} earlier accepted ones.").format(count=earlier))
    return "\n".join(lines)


def _first_line(facts: Provenance) -> str:
    name, count = row_name(facts.ensemble or facts.proposal), facts.request.proposals
    if facts.rank is None or facts.score is None:
        return _("{proposal} of {count} for “{prompt}”").format(proposal=name, count=count, prompt=facts.prompt)
    return _("{proposal} of {count} for “{prompt}”, rank {rank}, score {score:.2f}").format(
        proposal=name, count=count, prompt=facts.prompt, rank=facts.rank, score=facts.score
    )


def _run_line(facts: Provenance) -> str:
    line = _("Model {model}, seed {seed}, {steps} steps").format(
        model=facts.model_id or _("unknown"), seed=facts.request.seed, steps=facts.request.steps
    )
    if facts.adapter_id:
        line += ", " + _("adapter {adapter}").format(adapter=facts.adapter_id)
    if facts.plane:
        line += ", " + {each.value: each.label().lower() for each in Plane}.get(facts.plane, facts.plane)
    if facts.corrected:
        line += ", " + _("values corrected")
    if facts.request.slices:
        line += ", " + _("slices {slices}").format(slices=tag_text(facts.request.slices))
    return ", ".join([line, *facts.request.unusual("targets", "proposals", "seed", "steps", "slices")])


def _state_line(facts: Provenance) -> str:
    if not facts.edited:
        return _("Not edited since it was accepted")
    if facts.dice_to_proposal is None:
        return _("Edited")
    return _("Edited, Dice to the proposal {dice:.3f}").format(dice=facts.dice_to_proposal)
