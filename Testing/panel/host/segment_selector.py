"""Choosing a segmentation and a segment in it, and the button that shows it in 3D."""

from __future__ import annotations

from typing import Any, ClassVar

import ctk
import qt
import slicer
import vtk
from PySide6.QtCore import Property, Signal

from .mrml_widgets import SceneHolder
from .observers import Observers
from .stand_ins import forwarded, kept, stand_in


@stand_in(slicer)
class qMRMLSegmentSelectorWidget(SceneHolder, qt.QWidget):
    """A node box for segmentations beside a box for the segments of the chosen one."""

    extra_signatures: ClassVar[dict[str, Any]] = {
        "currentNodeChanged(vtkMRMLNode*)": None,
        "currentNodeChanged(bool)": lambda node: node is not None,
        "mrmlSceneChanged(vtkMRMLScene*)": None,
    }
    mrmlSceneChanged = Signal(object)
    currentNodeChanged = Signal(object)
    currentSegmentChanged = Signal(str)
    segmentSelectionChanged = Signal(list)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._observers = Observers(self)
        self._observed: Any = None
        self._nodes = slicer.qMRMLNodeComboBox(self)
        self._nodes.nodeTypes = ["vtkMRMLSegmentationNode"]
        self._nodes.addEnabled = False
        self._segments = qt.QComboBox(self)
        row = qt.QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._nodes, 1)
        row.addWidget(self._segments, 1)
        self._nodes.currentNodeChanged.connect(self._on_node)
        self._segments.currentIndexChanged.connect(lambda _index: self.currentSegmentChanged.emit(self.currentSegmentID()))

    noneEnabled = forwarded(bool, "noneEnabled", "_nodes")
    editEnabled = forwarded(bool, "editEnabled", "_nodes")
    selectNodeUponCreation = forwarded(bool, "selectNodeUponCreation", "_nodes")
    segmentationNodeSelectorVisible = Property(
        bool, lambda self: not self._nodes.isHidden(), lambda self, shown: self._nodes.setVisible(shown)
    )
    multiSelection = kept(bool, "multiSelection", False)
    horizontalLayout = kept(bool, "horizontalLayout", True)

    def setMRMLScene(self, scene: Any) -> None:
        """List the segmentations of this scene."""
        super().setMRMLScene(scene)
        self._nodes.setMRMLScene(scene)

    def currentNode(self) -> Any:
        """The segmentation, or None."""
        return self._nodes.currentNode()

    def currentNodeID(self) -> str:
        """Its ID, or an empty text."""
        return self._nodes.currentNodeID

    def setCurrentNode(self, node: Any) -> None:
        """Choose a segmentation."""
        self._nodes.setCurrentNode(node)

    def setCurrentNodeID(self, nodeID: str) -> None:
        """Choose a segmentation by ID."""
        self._nodes.setCurrentNodeID(nodeID)

    def segmentIDs(self) -> list[str]:
        """The segments of the chosen segmentation."""
        return [self._segments.itemData(index) for index in range(self._segments.count) if self._segments.itemData(index)]

    def currentSegmentID(self) -> str:
        """The chosen segment, or an empty text."""
        return self._segments.currentData or ""

    def setCurrentSegmentID(self, segmentID: str) -> None:
        """Choose a segment."""
        self._segments.setCurrentIndex(self._segments.findData(segmentID))

    def _on_node(self, node: Any) -> None:
        self._observers.clear()
        self._observed = node
        if node is not None:
            self._observers.add(node, vtk.vtkCommand.AnyEvent, self._on_event)
        self._fill()
        self.currentNodeChanged.emit(node)

    def _on_event(self) -> None:
        segmentation = self._observed.GetSegmentation()
        ids = [segmentation.GetNthSegmentID(index) for index in range(segmentation.GetNumberOfSegments())]
        names = [segmentation.GetSegment(each).GetName() for each in ids]
        if ids != self.segmentIDs() or names != [self._segments.itemText(self._segments.findData(each)) for each in ids]:
            self._fill()

    def _fill(self) -> None:
        before = self.currentSegmentID()
        self._segments.blockSignals(True)
        self._segments.clear()
        if self.noneEnabled:
            self._segments.addItem("None", "")
        segmentation = self._observed.GetSegmentation() if self._observed is not None else None
        for index in range(segmentation.GetNumberOfSegments() if segmentation is not None else 0):
            segment_id = segmentation.GetNthSegmentID(index)
            self._segments.addItem(segmentation.GetSegment(segment_id).GetName(), segment_id)
        self._segments.setCurrentIndex(max(0, self._segments.findData(before)))
        self._segments.blockSignals(False)
        if self.currentSegmentID() != before:
            self.currentSegmentChanged.emit(self.currentSegmentID())


@stand_in(slicer)
class qMRMLSegmentationShow3DButton(ctk.ctkMenuButton):
    """Shows the segmentation in 3D while it is pressed."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self.setText("Show 3D")
        self.setCheckable(True)
        self.toggled.connect(self._on_toggled)

    locked = kept(bool, "locked", False, None, lambda self, on: self.setEnabled(not on))

    def segmentationNode(self) -> Any:
        """The node, or None."""
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        """Act on this node."""
        self._node = node
        self.setEnabled(node is not None)

    def _on_toggled(self, on: bool) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if on and self._node is not None:
            self._node.CreateClosedSurfaceRepresentation()
        if display is not None:
            display.SetVisibility3D(on)
