"""What Qt classes of the application do to the subject hierarchy: items for nodes, and an item for each segment.

As in the application, a segmentation goes on being observed after it was removed from the scene, and a segment that it loses
then, or gains, is reported as an error; here that is an exception in an observer, which fails a test.
"""

from __future__ import annotations

from typing import Any

import slicer
import vtk

_KINDS = ("vtkMRMLDisplayableNode", "vtkMRMLTransformNode", "vtkMRMLSequenceNode")


def observe(scene: Any) -> None:
    """Keep the scene's subject hierarchy as the application does."""

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def added(_caller: Any, _event: str, node: Any) -> None:
        hierarchy = scene.GetSubjectHierarchyNode()
        wanted = any(map(node.IsA, _KINDS)) and not node.GetHideFromEditors()
        if hierarchy is not None and wanted and not hierarchy.GetItemByDataNode(node):
            hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)
        if node.IsA("vtkMRMLSegmentationNode"):
            _observe_segmentation(node)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def removing(_caller: Any, _event: str, node: Any) -> None:
        hierarchy = scene.GetSubjectHierarchyNode()
        item = hierarchy.GetItemByDataNode(node) if hierarchy is not None and not scene.IsClosing() else 0
        if item:
            hierarchy.RemoveItem(item, False, False)

    scene.AddObserver(scene.NodeAddedEvent, added)
    scene.AddObserver(scene.NodeAboutToBeRemovedEvent, removing)


def _observe_segmentation(node: Any) -> None:
    """Each time the node is added, and never undone; as in Slicer a connection that is there is not made again."""
    if _added_before(node):
        return
    kinds = slicer.vtkSegmentation
    for event, reaction in (
        (kinds.SegmentAdded, _on_segment_added),
        (kinds.SegmentRemoved, _on_segment_removed),
        (kinds.SegmentModified, _on_segment_modified),
    ):
        node.AddObserver(event, reaction)


def _added_before(node: Any) -> bool:
    seen = getattr(node, "_host_observes_segments", False)
    node._host_observes_segments = True
    return bool(seen)


def _item(node: Any) -> tuple[Any, int]:
    """The subject hierarchy and the node's item in it.

    Raises:
        RuntimeError: it has none, which Slicer logs as an error.
    """
    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    item = hierarchy.GetItemByDataNode(node) if hierarchy is not None else 0
    if not item:
        raise RuntimeError(f"Subject hierarchy item cannot be found for segmentation node {node.GetName()}")
    return hierarchy, int(item)


def _child(hierarchy: Any, item: int, segment_id: str) -> int:
    children = vtk.vtkIdList()
    hierarchy.GetItemChildren(item, children)
    name = slicer.vtkMRMLSegmentationNode.GetSegmentIDAttributeName()
    ids = [children.GetId(index) for index in range(children.GetNumberOfIds())]
    return next((each for each in ids if hierarchy.GetItemAttribute(each, name) == segment_id), 0)


@vtk.calldata_type(vtk.VTK_STRING)
def _on_segment_added(node: Any, _event: str, segment_id: str | None = None) -> None:
    if node.GetScene() is not None and node.GetScene().IsImporting():
        return
    hierarchy, item = _item(node)
    segment = node.GetSegmentation().GetSegment(segment_id) if segment_id else None
    if segment is None or _child(hierarchy, item, segment_id or ""):
        return
    branch = slicer.vtkMRMLSubjectHierarchyConstants.GetSubjectHierarchyVirtualBranchAttributeName()
    place = node.GetSegmentation().GetSegmentIndex(segment_id)
    made = hierarchy.CreateHierarchyItem(item, segment.GetName() or "", branch, place)
    hierarchy.SetItemAttribute(made, slicer.vtkMRMLSegmentationNode.GetSegmentIDAttributeName(), segment_id)


@vtk.calldata_type(vtk.VTK_STRING)
def _on_segment_removed(node: Any, _event: str, segment_id: str | None = None) -> None:
    hierarchy, item = _item(node)
    child = _child(hierarchy, item, segment_id or "")
    if child:
        hierarchy.RemoveItem(child)


@vtk.calldata_type(vtk.VTK_STRING)
def _on_segment_modified(node: Any, _event: str, segment_id: str | None = None) -> None:
    if node.GetScene() is not None and node.GetScene().IsImporting():
        return
    hierarchy, item = _item(node)
    segment = node.GetSegmentation().GetSegment(segment_id) if segment_id else None
    child = _child(hierarchy, item, segment_id or "")
    if child and segment is not None and hierarchy.GetItemName(child) != (segment.GetName() or ""):
        hierarchy.SetItemName(child, segment.GetName() or "")
