"""An accepted mask lies exactly where the proposal was, whatever the grid and the transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.errors import InputError
from progidiff.volumes.geometry import Geometry

from ..volume_examples import GEOMETRIES, oblique, oblique_rotation, oriented
from .accept_support import (
    LIVER,
    SPLEEN,
    add_segments,
    add_transform,
    add_volume,
    crop_of,
    facts,
    mask_in,
    save_and_load_segmentation,
)
from .session_support import segment_points, sorted_points

slicer = pytest.importorskip("slicer", reason="needs slicer-core (pip install slicer-core)")


def mirrored() -> Geometry:
    """A left-handed grid: i grows to the left, j to the front, k to the head."""
    return oriented("LAS", (9, 8, 6), (0.8, 0.9, 3.0))


GRIDS = {**GEOMETRIES, "mirrored": mirrored()}


def rigid() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = oblique_rotation().T
    affine[:3, 3] = (5.5, -20.25, 3.125)
    return affine


def some_mask(shape_kji: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """No symmetry that would hide a flip, and touching every face of the grid."""
    mask = np.random.default_rng(seed).random(shape_kji) < 0.3
    mask[0, 0, 0] = mask[-1, -1, -1] = True
    return mask


def expected_points(affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return sorted_points(np.argwhere(mask), affine)


@pytest.mark.parametrize("moved", [False, True], ids=["plain", "transformed"])
@pytest.mark.parametrize("name", GRIDS)
def test_voxels_are_exact_in_ras(scene: Any, acceptance: Any, name: str, moved: bool, tmp_path: Path) -> None:
    geometry = GRIDS[name]
    volume = add_volume(scene, geometry)
    to_world = np.eye(4)
    if moved:
        to_world = rigid()
        volume.SetAndObserveTransformNodeID(add_transform(scene, to_world).GetID())
    mask = some_mask(geometry.shape_kji)
    done = acceptance.accept(crop_of(mask), volume, LIVER, facts())
    node = done.segmentation_node
    assert node.GetTransformNodeID() == volume.GetTransformNodeID()
    np.testing.assert_array_equal(mask_in(node, done.segment_id, volume), mask)
    expected = expected_points(to_world @ geometry.affine, mask)
    np.testing.assert_allclose(segment_points(node, done.segment_id), expected, atol=2e-4)
    # The reference geometry is the volume's own grid.
    converter = slicer.vtkSegmentationConverter
    image = slicer.vtkOrientedImageData()
    text = node.GetSegmentation().GetConversionParameter(converter.GetReferenceImageGeometryParameterName())
    assert converter.DeserializeImageGeometry(text, image, False)
    assert image.GetDimensions() == geometry.shape_ijk
    # What is written to disk is before the transform, as Slicer writes it.
    loaded = save_and_load_segmentation(node, tmp_path / "Lëber 肝.seg.nrrd")
    expected = expected_points(geometry.affine, mask)
    np.testing.assert_allclose(segment_points(loaded, done.segment_id), expected, atol=2e-4)


@pytest.mark.parametrize("mode", ["new", "replace", "add"])
@pytest.mark.parametrize("name", ["PSR", "oblique", "single slice"])
def test_into_an_existing_segmentation(scene: Any, acceptance: Any, name: str, mode: str) -> None:
    geometry = GRIDS[name]
    volume = add_volume(scene, geometry)
    volume.SetAndObserveTransformNodeID(add_transform(scene, rigid()).GetID())
    which = np.random.default_rng(1).integers(0, 3, geometry.shape_kji)
    node = add_segments(scene, volume, {"mine": which == 1, "other": which == 2})
    mask = some_mask(geometry.shape_kji)
    done = acceptance.accept(crop_of(mask), volume, LIVER, facts(), node, mode, "mine")
    expected = mask | (which == 1) if mode == "add" else mask
    np.testing.assert_array_equal(mask_in(node, done.segment_id, volume), expected)
    np.testing.assert_array_equal(mask_in(node, "other", volume), which == 2)
    assert "resampled" not in done.note


def test_a_reference_geometry_elsewhere_does_not_move_voxels_off_the_grid(scene: Any, acceptance: Any) -> None:
    """The segmentation's reference geometry was taken from another image than its segments lie on."""
    volume = add_volume(scene, oblique())
    node = add_segments(scene, volume, {"mine": some_mask(oblique().shape_kji, 1)})
    node.SetReferenceImageGeometryParameterFromVolumeNode(add_volume(scene, GRIDS["PSR"], "other"))
    mask = some_mask(oblique().shape_kji)
    done = acceptance.accept(crop_of(mask), volume, LIVER, facts(), node)
    np.testing.assert_array_equal(mask_in(node, done.segment_id, volume), mask)
    assert done.note == ""


