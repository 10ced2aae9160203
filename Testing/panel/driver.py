"""The module opened in the host, and hands that use its widgets as a person does."""

from __future__ import annotations

import ctypes.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import slicer_host as host

host.install()

import numpy as np  # noqa: E402
import qt  # noqa: E402
import slicer  # noqa: E402
import vtk  # noqa: E402
from PIL import Image  # noqa: E402
from PySide6.QtTest import QTest  # noqa: E402

from progidiff.volumes.reading import Volume  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "ProGiDiffSlicer" / "ProGiDiffSlicer.py"
PANEL_WIDTH = 460
# By then the panel has begun to draw its thumbnails of another slice.
FOLLOWS_S = 0.2
VIEW, LARGE_VIEW = (560, 500), (760, 640)
VIEWS = ("Red", "Yellow", "Green")


class Driver:
    """The module in a window of the host.

    Everything that a user does goes through the module's own widgets: they are clicked, typed into and set as by hand.

    Attributes:
        widget: the module's widget, as Slicer's factory makes it.
        volume: the volume that was loaded last.
    """

    def __init__(self) -> None:
        self.find_library()
        if sys.platform.startswith("linux") and ctypes.util.find_library("EGL"):
            # Pictures need no display, and one that does not answer must not be asked.
            os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
        host.start()
        self._loaded = host.load_module(MODULE)
        self.volume: Any = None
        self._views: dict[str, Any] = {}
        window = self._loaded.holder.window()
        window.resize(PANEL_WIDTH, 900)
        window.show()
        self._loaded.holder.enter()

    @staticmethod
    def find_library() -> None:
        """Make the module's library importable, which Slicer does when it loads the module."""
        if str(MODULE.parent) not in sys.path:
            sys.path.insert(0, str(MODULE.parent))

    # The module -----------------------------------------------------------------------------------------------------------

    @property
    def widget(self) -> Any:
        """The module's widget; a reload makes a new one."""
        return self._loaded.widget

    @property
    def panels(self) -> Any:
        """The four panels."""
        return self.widget.panels

    @property
    def services(self) -> Any:
        """What the panels work with: read here, never used to do something."""
        return self.widget.logic.services

    @property
    def session(self) -> Any:
        """Where the state of a run and its proposals are read."""
        return self.services.session

    @property
    def said(self) -> str:
        """What the status line says."""
        return str(self.panels.status.text)

    @property
    def settled(self) -> bool:
        """Whether no run is under way and everything that arrived is shown."""
        services = self.services
        return not services.session.running and not services.idle.waiting and not services.session.proposals.busy

    @property
    def complete(self) -> bool:
        """Whether the latest run ended well."""
        store = self.session.store
        return self.session.failure is None and store is not None and all(store[each].ranked for each in store.targets)

    def settle(self, timeout_s: float = 60) -> None:
        """Let everything that is queued happen."""
        host.spin(lambda: self.settled, timeout_s)
        host.spin()

    def reload(self) -> None:
        """Press the button with which developers read a module's files again."""
        self.widget.onReload()
        self._loaded.holder.enter()

    def close(self) -> None:
        """Unload the module: its worker ends."""
        for view in self._views.values():
            view.close()
        self._views.clear()
        self._loaded.unload()

    # What a user does -----------------------------------------------------------------------------------------------------

    def load(self, path: Path, name: str | None = None) -> Any:
        """Load a volume from a file and choose it in the panel."""
        node = slicer.util.loadVolume(str(path), {"name": name} if name else {})
        self.choose(node)
        return node

    def choose(self, node: Any) -> None:
        """Choose a volume in the panel, and show it in the slice views."""
        self.volume = node
        self.panels.prompt.ui.volumeSelector.setCurrentNode(node)
        for name in VIEWS:
            slicer.app.layoutManager().sliceWidget(name).mrmlSliceCompositeNode().SetBackgroundVolumeID(node.GetID())
        slicer.app.layoutManager().resetSliceViews()
        host.spin()

    def add(self, volume: Volume, name: str) -> Any:
        """Put a volume that was read elsewhere (a folder of DICOM images) into the scene, and choose it."""
        node = slicer.vtkMRMLScalarVolumeNode()
        node.SetName(name)
        matrix = vtk.vtkMatrix4x4()
        matrix.DeepCopy([float(value) for value in volume.geometry.affine.ravel()])
        node.SetIJKToRASMatrix(matrix)
        slicer.util.updateVolumeFromArray(node, volume.array)
        slicer.mrmlScene.AddNode(node)
        node.CreateDefaultDisplayNodes()
        self.choose(node)
        return node

    def set_window(self, window: float, level: float) -> None:
        """Window and level of the volume, as by dragging in a slice view."""
        display = self.volume.GetDisplayNode()
        display.AutoWindowLevelOff()
        display.SetWindowLevel(window, level)

    def ask(self, prompt: str, *numbers: int, **choices: Any) -> None:
        """Fill in the prompt panel and press Propose; the arguments of :meth:`fill`."""
        self.fill(prompt, *numbers, **choices)
        self.propose()

    def propose(self) -> None:
        """Press Propose (or Cancel, which is the same button)."""
        self.click(self.panels.prompt.ui.proposeButton)

    def fill(
        self, prompt: str, proposals: int = 8, steps: int = 4, seed: int | None = None, slices: tuple[int, int] | None = None
    ) -> None:
        """Fill in the prompt panel.

        Args:
            prompt: what is typed.
            proposals, steps: of the spin boxes.
            seed: typed and locked; ``None``: whatever the module draws.
            slices: first and last slice of a range, counted from 1; ``None``: the whole volume.
        """
        ui = self.panels.prompt.ui
        ui.promptEdit.clear()
        self.type(ui.promptEdit, prompt)
        ui.proposalsSpinBox.setValue(proposals)
        ui.stepsSpinBox.setValue(steps)
        if seed is not None:
            ui.seedSpinBox.setValue(seed)
        ui.seedLockCheckBox.setChecked(seed is not None)
        labels = [ui.extentComboBox.itemText(number) for number in range(ui.extentComboBox.count)]
        ui.extentComboBox.setCurrentIndex(labels.index("Whole volume" if slices is None else "Range of slices"))
        if slices is not None:
            ui.rangeWidget.setValues(*slices)
        host.spin()

    def choose_target(self, name: str) -> None:
        """List the proposals of a target; the box is empty where there is only one."""
        if len(self.session.store.targets) > 1:
            box = self.panels.proposals.ui.targetComboBox
            box.setCurrentIndex([box.itemText(number) for number in range(box.count)].index(name))
        self.settle()

    def look_at(self, target: str) -> None:
        """List the proposals of a target and show the selected one where it is largest, with the map of agreement."""
        self.choose_target(target)
        self.go_to_middle(target)
        self.panels.proposals.ui.agreementCheckBox.setChecked(True)
        self.settle()

    def hide_proposals(self) -> None:
        """Clear the boxes of all proposals, and the one of the map of agreement."""
        self.panels.proposals.ui.agreementCheckBox.setChecked(False)
        table = self.panels.proposals.ui.proposalsTable
        for row in range(table.rowCount):
            table.item(row, 0).setCheckState(qt.Qt.Unchecked)
        self.settle()

    def press_in_table(self, key: Any) -> None:
        """Press a key in the list of proposals."""
        self.press(self.panels.proposals.ui.proposalsTable, key)

    def click(self, button: Any) -> None:
        """Click a button with the mouse.

        Raises:
            AssertionError: a person could not click it.
        """
        assert button.enabled, f"{button.objectName} is greyed out"
        assert button.visible, f"{button.objectName} is not shown"
        QTest.mouseClick(button, qt.Qt.LeftButton)

    def press(self, widget: Any, key: Any, modifiers: Any = qt.Qt.NoModifier) -> None:
        """Press a key in a widget."""
        self._focus(widget)
        QTest.keyClick(widget, key, modifiers)

    def type(self, widget: Any, text: str) -> None:
        """Type into a widget."""
        self._focus(widget)
        QTest.keyClicks(widget, text)

    def _focus(self, widget: Any) -> None:
        widget.window().activateWindow()
        widget.setFocus()
        slicer.app.processEvents()

    # What a user sees -----------------------------------------------------------------------------------------------------

    def rows(self) -> list[list[str]]:
        """The cells of the list of proposals, line by line: proposal, score, millilitres, agreement."""
        table = self.panels.proposals.ui.proposalsTable
        return [[table.item(row, column).text() for column in range(2, 6)] for row in range(table.rowCount)]

    def accepted(self) -> Any | None:
        """The segmentation into which was accepted."""
        return self.panels.review.ui.segmentationSelector.currentNode()

    def segment_ids(self) -> list[str]:
        """Identifiers of the accepted segments."""
        node = self.accepted()
        return [] if node is None else list(node.GetSegmentation().GetSegmentIDs())

    def mask(self, segment_id: str) -> np.ndarray:
        """An accepted segment on the voxels of the volume, bool (K, J, I)."""
        return np.asarray(slicer.util.arrayFromSegmentBinaryLabelmap(self.accepted(), segment_id, self.volume)) > 0

    def proposal(self, target: str, index: int) -> np.ndarray:
        """A proposal on the voxels of the volume, bool (K, J, I)."""
        store = self.session.store
        crop = store[target].mask(index)
        whole = np.zeros(store.geometry.shape_kji, bool)
        place = tuple(slice(start, start + size) for start, size in zip(crop.origin_kji, crop.array.shape, strict=True))
        whole[place] = np.asarray(crop.array) != 0
        return whole

    def wait(self, until: Callable[[], object], timeout_s: float = 600) -> None:
        """Run the event loop until something holds."""
        host.spin(until, timeout_s)

    def open_sections(self, *names: str) -> None:
        """Open these of the sections setup, prompt, proposals and review, and close the others."""
        ui = self.panels.ui
        for name in ("setup", "prompt", "proposals", "review"):
            getattr(ui, f"{name}Section").collapsed = name not in names

    def panel(self, path: Path | None = None) -> Any:
        """A picture of the module's panel (QImage), as high as its content."""
        return host.grab(self._loaded.holder, path, PANEL_WIDTH)

    def view(self, name: str = "Red") -> np.ndarray:
        """A picture of a slice view, uint8 RGB (height, width, 3)."""
        if name not in self._views:
            self._views[name] = host.SliceView(name, VIEW)
            self._views[name].fit()
        return np.asarray(self._views[name].pixels())

    def save_views(self, path: Path, names: Sequence[str] = VIEWS) -> None:
        """Write a picture of slice views side by side."""
        Image.fromarray(np.hstack([self.view(name) for name in names])).save(path, optimize=True)

    def save_large(self, path: Path, name: str = "Red") -> None:
        """Write a picture of one slice view that fills a large window."""
        Image.fromarray(self._in_size(name, LARGE_VIEW)).save(path)

    def save_both(self, path: Path) -> None:
        """Write a picture of the panel, with the axial view beside it and the coronal one below."""
        panel = self.panel()
        top = round(0.64 * panel.height())
        sizes = {"Red": (LARGE_VIEW[0], top), "Green": (LARGE_VIEW[0], panel.height() - top)}
        host.beside(panel, [self._in_size(name, size) for name, size in sizes.items()], path)

    def _in_size(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """A picture of a slice view in a window of another size (width, height)."""
        with host.SliceView(name, size) as view:
            view.fit()
            pixels = np.asarray(view.pixels())
        logic = slicer.app.layoutManager().sliceWidget(name).sliceLogic()
        logic.ResizeSliceNode(*VIEW)
        logic.FitSliceToBackground()
        return pixels

    def go_to(self, point_ras: Sequence[float]) -> None:
        """Make all slice views show a point (mm), as by clicking at it with the crosshair."""
        slicer.modules.markups.logic().JumpSlicesToLocation(*(float(value) for value in point_ras), False)
        end = time.monotonic() + FOLLOWS_S
        host.spin(lambda: time.monotonic() > end)

    def go_to_middle(self, target: str) -> None:
        """Show the selected proposal of the chosen target where it is largest."""
        store = self.session.store
        array = self.proposal(target, self.panels.proposals.selected.index)
        if array.any():
            axis = store.plan.axis
            index = int(array.sum(axis=tuple(each for each in range(3) if each != axis)).argmax())
            place = [float(value) for value in np.argwhere(array.take(index, axis=axis)).mean(axis=0)]
            place.insert(axis, index)
            self.go_to((store.geometry.affine @ [*place[::-1], 1.0])[:3])
            self.settle()
