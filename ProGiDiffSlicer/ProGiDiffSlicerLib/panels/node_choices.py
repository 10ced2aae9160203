"""Keep the module's own nodes out of the boxes in which a user chooses nodes."""

from __future__ import annotations

from typing import Any

import slicer
import vtk

ROLE_ATTRIBUTE = "ProGiDiff.Role"
# Nodes of these roles are made anew by every run.
OWN_ROLES = frozenset({"proposals", "agreement"})


def is_own(node: Any) -> bool:
    """Whether a node shows proposals and is no input and no result."""
    return node is not None and node.GetAttribute(ROLE_ATTRIBUTE) in OWN_ROLES


def first_volume() -> Any | None:
    """The first volume of the scene in which something could be outlined."""
    for node in _nodes("vtkMRMLScalarVolumeNode"):
        if node.GetClassName() == "vtkMRMLScalarVolumeNode" and not is_own(node) and not node.GetHideFromEditors():
            return node
    return None


class OwnNodesHider:
    """Leaves the module's own nodes out of boxes (qMRMLNodeComboBox), also those that are added later."""

    def __init__(self, *boxes: Any) -> None:
        self._boxes = boxes
        self._scene = slicer.mrmlScene
        self._tag = self._scene.AddObserver(slicer.vtkMRMLScene.NodeAddedEvent, self._on_node_added)
        self.hide()

    def hide(self) -> None:
        """Leave out those that there are now."""
        for box in self._boxes:
            own = [node.GetID() for kind in box.nodeTypes for node in _nodes(kind) if is_own(node)]
            model = box.sortFilterProxyModel()
            if list(model.hiddenNodeIDs) != own:
                # The setter is no slot, so that PythonQt knows the property only.
                model.hiddenNodeIDs = own

    def cleanup(self) -> None:
        """Observe the scene no more."""
        self._scene.RemoveObserver(self._tag)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _on_node_added(self, _caller: Any, _event: str, node: Any) -> None:
        if is_own(node):
            self.hide()


def _nodes(kind: str) -> list[Any]:
    scene = slicer.mrmlScene
    return [scene.GetNthNodeByClass(number, kind) for number in range(scene.GetNumberOfNodesByClass(kind))]
