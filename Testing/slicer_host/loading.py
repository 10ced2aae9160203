"""Loading a scripted module as Slicer's factory does, and unloading it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import qt
import slicer

from .stand_ins import stands_for


@stands_for("qSlicerScriptedLoadableModule")
class ModuleInfo:
    """What a scripted module says about itself, ``parent`` of its first class."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.title = self.helpText = self.acknowledgementText = ""
        self.categories: list[str] = []
        self.dependencies: list[str] = []
        self.contributors: list[str] = []
        self.icon: Any = None
        self.hidden = False
        self._widget: Any = None

    def logic(self) -> Any:
        """None: the logic of a scripted module is in Python."""
        return None

    def widgetRepresentation(self) -> Any:
        """What holds the module's widget."""
        return self._widget


class LoadedModule:
    """A module, its widget, and how to get rid of both."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._folder = str(path.parent)
        self._added_folder = self._folder not in sys.path
        if self._added_folder:
            sys.path.insert(0, self._folder)
        self.source = importlib.import_module(self.name)
        self.info = ModuleInfo(self.name, str(path))
        self.module = getattr(self.source, self.name)(self.info)
        setattr(slicer.modules, self.name.lower(), self.info)
        setattr(slicer.modules, f"{self.name}Instance", self.module)
        self.holder = slicer.qSlicerScriptedLoadableModuleWidget()
        self.holder.setLayout(qt.QVBoxLayout())
        self.holder.setMRMLScene(slicer.mrmlScene)
        self.holder.__dict__["_make_widget"] = self._make_widget
        self.info._widget = self.holder
        slicer.app._loaded.append(self)
        self._make_widget()

    def _make_widget(self) -> None:
        source = sys.modules[self.name]
        self.widget: Any = getattr(source, f"{self.name}Widget")(self.holder)
        self.holder.__dict__["_python"] = self.widget
        setattr(slicer.modules, f"{self.name}Widget", self.widget)
        self.widget.setup()

    def unload(self) -> None:
        """Call ``cleanup()`` as the module manager does, delete the widget, forget the module; once."""
        if self not in slicer.app._loaded:
            return
        slicer.app._loaded.remove(self)
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


def unload_order() -> list[str]:
    """The names of all modules, as they are unloaded: the reverse of the order in which they are loaded.

    That is the alphabet's, but for the modules that another one says it depends on, which come first.
    """
    scripted = {each.name: each.info.dependencies for each in slicer.app._loaded}
    order: list[str] = []

    def load(name: str) -> None:
        for needed in scripted.get(name, ()):
            load(needed)
        if name not in order:
            order.append(name)

    for name in sorted([*scripted, *slicer.app._world.core_modules]):
        load(name)
    return order[::-1]


def quit_application() -> None:
    """End the application as Slicer does: all modules are unloaded in their order, then whoever wants to know is told.

    What belongs to Slicer comes back afterwards, for the next test.
    """
    world = slicer.app._world
    for name in unload_order():
        scripted = next((each for each in slicer.app._loaded if each.name == name), None)
        if scripted is not None:
            scripted.unload()
        else:
            world.unload_module(name)
    try:
        slicer.app.aboutToQuit.emit()
    finally:
        world.load_modules()


def load_module(path: str | Path) -> LoadedModule:
    """Load the scripted module in that file.

    Raises:
        AttributeError: the file lacks ``<Name>`` or ``<Name>Widget``.
        ImportError: the file cannot be imported.
    """
    return LoadedModule(Path(path).resolve())
