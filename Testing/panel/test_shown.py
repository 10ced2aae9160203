"""What shows proposals: every voxel where the volume has it, in any orientation; the map of agreement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import slicer
import vtk

from progidiff.proposals.proposals import MAJORITY
from progidiff.wire.messages import ProposeRequest
from ProGiDiffSlicerLib.idle import IdleQueue
from ProGiDiffSlicerLib.scene.shown import (
    AgreementOverlay,
    ProposalSegmentation,
    agreement_percent,
    most_uncertain_slice,
    proposal_color,
)
from ProGiDiffSlicerLib.scene.store import ProposalStore
from ProGiDiffSlicerLib.scene.volumes import volume_image

from ..proposal_examples import random_masks, ranking_event, slice_event
from ..volume_examples import GEOMETRIES, oblique, oblique_rotation
from .session_support import add_transform, add_volume, segment_array, segment_points, sorted_points

Spin = Callable[..., None]


PLACES = {
    **{name: (geometry, None) for name, geometry in GEOMETRIES.items()},
    "rotated": (GEOMETRIES["LPS"], np.block([[oblique_rotation(), np.c_[[5.0, -8.5, 21.0]]], [np.zeros((1, 3)), 1.0]])),
    "mirrored": (oblique(), np.diag([-1.0, 1.0, 1.0, 1.0])),
    "scaled": (GEOMETRIES["PSR"], np.diag([1.5, 1.5, 1.5, 1.0])),
}


def store_of(node: Any, masks: np.ndarray, prompt: str = "liver", ranked: bool = True) -> ProposalStore:
    store = ProposalStore(volume_image(node), ProposeRequest(("liver",)), prompt)
    for index in range(store.plan.count):
        store.add(slice_event(masks, store.plan, index))
    if ranked:
        store.add(ranking_event(masks, store.geometry))
    return store


@pytest.fixture
def proposals(scene: Any) -> Iterator[ProposalSegmentation]:
    shown = ProposalSegmentation(scene, IdleQueue())
    yield shown
    shown.forget()


def show(proposals: ProposalSegmentation, spin: Spin, *arguments: Any) -> Any:
    proposals.show(*arguments)
    spin(lambda: not proposals.busy)
    return proposals.node


@pytest.mark.parametrize("name", PLACES)
def test_overlapping_proposals_lie_exactly_where_the_volume_has_them(
    scene: Any, spin: Spin, proposals: ProposalSegmentation, name: str
) -> None:
    geometry, transform = PLACES[name]
    volume = add_volume(scene, geometry)
    if transform is not None:
        volume.SetAndObserveTransformNodeID(add_transform(scene, transform).GetID())
    masks = random_masks(geometry, 4, share=0.6)
    store = store_of(volume, masks)
    node = show(proposals, spin, store, "liver", range(4), 0)
    assert (masks[0] & masks[1] & masks[2] & masks[3]).any(), "they overlap"
    world = np.eye(4) if transform is None else transform
    for number, mask in enumerate(masks):
        segment_id = proposals.segment_id(number)
        np.testing.assert_array_equal(segment_array(node, segment_id, geometry.shape_kji), mask)
        np.testing.assert_allclose(
            segment_points(node, segment_id), sorted_points(np.argwhere(mask), world @ geometry.affine), atol=2e-4
        )
    assert node.GetTransformNodeID() == volume.GetTransformNodeID()


def test_the_node_is_set_apart_from_accepted_work(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    volume = add_volume(scene, oblique(), "Größe 肝.nii")
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "study")
    hierarchy.SetItemParent(hierarchy.GetItemByDataNode(volume), study)
    node = show(proposals, spin, store_of(volume, random_masks(oblique(), 2), "Leber;\nlinke Niere"), "liver", [0, 1], 0)
    assert node.GetName() == "Größe 肝.nii proposals: Leber; linke Niere"
    assert node.GetAttribute("ProGiDiff.Role") == "proposals"
    assert not node.GetSaveWithScene()
    assert not node.GetDisplayNode().GetSaveWithScene()
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) == study
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is volume


def test_all_are_outlined_and_only_the_selected_one_is_filled(
    scene: Any, spin: Spin, proposals: ProposalSegmentation
) -> None:
    store = store_of(add_volume(scene, oblique()), random_masks(oblique(), 5))
    node = show(proposals, spin, store, "liver", [2, 0, 4], 4)

    def state() -> dict[int, tuple[bool, bool, bool]]:
        display = node.GetDisplayNode()
        return {
            number: (
                bool(display.GetSegmentVisibility(segment_id)),
                bool(display.GetSegmentVisibility2DOutline(segment_id)),
                bool(display.GetSegmentVisibility2DFill(segment_id)),
            )
            for number in range(5)
            if (segment_id := proposals.segment_id(number)) is not None
        }

    outlined, filled, hidden = (True, True, False), (True, True, True), (False, True, False)
    assert state() == {0: outlined, 2: outlined, 4: filled}
    proposals.select(2)
    assert state() == {0: outlined, 2: filled, 4: outlined}
    proposals.set_visible(0, False)
    assert state() == {0: hidden, 2: filled, 4: outlined}
    assert not proposals.is_visible(0)
    proposals.set_visible(1, True)
    spin(lambda: not proposals.busy)
    assert state() == {0: hidden, 1: outlined, 2: filled, 4: outlined}
    proposals.set_visible(2, False)
    assert proposals.selected is None
    assert state()[2] == hidden
    proposals.set_hidden(True)
    assert not node.GetDisplayNode().GetVisibility()
    assert proposals.segment_id(3) is None


def test_ensembles_can_be_shown(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    geometry = oblique()
    masks = random_masks(geometry, 3, share=0.6)
    store = store_of(add_volume(scene, geometry), masks)
    node = show(proposals, spin, store, "liver", [0, MAJORITY], MAJORITY)
    found = segment_array(node, proposals.segment_id(MAJORITY), geometry.shape_kji)
    np.testing.assert_array_equal(found, masks.sum(0) > 1.5)


def test_voxels_come_a_segment_at_a_time_the_selected_one_first(scene: Any, proposals: ProposalSegmentation) -> None:
    class Steps(IdleQueue):
        """Runs only when it is told to."""

        def _turn(self) -> None:
            pass

    queue = Steps()
    shown = ProposalSegmentation(scene, queue)
    shown.show(store_of(add_volume(scene, oblique()), random_masks(oblique(), 4)), "liver", range(4), 2)
    order: list[int] = []
    task = shown._task
    assert task is not None
    while not task.done:
        task.step()
        order += [n for n in range(4) if shown.segment_id(n) and n not in order]
    assert order == [2, 0, 1, 3]
    shown.clear()


def test_slices_that_arrive_later_are_added(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    geometry = GEOMETRIES["LPS"]
    masks = random_masks(geometry, 2)
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ProposeRequest(("liver",)))
    changes: list[str] = []
    for index in range(store.plan.count):
        store.add(slice_event(masks, store.plan, index))
        node = show(proposals, spin, store, "liver", [0, 1], 0)
        if index == 0:
            event = slicer.vtkSegmentation.SourceRepresentationModified
            node.GetSegmentation().AddObserver(event, lambda caller, name: changes.append(name))
        arrived = masks[1].copy()
        arrived[index + 1 :] = False
        np.testing.assert_array_equal(segment_array(node, proposals.segment_id(1), geometry.shape_kji), arrived)
    assert len(changes) >= 2 * (store.plan.count - 1), "the views are told"


def test_showing_the_same_again_costs_nothing(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    store = store_of(add_volume(scene, oblique()), random_masks(oblique(), 3))
    node = show(proposals, spin, store, "liver", [0, 1, 2], 0)

    def times() -> list[int]:
        segmentation = node.GetSegmentation()
        return [segmentation.GetNthSegment(n).GetRepresentation("Binary labelmap").GetMTime() for n in range(3)]

    before = times()
    show(proposals, spin, store, "liver", [0, 1, 2], 1)
    assert times() == before


def test_empty_proposals_and_a_new_run_in_the_same_node(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    geometry = oblique()
    volume = add_volume(scene, geometry)
    masks = np.zeros((2, *geometry.shape_kji), bool)
    node = show(proposals, spin, store_of(volume, masks), "liver", [0, 1], 0)
    assert not segment_array(node, proposals.segment_id(0), geometry.shape_kji).any()
    again = random_masks(geometry, 3)
    assert show(proposals, spin, store_of(volume, again), "liver", [1], 1) is node
    assert node.GetSegmentation().GetNumberOfSegments() == 1
    np.testing.assert_array_equal(segment_array(node, proposals.segment_id(1), geometry.shape_kji), again[1])


def test_it_follows_the_volumes_transform(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    volume = add_volume(scene, oblique())
    node = show(proposals, spin, store_of(volume, random_masks(oblique(), 1)), "liver", [0], 0)
    transform = add_transform(scene, np.diag([1.0, -1.0, 1.0, 1.0]))
    volume.SetAndObserveTransformNodeID(transform.GetID())
    assert node.GetTransformNodeID() == transform.GetID()
    volume.SetAndObserveTransformNodeID(None)
    assert node.GetTransformNodeID() is None


def test_a_node_that_the_user_deleted_is_made_again(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    store = store_of(add_volume(scene, oblique()), random_masks(oblique(), 3))
    proposals.show(store, "liver", [0, 1], 0)
    scene.RemoveNode(proposals.node)
    spin(lambda: not proposals.busy)
    assert proposals.node is None
    node = show(proposals, spin, store, "liver", [0, 1], 0)
    assert node.GetSegmentation().GetNumberOfSegments() == 2


def test_clearing_leaves_nothing_in_the_scene(scene: Any, spin: Spin, proposals: ProposalSegmentation) -> None:
    volume = add_volume(scene, oblique())
    observed = volume.HasObserver(slicer.vtkMRMLTransformableNode.TransformModifiedEvent)
    before = scene.GetNumberOfNodes()
    show(proposals, spin, store_of(volume, random_masks(oblique(), 2)), "liver", [0, 1], 0)
    proposals.clear()
    assert scene.GetNumberOfNodes() == before
    assert proposals.node is None
    assert volume.HasObserver(slicer.vtkMRMLTransformableNode.TransformModifiedEvent) == observed


def test_colours_are_told_apart() -> None:
    colors = np.array([proposal_color(n) for n in range(20)])
    assert ((colors >= 0) & (colors <= 1)).all()
    apart = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + np.eye(20)
    assert apart[:7, :7].min() > 0.25
    assert apart.min() > 0.05


@pytest.fixture
def overlay(scene: Any) -> Iterator[AgreementOverlay]:
    shown = AgreementOverlay(scene, IdleQueue())
    yield shown
    shown.forget()


def add_composite(scene: Any, name: str) -> Any:
    node = slicer.vtkMRMLSliceCompositeNode()
    node.SetLayoutName(name)
    added = scene.AddNode(node)  # one of this name outlives the closing of a scene
    added.SetForegroundVolumeID(None)
    return added


def show_map(overlay: AgreementOverlay, spin: Spin, *arguments: Any) -> Any:
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
    node = show_map(overlay, spin, store_of(volume, masks, ranked=False), "liver")
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
    node = show_map(overlay, spin, store_of(add_volume(scene, geometry), masks, ranked=False), "liver")
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
    node = show_map(overlay, spin, store_of(volume, random_masks(oblique(), 3), ranked=False), "liver", 0.4)
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
    show_map(overlay, spin, store_of(volume, random_masks(oblique(), 3), ranked=False), "liver")
    scene.RemoveNode(other)
    overlay.hide()
    assert not red.GetForegroundVolumeID()


def test_clearing_leaves_nothing_of_the_map_in_the_scene(scene: Any, spin: Spin, overlay: AgreementOverlay) -> None:
    volume = add_volume(scene, oblique())
    add_composite(scene, "Red-test")
    before = scene.GetNumberOfNodes()
    show_map(overlay, spin, store_of(volume, random_masks(oblique(), 3), ranked=False), "liver")
    overlay.clear()
    assert scene.GetNumberOfNodes() == before
    assert overlay.node is None


def test_a_map_that_is_deleted_while_it_is_made(scene: Any, spin: Spin, overlay: AgreementOverlay) -> None:
    store = store_of(add_volume(scene, oblique()), random_masks(oblique(), 3), ranked=False)
    overlay.show(store, "liver")
    scene.RemoveNode(overlay.node)
    done: list[bool] = []
    overlay.filled.connect(lambda: done.append(True))
    spin(lambda: bool(done))
    node = show_map(overlay, spin, store, "liver")
    assert slicer.util.arrayFromVolume(node).any()


def add_view(scene: Any, name: str, axes: np.ndarray) -> Any:
    """A slice view whose plane lies across the last of the three axes (columns)."""
    view = slicer.vtkMRMLSliceNode()
    view.SetLayoutName(name)
    scene.AddNode(view)
    view.GetSliceToRAS().DeepCopy([float(value) for value in np.block([[axes, np.zeros((3, 1))], [0, 0, 0, 1]]).ravel()])
    view.UpdateMatrices()
    return view


@pytest.mark.parametrize("name", ["LPS", "PSR", "ARI", "oblique"])
def test_the_most_uncertain_slice_is_found_and_shown(name: str) -> None:
    scene = slicer.vtkMRMLScene()  # without the application's own views
    geometry = GEOMETRIES[name]
    masks = np.ones((4, *geometry.shape_kji), bool)
    store = ProposalStore(volume_image(add_volume(scene, geometry)), ProposeRequest(("liver",)))
    wanted = store.plan.count - 2
    for index in range(store.plan.count):
        here = masks.copy()
        rows = np.moveaxis(here, store.plan.axis + 1, 1)[:, index]
        rows[: 2 if index == wanted else 1, :2] = False
        store.add(slice_event(here, store.plan, index))
    assert most_uncertain_slice(store, "liver") == wanted
    along = geometry.affine[:3, 2 - store.plan.axis] / np.linalg.norm(geometry.affine[:3, 2 - store.plan.axis])
    beside = np.linalg.svd(along[None])[2][1]
    view = add_view(scene, "along", np.stack([beside, np.cross(along, beside), along], axis=1))
    # A view across the slices stays where it is.
    across = add_view(scene, "across", np.stack([along, np.cross(beside, along), beside], axis=1))
    AgreementOverlay(scene, IdleQueue()).jump_to_slice(store, wanted)
    shown = np.array([view.GetSliceToRAS().GetElement(row, 3) for row in range(3)])
    ijk = np.linalg.inv(geometry.affine) @ [*shown, 1.0]
    assert ijk[2 - store.plan.axis] == pytest.approx(wanted, abs=1e-6)
    assert [across.GetSliceToRAS().GetElement(row, 3) for row in range(3)] == [0, 0, 0]


def test_proposals_that_are_all_alike_have_no_uncertain_slice(scene: Any) -> None:
    masks = np.repeat(random_masks(oblique(), 1), 4, axis=0)
    assert most_uncertain_slice(store_of(add_volume(scene, oblique()), masks, ranked=False), "liver") is None


def test_nearly_unanimous_voxels_do_not_count_as_certain(scene: Any) -> None:
    geometry = oblique()
    masks = np.ones((300, *geometry.shape_kji), bool)
    masks[0, 2, 3, 4] = False
    masks[1:, 1, 1, 1] = False
    proposals = store_of(add_volume(scene, geometry), masks, ranked=False)["liver"]
    percent = [agreement_percent(proposals, index) for index in range(3)]
    assert (percent[2][3, 4], percent[1][1, 1], percent[0][0, 0]) == (99, 1, 100)
