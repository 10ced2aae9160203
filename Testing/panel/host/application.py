"""``slicer.app`` and its module manager."""

from __future__ import annotations

import logging
import tempfile
import types
from typing import Any

import qt
import slicer
from PySide6.QtCore import Signal, qInstallMessageHandler

from . import fonts
from .file_io import CoreIOManager
from .world import World


def _log_message(kind: Any, context: Any, text: str) -> None:
    """Qt's messages go to the log, but for what the off-screen platform says of every window: it cannot raise it."""
    if "This plugin does not support" not in text:
        logging.getLogger("qt").warning("%s", text)


class ModuleManager(qt.QObject):
    """``slicer.app.moduleManager()``."""

    moduleAboutToBeUnloaded = Signal(str)
    moduleLoaded = Signal(str)

    def module(self, name: str) -> Any:
        """The module of that name, or None."""
        return getattr(slicer.modules, name.lower(), None)

    def factoryManager(self) -> Any:
        """What knows which modules there are."""
        return types.SimpleNamespace(
            loadedModuleNames=self.modulesNames, isLoaded=lambda name: self.module(name) is not None
        )

    def modulesNames(self) -> list[str]:
        """The names of all modules."""
        return [each.name for each in vars(slicer.modules).values() if hasattr(each, "widgetRepresentation")]


class Application(qt.QApplication):
    """``slicer.app``, in testing mode, without a main window."""

    startupCompleted = Signal()
    majorVersion, minorVersion, revision, os = 5, 13, "33000", "linux"
    documentationBaseUrl = "https://slicer.readthedocs.io/en/latest/"

    def __init__(self, world: World) -> None:
        super().__init__(["Slicer"])
        qInstallMessageHandler(_log_message)
        self.world = world
        self.manager = ModuleManager()
        self.io = CoreIOManager(world.scene)
        self.layouts: Any = None
        self.restarts = 0
        self._folder = tempfile.TemporaryDirectory(prefix="slicer-host-")
        self.temporaryPath = self._folder.name
        self.slicerHome = self._folder.name
        self.setStyle("Fusion")
        fonts.ensure()

    def moduleManager(self) -> ModuleManager:
        """The module manager."""
        return self.manager

    def coreIOManager(self) -> CoreIOManager:
        """What loads and saves."""
        return self.io

    def ioManager(self) -> CoreIOManager:
        """What loads and saves, with dialogs in the application."""
        return self.io

    def applicationLogic(self) -> Any:
        """The real ``vtkSlicerApplicationLogic``."""
        return self.world.application_logic

    def mrmlScene(self) -> Any:
        """The scene."""
        return self.world.scene

    def layoutManager(self) -> Any:
        """The light layout manager, or None while a test has taken it away."""
        return self.layouts

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
    revisionUserSettings = userSettings

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
        self.restarts += 1

    def startupEnvironment(self) -> Any:
        """The environment that the application was started in."""
        return qt.QProcessEnvironment.systemEnvironment()

    def mainApplicationDisplayName(self) -> str:
        """The name in title bars."""
        return "3D Slicer"

    def pythonConsole(self) -> Any:
        """None: there is no console."""
        return None

    def launcherExecutableFilePath(self) -> str:
        """Empty: there is no launcher."""
        return ""
