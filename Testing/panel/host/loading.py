"""Loading a scripted module as Slicer's factory does, and unloading it."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import qt
import slicer


class LoadedModule:
    """A module, its widget, and how to get rid of both."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._folder = str(path.parent)
        self._added_folder = self._folder not in sys.path
        if self._added_folder:
            sys.path.insert(0, self._folder)
        self.source = importlib.import_module(self.name)
        self.info = types.SimpleNamespace(
            name=self.name, path=str(path), title="", categories=[], dependencies=[], contributors=[], helpText="",
            acknowledgementText="", icon=None, hidden=False, logic=lambda: None,
        )  # fmt: skip
        self.module = getattr(self.source, self.name)(self.info)
        setattr(slicer.modules, self.name.lower(), self.info)
        setattr(slicer.modules, f"{self.name}Instance", self.module)
        self.holder = slicer.qSlicerScriptedLoadableModuleWidget()
        self.holder.setLayout(qt.QVBoxLayout())
        self.holder.setMRMLScene(slicer.mrmlScene)
        self.holder.__dict__["reload"] = self._make_widget
        self.info.widgetRepresentation = lambda: self.holder
        self._make_widget()

    def _make_widget(self) -> None:
        source = sys.modules[self.name]
        self.widget: Any = getattr(source, f"{self.name}Widget")(self.holder)
        self.holder.__dict__["_python"] = self.widget
        setattr(slicer.modules, f"{self.name}Widget", self.widget)
        self.widget.setup()

    def unload(self) -> None:
        """Call ``cleanup()`` as the module manager does, delete the widget, forget the module."""
        slicer.app.moduleManager().moduleAboutToBeUnloaded.emit(self.name)
        for name in (self.name.lower(), f"{self.name}Instance", f"{self.name}Widget"):
            if hasattr(slicer.modules, name):
                delattr(slicer.modules, name)
        getattr(slicer, "selfTests", {}).pop(self.name, None)
        sys.modules.pop(self.name, None)
        self.holder.__dict__.clear()
        self.holder.deleteLater()
        slicer.app.sendPostedEvents(None, qt.QEvent.DeferredDelete)
        slicer.app.processEvents()
        if self._added_folder and self._folder in sys.path:
            sys.path.remove(self._folder)


def load_module(path: str | Path) -> LoadedModule:
    """Load the scripted module in that file.

    Raises:
        AttributeError: the file lacks ``<Name>`` or ``<Name>Widget``.
        ImportError: the file cannot be imported.
    """
    return LoadedModule(Path(path).resolve())
