"""What was asked of the worker and what became of it: the calls, those that wait, and the volume on its way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import Request, SetImage, image_digest
from ProGiDiffSlicerLib.idle import Task
from ProGiDiffSlicerLib.signals import Signal

Array = npt.NDArray[Any]

_PORTION = 1 << 20


class Call:
    """One request to the worker. It ends exactly once, by one of its last three signals, never before the event loop turns.

    Attributes:
        kind: ``"load"``, ``"set_image"``, ``"propose"``; of others the name of the request's class.
        done: whether it has ended.
        event: Signal(Event), while it runs; also after :meth:`cancel` until the worker has stopped.
        succeeded: Signal(Reply): the final one, such as ``Loaded``, ``ImageReply`` or ``DoneEvent``.
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


class Image:
    """The voxels of a volume as they were when they were copied.

    Attributes:
        key: the content hash that the worker knows it by; empty until it is ``ready``.
        nbytes: size of the voxels.
        ready: whether the copy is complete.
    """

    def __init__(
        self, array_kji: Array, affine: Array, modality: str | None, plane: str | None, correct_values: bool = False
    ) -> None:
        """Check a volume of numbers (K, J, I) and its affine (4, 4), IJK -> RAS in mm.

        Raises:
            InputError: not such a volume.
        """
        source, affine = np.asarray(array_kji), np.array(affine, dtype=np.float64)
        if source.ndim != 3 or source.size == 0 or source.dtype.kind not in "iuf" or source.dtype.itemsize > 8:
            raise InputError(_("The volume must hold plain numbers on three axes; convert it to a scalar volume first."))
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(_("The volume's position in space is not known; check its spacing, origin and directions."))
        self.key = ""
        self.nbytes = source.nbytes
        self.ready = False
        self._source: Array | None = source
        self._copy: Array | None = None
        self._affine = affine
        self._modality = modality
        self._plane = plane
        self._correct_values = correct_values

    def prepare(self) -> Generator[None, None, None]:
        """Copy and hash it, about a megabyte per step.

        Raises:
            MemoryError: there is no room for the copy.
        """
        source = self._source
        assert source is not None
        dtype = source.dtype.newbyteorder("<")
        copy: Array = np.empty(source.shape, dtype)
        digest = image_digest(dtype, source.shape, self._affine, self._modality, self._plane, self._correct_values)
        slices, height, width = source.shape
        rows = max(1, _PORTION // (width * dtype.itemsize))
        done = 0
        for k in range(slices):
            for j in range(0, height, rows):
                part = copy[k, j : j + rows]
                part[...] = source[k, j : j + rows]
                digest.update(part.reshape(-1).view(np.uint8).data)
                done += part.nbytes
                if done >= _PORTION:
                    done = 0
                    yield
        self._source, self._copy = None, copy
        self.key = digest.hexdigest()
        self.ready = True

    def by_key(self) -> SetImage:
        """The request that sends no voxels."""
        return SetImage(None, None, self._modality, self._plane, self.key, self._correct_values)

    def with_voxels(self) -> SetImage:
        """The request that sends them."""
        return SetImage(self._copy, self._affine, self._modality, self._plane, self.key, self._correct_values)


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
        alone: it builds on no call before it, and no call behind builds on it.
        told: its result is told even if it came after a cancel.
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
    told: bool = False

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
