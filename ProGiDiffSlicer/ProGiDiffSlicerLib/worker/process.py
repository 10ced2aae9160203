"""The worker's process on Qt's QProcess: pipes that never block the event loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import qt

from progidiff.system import kill_tree
from progidiff.wire.conversation import MOST_LINES, Patience, unattended
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.command import WorkerCommand

LONGEST_LINE = 2000


class Process(Protocol):
    """A process with three pipes, whose owner is told by signals and never waits.

    Attributes:
        started: Signal().
        readable: Signal(): something can be read.
        written: Signal(): some of what is pending has left.
        log_line: Signal(str): a line of standard error.
        failed_to_start: Signal(reason).
        finished: Signal(exit_code, crashed); what it wrote before can still be read.
    """

    started: Signal
    readable: Signal
    written: Signal
    log_line: Signal
    failed_to_start: Signal
    finished: Signal

    @property
    def pending(self) -> int:
        """Bytes given to :meth:`write` that have not left."""

    def start(self, command: WorkerCommand) -> None:
        """Start; ends in ``started`` or ``failed_to_start``, perhaps before this returns."""

    def read(self, most: int) -> bytes:
        """Up to ``most`` bytes of standard output, nothing where none have arrived."""

    def write(self, data: bytes) -> None:
        """Queue bytes for standard input."""

    def close_input(self) -> None:
        """Close standard input once everything pending has left."""

    def kill_tree(self) -> None:
        """Kill the process and all that it started, without waiting for their end."""

    def wait(self, milliseconds: int) -> bool:
        """Wait for the end, without an event loop; whether it has ended."""

    def release(self) -> None:
        """Give everything back; the process must have ended or never have been started."""


ProcessFactory = Callable[[Any], Process]


class LogLines:
    """Cuts a stream of bytes into lines of text of bounded length."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The complete lines, the last ones only where there are very many."""
        *lines, rest = (self._rest + data).split(b"\n")
        # A line without an end must not grow for ever; its beginning says what it is about.
        self._rest = rest[: LONGEST_LINE + 1]
        return [_text(line) for line in lines[-MOST_LINES:]]

    def finish(self) -> list[str]:
        """What came after the last line's end."""
        rest, self._rest = self._rest, b""
        return [_text(rest)] if rest else []


def _text(line: bytes) -> str:
    return line[:LONGEST_LINE].decode("utf-8", "replace").rstrip()


class QtProcess:
    """A :class:`Process` on QProcess."""

    def __init__(self, parent: Any = None) -> None:
        self.started = Signal()
        self.readable = Signal()
        self.written = Signal()
        self.log_line = Signal()
        self.failed_to_start = Signal()
        self.finished = Signal()
        self._lines = LogLines()
        self._running = False
        self._process: Any = qt.QProcess(parent)
        self._connections = {
            "started()": self._on_started,
            "readyReadStandardOutput()": self._on_readable,
            "readyReadStandardError()": self._on_log,
            "bytesWritten(qint64)": self._on_written,
            "errorOccurred(QProcess::ProcessError)": self._on_error,
            "finished(int,QProcess::ExitStatus)": self._on_finished,
        }
        for name, slot in self._connections.items():
            self._process.connect(name, slot)

    @property
    def pending(self) -> int:
        return int(self._process.bytesToWrite()) if self._running else 0

    def start(self, command: WorkerCommand) -> None:
        environment = qt.QProcessEnvironment()
        for name, value in command.environment.items():
            environment.insert(name, value)
        self._process.setProcessEnvironment(environment)
        self._running = True
        program, *arguments = unattended([command.program, *command.arguments])
        self._process.start(program, arguments)

    def read(self, most: int) -> bytes:
        if self._process is None:
            return b""
        return bytes(self._process.read(most).data())

    def write(self, data: bytes) -> None:
        if self._running:
            # As a QByteArray: where Python's bytes are taken for a C string, they end at their first zero.
            self._process.write(qt.QByteArray(data))

    def close_input(self) -> None:
        if self._running:
            self._process.closeWriteChannel()

    def kill_tree(self) -> None:
        if self._running:
            pid = int(self._process.processId())
            if pid > 0:
                kill_tree(pid)
            # A second way for where the first one found nothing; QProcess also reaps it.
            self._process.kill()

    def wait(self, milliseconds: int) -> bool:
        if self._running:
            self._process.waitForFinished(milliseconds)
        return not self._running

    def release(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._running = False
            for name, slot in self._connections.items():
                process.disconnect(name, slot)
            process.deleteLater()

    def _on_started(self) -> None:
        self.started.emit()

    def _on_readable(self) -> None:
        self.readable.emit()

    def _on_written(self, count: int) -> None:
        self.written.emit()

    def _on_log(self) -> None:
        if self._process is not None:
            for line in self._lines.feed(bytes(self._process.readAllStandardError().data())):
                self.log_line.emit(line)

    def _on_error(self, error: Any) -> None:
        # Every other error is followed by the end of the process, or shows as silence.
        if error == qt.QProcess.FailedToStart:
            self._running = False
            self.failed_to_start.emit(str(self._process.errorString()))

    def _on_finished(self, code: int, status: Any) -> None:
        self._running = False
        self._on_log()
        for line in self._lines.finish():
            self.log_line.emit(line)
        self.finished.emit(int(code), bool(status == qt.QProcess.CrashExit))


class PatientTimer:
    """Calls back when nothing was heard for some time; signs of life that waited unread are read before its next tick."""

    def __init__(self, parent: Any, expired: Callable[[], None]) -> None:
        self._expired = expired
        self._patience: Patience | None = None
        self._timer = qt.QTimer(parent)
        self._timer.connect("timeout()", self._tick)

    def start(self, limit_s: float) -> None:
        """Begin to wait, at most ``limit_s`` seconds after the last sign of life."""
        tick_s = min(1.0, limit_s / 4)
        self._patience = Patience(limit_s, tick_s, time.monotonic())
        self._timer.start(max(1, int(1000 * tick_s)))

    def reset(self) -> None:
        """There was a sign of life."""
        if self._patience is not None:
            self._patience.reset()

    def stop(self) -> None:
        """Wait no longer."""
        self._patience = None
        self._timer.stop()

    def release(self) -> None:
        """Stop for good and give the timer back."""
        self.stop()
        self._timer.disconnect("timeout()", self._tick)
        self._timer.deleteLater()

    def _tick(self) -> None:
        if self._patience is not None and self._patience.ends(time.monotonic()):
            self.stop()
            self._expired()
