"""What was asked of the worker, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.failures import WorkerFailure


class Call:
    """One request to the worker. It ends exactly once, by one of its last three signals, never before the event loop turns.

    Attributes:
        kind: ``"load"``, ``"set_image"`` or ``"propose"``.
        done: whether it has ended.
        event: Signal(Event), while it runs; also after :meth:`cancel` until the worker has stopped.
        succeeded: Signal(Reply): ``Loaded``, ``ImageReply`` or ``DoneEvent``.
        failed: Signal(WorkerFailure).
        cancelled: Signal().
    """

    def __init__(self, kind: str, cancel: Callable[[Call], None]) -> None:
        self.kind = kind
        self.done = False
        self.event = Signal()
        self.succeeded = Signal()
        self.failed = Signal()
        self.cancelled = Signal()
        self._cancel = cancel

    def cancel(self) -> None:
        """Do not run it, or stop it; calls behind it stay in the queue. It then ends as cancelled."""
        if not self.done:
            self._cancel(self)

    def succeed(self, reply: Any) -> None:
        """End it with its final reply; for the client alone, as the next two."""
        self._end(self.succeeded, reply)

    def fail(self, failure: WorkerFailure) -> None:
        """End it with a failure."""
        self._end(self.failed, failure)

    def end_cancelled(self) -> None:
        """End it as cancelled."""
        self._end(self.cancelled)

    def _end(self, signal: Signal, *values: Any) -> None:
        if not self.done:
            self.done = True
            signal.emit(*values)
