"""The scene, the logics of Slicer's modules over it, and what the application adds to a scene from Qt."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path
from typing import Any

import slicer
import vtk

from . import terminology
from .segment_items import observe
from .stand_ins import stands_for

# Name of the module -> its logic in slicer-core.
_LOGICS = {
    "Terminologies": "vtkSlicerTerminologiesModuleLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "Volumes": "vtkSlicerVolumesLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Models": "vtkSlicerModelsLogic",
    "Tables": "vtkSlicerTablesLogic",
    "Texts": "vtkSlicerTextsLogic",
    "Sequences": "vtkSlicerSequencesLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "CropVolume": "vtkSlicerCropVolumeLogic",
}


@stands_for("qSlicerLoadableModule")
class Module:
    """One of Slicer's modules, as ``slicer.modules.<name>`` shows it."""

    def __init__(self, name: str, logic: Any, path: str = "") -> None:
        self.name = name
        self.title = name
        self.path = path
        self._logic = logic

    def logic(self) -> Any:
        """The module's logic."""
        return self._logic

    def widgetRepresentation(self) -> Any:
        """The module's widget: none here."""
        return None


class World:
    """The scene and everything that has to live as long as it does."""

    def __init__(self, terminologies: Path | None = None) -> None:
        self.scene = slicer.vtkMRMLScene()
        self.application_logic = slicer.vtkSlicerApplicationLogic()
        self.application_logic.SetMRMLScene(self.scene)
        self.application_logic.SetSliceLogics(vtk.vtkCollection())
        self.application_logic.SetViewLogics(vtk.vtkCollection())
        self.modules = types.ModuleType("slicer.modules")
        self.core_modules: dict[str, Module] = {}
        self._cache = tempfile.TemporaryDirectory(prefix="scene-cache-")
        terminologies = terminologies or terminology.folder_without_terms(Path(self._cache.name))
        Path(self._cache.name, ".slicer-cache").touch()  # without it the cache manager warns that it may not delete
        self._add_data_io()
        crosshair = slicer.vtkMRMLCrosshairNode()
        crosshair.SetCrosshairName("default")
        self.scene.AddNode(crosshair)
        self.scene.AddNode(slicer.vtkMRMLInteractionNode())
        self.scene.AddNode(slicer.vtkMRMLSelectionNode())
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene, True)
        colours = slicer.vtkMRMLColorLogic()
        colours.SetMRMLScene(self.scene)
        colours.AddDefaultColorNodes()
        self.add_module("Colors", colours)
        for name, cls in _LOGICS.items():
            logic = getattr(slicer, cls)()
            if name == "Terminologies":
                logic.SetModuleShareDirectory(str(terminologies))
            self.add_module(name, logic)
        observe(self.scene)

    def add_module(self, name: str, logic: Any) -> None:
        """Make ``slicer.modules.<name>`` and connect its logic to the scene."""
        if hasattr(logic, "SetMRMLApplicationLogic"):
            logic.SetMRMLApplicationLogic(self.application_logic)
        logic.SetMRMLScene(self.scene)
        self.core_modules[name] = Module(name, logic)
        self.load_modules()

    def load_modules(self) -> None:
        """Make ``slicer.modules.<name>`` for all modules."""
        for name, module in self.core_modules.items():
            self.application_logic.SetModuleLogic(name, module.logic())
            setattr(self.modules, name.lower(), module)

    def unload_module(self, name: str) -> None:
        """Take a module away, as when the application ends."""
        self.application_logic.SetModuleLogic(name, None)
        delattr(self.modules, name.lower())

    def _add_data_io(self) -> None:
        """Reading ``.mrb`` needs a data manager with a cache folder."""
        self._remote = slicer.vtkMRMLRemoteIOLogic()
        self._remote.SetMRMLScene(self.scene)
        self._remote.SetMRMLApplicationLogic(self.application_logic)
        self._remote.GetCacheManager().SetRemoteCacheDirectory(self._cache.name)
        self._data_io = slicer.vtkDataIOManagerLogic()
        self._data_io.SetMRMLScene(self.scene)
        self._data_io.SetMRMLApplicationLogic(self.application_logic)
        self._data_io.SetAndObserveDataIOManager(self._remote.GetDataIOManager())
        self._remote.AddDataIOToScene()

    def clear(self) -> None:
        """Close the scene as File/Close does, and also forget parameter nodes, which Slicer keeps empty."""
        self.scene.Clear(False)
        for cls in ("vtkMRMLScriptedModuleNode", "vtkMRMLSegmentEditorNode"):
            while (node := self.scene.GetFirstNodeByClass(cls)) is not None:
                self.scene.RemoveNode(node)
        self.scene.SetURL("")
        self.scene.SetRootDirectory("")
