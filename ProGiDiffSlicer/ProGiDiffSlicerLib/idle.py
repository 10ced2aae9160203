"""Work in small portions between the events of the application, so that nothing stalls its window."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import qt

BUDGET_S = 0.008

Steps = Generator[Any, None, Any]


class Task:
    """A piece of work in an :class:`IdleQueue`.

    Attributes:
        done: whether it has ended: finished, failed or cancelled.
    """

    def __init__(self, steps: Steps, done: Callable[[Any], None] | None, failed: Callable[[Exception], None] | None) -> None:
        self.done = False
        self._steps = steps
        self._on_done = done
        self._on_failed = failed
        self._stepping = False

    def cancel(self) -> None:
        """Do no more of it and call nobody back; the generator's ``finally`` blocks run."""
        self.done = True
        # A generator that cancels itself is closed when its step is over.
        if not self._stepping:
            self._steps.close()

    def step(self) -> None:
        """Do the next portion; for the queue alone.

        Raises:
            Exception: what the work raised where nobody wants to be told, or what a callback raised.
        """
        self._stepping = True
        try:
            next(self._steps)
        except StopIteration as end:
            self._end(self._on_done, end.value)
        except Exception as error:
            if self._on_failed is None and not self.done:
                self.done = True
                raise
            self._end(self._on_failed, error)
        finally:
            self._stepping = False
        if self.done:
            self._steps.close()

    def _end(self, callback: Callable[[Any], None] | None, value: Any) -> None:
        if self.done:
            return
        self.done = True
        if callback is not None:
            callback(value)


class IdleQueue:
    """Runs generators one after another, a few milliseconds per turn of the event loop.

    A generator does a portion of its work, at most a few milliseconds, and yields. What it yields is ignored, what it
    returns is handed to ``done``.
    """

    def __init__(self, parent: Any = None, budget_s: float = BUDGET_S) -> None:
        self._budget_s = budget_s
        self._tasks: deque[Task] = deque()
        self._turning = False
        self._timer = qt.QTimer(parent)
        self._timer.setInterval(0)
        self._timer.connect("timeout()", self._turn)

    @property
    def waiting(self) -> int:
        """How many tasks have not ended."""
        return sum(not task.done for task in self._tasks)

    def submit(
        self,
        steps: Steps,
        done: Callable[[Any], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> Task:
        """Queue work.

        Args:
            steps: the generator.
            done: called with what the generator returned.
            failed: called with the exception that it raised; without it the exception goes to the event loop.
        """
        task = Task(steps, done, failed)
        self._tasks.append(task)
        self._timer.start()
        return task

    def clear(self) -> None:
        """Cancel everything."""
        tasks, self._tasks = self._tasks, deque()
        self._timer.stop()
        for task in tasks:
            task.cancel()

    def _turn(self) -> None:
        # A portion of work that runs an event loop of its own (a message box) is not interrupted by another one.
        if self._turning:
            self._timer.stop()
            return
        self._turning = True
        end = time.monotonic() + self._budget_s
        try:
            while self._tasks:
                if self._tasks[0].done:
                    self._tasks.popleft()
                    continue
                self._tasks[0].step()
                if time.monotonic() >= end:
                    break
        finally:
            self._turning = False
            while self._tasks and self._tasks[0].done:
                self._tasks.popleft()
            if self._tasks:
                self._timer.start()
            else:
                self._timer.stop()
