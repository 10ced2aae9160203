"""A headless stand-in for the Slicer application: Qt with the manners of PythonQt over the real MRML library.

Its widgets have the members that Slicer's Python can reach, from a table (``facts``). It is Slicer 5.13, or 5.10 inside
``as_version("5.10")``: that is the Qt side; the MRML library is always slicer-core's.

``install()`` makes ``import qt``, ``import ctk`` and Slicer's Python modules work; ``start()`` makes the application and the
scene.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dialogs import Dialogs, answering_dialogs

if TYPE_CHECKING:
    from .application import Application

__all__ = [
    "VERSIONS",
    "Dialogs",
    "SliceView",
    "answering_dialogs",
    "as_version",
    "beside",
    "clear_scene",
    "collected_exceptions",
    "grab",
    "install",
    "load_module",
    "quit_application",
    "scene",
    "spin",
    "start",
    "unload_order",
]

_started: list[Any] = []
_LATER = {
    "VERSIONS": "facts",
    "beside": "screenshots",
    "collected_exceptions": "event_loop",
    "grab": "screenshots",
    "load_module": "loading",
    "quit_application": "loading",
    "unload_order": "loading",
    "SliceView": "slice_view",
    "spin": "event_loop",
}


def install() -> None:
    """Put the modules in place; calling it again changes nothing. No application is made."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    from . import ctk_module, qt_module

    if "slicer.parameterNodeWrapper" in sys.modules:
        return
    import slicer
    import slicer.util

    slicer.mrmlScene = None
    qt_module.install()
    ctk_module.install()
    for name, ours in (
        ("i18n", "i18n"),
        ("mrml_widgets", "mrml_widgets"),
        ("packaging", "packaging"),
        ("ScriptedLoadableModule", "scripted_module"),
        ("parameterNodeWrapper", "parameter_nodes"),
    ):
        module = importlib.import_module(f"{__name__}.{ours}")
        if name != "mrml_widgets":
            sys.modules[f"slicer.{name}"] = module
            setattr(slicer, name, module)


def start(terminologies: Path | None = None) -> Application:
    """The application, made at the first call. ``terminologies``: a folder with Slicer's terminology files."""
    if _started:
        return _started[0]
    install()
    import qt
    import slicer

    from .application import Application
    from .layout import LayoutManager
    from .world import World

    world = World(terminologies)
    slicer.mrmlScene = world.scene
    slicer.modules = world.modules
    sys.modules["slicer.modules"] = world.modules
    application = Application(world)
    application._layouts = LayoutManager(world.scene, world.application_logic)
    slicer.app = application
    application.setOrganizationName("NA-MIC")
    application.setApplicationName("Slicer")
    qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
    qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, application.temporaryPath)
    _started.append(application)
    return application


@contextmanager
def as_version(version: str) -> Iterator[None]:
    """Be Slicer 5.10 or 5.13 for a while, in what Python can reach and in these points of behaviour.

    5.10 has no ``slicer.packaging``; ``connectGui`` of a parameter node wrapper leaves its observer behind; the Segment
    Editor crashes (here: raises RuntimeError) when its node brings an active effect without a segmentation.

    Raises:
        ValueError: the host cannot be that version.
    """
    import slicer
    import slicer.util

    from . import facts

    if version not in facts.VERSIONS:
        raise ValueError(f"this host can be Slicer {' or '.join(facts.VERSIONS)}, not {version}")
    before, facts.chosen = facts.chosen, version
    packaging: Any = sys.modules["slicer.packaging"]
    pips = {name: getattr(slicer.util, name) for name in ("pip_install", "pip_uninstall")}
    if version == "5.10" and packaging is not None:
        sys.modules["slicer.packaging"] = None  # type: ignore[assignment]
        del slicer.packaging
        slicer.util.pip_install, slicer.util.pip_uninstall = packaging.pip_install, packaging.pip_uninstall
    try:
        yield
    finally:
        facts.chosen = before
        sys.modules["slicer.packaging"] = packaging
        if packaging is not None:
            slicer.packaging = packaging
        for name, function in pips.items():
            setattr(slicer.util, name, function)


def scene() -> Any:
    """The scene (``slicer.mrmlScene``)."""
    return start()._world.scene


def clear_scene() -> None:
    """Close the scene."""
    start()._world.clear()


def __getattr__(name: str) -> Any:
    """What is imported, with ``qt`` and ``ctk`` in place, when it is first asked for."""
    if name in _LATER:
        install()
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
