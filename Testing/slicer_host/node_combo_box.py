"""The box in which a node of the scene is chosen."""

from __future__ import annotations

from typing import Any, ClassVar

import qt
import slicer
import vtk
from PySide6.QtCore import Property, Signal

from .observers import Observers
from .stand_ins import kept, stand_in, stands_for


@stands_for("qMRMLSortFilterProxyModel")
class SortFilterProxyModel(qt.QSortFilterProxyModel):
    """The part of the box's model that decides what is listed. As in Slicer, only the property can be set, by no slot."""

    def __init__(self, box: Any) -> None:
        super().__init__(box)
        self._box = box

    hiddenNodeIDs = kept(list, "hiddenNodeIDs", [], None, lambda self, _ids: self._box._refresh())


@stand_in(slicer)
class qMRMLNodeComboBox(qt.QWidget):
    """Lists the nodes of ``nodeTypes`` by name and follows the scene."""

    _conversions: ClassVar[dict[str, Any]] = {
        "currentNodeChanged(bool)": lambda node: node is not None,
    }
    currentNodeChanged = Signal(object)
    currentNodeIDChanged = Signal(str)
    nodeActivated = Signal(object)
    nodeAdded = Signal(object)
    nodeAddedByUser = Signal(object)
    nodeAboutToBeRemoved = Signal(object)
    currentNodeRenamed = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._scene_observers, self._node_observers = Observers(self), Observers(self)
        self._attributes: list[tuple[str, str, Any]] = []
        self._model = SortFilterProxyModel(self)
        self._current: Any = None
        self._listed: list[Any] = []
        self._filling = False
        self._combo = qt.QComboBox(self)
        self._combo.setSizePolicy(qt.QSizePolicy.Expanding, qt.QSizePolicy.Fixed)
        row = qt.QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self._combo)
        self._combo.currentIndexChanged.connect(self._on_index)
        self._combo.activated.connect(self._on_activated)
        self._refresh()

    def _changed(self, _value: Any) -> None:
        self._refresh()

    nodeTypes = kept(list, "nodeTypes", [], None, _changed)
    hideChildNodeTypes = kept(list, "hideChildNodeTypes", [], None, _changed)
    showChildNodeTypes = kept(bool, "showChildNodeTypes", True, None, _changed)
    showHidden = kept(bool, "showHidden", False, None, _changed)
    noneEnabled = kept(bool, "noneEnabled", False, None, _changed)
    noneDisplay = kept(str, "noneDisplay", "None", None, _changed)
    addEnabled = kept(bool, "addEnabled", True, None, _changed)
    removeEnabled = kept(bool, "removeEnabled", True, None, _changed)
    selectNodeUponCreation = kept(bool, "selectNodeUponCreation", True)
    baseName = kept(str, "baseName", "")

    def mrmlScene(self) -> Any:
        """The scene, or None."""
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        """List the nodes of this scene from now on."""
        self._scene_observers.clear()
        self._scene = scene
        if scene is not None:
            self._scene_observers.add_with_node(scene, scene.NodeAddedEvent, self._on_added)
            self._scene_observers.add_with_node(scene, scene.NodeAboutToBeRemovedEvent, self._on_removing)
            for event in (scene.NodeRemovedEvent, scene.EndCloseEvent, scene.EndImportEvent, scene.EndBatchProcessEvent):
                self._scene_observers.add(scene, event, self._refresh)
        self._refresh()

    def _on_added(self, node: Any) -> None:
        self._refresh()
        if node in self._listed:
            self.nodeAdded.emit(node)

    def _on_removing(self, node: Any) -> None:
        if node in self._listed:
            self.nodeAboutToBeRemoved.emit(node)

    def addAttribute(self, nodeType: str, attributeName: str, attributeValue: Any = None) -> None:
        """List nodes of that type only where they have the attribute (with that value, where one is given)."""
        self._attributes.append((nodeType, attributeName, attributeValue))
        self._refresh()

    def sortFilterProxyModel(self) -> SortFilterProxyModel:
        """What decides which nodes are listed."""
        return self._model

    def _nodes(self) -> list[Any]:
        """The nodes that can be chosen, in the order of the scene."""
        scene = self._scene
        every = [scene.GetNthNode(index) for index in range(scene.GetNumberOfNodes())] if scene is not None else []
        return [node for node in every if self._wanted(node)]

    def _wanted(self, node: Any) -> bool:
        name = node.GetClassName()
        fits = [kind for kind in self.nodeTypes if (node.IsA(kind) if self.showChildNodeTypes else name == kind)]
        if not fits or any(node.IsA(kind) and name not in self.nodeTypes for kind in self.hideChildNodeTypes):
            return False
        if (node.GetHideFromEditors() and not self.showHidden) or node.GetID() in self._model.hiddenNodeIDs:
            return False
        for kind, attribute, wanted in self._attributes:
            found = node.GetAttribute(attribute)
            if node.IsA(kind) and (found is None or (wanted is not None and found != str(wanted))):
                return False
        return True

    def nodeCount(self) -> int:
        """How many nodes can be chosen."""
        return len(self._listed)

    def nodeFromIndex(self, index: int) -> Any:
        """The node at that place, or None."""
        return self._listed[index] if 0 <= index < len(self._listed) else None

    def currentNode(self) -> Any:
        """The chosen node, or None."""
        return self._current

    def setCurrentNode(self, node: Any) -> None:
        """Choose a node (or give its ID); one that is not listed, or None: nothing is chosen."""
        if isinstance(node, str):
            node = self._scene.GetNodeByID(node) if self._scene is not None else None
        self._choose(node if node in self._listed else None)

    def setCurrentNodeID(self, nodeID: str) -> None:
        """Choose by ID."""
        self.setCurrentNode(nodeID)

    currentNodeID = Property(
        str, lambda self: "" if self._current is None else self._current.GetID(), lambda self, new: self.setCurrentNode(new)
    )

    def addNode(self, nodeType: str = "") -> Any:
        """Make a node of that type (default: the first listed one) as the user does with "Create new …"."""
        node = self._scene.AddNewNodeByClass(nodeType or self.nodeTypes[0], self.baseName)
        for kind, attribute, wanted in self._attributes:
            if node.IsA(kind):
                node.SetAttribute(attribute, "" if wanted is None else str(wanted))
        self._refresh()
        if self.selectNodeUponCreation:
            self.setCurrentNode(node)
        self.nodeAddedByUser.emit(node)
        return node

    # -- the combo box ------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        if self._scene is not None and self._scene.IsBatchProcessing():
            return
        self._listed = self._nodes()
        current = self._current if self._current in self._listed else None
        if current is None and not self.noneEnabled and self._listed:
            current = self._listed[0]
        self._fill(current)
        self._choose(current)

    def _fill(self, current: Any) -> None:
        self._filling = True
        self._combo.clear()
        if self.noneEnabled:
            self._combo.addItem(self.noneDisplay, "")
        for node in self._listed:
            self._combo.addItem(node.GetName() or node.GetID(), node.GetID())
        if not self._combo.count:
            self._combo.setPlaceholderText("Select a " + (self._type_label() or "node"))
        if self._scene is not None and self.addEnabled and self.nodeTypes:
            self._combo.insertSeparator(self._combo.count)
            self._combo.addItem(f"Create new {self._type_label()}", "#add")
        self._combo.setCurrentIndex(-1 if current is None and not self.noneEnabled else self._row(current))
        self._filling = False

    def _type_label(self) -> str:
        if not self.nodeTypes or self._scene is None:
            return ""
        made = self._scene.CreateNodeByClass(self.nodeTypes[0])
        if made is None:
            return self.nodeTypes[0].removeprefix("vtkMRML").removesuffix("Node")
        made.UnRegister(None)
        return str(made.GetNodeTagName())

    def _row(self, node: Any) -> int:
        return self._combo.findData("" if node is None else node.GetID())

    def _choose(self, node: Any) -> None:
        if self._row(node) != self._combo.currentIndex:
            self._filling = True
            self._combo.setCurrentIndex(self._row(node))
            self._filling = False
        if node is not self._current:
            self._current = node
            self._watch_name()
            self.currentNodeChanged.emit(node)
            self.currentNodeIDChanged.emit("" if node is None else node.GetID())

    def _watch_name(self) -> None:
        self._node_observers.clear()
        if self._current is not None:
            self._node_observers.add(self._current, vtk.vtkCommand.ModifiedEvent, self._on_modified)

    def _on_modified(self) -> None:
        row = self._row(self._current)
        if self._current is not None and row >= 0 and self._combo.itemText(row) != self._current.GetName():
            self._combo.setItemText(row, self._current.GetName())
            self.currentNodeRenamed.emit(self._current.GetName())

    def _on_index(self, index: int) -> None:
        if self._filling or index < 0:
            return
        data = self._combo.itemData(index)
        if data == "#add":
            self.addNode()
        else:
            self._choose(self._scene.GetNodeByID(data) if data and self._scene is not None else None)

    def _on_activated(self, _index: int) -> None:
        self.nodeActivated.emit(self._current)
