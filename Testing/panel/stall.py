"""How long the event loop stood still, and in which lines of code."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import qt

_TICK_MS = 1
_LOOK_S = 0.004
#: A tick that is later than this is looked at.
LATE_S = 0.020
_KEPT = 12


@dataclass
class Stall:
    """A time in which no event was handled.

    Attributes:
        wall_s: how long.
        work_s: processor time of the main thread in it; the rest was spent waiting, or the machine was busy elsewhere.
        at_s: when it began, since the watch was started.
        stacks: where the main thread was, innermost line last, each with the number of times that it was seen there.
    """

    wall_s: float
    work_s: float
    at_s: float
    stacks: dict[str, int] = field(default_factory=dict)


class StallWatch:
    """A timer that ticks while the event loop is free, and a thread that looks at the main thread when a tick is late.

    Attributes:
        stalls: the longest ones, longest first.
        longest_s: wall time of the longest one.
        most_work_s: processor time of the main thread in the one with most of it.
        ticks: how often the timer ticked.
    """

    def __init__(self, parent: Any = None) -> None:
        self.stalls: list[Stall] = []
        self.longest_s = self.most_work_s = 0.0
        self.ticks = 0
        self._began = self._last = time.perf_counter()
        self._worked = time.thread_time()
        self._seen: dict[str, int] = {}
        self._main = threading.get_ident()
        self._ending = threading.Event()
        self._timer = qt.QTimer(parent)
        self._timer.setTimerType(qt.Qt.PreciseTimer)
        self._timer.setInterval(_TICK_MS)
        self._timer.connect("timeout()", self._tick)
        self._timer.start()
        self._thread = threading.Thread(target=self._look, name="stall watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; calling it again changes nothing."""
        if self._ending.is_set():
            return
        self._tick()
        self._timer.stop()
        self._ending.set()
        self._thread.join()

    def restart(self) -> None:
        """Forget what was seen so far."""
        self.stalls, self.longest_s, self.most_work_s, self.ticks = [], 0.0, 0.0, 0
        self._last, self._worked = time.perf_counter(), time.thread_time()
        self._seen = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out a time in which the watcher itself keeps the main thread busy, as with a picture."""
        self._tick()
        try:
            yield
        finally:
            self._last, self._worked = time.perf_counter(), time.thread_time()
            self._seen = {}

    def report(self, most: int = 5) -> str:
        """The longest stalls with the lines in which they were spent."""
        lines = []
        for stall in self.stalls[:most]:
            text = f"{1000 * stall.wall_s:.0f} ms, of which {1000 * stall.work_s:.0f} ms of work, at {stall.at_s:.2f} s"
            lines.append(text)
            for stack, count in sorted(stall.stacks.items(), key=lambda pair: -pair[1])[:2]:
                lines += [f"  seen {count} times in", *(f"    {line}" for line in stack.splitlines())]
        return "\n".join(lines)

    def _tick(self) -> None:
        now, worked = time.perf_counter(), time.thread_time()
        wall, work = now - self._last, worked - self._worked
        seen, self._seen = self._seen, {}
        self.ticks += 1
        self.longest_s, self.most_work_s = max(self.longest_s, wall), max(self.most_work_s, work)
        if wall > LATE_S:
            self.stalls.append(Stall(wall, work, self._last - self._began, seen))
            self.stalls.sort(key=lambda stall: -stall.work_s)
            del self.stalls[_KEPT:]
        self._last, self._worked = time.perf_counter(), time.thread_time()

    def _look(self) -> None:
        while not self._ending.wait(_LOOK_S):
            if time.perf_counter() - self._last > LATE_S:
                frame = sys._current_frames().get(self._main)
                if frame is not None:
                    stack = _short(frame)
                    self._seen[stack] = self._seen.get(stack, 0) + 1


def _short(frame: Any) -> str:
    """The innermost lines of a stack."""
    entries = traceback.extract_stack(frame)[-6:]
    return "\n".join(f"{'/'.join(entry.filename.split('/')[-2:])}:{entry.lineno} {entry.name}" for entry in entries)
