"""The module through its own widgets, with the real worker and the bundled model, from a prompt to saved segments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qt
import slicer

from progidiff.places import sample_volume
from ProGiDiffSlicerLib.scene.provenance import get_tag, read_provenance

from .driver import Driver
from .worker_support import children

SLICES = (13, 15)


@pytest.fixture
def driver(app: Any, scene: Any) -> Iterator[Driver]:
    """The module in a window, with the middle of the sample volume to work on."""
    before = {child.pid for child in children()}
    opened = Driver()
    opened.load(sample_volume(), "Größe 肝")
    yield opened
    opened.close()
    left = [child for child in children() if child.pid not in before]
    for child in left:
        child.kill()
    assert left == []


def voxels(driver: Driver, node: Any) -> dict[str, np.ndarray]:
    """The voxels of each segment by its name, bool (K, J, I)."""
    segmentation = node.GetSegmentation()
    ids = [segmentation.GetNthSegmentID(number) for number in range(segmentation.GetNumberOfSegments())]
    return {
        segmentation.GetSegment(each).GetName(): slicer.util.arrayFromSegmentBinaryLabelmap(node, each, driver.volume) > 0
        for each in ids
    }


def facts(node: Any) -> dict[str, Any]:
    """Provenance, colour and terminology of each segment by its name."""
    segmentation = node.GetSegmentation()
    segments = [segmentation.GetNthSegment(number) for number in range(segmentation.GetNumberOfSegments())]
    terminology = slicer.vtkSegment.GetTerminologyEntryTagName()
    return {
        each.GetName(): (read_provenance(each), np.round(each.GetColor(), 2).tolist(), get_tag(each, terminology))
        for each in segments
    }


@pytest.mark.slow
def test_from_a_prompt_to_files_and_back(driver: Driver, tmp_path: Path) -> None:
    driver.ask("liver; left kidney", 3, 1, seed=7, slices=SLICES)
    driver.wait(lambda: driver.settled)
    store = driver.session.store
    assert store["liver"].ranked
    assert store["left kidney"].ranked

    # Enter accepts what is selected: the first-ranked proposal of the first target, the second line of the other.
    driver.press_in_table(qt.Qt.Key_Return)
    node = driver.accepted()
    chosen = {"Liver": driver.panels.proposals.selected}
    driver.choose_target("left kidney")
    driver.press_in_table(qt.Qt.Key_2)
    chosen["Left kidney"] = driver.panels.proposals.selected
    driver.click(driver.panels.review.ui.acceptButton)
    driver.settle()
    assert driver.accepted() is node
    before, described = voxels(driver, node), facts(node)
    assert list(before) == ["Liver", "Left kidney"]
    for name, target in (("Liver", "liver"), ("Left kidney", "left kidney")):
        expected = np.zeros_like(before[name])
        crop = store[target].mask(chosen[name].index)
        place = tuple(slice(start, start + size) for start, size in zip(crop.origin_kji, crop.array.shape, strict=True))
        expected[place] = crop.array > 0
        assert np.array_equal(before[name], expected)
        assert expected[SLICES[0] - 1 : SLICES[1]].sum() == expected.sum() > 100
        provenance, _color, terminology = described[name]
        assert (provenance.request.seed, provenance.target, provenance.rank) == (7, target, chosen[name].rank)
        assert provenance.prompt == "liver; left kidney"
        assert f"^{name.split()[-1].capitalize()}~" in terminology

    review = driver.panels.review.ui
    driver.click(review.undoButton)
    assert list(voxels(driver, node)) == ["Liver"]
    driver.click(review.undoButton)
    assert driver.accepted() is None
    driver.click(review.redoButton)
    # What comes back is chosen again, so that the next accept goes into the same segmentation.
    assert driver.accepted() is node
    assert review.segmentComboBox.currentText == "Liver"
    driver.click(review.redoButton)
    assert driver.accepted() is node
    assert review.segmentComboBox.currentText == "Left kidney"
    after = voxels(driver, node)
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert facts(node) == described

    scene_file, segmentation_file = str(tmp_path / "Szene é.mrb"), str(tmp_path / "Segmente 肝.seg.nrrd")
    assert slicer.util.saveNode(node, segmentation_file)
    assert slicer.util.saveScene(scene_file)
    slicer.mrmlScene.Clear(0)
    slicer.util.loadScene(scene_file)
    (node,) = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    (driver.volume,) = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
    driver._loaded.holder.enter()
    assert driver.panels.prompt.ui.promptEdit.text == "liver; left kidney"
    loaded = slicer.util.loadSegmentation(segmentation_file)
    for each in (node, loaded):
        again = voxels(driver, each)
        assert list(again) == list(before)
        assert all(np.array_equal(again[name], before[name]) for name in before)
        assert facts(each) == described
