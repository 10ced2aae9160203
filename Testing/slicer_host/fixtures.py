"""Fixtures for pytest: ``from slicer_host.fixtures import *`` in a ``conftest.py`` installs the host and brings them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import VERSIONS, Dialogs, answering_dialogs, as_version, clear_scene, collected_exceptions, install, start
from . import scene as the_scene
from . import spin as spin_until

# Before any test module is imported: what is tested says ``import qt`` at its top.
install()

__all__ = ["app", "dialogs", "nothing_raised_unseen", "scene", "slicer_version", "spin"]


@pytest.fixture(scope="session")
def app() -> Any:
    """The one application (``slicer.app``)."""
    return start()


@pytest.fixture(params=VERSIONS)
def slicer_version(app: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """The versions of Slicer in which what Python sees differs: the test runs as each of them."""
    with as_version(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def nothing_raised_unseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An exception in a slot or in an observer is printed and forgotten by Qt and VTK: here it fails the test."""
    with collected_exceptions(monkeypatch) as raised:
        yield
    if raised:
        pytest.fail("raised inside a Qt slot or a VTK observer:\n" + "\n".join(raised))


@pytest.fixture
def scene(app: Any) -> Iterator[Any]:
    """The scene (``slicer.mrmlScene``), closed before and after the test."""
    clear_scene()
    yield the_scene()
    clear_scene()


@pytest.fixture
def spin(app: Any) -> Callable[..., None]:
    """``spin(until, timeout_s=60)``: run the event loop until ``until()`` holds; AssertionError when it never does."""
    return spin_until


@pytest.fixture
def dialogs(app: Any) -> Iterator[Dialogs]:
    """What was shown to the user, and what the user answers (yes, unless told otherwise)."""
    with answering_dialogs() as answering:
        yield answering
