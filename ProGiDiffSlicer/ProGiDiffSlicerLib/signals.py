"""Signals in plain Python: Qt's own cannot be declared from Python inside Slicer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Signal:
    """Something that happens, and who wants to be told.

    Listeners are called in the order in which they connected. One that is disconnected while the others are told is not
    called any more; one that connects meanwhile is called from the next time on.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[..., Any]] = []

    def connect(self, listener: Callable[..., Any]) -> None:
        """Call ``listener`` from now on; a listener is called once however often it connects."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def disconnect(self, listener: Callable[..., Any]) -> None:
        """Call ``listener`` no more; one that is not connected is passed over."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def clear(self) -> None:
        """Forget every listener."""
        self._listeners.clear()

    def emit(self, *values: Any) -> None:
        """Tell every listener.

        Raises:
            Exception: whatever a listener raises; the listeners after it are not told.
        """
        for listener in list(self._listeners):
            if listener in self._listeners:
                listener(*values)
