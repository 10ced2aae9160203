"""What the tests of the worker client share: commands, a recorder of calls, and a pulse that notices stalls."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import qt

from progidiff.wire.conversation import WorkerFailure
from progidiff.wire.messages import ProgressEvent, ProposeRequest
from ProGiDiffSlicerLib.worker.calls import Call
from ProGiDiffSlicerLib.worker.client import WorkerClient, WorkerState
from ProGiDiffSlicerLib.worker.command import WorkerCommand, worker_environment
from ProGiDiffSlicerLib.worker.process import QtProcess

SCRIPT = Path(__file__).resolve().parents[1] / "engine" / "scripted_worker.py"
LIVER = ProposeRequest(("liver",), proposals=2)


def run_python(*arguments: str) -> WorkerCommand:
    environment = worker_environment({**os.environ, "OMP_NUM_THREADS": "1"})
    return WorkerCommand(sys.executable, arguments, environment)


def organs(**script: Any) -> WorkerCommand:
    """The worker that invents organs (see its file)."""
    return run_python(str(SCRIPT.with_name("organs_worker.py")), json.dumps(script))


def python(code: str) -> WorkerCommand:
    return run_python("-c", code)


def scripted(*options: str) -> WorkerCommand:
    return run_python(str(SCRIPT), *options)


def phantom(shape: tuple[int, int, int] = (3, 16, 20)) -> np.ndarray:
    k, j, i = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return ((k + 1) * 100 - (j - shape[1] / 2) ** 2 - (i - shape[2] / 2) ** 2).clip(0).astype(np.int16)


class Record:
    """Everything that one call, or several, said."""

    def __init__(self, *calls: Call) -> None:
        self.events: list[Any] = []
        self.ends: list[tuple[str, str, Any]] = []
        self.calls = calls
        for call in calls:
            self._listen(call)

    def _listen(self, call: Call) -> None:
        call.event.connect(self.events.append)
        call.succeeded.connect(lambda reply: self.ends.append((call.kind, "succeeded", reply)))
        call.failed.connect(lambda failure: self.ends.append((call.kind, "failed", failure)))
        call.cancelled.connect(lambda: self.ends.append((call.kind, "cancelled", None)))

    @property
    def done(self) -> bool:
        return len(self.ends) >= len(self.calls)

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        return [(kind, how) for kind, how, _ in self.ends]

    @property
    def failure(self) -> WorkerFailure:
        (failure,) = {id(value): value for _, how, value in self.ends if how == "failed"}.values()
        return failure

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class Client(WorkerClient):
    """A client that remembers its states and failures."""

    def __init__(self, command: WorkerCommand, **options: Any) -> None:
        self.states: list[str] = []
        self.failures: list[WorkerFailure] = []
        super().__init__(lambda: command, **options)
        self.stateChanged.connect(lambda state: self.states.append(state.value))
        self.failed.connect(self.failures.append)

    @property
    def pid(self) -> int:
        assert self.hello is not None
        return self.hello.pid

    def run(self, mode: str = "work", image: np.ndarray | None = None, request: ProposeRequest = LIVER) -> Record:
        """A whole run, submitted at a time."""
        volume = phantom() if image is None else image
        return Record(self.load(mode, "cpu"), self.set_image(volume, np.eye(4), "CT"), self.propose(request))


Spin = Callable[..., None]


class CountingProcess(QtProcess):
    """Counts what goes through the pipes."""

    last: CountingProcess

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self.bytes_read = self.bytes_written = self.most_pending = self.longest_write = self.most_waiting = 0
        CountingProcess.last = self

    def read(self, most: int) -> bytes:
        if self._process is not None:
            self.most_waiting = max(self.most_waiting, self._process.bytesAvailable())
        data = super().read(most)
        self.bytes_read += len(data)
        return data

    def write(self, data: bytes) -> None:
        super().write(data)
        self.bytes_written += len(data)
        self.longest_write = max(self.longest_write, len(data))
        self.most_pending = max(self.most_pending, self.pending)


def is_sampling(record: Record) -> bool:
    return any(event.phase == "sampling" for event in record.of(ProgressEvent))


def reach_loading(client: Client, spin: Spin) -> Record:
    """A run whose model is being loaded, for a minute."""
    record = client.run("slow_load")
    spin(lambda: bool(record.events))
    return record


def reach_sending(client: Client, spin: Spin) -> Record:
    """A large image on its way to a worker that is suspended and so does not read it."""
    loaded = Record(client.load("work", "cpu"))
    spin(lambda: loaded.done)
    psutil.Process(client.pid).suspend()
    record = Record(client.set_image(phantom((64, 512, 512)), np.eye(4)), client.propose(LIVER))
    spin(lambda: client._link is not None and client._link.unsent > 30 << 20)
    return record


def reach_proposing(client: Client, spin: Spin) -> Record:
    """A run that makes proposals, for a minute."""
    record = client.run("slow")
    spin(lambda: is_sampling(record))
    return record


def children() -> list[psutil.Process]:
    """Living processes that this one started."""
    return [child for child in psutil.Process().children(recursive=True) if child.is_running() and not _is_zombie(child)]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def gone(pid: int) -> bool:
    try:
        return _is_zombie(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def finished(record: Record, spin: Spin) -> Record:
    """The record, once all its calls have ended."""
    spin(lambda: record.done)
    return record


def failed_run(client: Client, spin: Spin, mode: str = "work") -> Record:
    """A run on a worker that fails before it does anything."""
    run = finished(client.run(mode), spin)
    assert [how for _, how in run.outcomes] == ["failed"] * 3
    assert client.failures == [run.failure]
    assert client.failure is run.failure
    assert client.state is WorkerState.CRASHED
    return run


def reach_starting(client: Client, spin: Spin) -> Record:
    record = client.run()
    spin(lambda: bool(children()))
    return record


def reach_cancelling(client: Client, spin: Spin) -> Record:
    record = client.run("deaf")
    spin(lambda: is_sampling(record))
    assert client.cancel()
    assert client.state is WorkerState.CANCELLING
    return record


def only_child() -> int:
    (child,) = children()
    return int(child.pid)


@contextmanager
def worker(command: WorkerCommand | None = None, **options: Any) -> Iterator[Client]:
    """A client whose process is gone afterwards, whatever happened."""
    before = {child.pid for child in children()}
    parent = qt.QObject()
    client = Client(scripted() if command is None else command, parent=parent, **options)
    try:
        yield client
    finally:
        client.stop(wait=True)
        left = [child for child in children() if child.pid not in before]
        for child in left:
            child.kill()
        assert left == []


class Pulse:
    """A timer that ticks whenever the event loop is free."""

    def __init__(self, parent: Any) -> None:
        self.ticks = 0
        self._timer = qt.QTimer(parent)
        self._timer.setInterval(0)
        self._timer.connect("timeout()", self._tick)
        self._timer.start()

    def _tick(self) -> None:
        self.ticks += 1

    def stop(self) -> None:
        self._timer.stop()


def run_event_loop(milliseconds: int) -> None:
    """What a message box does: an event loop within a slot."""
    loop = qt.QEventLoop()
    timer = qt.QTimer(loop)
    timer.setSingleShot(True)
    timer.connect("timeout()", lambda: loop.quit())
    timer.start(milliseconds)
    loop.exec_()
