"""Volumes that change over time: frames, and segmentations that go with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer
import vtk

from progidiff.errors import InputError
from ProGiDiffSlicerLib.scene.labelmaps import image_of
from ProGiDiffSlicerLib.scene.volumes import (
    frames,
    parent_to_world,
    record_segmentation,
    show_frame,
    still_same,
    volume_image,
)

from ..volume_examples import oriented
from .session_support import LABELMAP, add_sequence, add_transform, add_volume, segment_array

GEOMETRY = oriented("LPS", (6, 5, 4), (1.0, 1.2, 2.5))


def arrays(count: int = 3) -> list[np.ndarray]:
    return [np.full(GEOMETRY.shape_kji, 10 * n, np.int16) for n in range(count)]


def test_a_volume_alone_has_no_frames(scene: Any) -> None:
    assert frames(add_volume(scene, GEOMETRY)) is None
    assert frames(None) is None


def test_frames_of_a_proxy(scene: Any) -> None:
    proxy, browser = add_sequence(scene, GEOMETRY, arrays(), "Herz")
    browser.SetSelectedItemNumber(2)
    playing = frames(proxy)
    assert playing is not None
    assert (playing.count, playing.index, playing.browser) == (3, 2, browser)
    assert frames(add_volume(scene, GEOMETRY)) is None, "another volume of the scene"
    for number in range(3):
        assert (slicer.util.arrayFromVolume(playing.data_node(number)) == 10 * number).all()
    for wrong in (-1, 3):
        with pytest.raises(InputError, match="holds no volume"):
            playing.data_node(wrong)
    show_frame(playing, 0)
    assert (slicer.util.arrayFromVolume(proxy) == 0).all()


def test_browsing_does_not_change_a_frame(scene: Any) -> None:
    proxy, browser = add_sequence(scene, GEOMETRY, arrays())
    fingerprint = volume_image(proxy, 1).fingerprint
    for number in (2, 1, 0, 1, 2):
        browser.SetSelectedItemNumber(number)
    assert still_same(scene, fingerprint) is None
    playing = frames(proxy)
    assert playing is not None
    data = playing.data_node(1)
    slicer.util.arrayFromVolume(data)[0, 0, 0] = 99
    slicer.util.arrayFromVolumeModified(data)
    assert still_same(scene, fingerprint) is not None


def test_transforms_that_change_with_the_frames(scene: Any) -> None:
    """The place of a frame is that of its own transform, whichever frame is shown."""
    proxy, browser = add_sequence(scene, GEOMETRY, arrays())
    moves = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "motion")
    for number in range(3):
        step = slicer.vtkMRMLLinearTransformNode()
        shift = vtk.vtkMatrix4x4()
        shift.SetElement(0, 3, 100.0 * number)
        step.SetMatrixTransformToParent(shift)
        moves.SetDataNodeAtValue(step, str(number * 0.5))
    browser.AddSynchronizedSequenceNode(moves)
    browser.SetSelectedItemNumber(1)
    browser.SetSelectedItemNumber(0)
    motion = browser.GetProxyNode(moves)
    fixed = add_transform(scene, np.diag([1.0, 1.0, -1.0, 1.0]))
    motion.SetAndObserveTransformNodeID(fixed.GetID())
    proxy.SetAndObserveTransformNodeID(motion.GetID())
    for number in range(3):
        expected = np.diag([1.0, 1.0, -1.0, 1.0])
        expected[0, 3] = 100.0 * number
        found = parent_to_world(proxy, frames(proxy), number)
        np.testing.assert_allclose(found, expected)
        np.testing.assert_allclose(volume_image(proxy, number).affine, expected @ GEOMETRY.affine)


def put_mask(node: Any, mask: np.ndarray) -> None:
    """One segment "liver" with a mask, as after accepting."""
    segmentation = node.GetSegmentation()
    segmentation.RemoveAllSegments()
    segment = slicer.vtkSegment()
    segment.SetName("liver")
    segment.AddRepresentation(LABELMAP, image_of(mask.astype(np.uint8), (0, 0, 0), GEOMETRY.affine))
    segmentation.AddSegment(segment, "liver")
    node.Modified()


def test_accepted_segments_stay_with_their_frame(scene: Any) -> None:
    proxy, browser = add_sequence(scene, GEOMETRY, arrays(), "Herz")
    browser.SetSelectedItemNumber(1)
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Segmentierung")
    node.SetReferenceImageGeometryParameterFromVolumeNode(proxy)
    first = np.zeros(GEOMETRY.shape_kji, bool)
    first[1:3, 2, 2:5] = True
    put_mask(node, first)
    playing = frames(proxy)
    assert playing is not None
    sequence = record_segmentation(playing, node)
    assert sequence.GetNumberOfDataNodes() == 3
    assert browser.GetProxyNode(sequence) is node
    assert record_segmentation(playing, node) is sequence, "only once"
    np.testing.assert_array_equal(segment_array(node, "liver", GEOMETRY.shape_kji), first)

    show_frame(playing, 2)
    assert node.GetSegmentation().GetNumberOfSegments() == 0
    second = np.zeros(GEOMETRY.shape_kji, bool)
    second[0, 1:4, 1] = True
    put_mask(node, second)
    show_frame(playing, 0)
    assert node.GetSegmentation().GetNumberOfSegments() == 0
    show_frame(playing, 1)
    np.testing.assert_array_equal(segment_array(node, "liver", GEOMETRY.shape_kji), first)
    show_frame(playing, 2)
    np.testing.assert_array_equal(segment_array(node, "liver", GEOMETRY.shape_kji), second)
    assert node.GetName() == "Segmentierung"
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is proxy
