"""The map of agreement over the volume, and the way to the slice on which the proposals differ most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import slicer
import vtk

from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.logic.agreement import AgreementOverlay, agreement_percent, most_uncertain_slice
from ProGiDiffSlicerLib.logic.store import ProposalStore
from ProGiDiffSlicerLib.logic.volumes import volume_image

from ..proposal_examples import random_masks, slice_event
from ..volume_examples import GEOMETRIES, oblique
from .session_support import add_transform, add_volume

Spin = Callable[..., None]


@pytest.fixture
def overlay(scene: Any) -> Iterator[AgreementOverlay]:
    shown = AgreementOverlay(scene, IdleQueue())
    yield shown
    shown.forget()


def store_of(node: Any, masks: np.ndarray) -> ProposalStore:
    store = ProposalStore(volume_image(node), ("liver",))
    for index in range(store.plan.count):
        store.add(slice_event(masks, store.plan, index))
    return store


def add_composite(scene: Any, name: str) -> Any:
    node = slicer.vtkMRMLSliceCompositeNode()
    node.SetLayoutName(name)
    added = scene.AddNode(node)  # one of this name outlives the closing of a scene
    added.SetForegroundVolumeID(None)
    return added


def show(overlay: AgreementOverlay, spin: Spin, *arguments: Any) -> Any:
    done: list[bool] = []
    overlay.filled.connect(lambda: done.append(True))
    overlay.show(*arguments)
    spin(lambda: bool(done))
    return overlay.node


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_map_lies_on_the_volume(scene: Any, spin: Spin, overlay: AgreementOverlay, name: str) -> None:
    geometry = GEOMETRIES[name]
    volume = add_volume(scene, geometry, "肝 CT")
    transform = add_transform(scene, np.diag([-1.0, 1.0, 1.0, 1.0]))
    volume.SetAndObserveTransformNodeID(transform.GetID())
    masks = random_masks(geometry, 5, share=0.6)
    node = show(overlay, spin, store_of(volume, masks), "liver")
    np.testing.assert_allclose(slicer.util.arrayFromVolume(node), 100 * masks.mean(0), atol=0.5)
    found = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(found)
    np.testing.assert_allclose(slicer.util.arrayFromVTKMatrix(found), geometry.affine, atol=1e-9)
    assert node.GetTransformNodeID() == transform.GetID()
    assert node.GetName() == "肝 CT agreement: liver"
    assert not node.GetSaveWithScene()


def test_where_all_agree_nothing_covers_the_image(scene: Any, spin: Spin, overlay: AgreementOverlay) -> None:
    """The display pipeline of the slice views: certain voxels are transparent, uncertain ones coloured."""
    geometry = GEOMETRIES["LPS"]
    masks = np.zeros((4, *geometry.shape_kji), bool)
    masks[:, 1:4] = True
    masks[:2, 1:4, 2:5, 2:5] = False
    node = show(overlay, spin, store_of(add_volume(scene, geometry), masks), "liver")
    display = node.GetDisplayNode()
    display.SetInputImageDataConnection(node.GetImageDataConnection())
    display.UpdateImageDataPipeline()
    display.GetOutputImageDataConnection().GetProducer().Update()
    image = display.GetOutputImageData()
    i, j, k = image.GetDimensions()
    colours = vtk.util.numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(k, j, i, -1)
    opaque = colours[..., 3] > 0
    share = masks.mean(0)
    np.testing.assert_array_equal(opaque, (share > 0) & (share < 1))
    assert opaque.any()


def test_it_is_the_foreground_and_the_former_one_comes_back(scene: Any, spin: Spin, overlay: AgreementOverlay) -> None:
    volume, other, third = (add_volume(scene, oblique(), name) for name in ("CT", "PET", "later"))
    red, yellow = add_composite(scene, "Red-test"), add_composite(scene, "Yellow-test")
    red.SetForegroundVolumeID(other.GetID())
    red.SetForegroundOpacity(0.25)
    red.SetBackgroundVolumeID(volume.GetID())
    node = show(overlay, spin, store_of(volume, random_masks(oblique(), 3)), "liver", 0.4)
    for composite in (red, yellow):
        assert composite.GetForegroundVolumeID() == node.GetID()
        assert composite.GetForegroundOpacity() == pytest.approx(0.4)
    assert red.GetBackgroundVolumeID() == volume.GetID()
    assert overlay.visible
    overlay.set_opacity(0.8)
    assert yellow.GetForegroundOpacity() == pytest.approx(0.8)
    yellow.SetForegroundVolumeID(third.GetID())
    overlay.hide()
    assert not overlay.visible
    assert red.GetForegroundVolumeID() == other.GetID()
    assert red.GetForegroundOpacity() == pytest.approx(0.25)
    assert yellow.GetForegroundVolumeID() == third.GetID(), "the user's own choice stays"


def test_a_foreground_that_was_deleted_does_not_come_back(scene: Any, spin: Spin, overlay: AgreementOverlay) -> None:
    volume, other = add_volume(scene, oblique(), "CT"), add_volume(scene, oblique(), "PET")
    red = add_composite(scene, "Red-test")
    red.SetForegroundVolumeID(other.GetID())
    show(overlay, spin, store_of(volume, random_masks(oblique(), 3)), "liver")
    scene.RemoveNode(other)
    overlay.hide()
    assert not red.GetForegroundVolumeID()


def test_clearing_leaves_nothing_in_the_scene(scene: Any, spin: Spin, overlay: AgreementOverlay) -> None:
    volume = add_volume(scene, oblique())
    add_composite(scene, "Red-test")
    before = scene.GetNumberOfNodes()
    show(overlay, spin, store_of(volume, random_masks(oblique(), 3)), "liver")
    overlay.clear()
    assert scene.GetNumberOfNodes() == before
    assert overlay.node is None


def test_a_map_that_is_deleted_while_it_is_made(scene: Any, spin: Spin, overlay: AgreementOverlay) -> None:
    store = store_of(add_volume(scene, oblique()), random_masks(oblique(), 3))
    overlay.show(store, "liver")
    scene.RemoveNode(overlay.node)
    done: list[bool] = []
    overlay.filled.connect(lambda: done.append(True))
    spin(lambda: bool(done))
    node = show(overlay, spin, store, "liver")
    assert slicer.util.arrayFromVolume(node).any()


@pytest.mark.parametrize("name", ["LPS", "PSR", "ARI", "oblique"])
def test_the_most_uncertain_slice_is_found_and_shown(name: str) -> None:
    scene = slicer.vtkMRMLScene()  # without the application's own views
    geometry = GEOMETRIES[name]
    masks = np.ones((4, *geometry.shape_kji), bool)
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ("liver",))
    wanted = store.plan.count - 2
    for index in range(store.plan.count):
        here = masks.copy()
        rows = np.moveaxis(here, store.plan.axis + 1, 1)[:, index]
        rows[: 2 if index == wanted else 1, :2] = False
        store.add(slice_event(here, store.plan, index))
    assert most_uncertain_slice(store, "liver") == wanted
    view = slicer.vtkMRMLSliceNode()
    view.SetLayoutName("Test")
    scene.AddNode(view)
    along = geometry.affine[:3, 2 - store.plan.axis] / np.linalg.norm(geometry.affine[:3, 2 - store.plan.axis])
    axes = np.linalg.svd(along[None])[2]
    axes[0] = along
    place = np.eye(4)
    place[:3, :3] = np.stack([axes[1], np.cross(along, axes[1]), along], axis=1)
    for row in range(4):
        for column in range(4):
            view.GetSliceToRAS().SetElement(row, column, float(place[row, column]))
    view.UpdateMatrices()
    AgreementOverlay(scene, IdleQueue()).jump_to_slice(store, wanted)
    shown = np.array([view.GetSliceToRAS().GetElement(row, 3) for row in range(3)])
    ijk = np.linalg.inv(geometry.affine) @ [*shown, 1.0]
    assert ijk[2 - store.plan.axis] == pytest.approx(wanted, abs=1e-6)


def test_views_across_the_slices_stay_where_they_are() -> None:
    scene = slicer.vtkMRMLScene()
    geometry = GEOMETRIES["LPS"]
    store = store_of(add_volume(scene, geometry), random_masks(geometry, 2))
    view = slicer.vtkMRMLSliceNode()
    view.SetLayoutName("Test")
    scene.AddNode(view)
    view.SetSliceToRASByNTP(1, 0, 0, 0, 1, 0, 12.0, 0, 0, 1)
    before = view.GetSliceToRAS().GetElement(0, 3)
    AgreementOverlay(scene, IdleQueue()).jump_to_slice(store, 3)
    assert view.GetSliceToRAS().GetElement(0, 3) == before


def test_proposals_that_are_all_alike_have_no_uncertain_slice(scene: Any) -> None:
    masks = np.repeat(random_masks(oblique(), 1), 4, axis=0)
    assert most_uncertain_slice(store_of(add_volume(scene, oblique()), masks), "liver") is None


def test_nearly_unanimous_voxels_do_not_count_as_certain(scene: Any) -> None:
    geometry = oblique()
    masks = np.ones((300, *geometry.shape_kji), bool)
    masks[0, 2, 3, 4] = False
    masks[1:, 1, 1, 1] = False
    proposals = store_of(add_volume(scene, geometry), masks)["liver"]
    percent = [agreement_percent(proposals, index) for index in range(3)]
    assert (percent[2][3, 4], percent[1][1, 1], percent[0][0, 0]) == (99, 1, 100)
