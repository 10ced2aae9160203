"""The tie between a panel and the scene's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import vtk


class Binding:
    """Connects a panel's widgets with parameters and calls back when a parameter changes.

    Attributes:
        parameters: the :class:`~ProGiDiffSlicerLib.parameters.Parameters` that are shown, or ``None``.
    """

    def __init__(self, widget: Any, changed: Callable[[], None]) -> None:
        self.parameters: Any = None
        self._widget = widget
        self._changed = changed
        self._gui_tag: Any = None
        self._observer: Any = None

    def bind(self, parameters: Any) -> None:
        """Show these parameters instead of others."""
        self.release()
        self.parameters = parameters
        self._gui_tag = parameters.connectGui(self._widget)
        self._observer = parameters.AddObserver(vtk.vtkCommand.ModifiedEvent, self._on_modified)
        self._changed()

    def release(self) -> None:
        """Let go of the parameters."""
        if self.parameters is not None:
            self.parameters.disconnectGui(self._gui_tag)
            self.parameters.RemoveObserver(self._observer)
        self.parameters = None

    def _on_modified(self, _caller: Any, _event: str) -> None:
        if self.parameters is not None:
            self._changed()
