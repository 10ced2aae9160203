"""A call when the slice views show another place."""

from __future__ import annotations

from typing import Any

import qt
import slicer
import vtk

from ProGiDiffSlicerLib.signals import Signal

# A slice view reports every pixel of a drag; the panel follows at this pace.
_PAUSE_MS = 60


class SliceWatch:
    """Watches the slice views.

    Attributes:
        moved: Signal(): a view shows another place.
    """

    def __init__(self, parent: Any) -> None:
        self.moved = Signal()
        self._observed: list[tuple[Any, int]] = []
        self._timer = qt.QTimer(parent)
        self._timer.setSingleShot(True)
        self._timer.setInterval(_PAUSE_MS)
        self._timer.connect("timeout()", self.moved.emit)

    def start(self) -> None:
        """Watch the views that there are now."""
        self.stop()
        scene = slicer.mrmlScene
        for number in range(scene.GetNumberOfNodesByClass("vtkMRMLSliceNode")):
            node = scene.GetNthNodeByClass(number, "vtkMRMLSliceNode")
            self._observed.append((node, node.AddObserver(vtk.vtkCommand.ModifiedEvent, self._on_modified)))

    def stop(self) -> None:
        """Watch nothing."""
        for node, tag in self._observed:
            node.RemoveObserver(tag)
        self._observed.clear()
        self._timer.stop()

    def cleanup(self) -> None:
        """Watch nothing any more."""
        self.stop()
        self._timer.disconnect("timeout()", self.moved.emit)
        self.moved.clear()

    def _on_modified(self, caller: Any, event: str) -> None:
        if not self._timer.active:
            self._timer.start()
