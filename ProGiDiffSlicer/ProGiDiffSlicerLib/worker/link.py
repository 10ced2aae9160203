"""One worker process from its start to its end: frames in both directions, and why it is over."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import qt

from progidiff.errors import ProtocolError
from progidiff.wire.frames import Frame, FrameDecoder, encode_frame
from progidiff.wire.messages import ErrorReply, Heartbeat, Hello, HelloReply, Request, frame_to_reply, to_frame
from ProGiDiffSlicerLib.idle import BUDGET_S
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker import failures
from ProGiDiffSlicerLib.worker.command import WorkerCommand
from ProGiDiffSlicerLib.worker.failures import WorkerFailure
from ProGiDiffSlicerLib.worker.patience import Patience
from ProGiDiffSlicerLib.worker.process import MOST_LINES, ProcessFactory

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
        hello: what the worker said of itself, once it has.
        released: the process has ended, and everything it used is given back.
        log: the last lines of its log.
        opened: Signal(HelloReply).
        replied: Signal(request id, Reply).
        sent: Signal(): some of what is :attr:`unsent` has left.
        broken: Signal(WorkerFailure), once: nothing more is said or heard; not after :meth:`close`.
        gone: Signal(Link): it is ``released``.
    """

    def __init__(
        self, process_factory: ProcessFactory, parent: Any, start_timeout_s: float, heartbeat_timeout_s: float
    ) -> None:
        self.hello: HelloReply | None = None
        self.log: deque[str] = deque(maxlen=MOST_LINES)
        self.opened, self.replied, self.sent, self.broken, self.gone = (Signal() for _ in range(5))
        self._start_timeout_s = start_timeout_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._program = ""
        self._open = True
        self._exit: tuple[int, bool] | None = None
        self.released = False
        self._next_id = 0
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()
        self._outgoing: deque[memoryview] = deque()
        self._queued = 0
        self._turning = False
        self._starting = Patience(parent, self._start_expired)
        self._silence = Patience(parent, self._silence_expired)
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
        self._process.log_line.connect(self.log.append)
        self._process.failed_to_start.connect(self._on_failed_to_start)
        self._process.finished.connect(self._on_finished)

    @property
    def unsent(self) -> int:
        """Bytes that have not left this process."""
        return self._queued + self._process.pending

    @property
    def log_text(self) -> str:
        return "\n".join(self.log)

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
        self._next_id += 1
        frame = to_frame(request, self._next_id)
        buffers = [memoryview(buffer) for buffer in encode_frame(frame.header, frame.arrays)]
        self._outgoing.extend(buffers)
        self._queued += sum(map(len, buffers))
        self._write_some()
        return self._next_id

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
        self._frames.clear()
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
            self.broken.emit(failures.not_found(self._program, reason))
        self._release()

    def _on_finished(self, code: int, crashed: bool) -> None:
        self._exit = (code, crashed)
        if self._open:
            self._pump.start()  # it may have said something before
        else:
            self._release()

    def _start_expired(self) -> None:
        self.fail(failures.no_answer(self._start_timeout_s, self.log_text))

    def _silence_expired(self) -> None:
        self.fail(failures.silent(self._heartbeat_timeout_s, self.log_text))

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
        nbytes = frames = 0
        while self._open:
            if self._frames:
                frames += 1
                self._deliver(self._frames.popleft())
            elif data := self._process.read(_READ):
                self._silence.reset()
                nbytes += len(data)
                self._frames.extend(self._decoder.feed(data))
            else:
                return False
            if nbytes >= MOST_READ_PER_TURN or frames >= MOST_FRAMES_PER_TURN or time.monotonic() >= end:
                break
        return True

    def _deliver(self, frame: Frame) -> None:
        try:
            request_id, reply = frame_to_reply(frame)
        except ProtocolError as error:
            self.fail(failures.unreadable(str(error), self.log_text))
            return
        if isinstance(reply, Heartbeat):
            return
        if isinstance(reply, HelloReply) and self.hello is None:
            self.hello = reply
            self._starting.stop()
            self.opened.emit(reply)
        elif request_id is not None:
            self.replied.emit(request_id, reply)
        elif isinstance(reply, ErrorReply):
            self.fail(failures.unread(reply.message, self.log_text))

    def _ended(self, code: int, crashed: bool) -> None:
        explain = failures.did_not_start if self.hello is None else failures.ended
        self._shut()
        self.broken.emit(explain(code, crashed, self.log_text))
