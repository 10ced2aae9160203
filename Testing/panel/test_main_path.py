"""The module through its own widgets, with the engine's real worker and the bundled model, from a prompt to saved segments.

One worker serves several tests where nothing is lost by it: loading the model is most of their time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import qt
import slicer

from progidiff.places import sample_volume
from ProGiDiffSlicerLib.scene.provenance import get_tag, read_provenance

from .driver import Driver
from .worker_support import children, gone

SLICES = (13, 15)
#: Proposals and steps of a run that is interrupted: many, so that it cannot be over before.
MANY, LONG = 64, 8


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


def pid(driver: Driver) -> int:
    """The worker's process."""
    return int(driver.services.client.hello.pid)


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


def proposals_of(driver: Driver, target: str) -> list[np.ndarray]:
    """What has arrived of a target: one mask for each proposal and slice."""
    store = driver.session.store
    found = store[target]
    return [found.slice_mask(number, index) for number in range(found.count) for index in found.uncertainty]


def interrupted_run(driver: Driver, prompt: str = "liver") -> None:
    """Start a long run and wait until its first slices have arrived."""
    before = driver.session.store
    driver.ask(prompt, MANY, LONG, seed=3)
    driver.wait(lambda: driver.session.store not in (None, before), 120)
    assert driver.session.running


@pytest.mark.slow
def test_from_a_prompt_to_files_and_back(driver: Driver, tmp_path: Path) -> None:
    driver.ask("liver; left kidney", 3, 1, seed=7, slices=SLICES)
    driver.wait(lambda: driver.settled, 120)
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


@pytest.mark.slow
def test_a_killed_worker_costs_neither_prompt_nor_proposals_and_one_click_starts_it_again(driver: Driver) -> None:
    driver.ask("liver", 2, 1, seed=1, slices=SLICES)
    driver.wait(lambda: driver.settled, 120)
    driver.press_in_table(qt.Qt.Key_Return)
    accepted = voxels(driver, driver.accepted())["Liver"]
    store = driver.session.store
    driver.ask("spleen", MANY, LONG, seed=2)
    driver.wait(lambda: driver.session.store is not store, 120)
    received, killed = proposals_of(driver, "spleen"), pid(driver)
    assert received
    os.kill(killed, signal.SIGKILL)
    driver.wait(lambda: not driver.session.running)
    driver.settle()
    assert "worker" in driver.said
    assert driver.panels.prompt.ui.promptEdit.text == "spleen"
    kept = proposals_of(driver, "spleen")
    assert len(kept) >= len(received)
    assert all(np.array_equal(a, b) for a, b in zip(kept, received, strict=False))
    assert len(driver.rows()) >= driver.session.store["spleen"].count
    assert np.array_equal(voxels(driver, driver.accepted())["Liver"], accepted)

    driver.click(driver.panels.ui.restartButton)
    driver.wait(lambda: driver.services.client.hello is not None, 120)
    assert gone(killed)
    assert not driver.panels.ui.restartButton.visible
    assert proposals_of(driver, "spleen")
    driver.ask("liver", 2, 1, seed=1, slices=SLICES)
    driver.wait(lambda: driver.settled, 120)
    again = driver.session.store
    assert again["liver"].ranked
    for number in range(2):
        for index in range(SLICES[0] - 1, SLICES[1]):
            assert np.array_equal(again["liver"].slice_mask(number, index), store["liver"].slice_mask(number, index))


@pytest.mark.slow
def test_cancel_then_a_closed_scene_and_a_reloaded_module_in_the_middle_of_a_run(driver: Driver) -> None:
    interrupted_run(driver)
    worker = pid(driver)
    driver.propose()
    driver.wait(lambda: not driver.session.running, 60)
    driver.settle()
    assert pid(driver) == worker
    assert proposals_of(driver, "liver")
    assert not driver.session.store["liver"].ranked
    # What is there can be accepted, without a rank.
    driver.press_in_table(qt.Qt.Key_Return)
    provenance, _color, _terminology = facts(driver.accepted())["Liver"]
    assert provenance.rank is None

    # The scene is closed in the middle of the next run.
    interrupted_run(driver, "spleen; liver")
    slicer.mrmlScene.Clear(0)
    driver.wait(lambda: driver.settled, 60)
    assert driver.session.store is None
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []
    driver._loaded.holder.enter()
    driver.load(sample_volume(), "again")
    driver.ask("liver", 2, 1, seed=1, slices=SLICES)
    driver.wait(lambda: driver.settled, 120)
    assert driver.session.store is not None, driver.said
    assert driver.session.store["liver"].ranked
    assert pid(driver) == worker

    # The module is read again in the middle of a run: its worker ends, and the new one works.
    interrupted_run(driver)
    processes = psutil.Process(worker).children(recursive=True)
    driver.reload()
    assert gone(worker)
    assert all(gone(each.pid) for each in processes)
    assert [child.pid for child in children()] == []
    assert driver.panels.prompt.ui.promptEdit.text == "liver"
    assert driver.services.client.hello is None
