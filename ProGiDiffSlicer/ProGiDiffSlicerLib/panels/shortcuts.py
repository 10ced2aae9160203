"""Keys that work inside a panel while the module is shown, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qt


class Shortcuts:
    """Shortcuts of widgets, installed together and removed together.

    They are never on the main window, where they would take keys from Slicer's own views and editors.
    """

    def __init__(self) -> None:
        self._wanted: list[tuple[Any, str, Callable[[], None]]] = []
        self._installed: list[tuple[Any, Callable[[], None]]] = []

    def add(self, widget: Any, keys: str, action: Callable[[], None]) -> None:
        """Call ``action``, a bound method, when ``keys`` are pressed in ``widget`` or in one of its children."""
        self._wanted.append((widget, keys, action))

    def install(self) -> None:
        """Make the keys work; they work once, however often this is called."""
        if self._installed:
            return
        for widget, keys, action in self._wanted:
            shortcut = qt.QShortcut(widget)
            shortcut.setKey(qt.QKeySequence(keys))
            shortcut.setContext(qt.Qt.WidgetWithChildrenShortcut)
            shortcut.connect("activated()", action)
            self._installed.append((shortcut, action))

    def remove(self) -> None:
        """Give the keys back."""
        for shortcut, action in self._installed:
            shortcut.disconnect("activated()", action)
            shortcut.setEnabled(False)
            shortcut.deleteLater()
        self._installed.clear()


class Numbered:
    """A bound method for one number, since a shortcut passes no argument."""

    def __init__(self, number: int, action: Callable[[int], None]) -> None:
        self._number = number
        self._action = action

    def call(self) -> None:
        """Call the action with the number."""
        self._action(self._number)
