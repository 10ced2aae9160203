"""Slicer's widgets that know the scene: the containers, sliders with units, and the widget of a scripted module."""

from __future__ import annotations

import importlib
from typing import Any

import qt
import slicer
from PySide6.QtCore import Property, Signal

from .stand_ins import stand_in


def install() -> None:
    """Put every stand-in into the module ``slicer``; calling it again changes nothing."""
    for part in ("node_combo_box", "segments_table", "segment_editor"):
        importlib.import_module(f"{__package__}.{part}")


class SceneHolder:
    """``setMRMLScene()`` and the signal that passes the scene on."""

    mrmlSceneChanged = Signal(object)

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

    def mrmlScene(self) -> Any:
        """The scene, or None."""
        return self.__dict__.get("_scene")


@stand_in(slicer)
class qSlicerWidget(SceneHolder, qt.QWidget):
    """A widget with a scene, of the application."""

    mrmlSceneChanged = Signal(object)


@stand_in(slicer)
class qSlicerScriptedLoadableModuleWidget(qSlicerWidget):
    """What holds the widget of a scripted module. ``self()`` gives the Python object."""

    isEntered = Property(bool, lambda self: self.__dict__.get("_entered", False))

    def self(self) -> Any:
        """The Python object, or None before it is made."""
        return self.__dict__.get("_python")

    def enter(self) -> None:
        """The module is chosen."""
        self.__dict__["_entered"] = True
        self._call("enter")

    def exit(self) -> None:
        """Another module is chosen."""
        self.__dict__["_entered"] = False
        self._call("exit")

    def reload(self) -> None:
        """Make the Python object anew, from the module's file as it was read last."""
        self.__dict__["_make_widget"]()

    def _call(self, name: str) -> None:
        method = getattr(self.__dict__.get("_python"), name, None)
        if method is not None:
            method()


install()
