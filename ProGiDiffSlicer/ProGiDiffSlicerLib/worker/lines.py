"""A background process that tells what it does by JSON lines, and stops when it is asked to."""

from __future__ import annotations

import json
from collections import deque
from typing import Any, Protocol

from slicer.i18n import tr as _

from progidiff.errors import InputError
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.command import WorkerCommand
from ProGiDiffSlicerLib.worker.process import PatientTimer, Process, ProcessFactory, QtProcess

#: A process that was asked to stop finishes its step, measures and writes what it has; then it is ended.
STOP_GRACE_S = 180.0
#: The application ends: what has not stopped by then is ended.
_CLOSE_GRACE_MS = 3000
_READ = 1 << 16
# A line holds a few pictures at most.
_LONGEST_LINE = 64 << 20


class Choices(Protocol):
    """The settings that such a process depends on; see :class:`ProGiDiffSlicerLib.setup.settings.Settings`."""

    @property
    def workerKind(self) -> str: ...

    @property
    def modelFolder(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def curatedFolder(self) -> str: ...

    @property
    def adaptersFolder(self) -> str: ...

    def command(self) -> WorkerCommand: ...


def engine_command(settings: Choices, *arguments: str) -> WorkerCommand:
    """A command of the engine, run by the worker's Python on this computer.

    Raises:
        InputError: the worker runs elsewhere, or its Python cannot be found.
    """
    if settings.workerKind == "command":
        raise InputError(
            _(
                "Tuning runs on this computer, but the worker is started by a command of its own; choose a Python of this "
                "computer in Setup, or run progidiff on the other one."
            )
        )
    worker = settings.command()
    return WorkerCommand(worker.program, ("-P", "-m", "progidiff", *arguments), worker.environment)


class LineProcess:
    """Runs one process at a time.

    Args:
        parent: Qt parent of the process and of a timer.
        factory: how processes are made.

    Attributes:
        running: whether a process runs.
        stopping: whether it was asked to stop.
        said: Signal(object) for every JSON object on a line of its own.
        ended: Signal(trouble): "" when it ended well; otherwise a sentence. What it said before has been told.
    """

    def __init__(self, parent: Any, factory: ProcessFactory = QtProcess) -> None:
        self.said = Signal()
        self.ended = Signal()
        self.stopping = False
        self._parent = parent
        self._factory = factory
        self._process: Process | None = None
        self._rest = b""
        self._log: deque[str] = deque(maxlen=60)
        self._error = ""
        self._patience = PatientTimer(parent, self.kill)

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def log_text(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log)

    def start(self, command: WorkerCommand) -> None:
        """Start a process; does nothing while one runs. ``ended`` may be emitted before this returns."""
        if self._process is not None:
            return
        self._rest, self._error, self.stopping = b"", "", False
        self._log.clear()
        process = self._process = self._factory(self._parent)
        process.readable.connect(self._on_readable)
        process.log_line.connect(self._log.append)
        process.failed_to_start.connect(self._on_failed_to_start)
        process.finished.connect(self._on_finished)
        process.start(command)

    def stop(self) -> None:
        """Ask the process to stop and to keep what it has; asked again, or after a while, it is killed."""
        if self._process is None:
            return
        if self.stopping:
            self.kill()
            return
        self.stopping = True
        self._process.write(b"stop\n")
        self._patience.start(STOP_GRACE_S)

    def kill(self) -> None:
        """End the process and all that it started at once; what it has written to disk stays."""
        if self._process is not None:
            self._process.kill_tree()

    def close(self) -> None:
        """End the process for good: nothing is told any more, and none is left when this returns.

        Its input ends, so that one that is quick can still finish; its checkpoint is there for the next time anyway.
        """
        self.said.clear()
        self.ended.clear()
        process = self._process
        if process is not None:
            process.close_input()
            if not process.wait(_CLOSE_GRACE_MS):
                process.kill_tree()
                process.wait(_CLOSE_GRACE_MS)
        self._release()
        self._patience.release()

    def _on_readable(self) -> None:
        while self._process is not None and (data := self._process.read(_READ)):
            self._rest += data
            if len(self._rest) > _LONGEST_LINE:
                self._error = _("The process wrote something that is no answer; see its log.")
                self.kill()
                return
        while b"\n" in self._rest:
            line, self._rest = self._rest.split(b"\n", 1)
            self._on_line(line)

    def _on_line(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # a stray print of some library
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            return
        if event["event"] == "error":
            self._error = str(event.get("message") or _("The process failed; see its log."))
        self.said.emit(event)

    def _on_failed_to_start(self, reason: str) -> None:
        self._end(
            _("The process could not be started ({reason}); check the worker's Python in Setup.").format(reason=reason)
        )

    def _on_finished(self, code: int, crashed: bool) -> None:
        self._on_readable()
        if self._error or (code == 0 and not crashed):
            self._end(self._error)
        elif self.stopping:
            self._end(_("The process was ended before it had finished; its checkpoint is kept, start again to go on."))
        else:
            last = self._log[-1] if self._log else ""
            text = _("The process ended unexpectedly (exit code {code}). {reason}")
            self._end(text.format(code=code, reason=last).strip())

    def _end(self, trouble: str) -> None:
        self._release()
        self.ended.emit(trouble)

    def _release(self) -> None:
        self._patience.stop()
        process, self._process = self._process, None
        if process is not None:
            process.release()
