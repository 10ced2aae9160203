"""The Segment Editor over a real segment editor node; painting itself needs the application."""

from __future__ import annotations

from typing import Any

import slicer
import vtk
from PySide6.QtCore import Signal

from . import facts
from .observers import Observers
from .segment_editor_look import EFFECTS, SegmentEditorLook
from .stand_ins import kept, stand_in, stands_for


@stands_for("qSlicerSegmentEditorAbstractEffect")
class Effect:
    """An effect as far as it can be without the application: its name."""

    def __init__(self, name: str) -> None:
        self.name = name


@stand_in(slicer)
class qMRMLSegmentEditorWidget(SegmentEditorLook):
    """Works on a ``vtkMRMLSegmentEditorNode``; undo and redo go through the real ``vtkSlicerSegmentEditorLogic``."""

    mrmlSceneChanged = Signal(object)
    segmentationNodeChanged = Signal(object)
    sourceVolumeNodeChanged = Signal(object)
    currentSegmentIDChanged = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._observers = Observers(self)
        self._updating = False
        self._shown: tuple[Any, Any, str] = (None, None, "")
        self._active = ""
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
    readOnly = kept(bool, "readOnly", False)

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
        """Work on this node; what it brings is shown at once, its active effect activated."""
        if not hasattr(slicer.modules, "segmentations"):
            raise RuntimeError("the Segmentations module is unloaded: Slicer has deleted the effects of this widget")
        if node is self._node:
            return
        self._observers.clear()
        self._node = node
        self._logic.SetSegmentEditorNode(node)
        if node is not None:
            self._observers.add(node, vtk.vtkCommand.ModifiedEvent, self.updateWidgetFromMRML)
            self.updateWidgetFromMRML()

    def segmentationNode(self) -> Any:
        """The segmentation in the selector, or None."""
        return self._segmentations.currentNode()

    def setSegmentationNode(self, node: Any) -> None:
        """Edit this segmentation; the active effect ends where it is another one."""
        if self._node is not None and self._node.GetSegmentationNode() is not node:
            self._node.SetAndObserveSegmentationNode(node)
            self.setActiveEffect(None)

    def sourceVolumeNode(self) -> Any:
        """The volume, or None."""
        return None if self._node is None else self._node.GetSourceVolumeNode()

    def setSourceVolumeNode(self, node: Any) -> None:
        """Use this volume's intensities; nothing happens where there is no segmentation."""
        if self._node is not None and self._node.GetSegmentationNode() is not None:
            self._node.SetAndObserveSourceVolumeNode(node)

    def currentSegmentID(self) -> str:
        """The segment being edited, or an empty text."""
        return "" if self._node is None else self._node.GetSelectedSegmentID() or ""

    def setCurrentSegmentID(self, segmentID: str) -> None:
        """Edit this segment."""
        if self._node is not None:
            self._node.SetSelectedSegmentID(segmentID)

    # -- effects and undo ---------------------------------------------------------------------------------------------

    def effectByName(self, name: str) -> Any:
        """The effect, or None."""
        return Effect(name) if name in EFFECTS else None

    def activeEffect(self) -> Any:
        """The active effect, or None."""
        return self.effectByName(self._active)

    def updateEffectList(self) -> None:
        """Offer the effects that were registered since (none here)."""

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
        scene = self.mrmlScene()
        if self._node is None or scene is None or scene.IsClosing() or scene.IsBatchProcessing():
            return
        blocked = self._node.StartModify()
        self._updating = True
        self._show_segmentation(self._node.GetSegmentationNode())
        self._show_volume(self._node.GetSourceVolumeNode())
        self._table.setSelectedSegmentIDs([self.currentSegmentID()])
        self._show_effect(self._node.GetActiveEffectName() or "")
        self._overwrite.setCurrentIndex(self._node.GetOverwriteMode())
        self._mask_mode.setCurrentIndex(self._mask_mode.findData(self._node.GetMaskMode()))
        self._updating = False
        before, self._shown = self._shown, (*self._shown[:2], self.currentSegmentID())
        if before[2] != self._shown[2]:
            self.currentSegmentIDChanged.emit(self._shown[2])
        self._node.EndModify(blocked)

    def _show_segmentation(self, segmentation: Any) -> None:
        """A new one brings its reference volume and its first segment with it."""
        self._segmentations.setCurrentNode(segmentation)
        if segmentation is self._shown[0]:
            return
        self._shown = (segmentation, *self._shown[1:])
        self._table.setSegmentationNode(segmentation)
        self._show_3d.setSegmentationNode(segmentation)
        if segmentation is not None:
            role = segmentation.GetReferenceImageGeometryReferenceRole()
            self._node.SetAndObserveSourceVolumeNode(segmentation.GetNodeReference(role))
            segmentation.CreateDefaultDisplayNodes()
            if segmentation.GetSegmentation().GetNumberOfSegments():
                self._node.SetSelectedSegmentID(segmentation.GetSegmentation().GetNthSegmentID(0))
            for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
                composite.SetLabelVolumeID(None)
        self.segmentationNodeChanged.emit(segmentation)

    def _show_volume(self, volume: Any) -> None:
        """One that no slice view shows takes the place of all that they show."""
        self._volumes.setCurrentNode(volume)
        if self._node.GetSegmentationNode() is None or volume is self._shown[1]:
            return
        self._shown = (self._shown[0], volume, self._shown[2])
        for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode") if volume is not None else ():
            shown = (composite.GetBackgroundVolumeID(), composite.GetForegroundVolumeID())
            if self.autoShowSourceVolumeNode and volume.GetID() not in shown:
                composite.SetBackgroundVolumeID(volume.GetID())
                composite.SetForegroundVolumeID(None)
                composite.SetLabelVolumeID(None)
        self.sourceVolumeNodeChanged.emit(volume)

    def _show_effect(self, name: str) -> None:
        """Activate what the node says; that needs a segmentation, and Slicer 5.10 crashes where there is none."""
        if name in EFFECTS and name != self._active and self._node.GetSegmentationNode() is None:
            if facts.chosen == "5.10":
                raise RuntimeError(f"Slicer 5.10 crashes: the effect {name} is activated without a segmentation")
            name = ""
        self._active = name if name in EFFECTS else ""
        for button in self._effects.buttons():
            button.setChecked(button.name == self._active)

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
