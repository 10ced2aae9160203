"""The review panel: accept, replace, add, neighbours, undo and redo, editing, where a segment comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import qt
import slicer

from progidiff.proposals.votes import consensus
from progidiff.wire.messages import ProposeRequest
from ProGiDiffSlicerLib.panels.review import describe_segment
from ProGiDiffSlicerLib.scene.accept import AcceptMode
from ProGiDiffSlicerLib.scene.labelmaps import Overwrite
from ProGiDiffSlicerLib.scene.provenance import Provenance, read_provenance, write_provenance
from ProGiDiffSlicerLib.scene.volumes import Frames

from .panel_support import GRID, Opened, nested_masks, press
from .session_support import add_sequence, segment_array

Spin = Callable[..., None]


def choose(panel: Opened, box: str, value: Any) -> None:
    """Choose an entry of a box that shows an enumeration."""
    getattr(panel.review.ui, box).setCurrentIndex(list(type(value)).index(value))


def accept(panel: Opened, key: Any = None) -> int:
    """Press Accept, on the line of a digit key if one is given; the number of the proposal."""
    if key is not None:
        press(panel.table, key)
    panel.review.ui.acceptButton.click()
    return int(panel.proposals.selected.index)


def voxels(panel: Opened) -> dict[str, np.ndarray]:
    """The voxels of each accepted segment by its name."""
    node = panel.parameters.targetSegmentation
    segmentation = node.GetSegmentation()
    ids = list(segmentation.GetSegmentIDs())
    return {segmentation.GetSegment(each).GetName(): segment_array(node, each, GRID.shape_kji) for each in ids}


def same(panel: Opened, **expected: np.ndarray) -> bool:
    """Whether there are these segments and no others, to the last voxel; "_" in a name is a blank."""
    found = voxels(panel)
    names = {name.replace("_", " "): mask for name, mask in expected.items()}
    return list(found) == list(names) and all(np.array_equal(found[name], mask) for name, mask in names.items())


def segment_of(panel: Opened) -> Any:
    """The segment that is chosen."""
    return panel.parameters.targetSegmentation.GetSegmentation().GetSegment(panel.parameters.targetSegment)


def test_accept_makes_a_segment_with_name_code_and_origin(panel: Opened, spin: Spin) -> None:
    node, masks = panel.run(spin, 4, prompt="left kidney", steps=6, seed=77, seedLocked=True)
    row = panel.proposals.selected
    panel.review.ui.acceptButton.click()
    segmentation = panel.review.ui.segmentationSelector.currentNode()
    assert same(panel, Left_kidney=masks[row.index])
    assert segmentation.GetNodeReference(segmentation.GetReferenceImageGeometryReferenceRole()) is node
    facts = read_provenance(segment_of(panel))
    assert facts is not None
    assert (facts.prompt, facts.target, facts.request.seed, facts.request.steps) == ("left kidney", "left kidney", 77, 6)
    assert (facts.proposal, facts.rank, facts.request.proposals, facts.model_id) == (row.index, 1, 4, "fake")
    assert facts.score == pytest.approx(row.score)
    assert facts.request.slices is None
    assert panel.said == "Accepted as Left kidney in CT segmentation."


def test_new_replace_and_add_change_the_chosen_segment_only(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 4)
    first, second = accept(panel), accept(panel, qt.Qt.Key_2)
    assert (masks[first] & masks[second]).any()
    assert same(panel, Liver=masks[first], Liver_2=masks[second])
    panel.review.ui.segmentComboBox.setCurrentIndex(0)
    choose(panel, "acceptModeComboBox", AcceptMode.REPLACE)
    third = accept(panel, qt.Qt.Key_3)
    assert same(panel, Liver=masks[third], Liver_2=masks[second])
    assert panel.parameters.acceptMode is AcceptMode.NEW, "the next one is new again"
    panel.review.ui.segmentComboBox.setCurrentIndex(1)
    choose(panel, "acceptModeComboBox", AcceptMode.ADD)
    accept(panel)
    assert same(panel, Liver=masks[third], Liver_2=masks[second] | masks[third])
    assert "Added to 1 earlier" in panel.review.ui.provenanceLabel.text


def test_neighbours_give_way_only_where_that_was_chosen_and_it_is_said(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 3)
    first = accept(panel)
    choose(panel, "overwriteComboBox", Overwrite.ALL)
    second = accept(panel, qt.Qt.Key_2)
    assert same(panel, Liver=masks[first] & ~masks[second], Liver_2=masks[second])
    assert f"lost {(masks[first] & masks[second]).sum()} voxels" in panel.said
    panel.review.ui.undoButton.click()
    assert same(panel, Liver=masks[first])


def test_undo_and_redo_one_step_per_accept(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 3)
    ui = panel.review.ui
    assert not ui.undoButton.enabled
    first, second = accept(panel), accept(panel, qt.Qt.Key_2)
    segmentation = panel.parameters.targetSegmentation
    press(panel.prompt.ui.promptEdit, qt.Qt.Key_Z, qt.Qt.ControlModifier)
    assert len(voxels(panel)) == 2, "in the prompt the key belongs to the prompt"
    press(panel.table, qt.Qt.Key_Z, qt.Qt.ControlModifier)
    assert same(panel, Liver=masks[first])
    assert panel.said == "Undone: Accept liver"
    ui.undoButton.click()
    assert not panel.scene.IsNodePresent(segmentation)
    assert panel.parameters.targetSegmentation is None
    assert not ui.undoButton.enabled
    press(panel.table, qt.Qt.Key_Y, qt.Qt.ControlModifier)
    assert panel.scene.IsNodePresent(segmentation)
    assert same(panel, Liver=masks[first])
    ui.redoButton.click()
    assert same(panel, Liver=masks[first], Liver_2=masks[second])
    assert not ui.redoButton.enabled


@pytest.mark.slow
def test_an_ensemble_can_be_accepted(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 5)
    panel.proposals._table.select_key("consensus")
    panel.review.ui.acceptButton.click()
    assert same(panel, Liver=consensus(masks))
    facts = read_provenance(segment_of(panel))
    assert (facts.ensemble, facts.proposal) == ("consensus", -1)
    assert panel.review.ui.provenanceLabel.text.startswith("Consensus of all of 5")


def test_what_cannot_be_done_is_said_and_changes_nothing(panel: Opened, spin: Spin) -> None:
    assert not panel.review.ui.acceptButton.enabled
    assert panel.review.accept() is None
    assert panel.said == "Select the proposal to accept."
    panel.review.edit()
    assert "to edit" in panel.said
    assert panel.review.ui.editorSection.collapsed
    node, _masks = panel.run(spin)
    choose(panel, "acceptModeComboBox", AcceptMode.REPLACE)
    assert panel.review.accept() is None
    assert "no segmentation to change" in panel.said
    node.SetOrigin(1, 2, 3)
    choose(panel, "acceptModeComboBox", AcceptMode.NEW)
    assert panel.review.accept() is None
    assert panel.said == "CT was changed after these proposals were made; ask for them again."
    assert panel.titles(), "they stay to be looked at"
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == [panel.session.proposals.node]


def test_accepting_into_a_segmentation_that_was_there(panel: Opened, spin: Spin) -> None:
    node, masks = panel.run(spin)
    selector = panel.review.ui.segmentationSelector
    assert panel.session.proposals.node is not None
    assert selector.nodeCount() == 0, "the proposals cannot be chosen"
    own = panel.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "by hand")
    own.SetReferenceImageGeometryParameterFromVolumeNode(node)
    selector.setCurrentNode(own)
    index = accept(panel)
    assert panel.parameters.targetSegmentation is own
    assert same(panel, Liver=masks[index])


@pytest.mark.usefixtures("slicer_version")
def test_edit_opens_the_editor_on_the_segment_and_the_origin_follows(panel: Opened, spin: Spin) -> None:
    node, masks = panel.run(spin, 3)
    accepted = panel.review.accept()
    ui = panel.review.ui
    assert ui.provenanceLabel.text.endswith("Not edited since it was accepted")
    ui.editButton.click()
    editor = ui.segmentEditor.mrmlSegmentEditorNode()
    assert not ui.editorSection.collapsed
    assert "the editor's own Undo takes back a stroke" in ui.undoButton.toolTip
    assert editor.GetSegmentationNode() is accepted.segmentation_node
    assert editor.GetSourceVolumeNode() is node
    assert editor.GetSelectedSegmentID() == accepted.segment_id
    assert editor.GetOverwriteMode() == editor.OverwriteNone
    before = masks[panel.proposals.selected.index]
    edited = paint_away(panel, before)
    ui.editorSection.collapsed = True
    dice = 2 * edited.sum() / (edited.sum() + before.sum())
    assert ui.provenanceLabel.text.endswith(f"Edited, Dice to the proposal {dice:.3f}")
    ui.editButton.click()
    editing = panel.review._editing
    panel.panels.exit()
    assert not editing.active, "leaving the module ends editing"
    assert ui.editorSection.collapsed


def paint_away(panel: Opened, mask: np.ndarray) -> np.ndarray:
    """Erase two slices of the chosen segment; what is left."""
    left = mask.copy()
    left[2:4] = False
    node, parameters = panel.parameters.inputVolume, panel.parameters
    slicer.util.updateSegmentBinaryLabelmapFromArray(
        left.astype(np.uint8), parameters.targetSegmentation, parameters.targetSegment, node
    )
    return left


def test_the_editors_own_undo_does_not_step_over_an_accept(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 3)
    first = accept(panel)
    panel.review.edit()
    editor = panel.review.ui.segmentEditor
    editor.saveStateForUndo()
    edited = paint_away(panel, masks[first])
    accept(panel, qt.Qt.Key_2)
    panel.review.edit()
    editor.undo()
    assert same(panel, Liver=edited), "the accept is one step of the editor, and the edit before it another"


def test_what_is_done_to_a_segment_elsewhere_shows_in_the_box(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 2)
    accept(panel)
    box = panel.review.ui.segmentComboBox
    segment_of(panel).SetName("Leber")
    assert (box.count, box.currentText) == (1, "Leber")
    panel.parameters.targetSegmentation.GetSegmentation().RemoveSegment(panel.parameters.targetSegment)
    assert box.count == 0
    assert panel.review.ui.provenanceLabel.isHidden()
    assert not panel.review.ui.editButton.enabled


def test_the_words_about_a_segment() -> None:
    segment = slicer.vtkSegment()
    assert describe_segment(segment) == ""
    facts = Provenance(
        prompt="a | b: <c>", target="liver", proposal=2, rank=3, score=0.875, model_id="m", adapter_id="mr", edited=True,
        dice_to_proposal=0.5, request=ProposeRequest(("liver",), 8, seed=4, slices=(2, 9), everywhere=True, batch_size=8),
    )  # fmt: skip
    write_provenance(segment, facts)
    assert describe_segment(segment).splitlines() == [
        "Proposal 3 of 8 for “a | b: <c>”, rank 3, score 0.88",
        "Model m, seed 4, 4 steps, adapter mr, slices 3-9, batch size 8, everywhere",
        "Edited, Dice to the proposal 0.500",
    ]


@pytest.mark.slow
def test_each_frame_has_its_own_segment_and_undo_never_touches_another_frame(panel: Opened, spin: Spin) -> None:
    rng, masks = np.random.default_rng(2), nested_masks(GRID, 2)
    arrays = [rng.normal(size=GRID.shape_kji).astype(np.float32) for _frame in range(2)]
    node, browser = add_sequence(panel.scene, GRID, arrays)
    panel.prompt.ui.volumeSelector.setCurrentNode(node)
    panel.propose(proposals=2, frames=Frames.ALL)
    for shift in range(2):
        panel.arrive(node, np.roll(masks, shift, axis=2))
        panel.client.finish()
    panel.settle(spin)
    ui = panel.review.ui
    first = accept(panel)
    segmentation = panel.parameters.targetSegmentation
    browser.SetSelectedItemNumber(1)
    panel.settle(spin)
    assert voxels(panel) == {}, "the other frame has none yet"
    second = accept(panel, qt.Qt.Key_2)
    browser.SetSelectedItemNumber(0)
    panel.settle(spin)
    assert same(panel, Liver=masks[first])
    ui.undoButton.click()
    assert browser.GetSelectedItemNumber() == 1, "the frame of the step is shown"
    assert voxels(panel) == {}
    browser.SetSelectedItemNumber(0)
    assert same(panel, Liver=masks[first])
    ui.redoButton.click()
    assert browser.GetSelectedItemNumber() == 1
    assert same(panel, Liver=np.roll(masks, 1, axis=2)[second])
    ui.undoButton.click()
    ui.undoButton.click()
    assert not panel.scene.IsNodePresent(segmentation)
    assert panel.parameters.targetSegmentation is None
    accept(panel)
    assert list(voxels(panel)) == ["Liver"]
