"""Saving accepted segments as training examples, through the panel: what arrives in the set, and what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qt
import slicer

from progidiff.volumes.geometry import Geometry
from ProGiDiffSlicerLib.scene.volumes import Extent, frames

from ..proposal_examples import ranking_event, slice_event
from ..volume_examples import oblique, oblique_rotation, oriented
from .curating_support import Saver, Spin, draw, everything_in, only
from .panel_support import GRID, Opened, nested_masks, opened, press
from .session_support import add_sequence, add_transform, add_volume, plan_of

PATIENT, PATIENT_ID, VOLUME = "Müller^Hans", "PAT-4711-ü", "Müller Hans CT Abdomen"


@pytest.fixture
def panel(scene: Any) -> Iterator[Opened]:
    with opened(scene) as panels:
        yield panels


@pytest.fixture
def saver(panel: Opened, spin: Spin, tmp_path: Path) -> Saver:
    return Saver(panel.panels, spin, tmp_path / "Beispiele é 肝")


def values_of(geometry: Geometry, dtype: str) -> np.ndarray:
    """Values without any symmetry, with fractions where the type has any."""
    values = np.random.default_rng(3).normal(100, 400, geometry.shape_kji)
    return values.astype(dtype)


def patient_of(node: Any, name: str = PATIENT, identifier: str = PATIENT_ID) -> None:
    """Put a volume under a patient of the subject hierarchy, as the DICOM module does."""
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(node.GetScene())
    constants = slicer.vtkMRMLSubjectHierarchyConstants
    item = tree.GetItemByDataNode(node) or tree.CreateItem(tree.GetSceneItemID(), node)
    patient = tree.CreateHierarchyItem(tree.GetSceneItemID(), name, constants.GetDICOMLevelPatient())
    tree.SetItemAttribute(patient, constants.GetDICOMPatientIDAttributeName(), identifier)
    study = tree.CreateHierarchyItem(patient, f"{name} study", constants.GetDICOMLevelStudy())
    tree.SetItemParent(item, study)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "modality", "dtype", "moved"),
    [
        pytest.param(GRID, "CT", "int16", False, id="CT"),
        pytest.param(oblique((13, 11, 7)), "MR", "float32", False, id="oblique MR"),
        pytest.param(oriented("PSR", (9, 12, 10), (0.8, 0.9, 3.0)), "MR", "uint16", False, id="PSR MR"),
        pytest.param(oblique((13, 11, 7)), "CT", "int16", True, id="CT under a transform"),
    ],
)
def test_what_is_saved_is_what_is_there(
    panel: Opened, saver: Saver, spin: Spin, geometry: Geometry, modality: str, dtype: str, moved: bool
) -> None:
    values = values_of(geometry, dtype)
    node = add_volume(panel.scene, geometry, VOLUME, values)
    node.SetAttribute("DICOM.Modality", modality)
    patient_of(node)
    world = np.eye(4)
    if moved:
        world[:3, :3], world[:3, 3] = oblique_rotation().T, (7.0, -3.5, 12.25)
        node.SetAndObserveTransformNodeID(add_transform(panel.scene, world).GetID())
    panel.prompt.ui.volumeSelector.setCurrentNode(node)
    _node, masks = panel.run(spin, 4, prompt="left kidney", seed=77, seedLocked=True)
    row = panel.proposals.selected
    accepted = panel.review.accept()
    mask = masks[row.index].copy()
    mask[2:4, 3:6] = False
    panel.review.ui.editButton.click()
    draw(accepted.segmentation_node, accepted.segment_id, node, mask)
    assert saver.save().startswith(f"Saved as training example: left kidney of {VOLUME}, slices 1 to ")

    case, image, affine, saved = only(saver.cases)
    assert image.dtype == values.dtype
    assert np.array_equal(image, values)
    assert np.array_equal(saved, mask)
    assert saved.any()
    np.testing.assert_allclose(affine, world @ geometry.affine, rtol=1e-5, atol=1e-3)
    dice = 2 * mask.sum() / (mask.sum() + masks[row.index].sum())
    assert (list(case.targets), case.modality, case.plane) == (["left kidney"], modality, plan_of(node)[1].plane)
    facts = case.facts
    assert (facts["prompt"], facts["edited"], facts["model_id"]) == ("left kidney", True, "fake")
    assert facts["dice_to_proposal"] == pytest.approx(dice)
    assert facts["proposal"]["seed"] == 77
    assert facts["proposal"]["index"] == row.index
    assert (facts["proposal"]["rank"], facts["proposal"]["proposals"]) == (row.rank, 4)
    assert facts["code"]["type"]["meaning"] == "Kidney"
    assert facts["code"]["modifier"]["meaning"] == "Left"
    assert saver.shown == f"left kidney 1; {modality}"
    assert panel.review.ui.editorSection.collapsed, "editing has ended"

    written = everything_in(saver.folder)
    for text in (VOLUME, PATIENT, PATIENT_ID, "Müller", "Hans", "4711", node.GetID()):
        for encoding in ("utf-8", "utf-16-le", "latin-1", "unicode-escape"):
            assert text.encode(encoding) not in written, text
    assert b"left kidney" in written


@pytest.mark.slow
def test_only_the_slices_that_were_worked_on(panel: Opened, saver: Saver) -> None:
    node = panel.choose_volume()
    panel.propose(extent=Extent.RANGE, rangeStart=2, rangeStop=5, proposals=2)
    geometry, plan = plan_of(node)
    masks = nested_masks(geometry, 2)
    masks[:, :2] = masks[:, 4:] = False
    call = panel.client.reach_propose()
    for index in range(2, 5):
        call.event.emit(slice_event(masks, plan, index))
    call.event.emit(ranking_event(masks, geometry))
    panel.review.accept()
    mask = masks[panel.proposals.selected.index]
    values = slicer.util.arrayFromVolume(node)
    for choice, first, stop in (
        ("Slices that were proposed for", 2, 5),
        ("Slices of the segment and 2 around it", 0, 6),
        ("Whole volume", 0, 8),
    ):
        saver.choose("exampleSlicesComboBox", choice)
        assert f"slices {first + 1} to {stop}" in saver.save()
        _case, image, affine, saved = only(saver.cases)
        assert np.array_equal(image, values[first:stop])
        assert np.array_equal(saved, mask[first:stop])
        np.testing.assert_allclose(affine @ [0, 0, 0, 1], geometry.affine @ [0, 0, first, 1], atol=1e-3)


@pytest.mark.slow
def test_slices_that_were_added_by_hand_are_never_cut_off(panel: Opened, saver: Saver) -> None:
    test_only_the_slices_that_were_worked_on(panel, saver)
    parameters = panel.parameters
    mask = np.zeros(GRID.shape_kji, bool)
    mask[3:8, 4:6, 4:9] = True
    draw(parameters.targetSegmentation, parameters.targetSegment, parameters.inputVolume, mask)
    saver.choose("exampleSlicesComboBox", "Slices that were proposed for")
    assert "slices 3 to 8" in saver.save()
    assert np.array_equal(only(saver.cases)[3], mask[2:])


@pytest.mark.slow
def test_saving_again_replaces_and_undo_brings_back(panel: Opened, saver: Saver, spin: Spin) -> None:
    node, masks = panel.run(spin, 3)
    accepted = panel.review.accept()
    first = masks[panel.proposals.selected.index]
    saver.save()
    assert not only(saver.cases)[0].facts["edited"]
    identifier = only(saver.cases)[0].id
    smaller = first.copy()
    smaller[:4] = False
    draw(accepted.segmentation_node, accepted.segment_id, node, smaller)
    assert "takes the place of what was saved before" in saver.save()
    case, _image, _affine, saved = only(saver.cases)
    assert case.id != identifier
    assert case.facts["edited"]
    assert np.array_equal(saved, smaller)
    assert saver.shown == "liver 1; CT"

    assert "What was saved before is back" in saver.undo()
    assert only(saver.cases)[0].id == identifier
    assert np.array_equal(only(saver.cases)[3], first)
    # It is the one before that the next save replaces.
    saver.save()
    assert only(saver.cases)[0].id not in (identifier, case.id)
    saver.undo()
    saver.undo()
    assert saver.cases == []
    assert saver.shown == "No training examples yet."
    assert not saver.ui.undoSaveButton.enabled


@pytest.mark.slow
def test_two_segments_are_two_cases_and_are_counted(panel: Opened, saver: Saver, spin: Spin) -> None:
    _node, masks = panel.run(spin, 4, prompt="liver; spleen")
    indices = [panel.proposals.selected.index]
    panel.review.accept()
    assert saver.save().startswith("Saved")
    panel.proposals.ui.targetComboBox.setCurrentIndex(1)
    press(panel.table, qt.Qt.Key_2)
    indices.append(panel.proposals.selected.index)
    panel.review.accept()
    assert saver.ui.exampleTargetComboBox.currentText == "spleen"
    saver.save()
    assert saver.shown == "liver 1, spleen 1; CT"
    read = {case.targets[0]: case.read() for case in saver.cases}
    assert np.array_equal(read["liver"][2]["liver"], masks[indices[0]])
    assert np.array_equal(read["spleen"][2]["spleen"], masks[indices[1]])
    assert (masks[indices[0]] & masks[indices[1]]).any(), "they overlap, and neither lost anything"
    assert len({case.volume_key for case in saver.cases}) == 1


@pytest.mark.slow
def test_all_accepted_segments_at_once(panel: Opened, saver: Saver, spin: Spin) -> None:
    node, _masks = panel.run(spin, 4, prompt="liver; spleen")
    panel.review.accept()
    panel.proposals.ui.targetComboBox.setCurrentIndex(1)
    accepted = panel.review.accept()
    own = accepted.segmentation_node.GetSegmentation().AddEmptySegment("own", "mine")
    draw(accepted.segmentation_node, own, node, np.ones(GRID.shape_kji, bool))
    saver.ui.allSegmentsCheckBox.setChecked(True)
    assert saver.save() == "Saved as 2 training examples: liver, spleen."
    assert saver.shown == "liver 1, spleen 1; CT"
    assert saver.undo() == "No longer a training example: liver, spleen."
    assert saver.cases == []


def test_a_segment_that_was_drawn_by_hand_needs_a_target(panel: Opened, saver: Saver, spin: Spin) -> None:
    node = panel.choose_volume()
    segmentation = panel.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "by hand")
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(node)
    identifier = segmentation.GetSegmentation().AddEmptySegment("Segment_1", "Segment_1")
    mask = nested_masks(GRID, 3)[1]
    mask[:3] = mask[6:] = False
    draw(segmentation, identifier, node, mask)
    panel.review.ui.segmentationSelector.setCurrentNode(segmentation)
    spin()
    assert saver.ui.exampleTargetComboBox.currentText == ""
    assert "Choose under Target what Segment_1 shows" in saver.save()
    saver.choose("exampleTargetComboBox", "spleen")
    assert saver.save().endswith("It was drawn by hand and comes from no proposal.")
    case, image, _affine, saved = only(saver.cases)
    facts = case.facts
    assert list(case.targets) == ["spleen"]
    assert (facts["prompt"], facts["proposal"], facts["dice_to_proposal"]) == ("", None, None)
    assert image.shape[0] == mask.any(axis=(1, 2)).sum() + 4
    assert np.array_equal(saved, mask[1:8])
    # A code says it too.
    terminology = slicer.vtkSegment.GetTerminologyEntryTagName()
    from progidiff.targets import target_for

    segmentation.GetSegmentation().GetSegment(identifier).SetTag(terminology, target_for("pancreas").terminology_entry)
    spin()
    assert saver.ui.exampleTargetComboBox.currentText == "pancreas"


def test_what_cannot_be_saved_is_said_and_changes_nothing(panel: Opened, saver: Saver, spin: Spin) -> None:
    assert not saver.ui.saveExampleButton.enabled
    node, masks = panel.run(spin, 3)
    accepted = panel.review.accept()
    segmentation, identifier = accepted.segmentation_node, accepted.segment_id
    kept = masks[panel.proposals.selected.index]
    draw(segmentation, identifier, node, np.zeros_like(kept))
    assert "Liver is empty" in saver.save()
    draw(segmentation, identifier, node, kept)
    spacing = node.GetSpacing()
    node.SetSpacing(spacing[0] * 1.1, *spacing[1:])
    assert "are not those of CT" in saver.save()
    node.SetSpacing(*spacing)
    saver.ui.examplesFolderEdit.setCurrentPath("")
    assert "Choose the folder" in saver.save()
    saver.ui.examplesFolderEdit.setCurrentPath(str(saver.folder))
    panel.scene.RemoveNode(node)
    spin()
    assert "is not in the scene" in saver.save()
    assert not saver.folder.exists()
    assert np.array_equal(slicer.util.arrayFromSegmentInternalBinaryLabelmap(segmentation, identifier).sum(), kept.sum())


def test_a_volume_that_lost_slices_is_refused(panel: Opened, saver: Saver, spin: Spin) -> None:
    node, _masks = panel.run(spin, 3)
    panel.review.accept()
    slicer.util.updateVolumeFromArray(node, slicer.util.arrayFromVolume(node)[:4].copy())
    assert "reaches outside CT" in saver.save()
    assert not saver.folder.exists()


def test_each_segment_belongs_to_the_volume_for_which_it_was_accepted(panel: Opened, saver: Saver, spin: Spin) -> None:
    """Two volumes on one grid, one segmentation for both, and the other volume chosen when the segment is saved."""
    first, _masks = panel.run(spin, 3)
    panel.review.accept()
    second = add_volume(panel.scene, GRID, "second", values_of(GRID, "int16"))
    panel.prompt.ui.volumeSelector.setCurrentNode(second)
    spin()
    saver.save()
    assert np.array_equal(only(saver.cases)[1], slicer.util.arrayFromVolume(first))


@pytest.mark.slow
def test_frames_belong_together_and_only_the_shown_one_is_saved(panel: Opened, saver: Saver, spin: Spin) -> None:
    arrays = [values_of(GRID, "int16") + 10 * number for number in range(2)]
    node, browser = add_sequence(panel.scene, GRID, arrays)
    panel.prompt.ui.volumeSelector.setCurrentNode(node)
    keys = set()
    for number in range(2):
        browser.SetSelectedItemNumber(number)
        panel.run(spin, 2)
        accepted = panel.review.accept()
        assert f"heart sequence, frame {number + 1}" in saver.save()
        case, image, _affine, _mask = only(saver.cases)
        assert np.array_equal(image, arrays[number])
        keys.add(case.volume_key)
        saver.undo()
    assert len(keys) == 1
    # A segmentation that stays the same in all frames does not say to which frame it belongs.
    playing = frames(node)
    playing.browser.RemoveSynchronizedSequenceNode(playing.browser.GetSequenceNode(accepted.segmentation_node).GetID())
    assert "the frame of Liver is not known" in saver.save()


@pytest.mark.slow
def test_patients_are_known_again_and_nobody_else_can_tell(panel: Opened, saver: Saver, spin: Spin) -> None:
    keys = []
    for number, patient in enumerate((PATIENT_ID, PATIENT_ID, "other", None)):
        geometry = Geometry((8, 7, 5 + number), GRID.affine)
        node = add_volume(panel.scene, geometry, f"v{number}")
        if patient is not None:
            patient_of(node, identifier=patient)
        panel.parameters.targetSegmentation = None
        panel.prompt.ui.volumeSelector.setCurrentNode(node)
        panel.run(spin, 2)
        panel.review.accept()
        saver.save()
        keys.append(only(saver.cases)[0].patient_key)
        saver.undo()
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] is None
    assert len(keys[0]) >= 16
    assert panel.services.settings.annotatorSecret.encode() not in everything_in(saver.folder)
    assert panel.services.settings.annotatorId.encode() in everything_in(saver.folder)
