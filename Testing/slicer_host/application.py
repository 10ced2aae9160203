"""``slicer.app`` and its module manager."""

from __future__ import annotations

import logging
import tempfile
import types
from typing import Any

import qt
import slicer
from PySide6.QtCore import Signal, qInstallMessageHandler

from . import facts, fonts
from .file_io import CoreIOManager
from .stand_ins import stands_for
from .world import World


def _log_message(kind: Any, context: Any, text: str) -> None:
    """Qt's messages go to the log, but for what the off-screen platform says of every window: it cannot raise it."""
    if "This plugin does not support" not in text:
        logging.getLogger("qt").warning("%s", text)


@stands_for("qSlicerModuleFactoryManager")
class ModuleFactoryManager:
    """``slicer.app.moduleManager().factoryManager()``: which modules there are."""


@stands_for("qSlicerModuleManager")
class ModuleManager(qt.QObject):
    """``slicer.app.moduleManager()``."""

    moduleAboutToBeUnloaded = Signal(str)
    moduleLoaded = Signal(str)

    def module(self, name: str) -> Any:
        """The module of that name, or None."""
        return getattr(slicer.modules, name.lower(), None)

    def factoryManager(self) -> Any:
        """What knows which modules there are."""
        return ModuleFactoryManager()


@stands_for("qSlicerApplication")
class Application(qt.QApplication):
    """``slicer.app``, in testing mode, without a main window."""

    startupCompleted = Signal()
    revision, os = "33000", "linux"
    documentationBaseUrl = "https://slicer.readthedocs.io/en/latest/"

    def __init__(self, world: World) -> None:
        super().__init__(["Slicer"])
        qInstallMessageHandler(_log_message)
        self._world = world
        self._loaded: list[Any] = []
        self._manager = ModuleManager()
        self._io = CoreIOManager(world.scene)
        self._layouts: Any = None
        self._restarts = 0
        self._folder = tempfile.TemporaryDirectory(prefix="slicer-host-")
        self.temporaryPath = self._folder.name
        self.slicerHome = self._folder.name
        self.setStyle("Fusion")
        fonts.ensure()

    @property
    def majorVersion(self) -> int:
        """5."""
        return int(facts.chosen.split(".")[0])

    @property
    def minorVersion(self) -> int:
        """10 or 13, as the host is chosen to be."""
        return int(facts.chosen.split(".")[1])

    def moduleManager(self) -> ModuleManager:
        """The module manager."""
        return self._manager

    def coreIOManager(self) -> CoreIOManager:
        """What loads and saves."""
        return self._io

    def ioManager(self) -> CoreIOManager:
        """What loads and saves, with dialogs in the application."""
        return self._io

    def applicationLogic(self) -> Any:
        """The real ``vtkSlicerApplicationLogic``."""
        return self._world.application_logic

    def mrmlScene(self) -> Any:
        """The scene."""
        return self._world.scene

    def layoutManager(self) -> Any:
        """The light layout manager, or None while a test has taken it away."""
        return self._layouts

    def testingEnabled(self) -> bool:
        """True: dialogs are not shown."""
        return True

    def commandOptions(self) -> Any:
        """The command line."""
        return types.SimpleNamespace(noMainWindow=True)

    def userSettings(self) -> Any:
        """The settings, in a folder of this run."""
        return qt.QSettings()

    settings = userSettings

    def translate(self, context: str, text: str) -> str:
        """The text itself: no language is loaded."""
        return text

    def moduleDocumentationUrl(self, name: str) -> str:
        """Where a module is described."""
        return f"{self.documentationBaseUrl}user_guide/modules/{name.lower()}.html"

    def pauseRender(self) -> None:
        """Hold rendering back."""

    def resumeRender(self) -> None:
        """Render again."""

    def restart(self) -> None:
        """Count the wish: nothing is restarted."""
        self._restarts += 1

    def startupEnvironment(self) -> Any:
        """The environment that the application was started in."""
        return qt.QProcessEnvironment.systemEnvironment()

    def pythonConsole(self) -> Any:
        """None: there is no console."""
        return None
