"""Waiting for somebody else, fairly: time in which this process itself did not run does not count."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import qt


class Patience:
    """Calls back when nothing was heard for some time.

    The event loop may stand still (a computer asleep, a long computation elsewhere in the application), and signs of life
    then wait unread. Such a gap counts for no more than two ticks, and the signs that waited are read before the next one.
    """

    def __init__(self, parent: Any, expired: Callable[[], None]) -> None:
        self._expired = expired
        self._limit_s = 0.0
        self._tick_s = 1.0
        self._waited_s = 0.0
        self._last = 0.0
        self._running = False
        self._timer = qt.QTimer(parent)
        self._timer.connect("timeout()", self._tick)

    def start(self, limit_s: float) -> None:
        """Begin to wait, at most ``limit_s`` seconds after the last sign of life."""
        self._limit_s = limit_s
        self._tick_s = min(1.0, limit_s / 4)
        self._waited_s = 0.0
        self._last = time.monotonic()
        self._running = True
        self._timer.start(max(1, int(1000 * self._tick_s)))

    def reset(self) -> None:
        """There was a sign of life."""
        self._waited_s = 0.0

    def stop(self) -> None:
        """Wait no longer."""
        self._running = False
        self._timer.stop()

    def release(self) -> None:
        """Stop for good and give the timer back."""
        self.stop()
        self._timer.disconnect("timeout()", self._tick)
        self._timer.deleteLater()

    def _tick(self) -> None:
        now = time.monotonic()
        self._waited_s += min(now - self._last, 2 * self._tick_s)
        self._last = now
        if self._running and self._waited_s >= self._limit_s:
            self.stop()
            self._expired()
