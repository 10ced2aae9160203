"""Loading ``.ui`` files whose classes come from CTK and from Slicer."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from PySide6 import QtCore, QtUiTools, QtWidgets

from .signatures import signal_name

# Name of the class in a .ui file -> the stand-in for it.
registry: dict[str, type] = {}
_MRML_TYPES = ("vtkMRMLScene", "vtkMRMLNode")


class UiLoader(QtUiTools.QUiLoader):
    """``qt.QUiLoader`` that knows the stand-ins and connects their signals and slots, which are Python here."""

    def load(self, device: Any, parent: Any = None) -> Any:
        """The widget that ``device`` (an open ``QFile``) describes.

        Raises:
            RuntimeError: the file uses a class that this host has no stand-in for.
        """
        root = ET.fromstring(bytes(device.readAll().data()))
        used = {str(widget.get("class")) for widget in root.iter("widget")}
        missing = sorted(name for name in used if not hasattr(QtWidgets, name) and name not in registry)
        if missing:
            raise RuntimeError(f"this host has no stand-in for {', '.join(missing)}: add one there")
        for name in sorted(used & set(registry)):
            self.registerCustomWidget(registry[name])
        _numbers_for_flags(root)
        by_python = _taken_connections(root)
        text = QtCore.QBuffer()
        text.setData(ET.tostring(root))
        text.open(QtCore.QIODevice.ReadOnly)
        widget = super().load(text, parent)
        for sender, signal, receiver, slot in by_python:
            source, target = _named(widget, sender), _named(widget, receiver)
            source.connect(signal, getattr(target, signal_name(slot)))
        return widget


def _numbers_for_flags(root: ET.Element) -> None:
    """Write flags of stand-ins (``ctkPathLineEdit::Dirs|...``), which Qt's own loader does not know, as numbers."""
    for value in list(root.iter("set")):
        names = [name.rpartition("::") for name in (value.text or "").split("|")]
        if all(owner in registry for owner, _, _ in names):
            number = 0
            for owner, _, name in names:
                number |= int(registry[owner]._flags[name])
            value.tag, value.text = "number", str(number)


def _taken_connections(root: ET.Element) -> list[tuple[str, str, str, str]]:
    """Take the connections that begin or end at a stand-in, or carry a MRML object, out of the document."""
    ours = {widget.get("name") for widget in root.iter("widget") if widget.get("class") in registry}
    taken = []
    for group in root.iter("connections"):
        for connection in list(group):
            sender, signal, receiver, slot = (
                connection.findtext(each, "") for each in ("sender", "signal", "receiver", "slot")
            )
            if sender in ours or receiver in ours or any(kind in signal for kind in _MRML_TYPES):
                taken.append((sender, signal, receiver, slot))
                group.remove(connection)
    return taken


def _named(widget: Any, name: str) -> Any:
    if widget.objectName == name:
        return widget
    found = widget.findChild(QtCore.QObject, name)
    if found is None:
        raise RuntimeError(f"the .ui file connects '{name}', which it does not contain")
    return found
