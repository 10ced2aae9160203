"""The module ``qt``, as Slicer's Python has it: all of Qt's classes in one flat name space."""

from __future__ import annotations

import importlib
import sys
import types

from PySide6 import QtCore

from . import pythonqt
from .ui_loader import UiLoader

_PARTS = ("QtCore", "QtGui", "QtWidgets", "QtNetwork", "QtSvg", "QtUiTools")


def install() -> types.ModuleType:
    """Make ``import qt`` work and give PySide6's classes PythonQt's manners; calling it again changes nothing."""
    if "qt" in sys.modules:
        return sys.modules["qt"]
    module = types.ModuleType("qt", "Qt for Python, with the manners of PythonQt.")
    for part in _PARTS:
        source = importlib.import_module(f"PySide6.{part}")
        for name in dir(source):
            # Signal, Slot and Property are left out: Slicer's Python cannot declare them either.
            if name.startswith("Q") and not name.startswith("QT_"):
                setattr(module, name, getattr(source, name))
    classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, QtCore.QObject)]
    pythonqt.apply(classes)
    module.QUiLoader = UiLoader  # type: ignore[attr-defined]
    sys.modules["qt"] = module
    return module
