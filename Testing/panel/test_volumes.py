"""Volumes and sequences as the engine sees them: voxels, place, modality, frames, and whether they are still the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import slicer
import vtk

from progidiff.errors import InputError
from progidiff.volumes.slicing import plan_slices
from ProGiDiffSlicerLib.scene.volumes import (
    frames,
    modality_of,
    parent_to_world,
    record_segmentation,
    show_frame,
    slice_at,
    slices_of_extent,
    still_same,
    volume_image,
)

from ..volume_examples import GEOMETRIES, oblique, oblique_rotation, oriented, ramp
from .session_support import add_sequence, add_transform, add_volume, matrix

GEOMETRY = oriented("LPS", (6, 5, 4), (1.0, 1.2, 2.5))


def rigid(shift: tuple[float, float, float] = (5.0, -7.5, 11.25)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = oblique_rotation()
    affine[:3, 3] = shift
    return affine


@pytest.mark.parametrize("name", GEOMETRIES)
def test_voxels_and_place_are_the_nodes_own(scene: Any, name: str) -> None:
    geometry = GEOMETRIES[name]
    node = add_volume(scene, geometry, "Größe 肝")
    image = volume_image(node)
    assert image.name == "Größe 肝"
    np.testing.assert_array_equal(image.array_kji, ramp(geometry))
    np.testing.assert_allclose(image.affine, geometry.affine, rtol=0, atol=1e-9)
    assert image.geometry.shape_ijk == geometry.shape_ijk
    assert image.frame is None


def test_voxels_are_not_copied_and_outlive_their_node(scene: Any) -> None:
    node = add_volume(scene, oblique())
    image = volume_image(node)
    slicer.util.arrayFromVolume(node)[2, 3, 4] = 1234
    scene.RemoveNode(node)
    del node
    expected = ramp(oblique())
    expected[2, 3, 4] = 1234
    np.testing.assert_array_equal(image.array_kji, expected)


def test_linear_parent_transforms_are_part_of_the_place(scene: Any) -> None:
    geometry = oblique()
    node = add_volume(scene, geometry)
    outer, inner = add_transform(scene, rigid()), add_transform(scene, np.diag([-1.0, 1.0, 1.0, 1.0]))
    inner.SetAndObserveTransformNodeID(outer.GetID())
    node.SetAndObserveTransformNodeID(inner.GetID())
    image = volume_image(node)
    np.testing.assert_allclose(image.affine, rigid() @ np.diag([-1.0, 1, 1, 1]) @ geometry.affine, rtol=0, atol=1e-9)
    np.testing.assert_allclose(image.local_affine, geometry.affine, rtol=0, atol=1e-9)


def test_a_non_linear_transform_is_refused_with_what_to_do(scene: Any) -> None:
    node = add_volume(scene, oblique(), "Abdomen")
    grid = vtk.vtkImageData()
    grid.SetDimensions(3, 3, 3)
    grid.AllocateScalars(vtk.VTK_DOUBLE, 3)
    warp = slicer.vtkOrientedGridTransform()
    warp.SetDisplacementGridData(grid)
    bent = slicer.vtkMRMLGridTransformNode()
    bent.SetAndObserveTransformToParent(warp)
    scene.AddNode(bent)
    outside = add_transform(scene, np.eye(4))
    outside.SetAndObserveTransformNodeID(bent.GetID())
    for transform in (bent, outside):
        node.SetAndObserveTransformNodeID(transform.GetID())
        with pytest.raises(InputError, match=r"Abdomen.*non-linear.*harden"):
            volume_image(node)


def test_a_shearing_transform_is_refused(scene: Any) -> None:
    node = add_volume(scene, oriented("RAS", (5, 6, 7), (1, 1, 1)))
    shear = np.eye(4)
    shear[0, 2] = 0.2
    node.SetAndObserveTransformNodeID(add_transform(scene, shear).GetID())
    with pytest.raises(InputError, match="sheared"):
        volume_image(node)


def test_what_is_no_grey_volume_is_refused(scene: Any) -> None:
    with pytest.raises(InputError, match="No volume is chosen"):
        volume_image(None)
    empty = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Leer")
    with pytest.raises(InputError, match="Leer holds no voxels"):
        volume_image(empty)
    labels = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
    slicer.util.updateVolumeFromArray(labels, np.ones((2, 3, 4), np.uint8))
    with pytest.raises(InputError, match="label map"):
        volume_image(labels)
    colour = scene.AddNewNodeByClass("vtkMRMLVectorVolumeNode", "photo")
    slicer.util.updateVolumeFromArray(colour, np.ones((2, 3, 4, 3), np.uint8))
    with pytest.raises(InputError, match="3 values in each voxel"):
        volume_image(colour)
    with pytest.raises(InputError, match="not a volume"):
        volume_image(scene.AddNewNodeByClass("vtkMRMLModelNode", "surface"))


def test_modality_by_subject_hierarchy_attribute_and_unit(scene: Any) -> None:
    node = add_volume(scene, oblique())
    assert modality_of(node) is None
    units = slicer.vtkCodedEntry()
    units.SetValueSchemeMeaning("[hnsf'U]", "UCUM", "Hounsfield unit")
    node.SetVoxelValueUnits(units)
    assert modality_of(node) == "CT"
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    item = hierarchy.GetItemByDataNode(node)
    attribute = slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMSeriesModalityAttributeName()
    for stated, expected in (("MR", "MR"), ("CT", "CT"), ("PT", None)):
        hierarchy.SetItemAttribute(item, attribute, stated)
        image = volume_image(node)
        assert (image.modality, image.stated_modality) == (expected, stated)


def test_a_volume_stays_the_same_while_it_is_only_looked_at(scene: Any) -> None:
    node = add_volume(scene, oblique())
    image = volume_image(node)
    node.CreateDefaultDisplayNodes()
    node.GetDisplayNode().SetAutoWindowLevel(True)
    node.GetImageData().GetScalarRange()
    node.SetName("renamed")
    node.SetAndObserveTransformNodeID(add_transform(scene, rigid()).GetID())
    assert still_same(scene, image.fingerprint) is None


def test_changed_voxels_place_or_size_and_a_removed_volume_are_noticed(scene: Any) -> None:
    geometry = oblique()

    def edit(node: Any) -> None:
        slicer.util.arrayFromVolume(node)[0, 0, 0] += 1
        slicer.util.arrayFromVolumeModified(node)

    changes = {
        "edited": edit,
        "replaced": lambda node: slicer.util.updateVolumeFromArray(node, ramp(geometry)),
        "moved": lambda node: node.SetOrigin(1.0, 2.0, 3.0),
        "hardened": lambda node: node.ApplyTransformMatrix(matrix(rigid())),
    }
    for name, change in changes.items():
        node = add_volume(scene, geometry, "Abdomen")
        fingerprint = volume_image(node).fingerprint
        change(node)
        assert "Abdomen was changed" in (still_same(scene, fingerprint) or ""), name
    scene.RemoveNode(node)
    assert "removed" in (still_same(scene, fingerprint) or "")


def test_another_volume_under_a_used_id_is_not_taken_for_it(scene: Any) -> None:
    node = add_volume(scene, oblique())
    fingerprint = volume_image(node).fingerprint
    scene.Clear(0)
    other = add_volume(scene, oblique())
    assert other.GetID() == fingerprint.node_id
    assert still_same(scene, fingerprint) is not None


def test_frames_are_looked_up_by_their_number(scene: Any) -> None:
    geometry = oriented("LPS", (6, 5, 4), (1.0, 1.0, 2.5))
    arrays = [np.full(geometry.shape_kji, n, np.int16) for n in range(3)]
    proxy, browser = add_sequence(scene, geometry, arrays)
    browser.SetSelectedItemNumber(1)
    assert volume_image(proxy).frame == 1
    for frame in range(3):
        image = volume_image(proxy, frame)
        assert image.frame == frame
        assert (image.array_kji == frame).all()
        assert still_same(scene, image.fingerprint) is None
    with pytest.raises(InputError, match="Frame 4"):
        volume_image(proxy, 3)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_slice_at_a_point_is_the_one_whose_voxels_are_there(name: str) -> None:
    geometry = GEOMETRIES[name]
    plan = plan_slices(geometry)
    rng = np.random.default_rng(8)
    for index in range(plan.count):
        ijk = np.array([rng.integers(0, n) for n in geometry.shape_ijk], float)
        ijk[2 - plan.axis] = index + rng.uniform(-0.45, 0.45)
        point = tuple((geometry.affine @ [*ijk, 1.0])[:3])
        assert slice_at(point, geometry, plan) == index
    for outside in (-0.6, plan.count - 0.4):
        ijk[2 - plan.axis] = outside
        with pytest.raises(InputError, match="outside the volume"):
            slice_at(tuple((geometry.affine @ [*ijk, 1.0])[:3]), geometry, plan)


def test_ranges_and_the_whole_volume() -> None:
    geometry = GEOMETRIES["LPS"]
    plan = plan_slices(geometry)
    assert slices_of_extent("volume", (2, 3), geometry, plan) is None
    assert slices_of_extent("range", (1, plan.count), geometry, plan) == (1, plan.count)
    for start, stop in ((0, 0), (2, 2), (3, 2), (-1, 2), (0, plan.count + 1)):
        with pytest.raises(InputError, match="range"):
            slices_of_extent("range", (start, stop), geometry, plan)


def add_view(scene: Any, name: str, normal: int, point: tuple[float, float, float]) -> Any:
    """A slice view whose plane is across one of the RAS axes, centred at a point."""
    view = slicer.vtkMRMLSliceNode()
    view.SetLayoutName(name)
    scene.AddNode(view)
    place = np.eye(4)
    place[:3, :3] = np.roll(np.eye(3), normal + 1, axis=0)
    place[:3, 3] = point
    view.GetSliceToRAS().DeepCopy(matrix(place))
    view.UpdateMatrices()
    return view


def test_this_slice_is_the_one_in_the_red_view() -> None:
    scene = slicer.vtkMRMLScene()  # without the application's own views
    geometry = oriented("LPS", (20, 20, 12), (1.0, 1.0, 3.0))
    plan = plan_slices(geometry)
    place = tuple((geometry.affine @ [9.0, 9.0, 7.2, 1.0])[:3])
    add_view(scene, "Green", 2, tuple((geometry.affine @ [9.0, 9.0, 2.0, 1.0])[:3]))
    add_view(scene, "Red", 2, place)
    assert slices_of_extent("slice", None, geometry, plan, scene) == (7, 8)


def test_this_slice_of_a_sagittal_volume_is_not_looked_for_in_an_axial_view() -> None:
    scene = slicer.vtkMRMLScene()
    geometry = oriented("PSR", (20, 20, 12), (1.0, 1.0, 3.0))
    plan = plan_slices(geometry)
    assert plan.plane == "sagittal"
    place = tuple((geometry.affine @ [9.0, 9.0, 4.0, 1.0])[:3])
    add_view(scene, "Red", 2, place)
    with pytest.raises(InputError, match="No slice view shows"):
        slices_of_extent("slice", None, geometry, plan, scene)
    add_view(scene, "Yellow", 0, place)
    assert slices_of_extent("slice", None, geometry, plan, scene) == (4, 5)


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


def test_a_segmentation_changes_with_the_frames_and_is_recorded_once(scene: Any) -> None:
    """What is accepted on each frame is tested with undo."""
    proxy, browser = add_sequence(scene, GEOMETRY, arrays(), "Herz")
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Segmentierung")
    node.SetReferenceImageGeometryParameterFromVolumeNode(proxy)
    playing = frames(proxy)
    assert playing is not None
    sequence = record_segmentation(playing, node)
    assert sequence.GetNumberOfDataNodes() == 3
    assert browser.GetProxyNode(sequence) is node
    assert record_segmentation(playing, node) is sequence
    show_frame(playing, 2)
    assert node.GetName() == "Segmentierung"
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is proxy
