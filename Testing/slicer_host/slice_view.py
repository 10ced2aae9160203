"""A slice view rendered off screen by Slicer's own displayable managers."""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
import vtkmodules.vtkRenderingOpenGL2  # noqa: F401  registers what renders
from vtkmodules.util.numpy_support import vtk_to_numpy

_MANAGERS = (
    "vtkMRMLVolumeGlyphSliceDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLCrosshairDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLMarkupsDisplayableManager",
    "vtkMRMLOrientationMarkerDisplayableManager",
    "vtkMRMLRulerDisplayableManager",
)


def _choose_window() -> None:
    """Without a display VTK renders through EGL.

    Raises:
        RuntimeError: the machine has no EGL.
    """
    if not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or "VTK_DEFAULT_OPENGL_WINDOW" in os.environ:
        return
    if ctypes.util.find_library("EGL") is None:
        raise RuntimeError("slice views need EGL: install libegl1, libegl-mesa0 and libgl1-mesa-dri (Debian, Ubuntu)")
    os.environ["VTK_DEFAULT_OPENGL_WINDOW"] = "vtkEGLRenderWindow"


class SliceView:
    """Renders what the slice view ``name`` ("Red", "Yellow", "Green") would show in ``size`` (width, height) pixels.

    Raises:
        ValueError: there is no such view.
        RuntimeError: this machine cannot render off screen.
    """

    def __init__(self, name: str = "Red", size: tuple[int, int] = (500, 500)) -> None:
        widget = slicer.app.layoutManager().sliceWidget(name)
        if widget is None:
            raise ValueError(
                f"there is no slice view '{name}', only {', '.join(slicer.app.layoutManager().sliceViewNames())}"
            )
        _choose_window()
        self.name = name
        self.logic = widget.sliceLogic()
        self._window = vtk.vtkRenderWindow()
        self._window.SetOffScreenRendering(1)
        self._window.SetMultiSamples(0)
        self._window.SetSize(*size)
        self._renderer = vtk.vtkRenderer()
        self._window.AddRenderer(self._renderer)
        self._interactor = vtk.vtkRenderWindowInteractor()
        self._interactor.SetRenderWindow(self._window)
        self._interactor.SetInteractorStyle(vtk.vtkInteractorStyleUser())
        self._interactor.Initialize()
        self._interactor.UpdateSize(*size)
        # First, because what is half transparent is blended with what is painted by then.
        self._add_image()
        self._add_managers()
        self._label = self._text((8, 8), 14)
        self.logic.ResizeSliceNode(*size)
        self.logic.GetSliceNode().SetMappedInLayout(1)

    def _add_managers(self) -> None:
        self._group = slicer.vtkMRMLDisplayableManagerGroup()
        self._group.SetRenderer(self._renderer)
        slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance().SetMRMLApplicationLogic(slicer.app.applicationLogic())
        for name in _MANAGERS:
            manager = getattr(slicer, name)()
            manager.SetMRMLApplicationLogic(slicer.app.applicationLogic())
            self._group.AddDisplayableManager(manager)
        self._group.GetInteractor()
        self._group.SetMRMLDisplayableNode(self.logic.GetSliceNode())

    def _add_image(self) -> None:
        """Background, foreground and label, blended by the slice logic, behind everything else."""
        mapper = vtk.vtkImageMapper()
        mapper.SetColorWindow(255)
        mapper.SetColorLevel(127.5)
        mapper.SetInputConnection(self.logic.GetImageDataConnection())
        self._image = vtk.vtkActor2D()
        self._image.SetMapper(mapper)
        self._image.GetProperty().SetDisplayLocationToBackground()
        self._renderer.AddViewProp(self._image)

    def _text(self, position: tuple[int, int], size: int) -> Any:
        actor = vtk.vtkTextActor()
        actor.SetDisplayPosition(*position)
        actor.GetTextProperty().SetFontSize(size)
        actor.GetTextProperty().SetColor(*self.logic.GetSliceNode().GetLayoutColor())
        self._renderer.AddViewProp(actor)
        return actor

    def fit(self) -> None:
        """Show the whole background."""
        self.logic.FitSliceToBackground()

    def pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The view as uint8 RGB, shape (height, width, 3), the first row on top."""
        offset = self.logic.GetSliceOffset()
        self._label.SetInput(f"{self.logic.GetSliceNode().GetLayoutLabel()}: {offset:.1f} mm")
        if self._image.GetMapper().GetInputConnection(0, 0) is not self.logic.GetImageDataConnection():
            self._image.GetMapper().SetInputConnection(self.logic.GetImageDataConnection())
        self._image.SetVisibility(self.logic.GetImageDataConnection() is not None)
        self._window.Render()
        grabber = vtk.vtkWindowToImageFilter()
        grabber.SetInput(self._window)
        grabber.ReadFrontBufferOff()
        grabber.Update()
        image = grabber.GetOutput()
        width, height, _ = image.GetDimensions()
        values = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(height, width, -1)[::-1, :, :3]
        return np.ascontiguousarray(values)

    def png(self, path: str | Path) -> Path:
        """Write the view to ``path`` and give the path back."""
        from PIL import Image

        Image.fromarray(self.pixels()).save(path)
        return Path(path)

    def close(self) -> None:
        """Give the window and the observers back."""
        self._group.SetMRMLDisplayableNode(None)
        self._renderer.RemoveAllViewProps()
        self._window.Finalize()

    def __enter__(self) -> SliceView:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
