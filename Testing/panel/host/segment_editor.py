"""The Segment Editor over a real segment editor node; painting itself needs the application."""

from __future__ import annotations

from typing import Any, ClassVar

import slicer
import vtk
from PySide6.QtCore import Signal

from .mrml_widgets import SceneHolder
from .observers import Observers
from .segment_editor_look import EFFECTS, SegmentEditorLook
from .stand_ins import kept, stand_in


class Effect:
    """An effect as far as it can be without the application: its name."""

    def __init__(self, name: str) -> None:
        self.name = name


@stand_in(slicer)
class qMRMLSegmentEditorWidget(SceneHolder, SegmentEditorLook):
    """Works on a ``vtkMRMLSegmentEditorNode``; undo and redo go through the real ``vtkSlicerSegmentEditorLogic``."""

    extra_signatures: ClassVar[dict[str, Any]] = {
        "segmentationNodeChanged(vtkMRMLSegmentationNode*)": None,
        "sourceVolumeNodeChanged(vtkMRMLVolumeNode*)": None,
        "mrmlSceneChanged(vtkMRMLScene*)": None,
    }
    mrmlSceneChanged = Signal(object)
    segmentationNodeChanged = Signal(object)
    sourceVolumeNodeChanged = Signal(object)
    currentSegmentIDChanged = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._observers = Observers(self)
        self._updating = False
        self._shown = ("", "", "")
        self._logic = slicer.vtkSlicerSegmentEditorLogic()
        self._segmentations.currentNodeChanged.connect(self._on_segmentation)
        self._volumes.currentNodeChanged.connect(self._on_volume)
        self._table.selectionChanged.connect(self._on_selection)
        self._effects.idClicked.connect(lambda index: self.setActiveEffectByName(self._effects.button(index).name))
        self._overwrite.currentIndexChanged.connect(self._on_overwrite)
        self._mask_mode.currentIndexChanged.connect(self._on_mask_mode)
        self._add.clicked.connect(lambda: self._on_add())
        self._remove.clicked.connect(lambda: self._on_remove())
        self._undo.clicked.connect(lambda: self.undo())
        self._redo.clicked.connect(lambda: self.redo())

    autoShowSourceVolumeNode = kept(bool, "autoShow", True)
    undoEnabled = kept(bool, "undoEnabled", True)
    maximumNumberOfUndoStates = kept(
        int, "undoStates", 10, None, lambda self, count: self._logic.SetMaximumNumberOfUndoStates(count)
    )
    readOnly = kept(bool, "readOnly", False)
    defaultTerminologyEntry = kept(str, "terminology", "")
    defaultTerminologyEntrySettingsKey = kept(str, "terminologyKey", "")

    # -- nodes --------------------------------------------------------------------------------------------------------

    def setMRMLScene(self, scene: Any) -> None:
        """Use this scene."""
        super().setMRMLScene(scene)
        for each in (self._segmentations, self._volumes, self._table):
            each.setMRMLScene(scene)
        self._logic.SetMRMLScene(scene)

    def mrmlSegmentEditorNode(self) -> Any:
        """The node that holds the choices, or None."""
        return self._node

    def setMRMLSegmentEditorNode(self, node: Any) -> None:
        """Work on this node."""
        self._observers.clear()
        self._node = node
        if node is not None:
            self._observers.add(node, vtk.vtkCommand.ModifiedEvent, self.updateWidgetFromMRML)
        self._logic.SetSegmentEditorNode(node)
        self.updateWidgetFromMRML()

    def segmentationNode(self) -> Any:
        """The segmentation, or None."""
        return None if self._node is None else self._node.GetSegmentationNode()

    def segmentationNodeID(self) -> str:
        """Its ID, or an empty text."""
        return "" if self.segmentationNode() is None else self.segmentationNode().GetID()

    def setSegmentationNode(self, node: Any) -> None:
        """Edit this segmentation."""
        if self._node is not None:
            self._node.SetAndObserveSegmentationNode(node)

    def setSegmentationNodeID(self, nodeID: str) -> None:
        """Edit the segmentation with that ID."""
        self.setSegmentationNode(self.mrmlScene().GetNodeByID(nodeID))

    def sourceVolumeNode(self) -> Any:
        """The volume, or None."""
        return None if self._node is None else self._node.GetSourceVolumeNode()

    def sourceVolumeNodeID(self) -> str:
        """Its ID, or an empty text."""
        return "" if self.sourceVolumeNode() is None else self.sourceVolumeNode().GetID()

    def setSourceVolumeNode(self, node: Any) -> None:
        """Use this volume's intensities."""
        if self._node is not None:
            self._node.SetAndObserveSourceVolumeNode(node)

    def setSourceVolumeNodeID(self, nodeID: str) -> None:
        """Use the volume with that ID."""
        self.setSourceVolumeNode(self.mrmlScene().GetNodeByID(nodeID))

    def currentSegmentID(self) -> str:
        """The segment being edited, or an empty text."""
        return "" if self._node is None else self._node.GetSelectedSegmentID() or ""

    def setCurrentSegmentID(self, segmentID: str) -> None:
        """Edit this segment."""
        if self._node is not None:
            self._node.SetSelectedSegmentID(segmentID)

    def segmentationNodeSelectorAddAttribute(self, nodeType: str, attributeName: str, attributeValue: Any = None) -> None:
        """List only segmentations with that attribute."""
        self._segmentations.addAttribute(nodeType, attributeName, attributeValue)

    def sourceVolumeNodeSelectorAddAttribute(self, nodeType: str, attributeName: str, attributeValue: Any = None) -> None:
        """List only volumes with that attribute."""
        self._volumes.addAttribute(nodeType, attributeName, attributeValue)

    def setupViewObservations(self) -> None:
        """Begin to listen to the views (there are none here)."""

    def removeViewObservations(self) -> None:
        """Listen to the views no more."""

    def installKeyboardShortcuts(self, parent: Any = None) -> None:
        """Install the editor's keys (none here)."""

    def uninstallKeyboardShortcuts(self) -> None:
        """Take the editor's keys away."""

    def jumpSlices(self) -> None:
        """Show the selected segment in the slice views."""
        if self.segmentationNode() is not None and self.currentSegmentID():
            centre = self.segmentationNode().GetSegmentCenterRAS(self.currentSegmentID())
            slicer.vtkMRMLSliceNode.JumpAllSlices(self.mrmlScene(), *centre)

    # -- effects and undo ---------------------------------------------------------------------------------------------

    def availableEffectNames(self) -> list[str]:
        """The names of the effects."""
        return list(EFFECTS)

    def effectNameOrder(self) -> list[str]:
        """The order of the buttons."""
        return list(self._order)

    def setEffectNameOrder(self, effectNames: Any) -> None:
        """Set the order of the buttons."""
        self._order = [str(each) for each in effectNames]
        self._place_effects()

    def effectByName(self, name: str) -> Any:
        """The effect, or None."""
        return Effect(name) if name in EFFECTS else None

    def activeEffect(self) -> Any:
        """The active effect, or None."""
        return self.effectByName((self._node.GetActiveEffectName() or "") if self._node is not None else "")

    def setActiveEffectByName(self, effectName: str) -> None:
        """Activate an effect; an empty text: none."""
        if self._node is not None:
            self._node.SetActiveEffectName(effectName if effectName in EFFECTS else "")

    def setActiveEffect(self, effect: Any) -> None:
        """Activate an effect, or none."""
        self.setActiveEffectByName("" if effect is None else effect.name)

    def saveStateForUndo(self) -> None:
        """Begin an undo step."""
        if self.undoEnabled:
            self._logic.SaveStateForUndo()

    def undo(self) -> None:
        """Go one step back."""
        self._logic.Undo()

    def redo(self) -> None:
        """Go one step forward."""
        self._logic.Redo()

    # -- both ways ----------------------------------------------------------------------------------------------------

    def updateWidgetFromMRML(self) -> None:
        """Show what the node holds."""
        self._updating = True
        segmentation = self.segmentationNode()
        self._segmentations.setCurrentNode(segmentation)
        self._volumes.setCurrentNode(self.sourceVolumeNode())
        if self._table.segmentationNode() is not segmentation:
            self._table.setSegmentationNode(segmentation)
            self._show_3d.setSegmentationNode(segmentation)
        self._table.setSelectedSegmentIDs([self.currentSegmentID()])
        active = self.activeEffect()
        for button in self._effects.buttons():
            button.setChecked(button.name == ("" if active is None else active.name))
        if self._node is not None:
            self._overwrite.setCurrentIndex(self._node.GetOverwriteMode())
            self._mask_mode.setCurrentIndex(self._mask_mode.findData(self._node.GetMaskMode()))
        self._updating = False
        before, self._shown = self._shown, (self.segmentationNodeID(), self.sourceVolumeNodeID(), self.currentSegmentID())
        if before[0] != self._shown[0]:
            self.segmentationNodeChanged.emit(segmentation)
        if before[1] != self._shown[1]:
            self.sourceVolumeNodeChanged.emit(self.sourceVolumeNode())
        if before[2] != self._shown[2]:
            self.currentSegmentIDChanged.emit(self._shown[2])

    def _on_segmentation(self, node: Any) -> None:
        if not self._updating:
            self.setSegmentationNode(node)

    def _on_volume(self, node: Any) -> None:
        if not self._updating:
            self.setSourceVolumeNode(node)

    def _on_selection(self, *_selection: Any) -> None:
        chosen = self._table.selectedSegmentIDs()
        if not self._updating and chosen:
            self.setCurrentSegmentID(chosen[0])

    def _on_overwrite(self, index: int) -> None:
        if not self._updating and self._node is not None:
            self._node.SetOverwriteMode(index)

    def _on_mask_mode(self, index: int) -> None:
        if not self._updating and self._node is not None:
            self._node.SetMaskMode(self._mask_mode.itemData(index))

    def _on_add(self) -> None:
        if self.segmentationNode() is not None:
            self.saveStateForUndo()
            self.setCurrentSegmentID(self.segmentationNode().GetSegmentation().AddEmptySegment())

    def _on_remove(self) -> None:
        if self.segmentationNode() is not None and self.currentSegmentID():
            self.saveStateForUndo()
            self.segmentationNode().GetSegmentation().RemoveSegment(self.currentSegmentID())
