"""``slicer.app.layoutManager()``: three slice views without windows, over real slice logics."""

from __future__ import annotations

from typing import Any

import slicer

from .stand_ins import stands_for

_VIEWS = (("Red", "R", "Axial", (0.95, 0.29, 0.33)), ("Yellow", "Y", "Sagittal", (0.93, 0.84, 0.3)),
          ("Green", "G", "Coronal", (0.43, 0.69, 0.29)))  # fmt: skip


@stands_for("qMRMLSliceWidget")
class SliceWidget:
    """One slice view, as ``layoutManager().sliceWidget("Red")`` gives it."""

    def __init__(self, logic: Any) -> None:
        self._logic = logic
        self._view = _View()

    def sliceLogic(self) -> Any:
        """The real ``vtkMRMLSliceLogic``."""
        return self._logic

    def mrmlSliceNode(self) -> Any:
        """The slice node."""
        return self._logic.GetSliceNode()

    def mrmlSliceCompositeNode(self) -> Any:
        """The node that says which volumes are shown."""
        return self._logic.GetSliceCompositeNode()

    def sliceView(self) -> Any:
        """What renders; here it only takes the calls."""
        return self._view

    def fitSliceToBackground(self) -> None:
        """Show the whole background."""
        self._logic.FitSliceToBackground()


@stands_for("qMRMLSliceView")
class _View:
    """A view that has nothing on the screen."""

    def scheduleRender(self) -> None:
        """Render soon."""

    def forceRender(self) -> None:
        """Render now."""


@stands_for("qSlicerLayoutManager")
class LayoutManager:
    """As much of ``qSlicerLayoutManager`` as a module with slice views needs."""

    def __init__(self, scene: Any, application_logic: Any) -> None:
        self._widgets: dict[str, SliceWidget] = {}
        self._logics = application_logic.GetSliceLogics()
        self.threeDViewCount = 0
        self.tableViewCount = 0
        self.layout = 3
        for name, label, orientation, colour in _VIEWS:
            logic = slicer.vtkMRMLSliceLogic()
            logic.SetMRMLApplicationLogic(application_logic)
            logic.SetMRMLScene(scene)
            node = logic.AddSliceNode(name)
            node.SetLayoutLabel(label)
            node.SetLayoutColor(*colour)
            node.SetOrientation(orientation)
            node.SetMappedInLayout(1)
            logic.ResizeSliceNode(400, 400)
            self._logics.AddItem(logic)
            self._widgets[name] = SliceWidget(logic)

    def sliceViewNames(self) -> tuple[str, ...]:
        """The names of the slice views."""
        return tuple(self._widgets)

    def sliceWidget(self, name: str) -> SliceWidget | None:
        """The slice view of that name, or None."""
        return self._widgets.get(name)

    def mrmlSliceLogics(self) -> Any:
        """All slice logics, in a ``vtkCollection``."""
        return self._logics

    def setLayout(self, layout: int) -> None:
        """Choose a layout: only remembered."""
        self.layout = layout

    def threeDWidget(self, index: int) -> None:
        """None: there is no 3D view."""
        return

    def resetSliceViews(self) -> None:
        """Fit every slice view to its background."""
        for widget in self._widgets.values():
            widget.fitSliceToBackground()

    def resetThreeDViews(self) -> None:
        """Nothing: there is no 3D view."""
