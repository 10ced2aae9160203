"""Where nodes lie in the subject hierarchy, and how they leave the scene."""

from __future__ import annotations

from typing import Any

import slicer


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
