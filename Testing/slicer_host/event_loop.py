"""Running the event loop until something holds, and seeing what was raised in it."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import qt


def spin(until: Callable[[], object] | None = None, timeout_s: float = 60.0) -> None:
    """Run the event loop until ``until()`` holds; without it, until nothing is left to do at once.

    Raises:
        AssertionError: it did not hold within ``timeout_s``.
    """
    application = qt.QApplication.instance()
    if until is None:
        for _ in range(5):
            application.processEvents()
            application.sendPostedEvents(None, qt.QEvent.DeferredDelete)
        return
    waker = qt.QTimer()  # ends a wait in which nothing else happens
    waker.start(5)
    end = time.monotonic() + timeout_s
    try:
        while not until():
            if time.monotonic() > end:
                raise AssertionError(f"waited {timeout_s:g} s in vain for {getattr(until, '__qualname__', until)}")
            application.processEvents(qt.QEventLoop.WaitForMoreEvents)
            application.sendPostedEvents(None, qt.QEvent.DeferredDelete)
    finally:
        waker.stop()


@contextmanager
def collected_exceptions(monkeypatch: Any) -> Iterator[list[str]]:
    """Exceptions that Qt, VTK, Python's collector and threads print and forget, as texts with traceback."""
    raised: list[str] = []

    def note(kind: Any, error: Any, trace: Any) -> None:
        raised.append("".join(traceback.format_exception(kind, error, trace)))

    def note_in_thread(arguments: Any) -> None:
        note(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    monkeypatch.setattr(sys, "excepthook", note)
    monkeypatch.setattr(sys, "unraisablehook", note_in_thread)  # raised while an object was deleted
    monkeypatch.setattr(threading, "excepthook", note_in_thread)
    yield raised
