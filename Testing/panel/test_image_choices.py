"""How a volume is cut and its values are taken: shown, changed, warned about, and kept with what is accepted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.volumes.slicing import plan_slices
from progidiff.wire.messages import Loaded, WarningEvent
from ProGiDiffSlicerLib.panels.review import describe_segment
from ProGiDiffSlicerLib.parameters import Plane
from ProGiDiffSlicerLib.scene.provenance import read_provenance
from ProGiDiffSlicerLib.scene.volumes import Extent

from ..proposal_examples import ranking_event, slice_event
from ..volume_examples import oriented
from .curating_support import Saver, only
from .panel_support import Opened, nested_masks
from .session_support import add_volume
from .setup_examples import CARD

Spin = Callable[..., None]
#: Slices closer together than pixels are large, as usual for CT.
THIN = oriented("LPS", (14, 12, 8), (0.8, 0.8, 0.6))
CORONAL = oriented("LPS", (14, 12, 8), (0.8, 4.0, 0.8))


def choose_plane(panel: Opened, plane: Plane) -> None:
    panel.prompt.ui.planeComboBox.setCurrentIndex(list(Plane).index(plane))


def sent(panel: Opened) -> tuple[Any, ...]:
    """What the worker was last sent with a volume: modality, plane, whether values are corrected."""
    return next(values[2:] for call, values in reversed(panel.client.calls) if call.kind == "set_image")


def arrive(panel: Opened, geometry: Any, plane: str, count: int = 3) -> np.ndarray:
    """The whole run on slices of a plane; the masks."""
    plan, masks = plan_slices(geometry, plane), nested_masks(geometry, count)
    call = panel.client.reach_propose()
    wanted = panel.client.values[0].slices or (0, plan.count)
    for index in range(*wanted):
        call.event.emit(slice_event(masks, plan, index))
    call.event.emit(ranking_event(masks, geometry))
    panel.client.finish()
    return masks


# -- the plane --


def test_a_thin_slice_ct_is_cut_axially_unasked_and_that_is_shown(panel: Opened) -> None:
    panel.choose_volume(THIN)
    assert panel.parameters.plane is Plane.AUTOMATIC
    assert panel.prompt.ui.planeNote.text == "Axial, 8 slices"
    panel.propose()
    panel.client.reach_propose()
    assert sent(panel)[1] == "axial"


def knows(panel: Opened, *planes: str) -> None:
    """A model of such slices is loaded."""
    panel.client.loaded = Loaded("other", ("liver",), "cpu", {**CARD, "planes": list(planes)})
    panel.client.loaded_from = (None, panel.services.settings.device)
    panel.panels.enter()


def test_another_plane_can_be_chosen_and_is_kept_with_the_scene(panel: Opened, spin: Spin) -> None:
    panel.choose_volume(THIN)
    knows(panel, "axial")
    panel.prompt.ui.extentComboBox.setCurrentIndex(list(Extent).index(Extent.RANGE))
    assert panel.prompt.ui.rangeWidget.maximum == 8
    choose_plane(panel, Plane.CORONAL)
    assert panel.prompt.ui.planeNote.text == "Coronal, 12 slices; the model was not trained on such slices"
    assert panel.prompt.ui.rangeWidget.maximum == 12
    panel.prompt.ui.rangeWidget.setValues(3, 9)
    panel.propose(proposals=3)
    masks = arrive(panel, THIN, "coronal")
    panel.settle(spin)
    assert sent(panel)[1] == "coronal"
    assert panel.session.store.plan.plane == "coronal"
    row = panel.proposals.selected
    panel.review.ui.acceptButton.click()
    segment = panel.review.ui.segmentationSelector.currentNode().GetSegmentation().GetNthSegment(0)
    facts = read_provenance(segment)
    assert facts is not None
    assert (facts.plane, facts.request.slices, facts.corrected) == ("coronal", (2, 9), False)
    assert ", coronal, slices 3-9" in describe_segment(segment)
    kept = panel.session.store["liver"].mask(row.index)
    assert kept.array.sum() == masks[row.index][:, 2:9].sum()

    again = type(panel.parameters)(panel.parameters.parameterNode)
    choose_plane(panel, Plane.AUTOMATIC)
    again.plane = Plane.SAGITTAL
    panel.panels.connectGui(type(panel.parameters)(panel.parameters.parameterNode))
    assert panel.prompt.ui.planeComboBox.currentText == "Sagittal"
    assert panel.prompt.ui.planeNote.text.startswith("Sagittal, 14 slices")


def test_a_volume_that_was_clearly_acquired_otherwise_keeps_its_plane(panel: Opened) -> None:
    panel.choose_volume(CORONAL)
    knows(panel, "axial")
    assert panel.prompt.ui.planeNote.text == "Coronal, 12 slices; the model was not trained on such slices"
    choose_plane(panel, Plane.AXIAL)
    assert panel.prompt.ui.planeNote.text == "Axial, 8 slices"
    panel.propose()
    panel.client.reach_propose()
    assert sent(panel)[1] == "axial"


def test_a_model_that_knows_other_planes_gets_them(panel: Opened) -> None:
    panel.choose_volume(THIN)
    knows(panel, "coronal")
    assert panel.prompt.ui.planeNote.text == "Coronal, 12 slices"
    panel.propose()
    panel.client.answer_image()
    assert sent(panel)[1] == "coronal"


def test_a_whole_volume_follows_a_model_that_only_its_worker_knows(panel: Opened, tmp_path: Path) -> None:
    """Until it is loaded nobody here knows its planes; a range is one of the plane in which it was chosen."""
    panel.services.settings.modelFolder = str(tmp_path / "on another computer")
    for extent, expected in ((Extent.VOLUME, "coronal"), (Extent.RANGE, "axial")):
        panel.client.loaded = panel.client.loaded_from = None
        panel.choose_volume(THIN)
        panel.propose(extent=extent, rangeStart=1, rangeStop=4)
        assert panel.client.call.kind == "load"
        panel.client.loaded, panel.client.loaded_from = (
            Loaded("far", ("liver",), "cpu", {**CARD, "planes": ["coronal"]}),
            panel.client.values,
        )
        panel.client.call.succeed(panel.client.loaded)
        panel.client.answer_image()
        assert sent(panel)[1] == expected
        panel.session.forget()


@pytest.mark.slow
def test_an_example_keeps_the_plane_of_its_proposal(panel: Opened, spin: Spin, tmp_path: Path) -> None:
    panel.choose_volume(THIN)
    choose_plane(panel, Plane.CORONAL)
    panel.propose(proposals=3, extent=Extent.RANGE, rangeStart=2, rangeStop=9)
    arrive(panel, THIN, "coronal")
    panel.settle(spin)
    panel.review.ui.acceptButton.click()
    choose_plane(panel, Plane.AUTOMATIC)
    saver = Saver(panel.panels, spin, tmp_path / "set")
    assert "slices 3 to 9" in saver.save()
    case, image, _affine, _mask = only(saver.cases)
    assert case.plane == "coronal"
    assert image.shape == (8, 7, 14)
    assert case.facts["proposal"]["plane"] == "coronal"


# -- warnings --


def test_all_warnings_are_shown_the_most_important_first(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose()
    call = panel.client.reach_propose()
    for code, message in (("modality", "Said by the worker."), ("values", "Odd values."), ("plane", "Strange slices.")):
        call.event.emit(WarningEvent(code, message))
    call.event.emit(WarningEvent("empty", "liver: all empty."))
    call.event.emit(WarningEvent("plane", "Strange slices."))
    lines = panel.said.splitlines()
    assert lines == ["Strange slices.", "Odd values.", "Said by the worker.", "liver: all empty."]
    panel.prompt.ui.proposeButton.click()
    panel.client.confirm_cancel()
    assert panel.said.splitlines() == ["Cancelled. What had arrived is kept below.", *lines], "they stay"
    panel.propose()
    assert "Strange" not in panel.said, "those of the run before are gone"


def test_the_warnings_of_many_frames_do_not_fill_the_panel(panel: Opened) -> None:
    panel.choose_volume()
    panel.propose()
    call = panel.client.reach_propose()
    for number in range(20):
        call.event.emit(WarningEvent("empty", f"warning {number}"))
    call.event.emit(WarningEvent("plane", "Strange slices."))
    lines = panel.said.splitlines()
    assert len(lines) == 6
    assert lines[0] == "Strange slices."
    assert lines[-1].startswith("16 more")
    assert panel.panels.ui.statusLabel.toolTip.splitlines() == [f"warning {number}" for number in range(4, 20)]


# -- values --


@pytest.mark.slow
def test_values_are_corrected_when_the_user_agrees_and_as_they_are_again(panel: Opened, spin: Spin, tmp_path: Path) -> None:
    ct = np.random.default_rng(0).normal(40, 15, THIN.shape_kji)
    ct[:, :3] = -1000
    node = add_volume(panel.scene, THIN, "shifted", np.clip(ct + 1024, 0, None).astype(np.uint16))
    node.SetAttribute("DICOM.Modality", "CT")
    panel.prompt.ui.volumeSelector.setCurrentNode(node)
    button = panel.panels.ui.correctButton
    assert button.isHidden()
    panel.propose()
    call = panel.client.reach_propose()
    assert sent(panel) == ("CT", "axial", False)
    call.event.emit(WarningEvent("values", "The values of a CT cannot be Hounsfield units; they look like others."))
    assert not button.isHidden()
    assert button.text == "Correct the values"

    button.click()  # while the run goes on
    panel.client.confirm_cancel()
    assert "cannot be" not in panel.said
    panel.parameters.proposals = 3
    arrive(panel, THIN, "axial")
    panel.settle(spin)
    assert sent(panel) == ("CT", "axial", True)
    assert panel.parameters.correctedVolume is node
    panel.review.ui.acceptButton.click()
    segment = panel.review.ui.segmentationSelector.currentNode().GetSegmentation().GetNthSegment(0)
    assert "values corrected" in describe_segment(segment)
    saver = Saver(panel.panels, spin, tmp_path / "set")
    saver.save()
    case, image, _affine, _mask = only(saver.cases)
    assert case.facts["proposal"]["corrected"] is True
    assert np.percentile(image, 1) == pytest.approx(-1000, abs=30), "an example is in Hounsfield units"
    assert np.median(image) == pytest.approx(np.median(ct), abs=40)

    panel.propose()
    panel.client.reach_propose().event.emit(WarningEvent("values_corrected", "They were taken for others."))
    assert button.text == "Take the values as they are"
    button.click()
    panel.client.reach_propose()
    assert sent(panel) == ("CT", "axial", False)

    panel.prompt.correct_values(True)
    panel.session.forget()
    panel.choose_volume(THIN, "another")
    panel.propose()
    panel.client.reach_propose()
    assert sent(panel)[2] is False, "the user agreed for one volume"
