"""Slicer's widgets that know the scene: the containers, sliders with units, and the widget of a scripted module."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import ctk
import qt
import slicer
from PySide6.QtCore import Signal

from .stand_ins import kept, stand_in


def install() -> None:
    """Put every stand-in into the module ``slicer``; calling it again changes nothing."""
    for part in ("node_combo_box", "segments_table", "segment_selector", "segment_editor"):
        importlib.import_module(f"{__package__}.{part}")


class SceneHolder:
    """``mrmlScene()``, ``setMRMLScene()`` and the signal that passes the scene on."""

    extra_signatures: ClassVar[dict[str, Any]] = {"mrmlSceneChanged(vtkMRMLScene*)": None}
    mrmlSceneChanged = Signal(object)

    def mrmlScene(self) -> Any:
        """The scene, or None."""
        return self.__dict__.get("_scene")

    def setMRMLScene(self, scene: Any) -> None:
        """Use this scene."""
        if scene is self.__dict__.get("_scene"):
            return
        self.__dict__["_scene"] = scene
        self.mrmlSceneChanged.emit(scene)


@stand_in(slicer)
class qMRMLWidget(SceneHolder, qt.QWidget):
    """A widget with a scene."""

    mrmlSceneChanged = Signal(object)


@stand_in(slicer)
class qSlicerWidget(SceneHolder, qt.QWidget):
    """A widget with a scene, of the application."""

    mrmlSceneChanged = Signal(object)


@stand_in(slicer)
class qSlicerScriptedLoadableModuleWidget(qSlicerWidget):
    """What holds the widget of a scripted module. ``self()`` gives the Python object."""

    def self(self) -> Any:
        """The Python object, or None before it is made."""
        return self.__dict__.get("_python")

    def enter(self) -> None:
        """The module is chosen."""
        self._call("enter")

    def exit(self) -> None:
        """Another module is chosen."""
        self._call("exit")

    def _call(self, name: str) -> None:
        method = getattr(self.__dict__.get("_python"), name, None)
        if method is not None:
            method()


@stand_in(slicer)
class qMRMLSliderWidget(ctk.ctkSliderWidget):
    """A slider whose unit comes from the scene."""

    quantity = kept(str, "quantity", "")

    def setMRMLScene(self, scene: Any) -> None:
        """Use this scene."""
        self.__dict__["_scene"] = scene


@stand_in(slicer)
class qMRMLSpinBox(ctk.ctkDoubleSpinBox):
    """A spin box whose unit comes from the scene."""

    quantity = kept(str, "quantity", "")

    def setMRMLScene(self, scene: Any) -> None:
        """Use this scene."""
        self.__dict__["_scene"] = scene


@stand_in(slicer)
class qMRMLRangeWidget(ctk.ctkRangeWidget):
    """A range whose unit comes from the scene."""

    quantity = kept(str, "quantity", "")

    def setMRMLScene(self, scene: Any) -> None:
        """Use this scene."""
        self.__dict__["_scene"] = scene


install()