@pytest.mark.parametrize("mode", ["new", "add"])
def test_volume_moved_and_segmentation_hardened_still_meet(scene: Any, acceptance: Any, mode: str) -> None:
    """The volume is under a transform that was already hardened on the segmentation."""
    geometry = oblique()
    volume = add_volume(scene, geometry)
    first = some_mask(geometry.shape_kji, 1)
    node = add_segments(scene, volume, {"mine": first})
    transform = add_transform(scene, rigid())
    volume.SetAndObserveTransformNodeID(transform.GetID())
    node.SetAndObserveTransformNodeID(transform.GetID())
    node.HardenTransform()
    assert node.GetTransformNodeID() is None
    mask = some_mask(geometry.shape_kji, 2)
    done = acceptance.accept(crop_of(mask), volume, SPLEEN, facts(), node, mode, "mine")
    expected = expected_points(rigid() @ geometry.affine, mask | first if mode == "add" else mask)
    np.testing.assert_allclose(segment_points(node, done.segment_id), expected, atol=2e-4)
    assert "resampled" not in done.note


def test_shifted_and_turned_grids_share_voxels_without_resampling(scene: Any, acceptance: Any) -> None:
    """A cropped volume, and one with its axes the other way round, have other indices for the same places."""
    geometry = oblique((12, 10, 8))
    whole = add_volume(scene, geometry)
    node = add_segments(scene, whole, {"mine": some_mask(geometry.shape_kji, 1)})
    step = np.eye(4)
    step[:3, 3] = (3, 2, 1)
    turned = np.array([[0, -1, 0, 11.0], [1, 0, 0, 0], [0, 0, -1, 7], [0, 0, 0, 1]])
    for shape, to_whole in (((6, 5, 4), step), ((10, 12, 8), turned)):
        part = Geometry(shape, geometry.affine @ to_whole)
        mask = some_mask(part.shape_kji, 3)
        done = acceptance.accept(crop_of(mask), add_volume(scene, part, "part"), LIVER, facts(), node)
        np.testing.assert_allclose(
            segment_points(node, done.segment_id), expected_points(part.affine, mask), atol=2e-4, err_msg=str(shape)
        )
        assert done.note == ""


def test_another_grid_is_resampled_and_says_so(scene: Any, acceptance: Any) -> None:
    coarse = add_volume(scene, oriented("RAS", (10, 10, 10), (2.0, 2.0, 2.0)), "coarse")
    node = add_segments(scene, coarse, {"mine": np.zeros((10, 10, 10), bool)})
    fine = add_volume(scene, oriented("RAS", (20, 20, 20), (1.0, 1.0, 1.0)), "fine")
    mask = np.zeros((20, 20, 20), bool)
    mask[4:12, 4:12, 4:12] = True
    done = acceptance.accept(crop_of(mask), fine, LIVER, facts(), node)
    assert "resampled" in done.note
    expected = mask[::2, ::2, ::2]
    np.testing.assert_array_equal(mask_in(node, done.segment_id, coarse), expected)


