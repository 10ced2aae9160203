"""Fixtures of the module's tests: a headless Qt application that stands in for Slicer's, over the real MRML library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import host

# Before any test module is imported: product code says ``import qt`` at its top.
host.install()

MODULE = Path(__file__).resolve().parents[2] / "ProGiDiffSlicer" / "ProGiDiffSlicer.py"


@pytest.fixture(scope="session")
def app() -> Any:
    """The one application (``slicer.app``)."""
    return host.start()


@pytest.fixture(params=host.VERSIONS)
def slicer_version(app: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """The versions of Slicer in which what Python sees differs: the test runs as each of them."""
    with host.as_version(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def nothing_raised_unseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An exception in a slot or in an observer is printed and forgotten by Qt and VTK: here it fails the test."""
    with host.collected_exceptions(monkeypatch) as raised:
        yield
    if raised:
        pytest.fail("raised inside a Qt slot or a VTK observer:\n" + "\n".join(raised))


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
def scene(app: Any) -> Iterator[Any]:
    """The scene (``slicer.mrmlScene``), closed before and after the test."""
    host.clear_scene()
    yield host.scene()
    host.clear_scene()


@pytest.fixture
def acceptance(scene: Any) -> Iterator[Any]:
    """Acceptance into the scene, with a timer of edits that waits to be told."""
    from ProGiDiffSlicerLib.logic.accept import Acceptance
    from ProGiDiffSlicerLib.logic.editing import EditTracker

    from .accept_support import ManualTimer

    made = Acceptance(scene, tracker=EditTracker(scene, ManualTimer))
    yield made
    made.cleanup()


@pytest.fixture
def spin(app: Any) -> Callable[..., None]:
    """``spin(until, timeout_s=60)``: run the event loop until ``until()`` holds; AssertionError when it never does."""
    return host.spin


@pytest.fixture
def dialogs(app: Any) -> Iterator[host.Dialogs]:
    """What was shown to the user, and what the user answers (yes, unless told otherwise)."""
    with host.answering_dialogs() as answering:
        yield answering


@pytest.fixture
def module(app: Any, scene: Any) -> Iterator[Any]:
    """The module's widget (the Python object), made as Slicer's factory makes it and unloaded after the test."""
    loaded = host.load_module(MODULE)
    yield loaded.widget
    loaded.unload()
