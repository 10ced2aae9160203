"""The review panel: accept, replace, add, neighbours, undo and redo, editing, where a segment comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from ProGiDiffSlicerLib.scene.volumes import Extent, Frames, frames

from ..proposal_examples import ranking_event, slice_event
from .panel_support import GRID, Opened, nested_masks, opened, press
from .session_support import add_sequence, plan_of, segment_array

Spin = Callable[..., None]


@pytest.fixture
def panel(scene: Any) -> Iterator[Opened]:
    with opened(scene) as panels:
        yield panels


def choose(panel: Opened, box: str, value: Any) -> None:
    """Choose an entry of a box that shows an enumeration."""
    getattr(panel.review.ui, box).setCurrentIndex(list(type(value)).index(value))


def voxels(node: Any, name: str) -> np.ndarray:
    """The voxels of the segment of that name."""
    segmentation = node.GetSegmentation()
    return segment_array(node, segmentation.GetSegmentIdBySegmentName(name), GRID.shape_kji)


def names(node: Any) -> list[str]:
    segmentation = node.GetSegmentation()
    return [segmentation.GetNthSegment(number).GetName() for number in range(segmentation.GetNumberOfSegments())]


def test_accept_makes_a_segment_with_name_code_and_origin(panel: Opened, spin: Spin) -> None:
    node, masks = panel.run(spin, 4, prompt="left kidney", steps=6, seed=77, seedLocked=True)
    row = panel.proposals.selected
    panel.review.ui.acceptButton.click()
    segmentation = panel.review.ui.segmentationSelector.currentNode()
    assert segmentation.GetName() == "CT segmentation"
    assert names(segmentation) == ["Left kidney"]
    assert np.array_equal(voxels(segmentation, "Left kidney"), masks[row.index])
    role = segmentation.GetReferenceImageGeometryReferenceRole()
    assert segmentation.GetNodeReference(role) is node
    facts = read_provenance(segmentation.GetSegmentation().GetNthSegment(0))
    assert facts is not None
    assert (facts.prompt, facts.target, facts.request.seed, facts.request.steps) == ("left kidney", "left kidney", 77, 6)
    assert (facts.proposal, facts.rank, facts.request.proposals, facts.model_id) == (row.index, 1, 4, "fake")
    assert facts.score == pytest.approx(row.score)
    assert facts.request.slices is None
    assert panel.said == "Accepted as Left kidney in CT segmentation."


def test_a_range_is_part_of_the_origin(panel: Opened, spin: Spin) -> None:
    node = panel.choose_volume()
    panel.propose(extent=Extent.RANGE, rangeStart=2, rangeStop=5, proposals=2)
    geometry, plan = plan_of(node)
    masks = nested_masks(geometry, 2)
    masks[:, :2] = masks[:, 5:] = False
    call = panel.client.reach_propose()
    for index in range(2, 5):
        call.event.emit(slice_event(masks, plan, index))
    call.event.emit(ranking_event(masks, geometry))
    accepted = panel.review.accept()
    facts = read_provenance(accepted.segmentation_node.GetSegmentation().GetSegment(accepted.segment_id))
    assert facts.request.slices == (2, 5)


def test_a_second_accept_goes_into_the_same_segmentation_and_leaves_the_first_alone(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 4)
    first = panel.proposals.selected.index
    panel.review.ui.acceptButton.click()
    press(panel.table, qt.Qt.Key_2)
    second = panel.proposals.selected.index
    panel.review.ui.acceptButton.click()
    segmentation = panel.parameters.targetSegmentation
    assert names(segmentation) == ["Liver", "Liver 2"]
    assert (masks[first] & masks[second]).any()
    assert np.array_equal(voxels(segmentation, "Liver"), masks[first])
    assert np.array_equal(voxels(segmentation, "Liver 2"), masks[second])


def test_replace_and_add_change_the_chosen_segment_only(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 4)
    indices = []
    for key in (qt.Qt.Key_1, qt.Qt.Key_2):
        press(panel.table, key)
        indices.append(panel.proposals.selected.index)
        panel.review.ui.acceptButton.click()
    segmentation = panel.parameters.targetSegmentation
    press(panel.table, qt.Qt.Key_3)
    third = panel.proposals.selected.index
    panel.review.ui.segmentComboBox.setCurrentIndex(0)
    choose(panel, "acceptModeComboBox", AcceptMode.REPLACE)
    panel.review.ui.acceptButton.click()
    assert np.array_equal(voxels(segmentation, "Liver"), masks[third])
    assert np.array_equal(voxels(segmentation, "Liver 2"), masks[indices[1]])
    assert panel.parameters.acceptMode is AcceptMode.NEW, "the next one is new again"
    panel.review.ui.segmentComboBox.setCurrentIndex(1)
    choose(panel, "acceptModeComboBox", AcceptMode.ADD)
    panel.review.ui.acceptButton.click()
    assert np.array_equal(voxels(segmentation, "Liver 2"), masks[indices[1]] | masks[third])
    assert np.array_equal(voxels(segmentation, "Liver"), masks[third])
    assert "Added to 1 earlier" in panel.review.ui.provenanceLabel.text


def test_neighbours_give_way_only_where_that_was_chosen_and_it_is_said(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 3)
    first = panel.proposals.selected.index
    panel.review.ui.acceptButton.click()
    press(panel.table, qt.Qt.Key_2)
    second = panel.proposals.selected.index
    choose(panel, "overwriteComboBox", Overwrite.ALL)
    panel.review.ui.acceptButton.click()
    segmentation = panel.parameters.targetSegmentation
    lost = int((masks[first] & masks[second]).sum())
    assert np.array_equal(voxels(segmentation, "Liver"), masks[first] & ~masks[second])
    assert f"lost {lost} voxels" in panel.said
    panel.review.ui.undoButton.click()
    assert np.array_equal(voxels(segmentation, "Liver"), masks[first])
    assert names(segmentation) == ["Liver"]


def test_undo_and_redo_one_step_per_accept(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 3)
    ui = panel.review.ui
    assert not ui.undoButton.enabled
    first = panel.proposals.selected.index
    ui.acceptButton.click()
    press(panel.table, qt.Qt.Key_2)
    ui.acceptButton.click()
    segmentation = panel.parameters.targetSegmentation
    press(panel.table, qt.Qt.Key_Z, qt.Qt.ControlModifier)
    assert names(segmentation) == ["Liver"]
    assert panel.said == "Undone: Accept liver"
    ui.undoButton.click()
    assert not panel.scene.IsNodePresent(segmentation)
    assert panel.parameters.targetSegmentation is None
    assert not ui.undoButton.enabled
    press(panel.table, qt.Qt.Key_Y, qt.Qt.ControlModifier)
    assert panel.scene.IsNodePresent(segmentation)
    assert np.array_equal(voxels(segmentation, "Liver"), masks[first])
    ui.redoButton.click()
    assert names(segmentation) == ["Liver", "Liver 2"]
    assert not ui.redoButton.enabled


def test_ctrl_z_in_the_prompt_belongs_to_the_prompt(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.ui.acceptButton.click()
    press(panel.prompt.ui.promptEdit, qt.Qt.Key_Z, qt.Qt.ControlModifier)
    assert names(panel.parameters.targetSegmentation) == ["Liver"]


@pytest.mark.slow
def test_an_ensemble_can_be_accepted(panel: Opened, spin: Spin) -> None:
    _node, masks = panel.run(spin, 5)
    panel.proposals._table.select_key("consensus")
    accepted = panel.review.accept()
    assert accepted is not None
    found = segment_array(accepted.segmentation_node, accepted.segment_id, GRID.shape_kji)
    assert np.array_equal(found, consensus(masks))
    facts = read_provenance(accepted.segmentation_node.GetSegmentation().GetSegment(accepted.segment_id))
    assert (facts.ensemble, facts.proposal) == ("consensus", -1)
    assert panel.review.ui.provenanceLabel.text.startswith("Consensus of all of 5")


def test_nothing_to_accept_is_said_and_the_button_is_off(panel: Opened) -> None:
    assert not panel.review.ui.acceptButton.enabled
    assert panel.review.accept() is None
    assert panel.said == "Select the proposal to accept."


def test_proposals_of_a_volume_that_was_moved_are_not_accepted(panel: Opened, spin: Spin) -> None:
    node, _masks = panel.run(spin)
    node.SetOrigin(1, 2, 3)
    assert panel.review.accept() is None
    assert panel.said == "CT was changed after these proposals were made; ask for them again."
    assert panel.parameters.targetSegmentation is None
    assert panel.titles(), "they stay to be looked at"


def test_replacing_without_a_segment_is_refused(panel: Opened, spin: Spin) -> None:
    panel.run(spin)
    choose(panel, "acceptModeComboBox", AcceptMode.REPLACE)
    assert panel.review.accept() is None
    assert "no segmentation to change" in panel.said
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")[1:], "only the proposals"


def test_the_proposals_cannot_be_chosen_as_a_place_to_accept_into(panel: Opened, spin: Spin) -> None:
    panel.run(spin)
    selector = panel.review.ui.segmentationSelector
    assert panel.session.proposals.node is not None
    assert selector.nodeCount() == 0
    own = panel.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "by hand")
    assert [selector.nodeFromIndex(place) for place in range(selector.nodeCount())] == [own]


def test_accepting_into_a_segmentation_that_was_there(panel: Opened, spin: Spin) -> None:
    node, masks = panel.run(spin)
    own = panel.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "by hand")
    own.SetReferenceImageGeometryParameterFromVolumeNode(node)
    panel.review.ui.segmentationSelector.setCurrentNode(own)
    accepted = panel.review.accept()
    assert accepted.segmentation_node is own
    assert np.array_equal(voxels(own, "Liver"), masks[panel.proposals.selected.index])


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
    index = panel.proposals.selected.index
    edited = masks[index].copy()
    edited[2:4] = False
    slicer.util.updateSegmentBinaryLabelmapFromArray(
        edited.astype(np.uint8), accepted.segmentation_node, accepted.segment_id, node
    )
    ui.editorSection.collapsed = True
    dice = 2 * edited.sum() / (edited.sum() + masks[index].sum())
    assert ui.provenanceLabel.text.endswith(f"Edited, Dice to the proposal {dice:.3f}")


def test_leaving_the_module_ends_editing(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 2)
    panel.review.accept()
    panel.review.edit()
    editing = panel.review._editing
    assert editing.active
    panel.panels.exit()
    assert not editing.active
    assert panel.review.ui.editorSection.collapsed


def test_the_editors_own_undo_does_not_step_over_an_accept(panel: Opened, spin: Spin) -> None:
    node, masks = panel.run(spin, 3)
    accepted = panel.review.accept()
    first = panel.proposals.selected.index
    segmentation = accepted.segmentation_node
    panel.review.edit()
    editor = panel.review.ui.segmentEditor
    editor.saveStateForUndo()
    edited = masks[first].copy()
    edited[2:4] = False
    slicer.util.updateSegmentBinaryLabelmapFromArray(edited.astype(np.uint8), segmentation, accepted.segment_id, node)
    press(panel.table, qt.Qt.Key_2)
    panel.review.accept()
    panel.review.edit()
    editor.undo()
    assert names(segmentation) == ["Liver"], "the accept is one step of the editor"
    assert np.array_equal(voxels(segmentation, "Liver"), edited), "and the edit before it another"


def test_nothing_to_edit_is_said(panel: Opened) -> None:
    panel.review.edit()
    assert "to edit" in panel.said
    assert panel.review.ui.editorSection.collapsed


def test_a_segment_that_is_removed_by_hand_leaves_the_box(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 2)
    accepted = panel.review.accept()
    assert panel.review.ui.segmentComboBox.count == 1
    accepted.segmentation_node.GetSegmentation().RemoveSegment(accepted.segment_id)
    assert panel.review.ui.segmentComboBox.count == 0
    assert panel.review.ui.provenanceLabel.isHidden()
    assert not panel.review.ui.editButton.enabled


def test_a_new_name_shows_in_the_box(panel: Opened, spin: Spin) -> None:
    panel.run(spin, 2)
    accepted = panel.review.accept()
    accepted.segmentation_node.GetSegmentation().GetSegment(accepted.segment_id).SetName("Leber")
    assert panel.review.ui.segmentComboBox.currentText == "Leber"


def proposing_on_two_frames(panel: Opened) -> tuple[Any, Any, np.ndarray]:
    """A run on all frames of a sequence of two: its volume, its browser, and two masks for the answers."""
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=GRID.shape_kji).astype(np.float32) for _frame in range(2)]
    node, browser = add_sequence(panel.scene, GRID, arrays)
    panel.prompt.ui.volumeSelector.setCurrentNode(node)
    panel.propose(proposals=2, frames=Frames.ALL)
    return node, browser, nested_masks(GRID, 2)


@pytest.mark.slow
def test_each_frame_gets_its_own_accepted_segment(panel: Opened, spin: Spin) -> None:
    node, browser, masks = proposing_on_two_frames(panel)
    for shift in range(2):
        panel.arrive(node, np.roll(masks, shift, axis=2))
        panel.client.finish()
    panel.settle(spin)
    accepted = panel.review.accept()
    index = panel.proposals.selected.index
    segmentation = accepted.segmentation_node
    assert np.array_equal(voxels(segmentation, "Liver"), masks[index])
    browser.SetSelectedItemNumber(1)
    panel.settle(spin)
    assert names(segmentation) == [], "the other frame has none yet"
    panel.review.accept()
    second = panel.proposals.selected.index
    assert np.array_equal(voxels(segmentation, "Liver"), np.roll(masks, 1, axis=2)[second])
    browser.SetSelectedItemNumber(0)
    assert np.array_equal(voxels(segmentation, "Liver"), masks[index])
    assert frames(node).browser.GetSequenceNode(segmentation) is not None


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


def test_undo_never_touches_another_frame(panel: Opened, spin: Spin) -> None:
    node, browser, masks = proposing_on_two_frames(panel)
    for _frame in range(2):
        panel.arrive(node, masks)
        panel.client.finish()
    panel.settle(spin)
    ui = panel.review.ui
    first = panel.proposals.selected.index
    segmentation = panel.review.accept().segmentation_node
    browser.SetSelectedItemNumber(1)
    panel.settle(spin)
    press(panel.table, qt.Qt.Key_2)
    second = panel.proposals.selected.index
    panel.review.accept()
    browser.SetSelectedItemNumber(0)
    panel.settle(spin)
    ui.undoButton.click()
    assert browser.GetSelectedItemNumber() == 1, "the frame of the step is shown"
    assert names(segmentation) == []
    browser.SetSelectedItemNumber(0)
    assert np.array_equal(voxels(segmentation, "Liver"), masks[first])
    ui.redoButton.click()
    assert browser.GetSelectedItemNumber() == 1
    assert np.array_equal(voxels(segmentation, "Liver"), masks[second])
    ui.undoButton.click()
    ui.undoButton.click()
    assert not panel.scene.IsNodePresent(segmentation)
    assert panel.parameters.targetSegmentation is None
    panel.review.accept()
    assert names(panel.parameters.targetSegmentation) == ["Liver"]
