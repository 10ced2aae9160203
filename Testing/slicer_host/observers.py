"""VTK observers of a widget, which end with it as those of Slicer's own widgets do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import shiboken6
import vtk


class Observers:
    """What a widget observes. Nothing here keeps the widget alive."""

    def __init__(self, widget: Any) -> None:
        self._widget = weakref.ref(widget)
        self._tags: list[tuple[Any, int]] = []
        widget.destroyed.connect(lambda *_: self.clear())

    def add(self, where: Any, event: Any, method: Callable[..., None]) -> None:
        """Call the widget's bound ``method`` without arguments when ``where`` says ``event``."""
        function, widget = method.__func__, self._widget  # type: ignore[attr-defined]

        def called(_caller: Any, _event: str) -> None:
            alive = widget()
            if alive is not None and shiboken6.isValid(alive):
                function(alive)

        self._tags.append((where, where.AddObserver(event, called)))

    def add_with_node(self, where: Any, event: Any, method: Callable[..., None]) -> None:
        """As ``add``, with the node that the event is about as the argument."""
        function, widget = method.__func__, self._widget  # type: ignore[attr-defined]

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def called(_caller: Any, _event: str, node: Any) -> None:
            alive = widget()
            if alive is not None and shiboken6.isValid(alive):
                function(alive, node)

        self._tags.append((where, where.AddObserver(event, called)))

    def clear(self) -> None:
        """Observe nothing any more."""
        tags, self._tags = self._tags, []
        for where, tag in tags:
            where.RemoveObserver(tag)
