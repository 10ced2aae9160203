"""The calls that wait for the worker, and the one that it works on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from progidiff.wire.messages import Request
from ProGiDiffSlicerLib.idle import Task
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.image import Image


@dataclass(eq=False)
class Job:
    """A call and what is needed to carry it out.

    Attributes:
        call: what its owner holds.
        expects: type of the reply that ends it well.
        request: what to send; of a volume it is made when its copy is complete.
        image, copying: the volume, and the work of copying it.
        request_id: once it has been sent.
        by_key: the worker was only told the volume's key.
        cancelling: the worker was asked to stop.
        shown: share of the volume that has left, as last told.
        alone: no call behind it builds on it.
    """

    call: Call
    expects: type[Any]
    request: Request | None = None
    image: Image | None = None
    copying: Task | None = None
    request_id: int | None = None
    by_key: bool = False
    cancelling: bool = False
    shown: float = 0.0
    alone: bool = False

    def drop(self) -> None:
        """Give back the volume."""
        if self.copying is not None:
            self.copying.cancel()
        self.image = self.copying = None


class Jobs:
    """First come, first served; at most one is running."""

    def __init__(self) -> None:
        self.running: Job | None = None
        self._queue: deque[Job] = deque()

    @property
    def waiting(self) -> bool:
        """Whether any job waits behind the running one."""
        return bool(self._queue)

    def add(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        self._queue.append(job)

    def next(self) -> Job | None:
        """The running job; if there is none, the first of the queue becomes it."""
        if self.running is None and self._queue:
            self.running = self._queue.popleft()
        return self.running

    def take(self, call: Call) -> Job | None:
        """Remove the job of a call that waits in the queue."""
        job = next((job for job in self._queue if job.call is call), None)
        if job is not None:
            self._queue.remove(job)
            job.drop()
        return job

    def take_from(self, job: Job) -> list[Job]:
        """Remove a job, running or waiting, and those behind it, which build on it unless it is ``alone``."""
        if job is self.running and job.alone:
            self.end_running()
            return [job]
        if job is self.running:
            return self.take_all()
        first = self._queue.index(job)
        taken = list(self._queue)[first:]
        for other in taken:
            self._queue.remove(other)
            other.drop()
        return taken

    def take_waiting(self) -> list[Job]:
        """Remove the jobs behind the running one."""
        taken = list(self._queue)
        self._queue.clear()
        for job in taken:
            job.drop()
        return taken

    def end_running(self) -> None:
        """The running job is over."""
        if self.running is not None:
            self.running.drop()
            self.running = None

    def take_all(self) -> list[Job]:
        """Remove every job, the running one first."""
        taken = [] if self.running is None else [self.running]
        self.end_running()
        return taken + self.take_waiting()


def run_all(*actions: Callable[[], Any]) -> None:
    """Do one after the other, also where one raises: a listener that fails must not keep the others from being told.

    Raises:
        Exception: what an action raised; the last one where several did.
    """
    with ExitStack() as stack:
        for action in reversed(actions):
            stack.callback(action)
