"""One worker process from its start to its end: frames in both directions, and why it is over."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.wire.conversation import Conversation, WorkerFailure
from progidiff.wire.messages import Hello, HelloReply, Reply, Request
from ProGiDiffSlicerLib.idle import BUDGET_S
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.command import WorkerCommand
from ProGiDiffSlicerLib.worker.process import PatientTimer, ProcessFactory

# What one turn of the event loop reads and writes at most, whatever the time it takes.
MOST_READ_PER_TURN = 1 << 20
MOST_FRAMES_PER_TURN = 256
MOST_PENDING = 1 << 20
_READ = 32 << 10
_WRITE = 256 << 10
_KILLED_WAIT_MS = 2000


class Link:
    """Talks to one process.

    Attributes:
        conversation: what is said, and why it ended.
        released: the process has ended, and everything it used is given back.
        opened: Signal(HelloReply).
        replied: Signal(request id, Reply).
        sent: Signal(): some of what is :attr:`unsent` has left.
        broken: Signal(WorkerFailure), once: nothing more is said or heard; not after :meth:`close`.
        gone: Signal(Link): it is ``released``.
    """

    def __init__(
        self, process_factory: ProcessFactory, parent: Any, start_timeout_s: float, heartbeat_timeout_s: float
    ) -> None:
        self.conversation = Conversation(_(" in Setup"), _)
        self.opened, self.replied, self.sent, self.broken, self.gone = (Signal() for _ in range(5))
        self._start_timeout_s = start_timeout_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._program = ""
        self._open = True
        self._exit: tuple[int, bool] | None = None
        self.released = False
        self._outgoing: deque[memoryview] = deque()
        self._queued = 0
        self._turning = False
        self._starting = PatientTimer(parent, self._start_expired)
        self._silence = PatientTimer(parent, self._silence_expired)
        self._grace = qt.QTimer(parent)
        self._grace.setSingleShot(True)
        self._grace.connect("timeout()", self.kill)
        self._pump = qt.QTimer(parent)
        self._pump.setInterval(0)
        self._pump.connect("timeout()", self._turn)
        self._process = process_factory(parent)
        self._process.started.connect(self._on_started)
        self._process.readable.connect(self._on_readable)
        self._process.written.connect(self._on_written)
        self._process.log_line.connect(self.conversation.log.append)
        self._process.failed_to_start.connect(self._on_failed_to_start)
        self._process.finished.connect(self._on_finished)

    @property
    def unsent(self) -> int:
        """Bytes that have not left this process."""
        return self._queued + self._process.pending

    @property
    def hello(self) -> HelloReply | None:
        """What the worker said of itself, once it has."""
        return self.conversation.hello

    def start(self, command: WorkerCommand) -> None:
        """Start the process; ends in ``opened`` or ``broken``."""
        self._program = command.program
        self._starting.start(self._start_timeout_s)
        self._process.start(command)

    def send(self, request: Request) -> int:
        """Queue a request and return its id. Its arrays must not change until it has left.

        Raises:
            ProtocolError: it holds something that cannot be sent.
        """
        request_id, buffers = self.conversation.send(request)
        self._outgoing.extend(map(memoryview, buffers))
        self._queued += sum(map(len, buffers))
        self._write_some()
        return request_id

    def expect_signs(self, wanted: bool) -> None:
        """Whether silence is a failure from now on."""
        if wanted and self._open:
            # A worker that beats slowly is not dead between two beats.
            beat = 0.0 if self.hello is None else self.hello.heartbeat_s
            self._silence.start(max(self._heartbeat_timeout_s, 3 * beat))
        else:
            self._silence.stop()

    def fail(self, failure: WorkerFailure) -> None:
        """Give up: end the process and say why; the first reason counts."""
        if self._open:
            self._shut()
            self.kill()
            self.broken.emit(failure)

    def close(self, grace_s: float) -> None:
        """Ask the worker to end by closing its input, and kill it after a while; ``gone`` follows."""
        self._shut()
        self._process.close_input()
        if not self.released:
            self._grace.start(max(0, int(1000 * grace_s)))

    def kill(self) -> None:
        """End the process with all that it started."""
        self._process.kill_tree()

    def wait(self, grace_s: float) -> None:
        """Return when the closed process has ended; kill it after ``grace_s`` seconds. For the end of the application."""
        if not self.released and not self._process.wait(max(1, int(1000 * grace_s))):
            self.kill()
            self._process.wait(_KILLED_WAIT_MS)

    def _shut(self) -> None:
        """Neither write nor deliver anything any more."""
        self._open = False
        self._starting.stop()
        self._silence.stop()
        self._pump.stop()
        self._outgoing.clear()
        self._queued = 0
        if self._exit is not None:
            self._release()

    def _release(self) -> None:
        if self.released:
            return
        self.released = True
        self._starting.release()
        self._silence.release()
        for timer, slot in ((self._grace, self.kill), (self._pump, self._turn)):
            timer.stop()
            timer.disconnect("timeout()", slot)
            timer.deleteLater()
        self._process.release()
        self.gone.emit(self)

    def _on_started(self) -> None:
        if self._open:
            self.send(Hello())

    def _on_readable(self) -> None:
        self._silence.reset()
        if self._open:
            self._pump.start()
        else:
            # Nobody listens, but a worker that says goodbye must not be stuck in the middle of it.
            while self._process.read(MOST_READ_PER_TURN):
                pass

    def _on_written(self) -> None:
        if self._open:
            self._write_some()
            self.sent.emit()

    def _on_failed_to_start(self, reason: str) -> None:
        self._exit = (-1, False)
        if self._open:
            self._shut()
            self.broken.emit(self.conversation.not_found(self._program, reason))
        self._release()

    def _on_finished(self, code: int, crashed: bool) -> None:
        self._exit = (code, crashed)
        if self._open:
            self._pump.start()  # it may have said something before
        else:
            self._release()

    def _start_expired(self) -> None:
        self.fail(self.conversation.no_answer(self._start_timeout_s))

    def _silence_expired(self) -> None:
        self.fail(self.conversation.silent(self._heartbeat_timeout_s))

    def _write_some(self) -> None:
        while self._outgoing and self._process.pending < MOST_PENDING:
            buffer = self._outgoing[0]
            part, rest = buffer[:_WRITE], buffer[_WRITE:]
            if len(rest):
                self._outgoing[0] = rest
            else:
                self._outgoing.popleft()
            self._queued -= len(part)
            self._process.write(bytes(part))

    def _turn(self) -> None:
        """Read and deliver for a few milliseconds."""
        # Messages keep their order: while a listener runs an event loop of its own (a message box), the next one waits.
        if self._turning:
            self._pump.stop()
            return
        self._turning = True
        more = True
        try:
            more = self._read_and_deliver(time.monotonic() + BUDGET_S)
        finally:
            self._turning = False
            if self._open:
                if more:
                    self._pump.start()
                else:
                    self._pump.stop()
        if not more and self._open and self._exit is not None:
            self._ended(*self._exit)

    def _read_and_deliver(self, end: float) -> bool:
        """Whether there may be more."""
        nbytes = replies = 0
        while self._open:
            if reply := self.conversation.next_reply():
                replies += 1
                self._deliver(*reply)
            elif self.conversation.failure is not None:
                self.fail(self.conversation.failure)
            elif data := self._process.read(_READ):
                self._silence.reset()
                nbytes += len(data)
                self.conversation.receive(data)
            else:
                return False
            if nbytes >= MOST_READ_PER_TURN or replies >= MOST_FRAMES_PER_TURN or time.monotonic() >= end:
                break
        return True

    def _deliver(self, request_id: int, reply: Reply) -> None:
        if reply is self.hello:
            self._starting.stop()
            self.opened.emit(reply)
        else:
            self.replied.emit(request_id, reply)

    def _ended(self, code: int, crashed: bool) -> None:
        self._shut()
        # where the system knows signals, Qt gives the number of the one that ended it
        self.broken.emit(self.conversation.ended(-code if crashed and os.name != "nt" else code, crashed))
