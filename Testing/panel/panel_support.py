"""What the tests of the panels share: the panels over a scripted worker client, in a window, and fingers to type with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import qt
import slicer
from PySide6.QtTest import QTest

from progidiff.volumes.geometry import Geometry
from ProGiDiffSlicerLib.panels.module import ModulePanels
from ProGiDiffSlicerLib.parameters import Parameters
from ProGiDiffSlicerLib.services import Services
from ProGiDiffSlicerLib.setup.settings import Settings
from ProGiDiffSlicerLib.signals import Signal

from ..proposal_examples import random_masks, ranking_event, slice_event
from .session_support import FakeClient, add_volume, plan_of
from .setup_examples import MemoryStore

GRID = Geometry((14, 12, 8), np.array([[-2.0, 0, 0, 20], [0, -2, 0, 10], [0, 0, 5, -40], [0, 0, 0, 1]]))


class ScriptedClient(FakeClient):
    """A worker client of which the test says what its worker does."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = Signal()
        self.stops: list[bool] = []
        self.restarts = 0

    def stop(self, wait: bool = False) -> None:
        self.stops.append(wait)

    def restart(self) -> None:
        self.restarts += 1


class Opened:
    """The panels in a window, with a volume chosen."""

    def __init__(self, scene: Any, client: Any) -> None:
        self.scene = scene
        self.client = client
        self.services = Services(scene, Settings(MemoryStore()), client)
        self.window = qt.QWidget()
        layout = qt.QVBoxLayout(self.window)
        self.panels = ModulePanels(layout, self.services)
        node = scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode", "parameters")
        self.parameters = Parameters(node)
        self.panels.connectGui(self.parameters)
        self.panels.enter()
        self.window.show()
        self.session = self.services.session
        self.prompt, self.proposals, self.review = self.panels.prompt, self.panels.proposals, self.panels.review

    @property
    def table(self) -> Any:
        return self.proposals.ui.proposalsTable

    @property
    def said(self) -> str:
        return self.panels.status.text

    def choose_volume(self, geometry: Geometry = GRID, name: str = "CT") -> Any:
        """Add a volume and choose it."""
        node = add_volume(self.scene, geometry, name)
        self.prompt.ui.volumeSelector.setCurrentNode(node)
        return node

    def settle(self, spin: Callable[..., None]) -> None:
        """Let everything that is queued happen."""
        spin(lambda: not self.services.idle.waiting)
        spin()

    def propose(self, prompt: str = "liver", **values: Any) -> None:
        """Type a prompt, set parameters and press the button."""
        self.prompt.ui.promptEdit.setText(prompt)
        for name, value in values.items():
            setattr(self.parameters, name, value)
        self.prompt.ui.proposeButton.click()

    def arrive(self, node: Any, masks: np.ndarray, target: str = "liver", ranked: bool = True) -> None:
        """The worker sends all slices of a target, and its ranking."""
        geometry, plan = plan_of(node)
        call = self.client.call if self.client.call.kind == "propose" else self.client.reach_propose()
        for index in range(plan.count):
            call.event.emit(slice_event(masks, plan, index, target))
        if ranked:
            call.event.emit(ranking_event(masks, geometry, target, self.client.values[0].top_k))

    def run(self, spin: Callable[..., None], count: int = 5, prompt: str = "liver", **values: Any) -> tuple[Any, np.ndarray]:
        """A whole run with ``count`` different proposals; the volume and the masks."""
        node = self.parameters.inputVolume or self.choose_volume()
        masks = nested_masks(plan_of(node)[0], count)
        self.propose(prompt, proposals=count, **values)
        for target in prompt.split("; "):
            self.arrive(node, masks, target)
        self.client.finish()
        self.settle(spin)
        return node, masks

    def titles(self) -> list[str]:
        """What the lines of the table are called."""
        return [self.table.item(row, 2).text() for row in range(self.table.rowCount)]

    def close(self) -> None:
        self.panels.cleanup()
        self.services.close()
        self.window.hide()
        self.window.deleteLater()
        slicer.app.sendPostedEvents(None, qt.QEvent.DeferredDelete)


def nested_masks(geometry: Geometry, count: int) -> np.ndarray:
    """bool (N, K, J, I): the same random voxels, more of them with every proposal, so that all differ in size."""
    field = np.random.default_rng(5).random(geometry.shape_kji)
    inside = random_masks(geometry, 1, share=1.0)[0]
    return np.stack([inside & (field < 0.2 + 0.6 * number / count) for number in range(count)])


@contextmanager
def opened(scene: Any, client: Any = None) -> Iterator[Opened]:
    """Panels over a scripted client."""
    panels = Opened(scene, ScriptedClient() if client is None else client)
    try:
        yield panels
    finally:
        panels.close()


def press(widget: Any, key: Any, modifiers: Any = qt.Qt.NoModifier) -> None:
    """Press and release a key in a widget that has the focus."""
    widget.window().activateWindow()
    widget.setFocus()
    slicer.app.processEvents()
    QTest.keyClick(widget, key, modifiers)
    slicer.app.processEvents()


def type_text(widget: Any, text: str) -> None:
    """Type into a widget."""
    widget.window().activateWindow()
    widget.setFocus()
    slicer.app.processEvents()
    QTest.keyClicks(widget, text)
    slicer.app.processEvents()