def test_neighbours_on_another_grid_lose_what_lies_under_the_mask(scene: Any, acceptance: Any) -> None:
    coarse = add_volume(scene, oriented("RAS", (10, 10, 10), (2.0, 2.0, 2.0)), "coarse")
    fine = add_volume(scene, oriented("RAS", (20, 20, 20), (1.0, 1.0, 1.0)), "fine")
    neighbour = np.zeros((10, 10, 10), bool)
    neighbour[1:9, 2:8, 3:7] = True
    node = add_segments(scene, coarse, {"neighbour": neighbour})
    mask = np.zeros((20, 20, 20), bool)
    mask[4:12, 4:12, 4:12] = True
    add_fine_segment(scene, node, fine)
    done = acceptance.accept(crop_of(mask), fine, LIVER, facts(), node, "add", "fine", "all")
    np.testing.assert_array_equal(mask_in(node, done.segment_id, fine)[mask], True)
    left = neighbour & ~mask[::2, ::2, ::2]
    np.testing.assert_array_equal(mask_in(node, "neighbour", coarse), left)
    assert done.overwritten == {"neighbour": int(neighbour.sum() - left.sum())}
    acceptance.undo.undo()
    np.testing.assert_array_equal(mask_in(node, "neighbour", coarse), neighbour)


def add_fine_segment(scene: Any, node: Any, fine: Any) -> None:
    """Give a segmentation a segment on the grid of another volume."""
    corner = np.zeros((20, 20, 20), bool)
    corner[0, 0, 0] = True
    other = add_segments(scene, fine, {"fine": corner})
    assert node.GetSegmentation().CopySegmentFromSegmentation(other.GetSegmentation(), "fine", True)
    scene.RemoveNode(other)


def test_a_transform_that_is_not_linear_is_refused_with_what_to_do(scene: Any, acceptance: Any, volume: Any) -> None:
    import vtk

    node = add_segments(scene, volume, {"mine": some_mask((20, 30, 40))})
    warp = scene.AddNewNodeByClass("vtkMRMLTransformNode", "warp")
    spline = vtk.vtkThinPlateSplineTransform()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    for x, y, z in ((0, 0, 0), (50, 0, 0), (0, 50, 0), (0, 0, 50), (20, 20, 20)):
        source.InsertNextPoint(x, y, z)
        target.InsertNextPoint(x, y, z + 0.01 * x * y)
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    spline.SetBasisToR()
    warp.SetAndObserveTransformToParent(spline)
    volume.SetAndObserveTransformNodeID(warp.GetID())
    before = mask_in(node, "mine", add_volume(scene))
    with pytest.raises(InputError, match="harden"):
        acceptance.accept(crop_of(some_mask((20, 30, 40), 4)), volume, LIVER, facts(), node, "replace", "mine")
    np.testing.assert_array_equal(mask_in(node, "mine", add_volume(scene)), before)
    assert not acceptance.undo.can_undo


@pytest.mark.parametrize(("scan", "labels"), [("example_ct_sm", "example_seg"), ("example_mr_sm", "example_seg_mr")])
def test_real_scan(scene: Any, acceptance: Any, scan: str, labels: str, shared_data: Path) -> None:
    """A real organ on a real scan as Slicer reads it from disk, among the other organs of the label file."""
    folder = shared_data / "permissive" / "totalsegmentator_tests"
    volume = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", scan)
    label = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", labels)
    for node, name in ((volume, scan), (label, labels)):
        storage = scene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
        storage.SetFileName(str(folder / f"{name}.nii.gz"))
        assert storage.ReadData(node) == 1
    from vtk.util.numpy_support import vtk_to_numpy

    image = label.GetImageData()
    values = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
    sizes = {int(value): int(np.count_nonzero(values == value)) for value in np.unique(values) if value}
    organs = sorted(sizes, key=lambda value: -sizes[value])[:4]
    node = add_segments(scene, volume, {f"organ {value}": values == value for value in organs})
    mask = np.roll(values == organs[0], (1, 2, 2), axis=(0, 1, 2))
    done = acceptance.accept(crop_of(mask), volume, LIVER, facts(), node, "replace", f"organ {organs[0]}")
    np.testing.assert_array_equal(mask_in(node, done.segment_id, volume), mask)
    for value in organs[1:]:
        np.testing.assert_array_equal(mask_in(node, f"organ {value}", volume), values == value)
