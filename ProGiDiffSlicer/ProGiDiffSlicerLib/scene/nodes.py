"""Nodes of the scene: the module's own, where nodes lie in the subject hierarchy, and how they leave."""

from __future__ import annotations

from typing import Any

import slicer

ROLE_ATTRIBUTE = "ProGiDiff.Role"
ROLE_ACCEPTED, ROLE_PROPOSALS, ROLE_AGREEMENT = "accepted", "proposals", "agreement"


def nodes_of(scene: Any, kind: str) -> list[Any]:
    """All nodes of a class."""
    return [scene.GetNthNodeByClass(number, kind) for number in range(scene.GetNumberOfNodesByClass(kind))]


def is_own(node: Any) -> bool:
    """Whether a node shows proposals, is made anew by every run, and is no input and no result."""
    return node is not None and node.GetAttribute(ROLE_ATTRIBUTE) in (ROLE_PROPOSALS, ROLE_AGREEMENT)


def first_volume(scene: Any) -> Any | None:
    """The first volume of the scene in which something could be outlined."""
    for node in nodes_of(scene, "vtkMRMLScalarVolumeNode"):
        if node.GetClassName() == "vtkMRMLScalarVolumeNode" and not is_own(node) and not node.GetHideFromEditors():
            return node
    return None


def place_beside(scene: Any, node: Any, volume: Any) -> None:
    """Put a node where the volume is: under the same study or folder."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    if hierarchy is None:
        return
    item = hierarchy.GetItemByDataNode(node)
    beside = hierarchy.GetItemByDataNode(volume)
    if item and beside:
        hierarchy.SetItemParent(item, hierarchy.GetItemParent(beside))


def remove_with_display(scene: Any, node: Any) -> None:
    """Remove a displayable node together with its display node, which the scene would keep."""
    display = node.GetDisplayNode()
    scene.RemoveNode(node)
    if display is not None and scene.IsNodePresent(display):
        scene.RemoveNode(display)
