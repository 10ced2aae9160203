"""Fixtures of the module's tests: those of the stand-in for Slicer, the module in it, and acceptance into its scene."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .. import slicer_host as host
from ..slicer_host.fixtures import *  # noqa: F403

MODULE = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer" / "ProGiDiffSlicer.py"


@pytest.fixture(autouse=True)
def library_as_imported() -> Iterator[None]:
    """A test that reloads the module reads its library anew; the next test gets back the classes that its file imported."""
    before = _library()
    yield
    after = _library()
    if any(after.get(name) is not module for name, module in before.items()):
        for name in after:
            del sys.modules[name]
        sys.modules.update(before)


def _library() -> dict[str, Any]:
    names = ("ProGiDiffSlicer", "ProGiDiffSlicerLib")
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}


@pytest.fixture
def timers() -> list[Any]:
    """The timers of the acceptance, which wait to be told."""
    return []


@pytest.fixture
def acceptance(scene: Any, timers: list[Any]) -> Iterator[Any]:
    """Acceptance into the scene, with a timer of edits that waits to be told."""
    from ProGiDiffSlicerLib.scene.accept import Acceptance
    from ProGiDiffSlicerLib.scene.editing import EditTracker

    from .accept_support import timer_into

    made = Acceptance(scene, tracker=EditTracker(scene, timer_into(timers)))
    yield made
    made.cleanup()


@pytest.fixture
def volume(scene: Any) -> Any:
    """A volume of zeros to accept segments for."""
    from .accept_support import add_volume

    return add_volume(scene)


@pytest.fixture
def module(app: Any, scene: Any) -> Iterator[Any]:
    """The module's widget (the Python object), made as Slicer's factory makes it and unloaded after the test."""
    loaded = host.load_module(MODULE)
    yield loaded.widget
    loaded.unload()


@pytest.fixture
def panel(scene: Any) -> Iterator[Any]:
    """The panels in a window over a scripted worker client."""
    from .panel_support import opened

    with opened(scene) as panels:
        yield panels
