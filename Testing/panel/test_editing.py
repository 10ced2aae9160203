"""Editing accepted segments: the Segment Editor is made ready, and provenance follows what is done there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .accept_support import (
    LIVER,
    SPLEEN,
    A,
    B,
    ManualTimer,
    add_segments,
    add_volume,
    crop_of,
    facts,
    paint,
    save_and_load_scene,
    tag,
    timer_into,
    voxel_counts,
)

slicer = pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")

DICE = 2 * A.sum() / (A.sum() + (A | B).sum())


def told(node: Any, identifier: str) -> tuple[bool, float | None]:
    from ProGiDiffSlicerLib.scene.provenance import read_provenance

    read = read_provenance(node.GetSegmentation().GetSegment(identifier))
    return read.edited, read.dice_to_proposal


def test_tags_follow_a_moment_after_an_edit(acceptance: Any, timers: list[ManualTimer], volume: Any) -> None:
    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node, identifier = done.segmentation_node, done.segment_id
    (timer,) = timers
    timer.callback()
    assert told(node, identifier) == (False, 1.0)
    assert not timer.running
    paint(node, identifier, volume, B)
    assert timer.running
    timer.callback()
    assert not timer.running
    assert told(node, identifier) == (True, pytest.approx(DICE))


def test_undo_of_an_edit_makes_it_unedited_again(acceptance: Any, volume: Any) -> None:
    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node, identifier = done.segmentation_node, done.segment_id
    paint(node, identifier, volume, B)
    acceptance.tracker.update_all()
    assert told(node, identifier)[0]
    assert acceptance.undo.undo() == "Changes by hand"
    acceptance.tracker.update_all()
    assert told(node, identifier) == (False, 1.0)
    acceptance.undo.redo()
    acceptance.tracker.update_all()
    assert told(node, identifier) == (True, pytest.approx(DICE))


def test_bringing_tags_up_to_date_is_no_step_of_undo(scene: Any, acceptance: Any, volume: Any) -> None:
    node = add_segments(scene, volume, {"mine": A})
    acceptance.accept(crop_of(B), volume, LIVER, facts(), node, "add", "mine")
    segment = node.GetSegmentation().GetSegment("mine")
    segment.SetTag("ProGiDiff.edited", "1")
    segment.SetTag("ProGiDiff.dice", "0.5")
    assert acceptance.undo.undo() == "Add liver"


def test_each_segment_is_compared_with_its_own_mask(acceptance: Any, volume: Any) -> None:
    first = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node = first.segmentation_node
    second = acceptance.accept(crop_of(B), volume, SPLEEN, facts(target="spleen"), node)
    paint(node, first.segment_id, volume, B)
    acceptance.tracker.update_all()
    assert told(node, first.segment_id) == (True, pytest.approx(DICE))
    assert told(node, second.segment_id) == (False, 1.0)
    # A replaced segment starts anew, also when the edit before it was never looked at.
    paint(node, second.segment_id, volume, A)
    acceptance.accept(crop_of(A), volume, SPLEEN, facts(), node, "replace", second.segment_id)
    acceptance.tracker.update_all()
    assert told(node, second.segment_id) == (False, 1.0)


@pytest.mark.parametrize("saved_before", [False, True])
def test_saving_the_scene_brings_tags_up_to_date_first(
    scene: Any, acceptance: Any, saved_before: bool, tmp_path: Path, volume: Any
) -> None:
    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node, identifier = done.segmentation_node, done.segment_id
    if saved_before:
        scene.SetURL(str(tmp_path / "first.mrb"))
        scene.SetRootDirectory(str(tmp_path))
        assert scene.WriteToMRB(str(tmp_path / "first.mrb"))
    paint(node, identifier, volume, B)
    assert told(node, identifier) == (False, 1.0)  # nobody has looked yet
    save_and_load_scene(scene, tmp_path / "second.mrb")
    loaded = scene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    assert told(loaded, identifier) == (True, pytest.approx(DICE))


def test_an_announced_save_and_a_file_name_do_so_too(scene: Any, acceptance: Any, tmp_path: Path, volume: Any) -> None:
    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node, identifier = done.segmentation_node, done.segment_id
    paint(node, identifier, volume, B)
    scene.StartState(scene.SaveState)
    assert told(node, identifier) == (True, pytest.approx(DICE))
    scene.EndState(scene.SaveState)
    node.AddDefaultStorageNode()
    paint(node, identifier, volume, np.ones_like(A))
    node.GetStorageNode().SetFileName(str(tmp_path / "a.seg.nrrd"))
    assert told(node, identifier) == (True, pytest.approx(2 * A.sum() / (A.sum() + A.size)))


def test_an_edit_after_loading_is_noticed_though_the_proposal_is_gone(
    scene: Any, acceptance: Any, tmp_path: Path, volume: Any
) -> None:
    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    save_and_load_scene(scene, tmp_path / "a.mrb")
    volume = scene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    node = scene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    acceptance.tracker.update(node, done.segment_id)
    assert told(node, done.segment_id) == (False, 1.0)
    paint(node, done.segment_id, volume, B)
    acceptance.tracker.update_all()
    assert told(node, done.segment_id) == (True, None)


def test_cleanup_updates_a_last_time_and_leaves_nothing_behind(
    scene: Any, acceptance: Any, volume: Any, timers: list[ManualTimer]
) -> None:
    acceptance.cleanup()
    node = add_segments(scene, volume, {"mine": A})
    node.AddDefaultStorageNode()
    watched = (
        (scene, (scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.StartSaveEvent, scene.EndCloseEvent)),
        (node, (slicer.vtkSegmentation.SourceRepresentationModified, slicer.vtkMRMLNode.ReferenceAddedEvent)),
        (node.GetStorageNode(), ("ModifiedEvent",)),
    )

    def count() -> list[bool]:
        return [held.HasObserver(event) for held, events in watched for event in events]

    before = count()
    made = type(acceptance)(scene, tracker=type(acceptance.tracker)(scene, timer_into(timers)))
    made.accept(crop_of(A), volume, LIVER, facts(), node, "replace", "mine")
    paint(node, "mine", volume, B)
    assert count() != before
    made.cleanup()
    assert told(node, "mine") == (True, pytest.approx(DICE))
    assert count() == before
    assert not timers[-1].running
    paint(node, "mine", volume, np.ones_like(A))
    assert not timers[-1].running


@pytest.mark.parametrize("overwrite", ["none", "visible", "all"])
def test_the_segment_editor_is_made_ready(scene: Any, acceptance: Any, overwrite: str, volume: Any) -> None:
    from ProGiDiffSlicerLib.scene.editing import begin_edit

    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node = done.segmentation_node
    session = begin_edit(node, done.segment_id, volume, None, overwrite)
    editor = session.editor_node
    assert editor.GetSegmentationNode() is node
    assert editor.GetSourceVolumeNode() is volume
    assert editor.GetSelectedSegmentID() == done.segment_id
    assert editor.GetMaskMode() == slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere
    expected = {"none": editor.OverwriteNone, "visible": editor.OverwriteVisibleSegments, "all": editor.OverwriteAllSegments}
    assert editor.GetOverwriteMode() == expected[overwrite]
    again = begin_edit(node, done.segment_id, volume, None, overwrite)
    assert again.editor_node is editor
    assert scene.GetNodesByClass("vtkMRMLSegmentEditorNode").GetNumberOfItems() == 1


@pytest.mark.usefixtures("slicer_version")
def test_the_editor_does_not_go_on_with_the_effect_of_another_day(scene: Any, acceptance: Any) -> None:
    """A scene that was saved while somebody painted brings the effect; there may be no segmentation for it any more."""
    from ProGiDiffSlicerLib.scene.editing import EDITOR_TAG, begin_edit

    volume, other = add_volume(scene), add_volume(scene, name="other")
    node = add_segments(scene, volume, {"first": A, "second": B & ~A})
    saved = slicer.vtkMRMLSegmentEditorNode()
    saved.SetSingletonTag(EDITOR_TAG)
    saved.SetActiveEffectName("Paint")
    scene.AddNode(saved)
    editor = slicer.qMRMLSegmentEditorWidget()
    editor.setMRMLScene(scene)
    for segment_id in ("second", "first", "second"):
        session = begin_edit(node, segment_id, other, editor)
        assert editor.activeEffect() is None
        assert (editor.segmentationNode(), editor.sourceVolumeNode()) == (node, other)
        assert editor.currentSegmentID() == segment_id
        editor.setActiveEffectByName("Erase")
        session.end()
        assert editor.activeEffect() is None


def test_painting_with_slicers_own_logic_obeys_the_policy(scene: Any, acceptance: Any, volume: Any) -> None:
    """The prepared node in the real editor logic: neighbours stay as they are, its undo works beside ours."""
    if not hasattr(slicer, "vtkSlicerSegmentEditorLogic"):
        pytest.skip("this Slicer has no segment editor logic outside its widget")
    from ProGiDiffSlicerLib.scene.editing import begin_edit
    from ProGiDiffSlicerLib.scene.labelmaps import labelmap_of, volume_grid

    node = add_segments(scene, volume, {"mine": A, "other": B & ~A})
    acceptance.accept(crop_of(A), volume, LIVER, facts(), node, "replace", "mine")
    counts = voxel_counts(node, volume)
    session = begin_edit(node, "mine", volume, None, "none")
    logic = slicer.vtkSlicerSegmentEditorLogic()
    logic.SetMRMLScene(scene)
    logic.SetSegmentEditorNode(session.editor_node)
    assert logic.SaveStateForUndo()
    image = labelmap_of(B, (0, 0, 0), volume_grid(volume))
    logic.ModifySegmentByLabelmap(node, "mine", image, logic.ModificationModeAdd, False, False)
    assert voxel_counts(node, volume) == {"mine": (A | B).sum(), "other": counts["other"]}
    acceptance.tracker.update_all()
    assert told(node, "mine") == (True, pytest.approx(DICE))
    logic.Undo()
    assert voxel_counts(node, volume) == counts
    acceptance.tracker.update_all()
    assert told(node, "mine") == (False, 1.0)
    logic.SetSegmentEditorNode(None)


def test_tags_of_segments_that_were_not_accepted_stay_untouched(scene: Any, acceptance: Any, volume: Any) -> None:
    node = add_segments(scene, volume, {"mine": A})
    paint(node, "mine", volume, B)
    acceptance.tracker.update_all()
    assert acceptance.tracker.update(node, "mine") is None
    assert acceptance.tracker.update(node, "gone") is None
    assert tag(node.GetSegmentation().GetSegment("mine"), "ProGiDiff.edited") is None


def test_with_the_applications_timer_and_editor(app: Any, scene: Any, spin: Any, volume: Any) -> None:
    """The widget that the panel embeds, and the timer that the product uses."""
    from ProGiDiffSlicerLib.scene.accept import Acceptance
    from ProGiDiffSlicerLib.scene.editing import begin_edit

    editor = slicer.qMRMLSegmentEditorWidget()
    editor.setMRMLScene(scene)
    acceptance = Acceptance(scene, save_editor_state=editor.saveStateForUndo)
    done = acceptance.accept(crop_of(A), volume, LIVER, facts())
    node, identifier = done.segmentation_node, done.segment_id
    session = begin_edit(node, identifier, volume, editor, ended=acceptance.tracker.update_all)
    assert editor.segmentationNode() is node
    assert editor.sourceVolumeNode() is volume
    assert editor.currentSegmentID() == identifier
    editor.saveStateForUndo()
    paint(node, identifier, volume, B)
    spin(lambda: told(node, identifier)[0], timeout_s=20)
    assert told(node, identifier) == (True, pytest.approx(DICE))
    # An accept in between is a state of the editor's own undo as well.
    acceptance.accept(crop_of(B), volume, SPLEEN, facts(), node)
    editor.undo()
    assert voxel_counts(node, volume) == {identifier: (A | B).sum()}
    editor.undo()
    assert voxel_counts(node, volume) == {identifier: A.sum()}
    session.end()
    assert told(node, identifier) == (False, 1.0)
    assert not session.active
    session.end()
    editor.setMRMLSegmentEditorNode(None)
    editor.setMRMLScene(None)
    acceptance.cleanup()
